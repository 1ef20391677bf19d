"""Packed summary: the numbers of a layer at one measurement, in bins of the position.

It needs NumPy and the standard library alone.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Curve:
    """A measure over the position, or over the span, in bins of equal width.

    Attributes:
        mean: Float32 array `(bins,)`, the mean over the samples and the positions of a bin; NaN where nothing was
            measured, and where the network gave NaN.
        low: Float32 array `(bins,)`, the 10 % quantile over the samples.
        high: Float32 array `(bins,)`, the 90 % quantile over the samples.
        least: Float32 array `(bins,)`, the least mean of a position in the bin.
        greatest: Float32 array `(bins,)`, the greatest mean of a position in the bin.
        present: Boolean array `(bins,)`, False where nothing was measured.
        length: Integer, the number of positions.
        nan: Integer, the number of NaN among the measured values. Defaults to 0.
        inf: Integer, the number of inf and -inf among them. Defaults to 0.
    """

    mean: FloatArray
    low: FloatArray
    high: FloatArray
    least: FloatArray
    greatest: FloatArray
    present: npt.NDArray[np.bool_]
    length: int
    nan: int = 0
    inf: int = 0

    @property
    def is_binned(self) -> bool:
        """Boolean, True if a bin may hold several positions."""
        return self.mean.shape[-1] < self.length

    def stacked(self) -> "Curve":
        """Returns the curve with a first axis of one measurement."""
        return self._each(lambda part: part[None])

    def first(self) -> "Curve":
        """Returns the first measurement of a curve that has an axis of measurements."""
        return self._each(lambda part: part[0])

    def _each(self, change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> "Curve":
        names = ("mean", "low", "high", "least", "greatest", "present")
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return dataclasses.replace(self, **changed)


@dataclass(frozen=True)
class Packed:
    """The numbers of a layer at one measurement, as the dashboard shows them.

    Attributes:
        header: Dict of plain values: `"layer"`, `"cell"`, `"units"`, `"time"`, `"samples"`, `"order"` (place in the
            model), `"number"` (of measurements so far), `"verdict"` (dict or None), `"why_no_verdict"` (the reason;
            `""` with a verdict, and missing in older event files), `"notes"`, `"targets"` (of a regularizer, by key).
        curves: Dict of `Curve` by key: the measures of single steps over the position.
        flows: Dict of `Curve` by key: the flow over the span.
        spectra: Dict of arrays `(point, value)` by key: the singular values (float32) and eigenvalues (complex64).
    """

    header: Mapping[str, Any]
    curves: dict[str, Curve] = field(default_factory=dict)
    flows: dict[str, Curve] = field(default_factory=dict)
    spectra: dict[str, npt.NDArray[Any]] = field(default_factory=dict)


def bounds(length: int, bins: int) -> npt.NDArray[np.int64]:
    """Returns the first position of each bin, and the length after them.

    Args:
        length: Integer, the number of positions.
        bins: Integer, the number of bins, at most `length`.
    """
    # The least position p with p * bins // length equal to the number of the bin.
    return -(-np.arange(bins + 1) * length // max(bins, 1))
