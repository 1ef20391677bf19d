"""Reductions: the ways to make one number of an array of values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_jacmon.report.curve import growth, horizon, mean_curve

FloatArray = npt.NDArray[np.floating]


def mean(values: FloatArray) -> float:
    """Returns the mean in float64; NaN if a value is NaN, or if there is none."""
    # inf and -inf have no mean: NaN, and no warning of NumPy's.
    with np.errstate(invalid="ignore"):
        return float(np.mean(values, dtype=np.float64)) if values.size else float("nan")


@dataclass(frozen=True)
class Reduction:
    """A way to make one number of a measure of whole sequences.

    Attributes:
        reduce: Function from the array of the source to the number.
        source: String, the measure of the same view whose array is reduced; empty for the measure itself.
        select: Function from the array of the measure to the values of the samples, `(batch,)`.
        suffix: String after the measure's key in the key of the number.
        remark: String, the meaning of the number in printed tables; empty for a mean.
    """

    reduce: Callable[[FloatArray], float]
    source: str = ""
    select: Callable[[FloatArray], FloatArray] = lambda array: array
    suffix: str = ""
    remark: str = ""

    def samples(self, array: npt.NDArray[Any]) -> FloatArray:
        """Returns the values of the samples that have one."""
        return _known(self.select(array))

    def source_key(self, key: str) -> str:
        """Returns the key of the array that is reduced for a measure's key."""
        view = key[: key.rfind("/") + 1]
        return f"{view}{self.source}" if self.source else key


def _known(values: FloatArray) -> FloatArray:
    return values[~np.isnan(values)]


# "first" takes the leading one of several values of each sample, `(values, batch)`. Growth and horizon are those of the
# mean flow, as in the verdict: a horizon of the mean is no mean of horizons.
REDUCTIONS = {
    "mean": Reduction(lambda array: mean(_known(array))),
    "first": Reduction(lambda array: mean(_known(array[0])), select=lambda array: array[0], suffix="_1"),
    "growth": Reduction(lambda flow: float(growth(mean_curve(flow))), source="flow", remark="of the mean flow"),
    "horizon": Reduction(lambda flow: float(horizon(mean_curve(flow))), source="flow", remark="of the mean flow"),
}
