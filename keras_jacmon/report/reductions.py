"""Reductions: the ways to make one number of an array of values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]


def mean(values: FloatArray) -> float:
    """Returns the mean in float64; NaN if a value is NaN, or if there is none."""
    # inf and -inf have no mean: NaN, and no warning of NumPy's.
    with np.errstate(invalid="ignore"):
        return float(np.mean(values, dtype=np.float64)) if values.size else float("nan")


def median(values: FloatArray) -> float:
    """Returns the lower median, in which inf counts; NaN if there is no value."""
    return float(np.quantile(values, 0.5, method="lower")) if values.size else float("nan")


@dataclass(frozen=True)
class Reduction:
    """A way to make one number of a measure of whole sequences.

    Attributes:
        reduce: Function from the values of the samples, without NaN, to the number.
        select: Function from the array of the measure to the values of the samples, `(batch,)`.
        suffix: String after the measure's key in the key of the number.
        remark: String, the name of the number in printed tables; empty for a mean.
    """

    reduce: Callable[[FloatArray], float]
    select: Callable[[FloatArray], FloatArray]
    suffix: str = ""
    remark: str = ""

    def samples(self, array: npt.NDArray[Any]) -> FloatArray:
        """Returns the values of the samples that have one."""
        values = self.select(array)
        return values[~np.isnan(values)]


# "first" takes the leading one of several values of each sample, `(values, batch)`.
REDUCTIONS = {
    "mean": Reduction(mean, lambda array: array),
    "median": Reduction(median, lambda array: array, remark="median"),
    "first": Reduction(mean, lambda array: array[0], suffix="_1"),
}
