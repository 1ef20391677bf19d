"""Small helpers for tensors `(time, batch, ...)`: one axis for both, sizes, slices, sums."""

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import tensorflow as tf


def as_rows(tensor: tf.Tensor) -> tf.Tensor:
    """(time, batch, ...) -> (time * batch, ...)."""
    time, batch, *rest = known_sizes(tensor)
    return tf.reshape(tensor, [time * batch, *rest])


def known_sizes(tensor: tf.Tensor) -> list[int | tf.Tensor]:
    """The size of each axis: a number where it is known before the graph runs."""
    return [tf.shape(tensor)[axis] if size is None else size for axis, size in enumerate(tensor.shape)]


# More runs of neighbouring units than this are gathered one by one.
_MOST_RUNS = 16


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
