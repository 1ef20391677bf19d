"""Small helpers for tensors: points `(time * batch, ...)`, known sizes, slices and sums."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

HALF_PRECISION = (tf.float16, tf.bfloat16)

# The golden ratio, less one.
_GOLDEN = 0.6180339887498949


def as_points(tensor: tf.Tensor) -> tf.Tensor:
    """Reshapes a tensor `(time, batch, ...)` to points `(time * batch, ...)`."""
    time, batch, *rest = known_sizes(tensor)
    return tf.reshape(tensor, [time * batch, *rest])


def known_sizes(tensor: tf.Tensor) -> list[int | tf.Tensor]:
    """Returns the size of each axis: an integer where it is known before the graph runs, a tensor otherwise."""
    return [tf.shape(tensor)[axis] if size is None else size for axis, size in enumerate(tensor.shape)]


def spec_of(tensor: Any) -> tf.TensorSpec:
    """Returns shape and type of a tensor, or of a variable."""
    return tf.TensorSpec(tensor.shape, tensor.dtype)


def specs_of(tensors: Any) -> Any:
    """Returns shape and type of each tensor in a structure; None stays None."""
    return tf.nest.map_structure(lambda tensor: None if tensor is None else spec_of(tensor), tensors)


def swapped(tensor: tf.Tensor) -> tf.Tensor:
    """Swaps the first two axes: `(batch, time, ...)` to `(time, batch, ...)`."""
    return tf.transpose(tensor, [1, 0, *range(2, tensor.shape.rank)])


def aligned(flags: tf.Tensor, tensor: tf.Tensor) -> tf.Tensor:
    """Reshapes `(points,)` to `(points, 1, ...)`, with as many axes as a tensor `(points, ...)`."""
    return tf.reshape(flags, [-1] + [1] * (tensor.shape.rank - 1))


def finite_points(tensor: tf.Tensor) -> tf.Tensor:
    """Returns boolean `(points,)`: True where all values of a tensor `(points, ...)` are finite."""
    return tf.reduce_all(tf.math.is_finite(tensor), axis=range(1, tensor.shape.rank))


def golden_shares(index: tf.Tensor) -> tf.Tensor:
    """Returns a number from 0 up to 1 for each integer: those of neighbours are far apart, and all are spread evenly.

    They are the fractional parts of multiples of the golden ratio.
    """
    return tf.cast(index, tf.float64) * _GOLDEN % 1.0


def with_shape(tensor: tf.Tensor, shape: Sequence[int | None] | tf.TensorShape) -> tf.Tensor:
    """Returns a tensor with a static shape, without an operation if it has this shape already."""
    return tensor if tensor.shape == tf.TensorShape(shape) else tf.ensure_shape(tensor, shape)


# The largest number of runs of neighbouring units that are sliced; more of them are gathered unit by unit.
_MOST_RUNS = 16


class PointRange:
    """Neighbouring points, which several tensors give by one operation each and without a copy.

    Args:
        start: Integer or scalar tensor, index of the first point.
        count: Integer or scalar tensor, number of points.
    """

    def __init__(self, start: int | tf.Tensor, count: int | tf.Tensor) -> None:
        self.count = count
        self._bounds = tf.stack([start]), tf.stack([start + count]), tf.constant([1])

    def of(self, tensor: tf.Tensor) -> tf.Tensor:
        """Returns these points of a tensor `(points, ...)`."""
        part = tf.strided_slice(tensor, *self._bounds)
        part.set_shape([self.count if isinstance(self.count, int) else None, *tensor.shape[1:]])
        return part


class ChosenPoints:
    """Points by their indices, which several tensors give by one operation each.

    Args:
        indices: Integer tensor `(k,)`.
    """

    def __init__(self, indices: tf.Tensor) -> None:
        self.count = tf.size(indices) if indices.shape[0] is None else indices.shape[0]
        self._places = tf.expand_dims(indices, axis=1)

    def of(self, tensor: tf.Tensor) -> tf.Tensor:
        """Returns these points of a tensor `(points, ...)`."""
        return tf.gather_nd(tensor, self._places)


Points = PointRange | ChosenPoints


def take_each(tensor: tf.Tensor, indices: npt.NDArray[np.int64]) -> list[tf.Tensor]:
    """Picks units of the last axis, once for each row of the indices; see `take`.

    Args:
        tensor: Tensor `(..., size)`.
        indices: Integer array `(k, n)`; -1 for a zero.

    Returns:
        List of `k` tensors `(..., n)`.
    """
    size = tensor.shape[-1]
    if np.array_equal(indices.ravel(), np.arange(size)):
        return [tensor] if len(indices) == 1 else tf.split(tensor, len(indices), axis=-1)
    return [take(tensor, index) for index in indices]


def take(tensor: tf.Tensor, index: npt.NDArray[np.int64], axis: int = -1) -> tf.Tensor:
    """Picks units along an axis, in as few slices as possible, since a gather is slow.

    Args:
        tensor: Tensor.
        index: Integer array `(n,)`; -1 for a zero.
        axis: Integer. Defaults to -1.
    """
    axis %= tensor.shape.rank
    size = tensor.shape[axis]
    present = np.flatnonzero(index >= 0)
    if present.size and present.size < index.size:
        # Zeros before and after the units, in one operation.
        first, last = int(present[0]), int(present[-1])
        if first > 0 or last < index.size - 1:
            pads = np.zeros([tensor.shape.rank, 2], np.int32)
            pads[axis] = first, index.size - 1 - last
            return tf.pad(take(tensor, index[first : last + 1], axis), pads)
    none = index < 0
    breaks = (np.diff(index) != np.where(none[1:], 0, 1)) | (none[1:] != none[:-1])
    runs = np.split(index, np.flatnonzero(breaks) + 1)
    if len(runs) > _MOST_RUNS:
        # The zero stands after the last unit.
        padded = tf.pad(tensor, [[0, int(k == axis)] for k in range(tensor.shape.rank)])
        return tf.gather(padded, np.where(index < 0, size, index), axis=axis)
    pieces = [_run(tensor, int(run[0]), run.size, axis) for run in runs]
    return pieces[0] if len(pieces) == 1 else tf.concat(pieces, axis=axis)


def _run(tensor: tf.Tensor, start: int, size: int, axis: int) -> tf.Tensor:
    """Returns `size` neighbouring units from `start` on; zeros if `start` is negative."""
    if (start, size) == (0, tensor.shape[axis]):
        return tensor
    if start < 0:
        shape = tf.concat([tf.shape(tensor)[:axis], [size], tf.shape(tensor)[axis + 1 :]], axis=0)
        return tf.zeros(shape, tensor.dtype)
    begin, sizes = np.zeros(tensor.shape.rank, np.int32), np.full(tensor.shape.rank, -1, np.int32)
    begin[axis], sizes[axis] = start, size
    return tf.slice(tensor, begin, sizes)


def joined(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Concatenates tensors along the last axis; a single tensor is returned as it is."""
    return tensors[0] if len(tensors) == 1 else tf.concat(tensors, axis=-1)


def total(tensors: list[tf.Tensor]) -> tf.Tensor:
    """Adds tensors, with broadcasting."""
    shapes = [tensor.shape for tensor in tensors]
    alike = shapes[0].is_fully_defined() and all(shape == shapes[0] for shape in shapes)
    return tf.add_n(tensors) if alike else functools.reduce(tf.add, tensors)
