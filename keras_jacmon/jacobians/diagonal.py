"""Elementwise ways between states and products: diagonal matrices, up to an order of the units."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from keras_jacmon.jacobians.discovery import Link
from keras_jacmon.probe.graph import graph_of

# More runs of neighbouring units than this are gathered one by one.
_MOST_RUNS = 16


@dataclass(frozen=True)
class Diagonal:
    """An elementwise way from a base (a source or a product) to a target (a new state or what a product multiplies).

    Attributes:
        link: Which unit leads to which.
        pieces: Some units of the base, each in one of them, and the derivatives of these, `(rows, units)`; None if all
            are one.
    """

    link: Link
    pieces: tuple[tuple[npt.NDArray[np.int64], tf.Tensor], ...] | None

    @functools.cached_property
    def values(self) -> tf.Tensor | None:
        """The derivatives, `(rows, units of the base)`; None if all are one."""
        if self.pieces is None:
            return None
        units = np.concatenate([known for known, _ in self.pieces])
        parts = [derivatives for _, derivatives in self.pieces]
        with graph_of(parts[0]):
            return take(joined(parts), np.argsort(units))

    def at(self, units: npt.NDArray[np.int64]) -> tf.Tensor | None:
        """The derivatives of some units of the base, zero where the index is -1; None if all are one."""
        for known, derivatives in self.pieces or ():
            if np.array_equal(known, units):
                return derivatives
        return None if self.values is None else take(self.values, units)

    def take(self, rows: tf.Tensor | slice) -> "Diagonal":
        """That of some rows."""
        if self.pieces is None:
            return self
        if isinstance(rows, slice):
            # One slice, where each step of a sequence takes its own.
            return Diagonal(self.link, ((np.arange(self.link.base_size), take_rows(self.values, rows)),))
        return Diagonal(self.link, tuple((units, take_rows(part, rows)) for units, part in self.pieces))

    def forward(self, tangent: tf.Tensor) -> tf.Tensor:
        """From a change of the base to that of the target, `(rows, ..., units)`."""
        scaled = tangent if self.values is None else _beside(self.values, tangent) * tangent
        return total(take_each(scaled, self.link.slots))

    def backward(self, cotangent: tf.Tensor) -> tf.Tensor:
        """The transpose of `forward`."""
        pulled = take(cotangent, self.link.targets)
        return pulled if self.values is None else _beside(self.values, cotangent) * pulled


def take_rows(tensor: tf.Tensor, rows: tf.Tensor | slice) -> tf.Tensor:
    """Those with these indices `(k,)`, or a slice of them, which takes no copy."""
    return tensor[rows] if isinstance(rows, slice) else tf.gather(tensor, rows)


def take_each(tensor: tf.Tensor, indices: npt.NDArray[np.int64]) -> list[tf.Tensor]:
    """Picks units of the last axis, for each of some lists of the same length; see `take`."""
    size = tensor.shape[-1]
    if np.array_equal(indices.ravel(), np.arange(size)):
        return [tensor] if len(indices) == 1 else tf.split(tensor, len(indices), axis=-1)
    return [take(tensor, index) for index in indices]


def take(tensor: tf.Tensor, index: npt.NDArray[np.int64], axis: int = -1) -> tf.Tensor:
    """Picks units along an axis, zero where the index is -1; as few slices as possible, since a gather is slow."""
    axis %= tensor.shape.rank
    size = tensor.shape[axis]
    none = index < 0
    breaks = (np.diff(index) != np.where(none[1:], 0, 1)) | (none[1:] != none[:-1])
    runs = np.split(index, np.flatnonzero(breaks) + 1)
    if len(runs) > _MOST_RUNS:
        # The zero stands behind the last unit.
        padded = tf.pad(tensor, [[0, int(k == axis)] for k in range(tensor.shape.rank)])
        return tf.gather(padded, np.where(index < 0, size, index), axis=axis)
    pieces = [_run(tensor, int(run[0]), run.size, axis) for run in runs]
    return pieces[0] if len(pieces) == 1 else tf.concat(pieces, axis=axis)


def _run(tensor: tf.Tensor, start: int, size: int, axis: int) -> tf.Tensor:
    """Neighbouring units, or zeros if the first one is -1."""
    if (start, size) == (0, tensor.shape[axis]):
        return tensor
    if start < 0:
        shape = tf.concat([tf.shape(tensor)[:axis], [size], tf.shape(tensor)[axis + 1 :]], axis=0)
        return tf.zeros(shape, tensor.dtype)
    begin, sizes = np.zeros(tensor.shape.rank, np.int32), np.full(tensor.shape.rank, -1, np.int32)
    begin[axis], sizes[axis] = start, size
    return tf.slice(tensor, begin, sizes)


def joined(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """One behind the other along the last axis; of a single one nothing is made."""
    return tensors[0] if len(tensors) == 1 else tf.concat(tensors, axis=-1)


def total(tensors: list[tf.Tensor]) -> tf.Tensor:
    """Like `tf.add_n`, but broadcasting."""
    return functools.reduce(tf.add, tensors)


def _beside(values: tf.Tensor, vectors: tf.Tensor) -> tf.Tensor:
    """Values `(rows, units)` shaped to go with vectors `(rows, ..., units)`."""
    return values if vectors.shape.rank == values.shape.rank else values[:, None]
