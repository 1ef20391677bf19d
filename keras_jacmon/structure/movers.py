"""Rules of the operations that only move units: from the labels of the operands to the labels of the outputs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from keras_jacmon.graphs.constants import constant_value

# Integer array `(slots, ...)` for a tensor `(points, ...)`: for each unit of the tensor, the units of another tensor
# that it is made from, one in each slot; -1 for none.
Labels = npt.NDArray[np.int64]

# Function from the position of an operand to its labels.
Operand = Callable[[int], Labels]

# Function from an operation and its operands to the labels of each output, which the caller reshapes. It raises
# `NotImplementedError` if points move too, or if the graph does not say which units move.
Mover = Callable[[tf.Operation, Operand], list[Labels]]


def _constant(operation: tf.Operation, k: int) -> Any:
    """Returns the value of an operand that is a constant."""
    value = constant_value(operation.inputs[k])
    if value is None:
        raise NotImplementedError
    return value


def _unit_axis(axis: int, rank: int) -> int:
    """Returns the axis, counted from 0; raises an error for the first axis, which holds the points."""
    axis = int(axis) % rank
    if axis == 0:
        raise NotImplementedError
    return axis


def move_reshape(_: tf.Operation, operand: Operand) -> list[Labels]:
    """Keeps all units in their order; the caller reshapes. With as many units per point as before, points stay."""
    return [operand(0)]


def move_transpose(op: tf.Operation, operand: Operand) -> list[Labels]:
    """Permutes the axes of the units."""
    permutation = _constant(op, 1)
    if permutation[0] != 0:
        raise NotImplementedError
    return [np.transpose(operand(0), permutation)]


def move_split(op: tf.Operation, operand: Operand) -> list[Labels]:
    """Cuts into equal parts."""
    x = operand(1)
    return list(np.split(x, op.get_attr("num_split"), _unit_axis(_constant(op, 0), x.ndim)))


def move_split_v(op: tf.Operation, operand: Operand) -> list[Labels]:
    """Cuts into parts of given sizes."""
    x = operand(0)
    sizes = _constant(op, 1)
    return list(np.split(x, np.cumsum(sizes)[:-1], _unit_axis(_constant(op, 2), x.ndim)))


def move_unpack(op: tf.Operation, operand: Operand) -> list[Labels]:
    """Takes an axis apart."""
    x = operand(0)
    return list(np.moveaxis(x, _unit_axis(op.get_attr("axis"), x.ndim), 0))


def move_pack(op: tf.Operation, operand: Operand) -> list[Labels]:
    """Stacks tensors along a new axis."""
    parts = [operand(k) for k in range(len(op.inputs))]
    return [np.stack(parts, _unit_axis(op.get_attr("axis"), parts[0].ndim + 1))]


def move_concat(op: tf.Operation, operand: Operand) -> list[Labels]:
    """Joins tensors along an axis."""
    last = len(op.inputs) - 1
    parts = [operand(k) for k in range(last)]
    return [np.concatenate(parts, _unit_axis(_constant(op, last), parts[0].ndim))]


def move_slice(op: tf.Operation, operand: Operand) -> list[Labels]:
    """Takes a window."""
    x = operand(0)
    begin, size = _constant(op, 1), _constant(op, 2)
    if begin[0] != 0 or size[0] != -1:
        raise NotImplementedError
    units = [slice(b, None if s == -1 else b + s) for b, s in zip(begin[1:], size[1:], strict=True)]
    window = (slice(None), *units)
    return [x[window]]


def move_strided_slice(op: tf.Operation, operand: Operand) -> list[Labels]:
    """Indexes as Python does."""
    x = operand(0)
    begin, end, strides = (_constant(op, k) for k in (1, 2, 3))

    def masked(name: str, k: int) -> bool:
        return bool(op.get_attr(name) & (1 << k))

    index: list[Any] = []
    for k, (b, e, s) in enumerate(zip(begin, end, strides, strict=True)):
        if masked("ellipsis_mask", k):
            index.append(Ellipsis)
        elif masked("new_axis_mask", k):
            index.append(None)
        elif masked("shrink_axis_mask", k):
            index.append(int(b))
        else:
            first = None if masked("begin_mask", k) else int(b)
            index.append(slice(first, None if masked("end_mask", k) else int(e), int(s)))
    if index[0] != slice(None, None, 1) and index[0] is not Ellipsis:
        raise NotImplementedError
    if index[0] is Ellipsis and sum(part is not None for part in index) > x.ndim:
        raise NotImplementedError
    return [x[tuple(index)]]


def move_gather(op: tf.Operation, operand: Operand) -> list[Labels]:
    """Picks units along an axis."""
    x = operand(0)
    if op.get_attr("batch_dims"):
        raise NotImplementedError
    return [np.take(x, _constant(op, 1), _unit_axis(_constant(op, 2), x.ndim))]


def move_reverse(op: tf.Operation, operand: Operand) -> list[Labels]:
    """Reverses axes."""
    x = operand(0)
    return [np.flip(x, tuple(_unit_axis(axis, x.ndim) for axis in _constant(op, 1)))]


def move_roll(op: tf.Operation, operand: Operand) -> list[Labels]:
    """Rolls along axes."""
    x = operand(0)
    axes = [_unit_axis(axis, x.ndim) for axis in np.ravel(_constant(op, 2))]
    return [np.roll(x, [int(shift) for shift in np.ravel(_constant(op, 1))], axes)]


def move_pad(op: tf.Operation, operand: Operand) -> list[Labels]:
    """Puts constants around."""
    paddings = _constant(op, 1)
    if any(paddings[0]):
        raise NotImplementedError
    return [np.pad(operand(0), paddings, constant_values=-1)]
