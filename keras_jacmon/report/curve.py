"""The mean of a flow over the samples, and the numbers that are read off it: growth, fate and horizon."""

import math
import warnings
from typing import Literal

import numpy as np
import numpy.typing as npt

from keras_jacmon.report.arrays import FloatArray

State = Literal["vanishing", "stable", "exploding"]

# The gains at which a gradient has vanished, and at which it has exploded.
FALL, RISE = 0.01, 100.0


def mean_curve(log_gain: FloatArray) -> FloatArray:
    """Returns the flow of the mean sample: the logarithm of the geometric mean of the gains.

    The mean is taken of what each step adds, over the samples that have the step: so a sample that ends bends the curve
    only by what its last steps would have added.

    Args:
        log_gain: Float array `(spans, samples)`, natural logarithms over the last 1, 2, ... steps; NaN beyond a
            sample's length.

    Returns:
        Float array `(spans,)`, in nats; it ends with the longest sample. -inf from where a sample's gain is zero.
    """
    longest = (~np.isnan(log_gain)).sum(axis=0).max(initial=0)
    means = nan_mean(added(log_gain[:longest].astype(np.float64)), axis=1)
    # Where nothing is left of any sample, nothing is added.
    nothing = np.isnan(means) & np.isneginf(log_gain[:longest]).any(axis=1)
    return np.asarray(np.cumsum(np.where(nothing, 0.0, means)))


def added(log_gain: FloatArray) -> FloatArray:
    """Returns what each further step adds to the logarithm of the gain; NaN after -inf, where nothing is left."""
    with np.errstate(invalid="ignore"):
        return np.diff(log_gain, axis=0, prepend=0.0)


def growth(log_gain: FloatArray) -> FloatArray:
    """Returns the growth of a flow: the slope of its logarithm over the spans.

    Least squares through all finite spans and through span 0, whose gain is 1. Unlike `log_gain[K] / K` at the longest
    span K it does not ascribe to each step what the flow gains or loses once, when a random direction turns into those
    that survive; and one span alone still has a slope.

    Args:
        log_gain: Float array `(spans,)` of a curve, or `(spans, samples)`, in nats; NaN where there are none.

    Returns:
        Float64 array `()` or `(samples,)`, in nats per step; -inf if the flow ends at -inf, NaN if nothing is known of
        it.
    """
    gains = np.concatenate([np.zeros((1, *log_gain.shape[1:])), log_gain])
    finite = np.isfinite(gains)
    spans = np.arange(len(gains), dtype=np.float64).reshape(-1, *[1] * (gains.ndim - 1))
    centred = finite * (spans - (finite * spans).sum(axis=0) / finite.sum(axis=0))
    with np.errstate(invalid="ignore"):
        slope = (centred * np.where(finite, gains, 0.0)).sum(axis=0) / (centred**2).sum(axis=0)
    return np.where(np.isneginf(gains).any(axis=0), -math.inf, slope)


def fate(curve: FloatArray, fall: float = FALL, rise: float = RISE) -> tuple[State, float]:
    """Returns the threshold that a curve meets first, and the span at which it does; inf if it meets none.

    Args:
        curve: Float array `(spans,)`, in nats.
        fall: Float, the gain at which a gradient has vanished. Defaults to 0.01.
        rise: Float, the gain at which it has exploded. Defaults to 100.
    """
    vanished, exploded = (_first(met) for met in (curve <= math.log(fall), curve >= math.log(rise)))
    if math.isinf(vanished) and math.isinf(exploded):
        return "stable", math.inf
    return ("vanishing", vanished) if vanished < exploded else ("exploding", exploded)


def horizon(log_gain: FloatArray, fall: float = FALL, rise: float = RISE) -> FloatArray:
    """Returns the first span at which a flow has fallen, or grown, to a threshold.

    Args:
        log_gain: Float array `(spans,)` of a curve, or `(spans, samples)`, in nats; NaN where there are none.
        fall: Float, the gain at which a gradient has vanished. Defaults to 0.01.
        rise: Float, the gain at which it has exploded. Defaults to 100.

    Returns:
        Float64 array `()` or `(samples,)`; inf if no threshold is met, NaN if nothing is known of the flow.
    """
    if not len(log_gain):
        return np.full(log_gain.shape[1:], math.nan)
    met = (log_gain <= math.log(fall)) | (log_gain >= math.log(rise))
    beyond = np.where(np.isnan(log_gain).all(axis=0), math.nan, math.inf)
    return np.where(met.any(axis=0), np.argmax(met, axis=0) + 1.0, beyond)


def nan_mean(values: FloatArray, axis: int) -> FloatArray:
    """Returns the mean of the values that are not NaN; NaN where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's on means of nothing, and of inf and -inf
        return np.asarray(np.nanmean(values, axis=axis))


def _first(met: npt.NDArray[np.bool_]) -> float:
    """Returns the first span at which a condition is met; inf if there is none."""
    return float(np.argmax(met) + 1) if met.any() else math.inf
