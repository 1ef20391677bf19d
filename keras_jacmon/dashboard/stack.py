"""Stacks: a measure of a layer at many measurements, as arrays that a heat map is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_jacmon.dashboard.codec import unpack_curves
from keras_jacmon.dashboard.packed import Curve, Packed, bounds


@dataclass(frozen=True)
class Moment:
    """A packed summary at its step.

    Attributes:
        step: Integer, the training step.
        packed: `Packed`.
    """

    step: int
    packed: Packed


@dataclass(frozen=True)
class Stack:
    """A measure of a layer by measurement and row; the rows are bins of the position that all measurements share.

    Attributes:
        steps: Integer array `(measurements,)`, the training steps, in order.
        mean: Float32 array `(measurements, rows)`, the means; NaN where nothing was measured.
        least: Float32 array `(measurements, rows)`, the least mean of a position in the row.
        greatest: Float32 array `(measurements, rows)`, the greatest mean of a position in the row.
        present: Boolean array `(measurements, rows)`, False where nothing was measured.
        length: Integer, the number of positions of the longest probe.
        nan: Integer, the number of NaN among the measured values.
        inf: Integer, the number of inf and -inf among them.
    """

    steps: npt.NDArray[np.int64]
    mean: npt.NDArray[np.float32]
    least: npt.NDArray[np.float32]
    greatest: npt.NDArray[np.float32]
    present: npt.NDArray[np.bool_]
    length: int
    nan: int
    inf: int

    @property
    def nbytes(self) -> int:
        """Integer, the size of the arrays in bytes."""
        return sum(part.nbytes for part in (self.steps, self.mean, self.least, self.greatest, self.present))


def stack_of(contents: Sequence[npt.NDArray[np.uint8]], steps: npt.NDArray[np.int64], key: str, most: int) -> Stack:
    """Returns the stack of a measure out of packed summaries; those without the key are left out.

    Args:
        contents: Packed summaries, in the order of the steps.
        steps: Integer array `(measurements,)`, their steps.
        key: String, a key of the curves.
        most: Integer, the maximum number of rows.

    Raises:
        ValueError: If a summary cannot be read.
    """
    return _stacked([(steps[at], curves) for at, curves in unpack_curves(contents, key)], most)


def stack_of_moments(moments: Sequence[Moment], key: str, most: int) -> Stack:
    """Returns the stack of a measure out of unpacked summaries; those without the key are left out.

    Args:
        moments: `Moment`s in the order of the steps.
        key: String, a key of the curves.
        most: Integer, the maximum number of rows.
    """
    found = [(moment.step, moment.packed.curves[key]) for moment in moments if key in moment.packed.curves]
    return _stacked([(np.array([step]), curve.stacked()) for step, curve in found], most)


def _stacked(parts: Sequence[tuple[npt.NDArray[np.int64], Curve]], most: int) -> Stack:
    """Returns the curves of measurements in one stack; the curves of a part have a first axis for its measurements."""
    length = max((curve.length for _, curve in parts), default=0)
    rows = min(most, max((curve.mean.shape[1] for _, curve in parts), default=0))
    fitted = [(steps, *_fitted(curve, rows, length)) for steps, curve in parts]
    if not fitted:
        empty = np.empty((0, 0), np.float32)
        return Stack(np.empty(0, np.int64), empty, empty, empty, empty.astype(bool), 0, 0, 0)
    arrays = [np.concatenate(part) for part in zip(*fitted, strict=True)]
    order = np.argsort(arrays[0], kind="stable")
    steps, mean, least, greatest, present = (array[order] for array in arrays)
    nan, inf = sum(curve.nan for _, curve in parts), sum(curve.inf for _, curve in parts)
    return Stack(steps, mean, least, greatest, present, length, nan, inf)


def _fitted(curve: Curve, rows: int, length: int) -> tuple[npt.NDArray[Any], ...]:
    """Returns curves in rows that all measurements share; longer or shorter probes have other bins."""
    bins = curve.mean.shape[1]
    if bins == rows and curve.length == length:
        return curve.mean, curve.least, curve.greatest, curve.present
    middle = (bounds(length, rows)[:-1] + bounds(length, rows)[1:] - 1) // 2
    inside = middle < curve.length
    at = np.where(inside, middle * bins // max(1, curve.length), 0)
    present = curve.present[:, at] & inside
    blank = np.float32(np.nan)
    parts = (np.where(present, part[:, at], blank) for part in (curve.mean, curve.least, curve.greatest))
    return (*parts, present)
