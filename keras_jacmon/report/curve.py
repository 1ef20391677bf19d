"""The mean of a flow over the samples, and the numbers that are read off it: growth, fate and horizon."""

import math
import warnings
from typing import Literal

import numpy as np
import numpy.typing as npt

Curve = npt.NDArray[np.floating]

State = Literal["vanishing", "stable", "exploding"]

# The gains at which a gradient has vanished, and at which it has exploded.
FALL, RISE = 0.01, 100.0


def mean_curve(log_gain: Curve) -> Curve:
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


def added(log_gain: Curve) -> Curve:
    """Returns what each further step adds to the logarithm of the gain; NaN after -inf, where nothing is left."""
    with np.errstate(invalid="ignore"):
        return np.diff(log_gain, axis=0, prepend=0.0)


def growth(curve: Curve) -> float:
    """Returns the slope of a curve over the spans 1, 2, ..., by least squares with 0 at span 0.

    Args:
        curve: Float array `(spans,)`, in nats.

    Returns:
        Float, in nats per step; -inf if the curve ends at -inf, NaN if nothing is known of it.
    """
    if np.isneginf(curve).any():
        return -math.inf
    values = np.concatenate([[0.0], curve[np.isfinite(curve)]])
    spans = np.concatenate([[0.0], np.flatnonzero(np.isfinite(curve)) + 1.0])
    centred = spans - spans.mean()
    return float(centred @ values / (centred @ centred)) if values.size > 1 else math.nan


def fate(curve: Curve, fall: float = FALL, rise: float = RISE) -> tuple[State, float]:
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


def horizon(curve: Curve) -> float:
    """Returns the span at which a curve meets 1 % or 100; inf if it does not, NaN if nothing is known of it."""
    return fate(curve)[1] if curve.size and not np.isnan(curve).all() else math.nan


def nan_mean(values: Curve, axis: int) -> Curve:
    """Returns the mean of the values that are not NaN; NaN where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's on means of nothing, and of inf and -inf
        return np.asarray(np.nanmean(values, axis=axis))


def _first(met: npt.NDArray[np.bool_]) -> float:
    """Returns the first span at which a condition is met; inf if there is none."""
    return float(np.argmax(met) + 1) if met.any() else math.inf
