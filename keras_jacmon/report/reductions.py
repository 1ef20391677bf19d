"""Reductions: the ways to make one number of an array of values."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_jacmon.report.arrays import FloatArray
from keras_jacmon.report.curve import growth, horizon, mean_curve


def mean(values: FloatArray) -> float:
    """Returns the mean in float64; NaN if a value is NaN, or if there is none."""
    # inf and -inf have no mean: NaN, and no warning of NumPy's.
    with np.errstate(invalid="ignore"):
        return float(np.mean(values, dtype=np.float64)) if values.size else float("nan")


@dataclass(frozen=True)
class Reduction:
    """A way to make one number of a measure of whole sequences.

    Attributes:
        reduce: Function from the arrays of the sources to the number.
        sources: Tuple of strings, the measures of the same view whose arrays are reduced; empty for the measure itself.
        select: Function from the array of the measure to the values of the samples, `(batch,)`.
        suffix: String after the measure's key in the key of the number.
        remark: String, the meaning of the number in printed tables; empty for a mean.
        error: Function from the standard errors of the first source and the arrays of all sources to the standard error
            of the number; None where it is not known.
    """

    reduce: Callable[..., float]
    sources: tuple[str, ...] = ()
    select: Callable[[FloatArray], FloatArray] = lambda array: array
    suffix: str = ""
    remark: str = ""
    error: Callable[..., float] | None = None

    def samples(self, array: npt.NDArray[Any]) -> FloatArray:
        """Returns the values of the samples that have one."""
        return _known(self.select(array))

    def source_keys(self, key: str) -> list[str]:
        """Returns the keys of the arrays that are reduced for a measure's key."""
        view = key[: key.rfind("/") + 1]
        return [f"{view}{source}" for source in self.sources] or [key]


def at_whole_length(by_span: FloatArray) -> FloatArray:
    """Returns the value at each sample's longest span, `(batch,)`, of values `(span, batch)`; NaN if there is none."""
    last = np.maximum((~np.isnan(by_span)).sum(axis=0) - 1, 0)
    return np.asarray(by_span[last, np.arange(last.size)])


def root_mean_square(values: FloatArray) -> float:
    """Returns the root mean square of the values that are not NaN; NaN if there is none."""
    with np.errstate(over="ignore"):
        return math.sqrt(mean(np.square(_known(values), dtype=np.float64)))


def _error_of_whole(errors: FloatArray, by_span: FloatArray) -> float:
    """Returns the standard error of the root mean square at whole length; samples have independent errors."""
    values, deltas = at_whole_length(by_span), at_whole_length(errors)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return float(np.sqrt(np.nansum((values * deltas) ** 2)) / _known(values).size / root_mean_square(values))


def _error_of_ratio(errors: FloatArray, by_span: FloatArray, norms: FloatArray) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.divide(_error_of_whole(errors, by_span), root_mean_square(norms)))


def _ratio(by_span: FloatArray, norms: FloatArray) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.divide(root_mean_square(at_whole_length(by_span)), root_mean_square(norms)))


def _known(values: FloatArray) -> FloatArray:
    return values[~np.isnan(values)]


# "first" takes the leading one of several values of each sample, `(values, batch)`. Growth and horizon are those of the
# mean flow, as in the verdict: a horizon of the mean is no mean of horizons.
REDUCTIONS = {
    "mean": Reduction(lambda array: mean(_known(array))),
    "first": Reduction(lambda array: mean(_known(array[0])), select=lambda array: array[0], suffix="_1"),
    "root_mean_square": Reduction(root_mean_square, remark="root mean square"),
    "whole": Reduction(
        lambda by_span: root_mean_square(at_whole_length(by_span)),
        select=at_whole_length,
        remark="root mean square",
        error=_error_of_whole,
    ),
    "relative": Reduction(
        _ratio, sources=("sensitivity", "state_norm"), remark="of all samples together", error=_error_of_ratio
    ),
    "growth": Reduction(lambda flow: float(growth(mean_curve(flow))), sources=("flow",), remark="of the mean flow"),
    "horizon": Reduction(lambda flow: float(horizon(mean_curve(flow))), sources=("flow",), remark="of the mean flow"),
}
