"""What single TensorFlow operations do with the units of a tensor `(rows, ...)`: nothing, move them, or mix them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

# For each unit of a tensor the unit of another one that it was made from; -1 for none. `(slots, ...)` where the
# tensor is `(rows, ...)`: several slots where it was made from several units.
Labels = npt.NDArray[np.int64]

# Unit by unit, with operands broadcast.
ELEMENTWISE = frozenset(
    [
        "Abs",
        "Acos",
        "Acosh",
        "Add",
        "AddN",
        "AddV2",
        "Asin",
        "Asinh",
        "Atan",
        "Atan2",
        "Atanh",
        "BesselI0e",
        "BesselI1e",
        "BiasAdd",
        "Cast",
        "Ceil",
        "CheckNumerics",
        "ClipByValue",
        "Cos",
        "Cosh",
        "Digamma",
        "Div",
        "DivNoNan",
        "Elu",
        "Erf",
        "Erfc",
        "Erfinv",
        "Exp",
        "Expm1",
        "Floor",
        "FloorDiv",
        "FloorMod",
        "Identity",
        "Inv",
        "LeakyRelu",
        "Lgamma",
        "Log",
        "Log1p",
        "Maximum",
        "Minimum",
        "Mod",
        "Mul",
        "MulNoNan",
        "Ndtri",
        "Neg",
        "Pow",
        "RealDiv",
        "Reciprocal",
        "Relu",
        "Relu6",
        "Rint",
        "Round",
        "Rsqrt",
        "Select",
        "SelectV2",
        "Selu",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Snapshot",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Square",
        "SquaredDifference",
        "Sub",
        "Tan",
        "Tanh",
        "TruncateDiv",
        "Xdivy",
        "Xlog1py",
        "Xlogy",
        "Zeta",
    ]
)

# Of those, the ones whose derivative with respect to their first operand is one; with respect to every operand if they
# add.
_PASSING = frozenset({"Cast", "Identity", "Snapshot", "Sub"})
_ADDING = frozenset({"Add", "AddN", "AddV2", "BiasAdd"})

# No derivative passes them.
BLOCKING = frozenset({"StopGradient", "ZerosLike", "OnesLike", "Shape", "ShapeN", "Size", "Rank"})


def passes_unchanged(operation: tf.Operation, operand: int) -> bool:
    """Whether the derivative with respect to an operand of an elementwise operation is one."""
    return operation.type in _ADDING or (operation.type in _PASSING and operand == 0)


def move(
    operation: tf.Operation,
    labels: Mapping[int, Labels],
    units: Callable[[tf.Tensor], tuple[int, ...]],
    shapes: Sequence[tuple[int, ...]],
    slots: int,
) -> list[Labels]:
    """Where an operation that only moves units puts them.

    Args:
        operation: The operation, of a type in `MOVING`.
        labels: For some operands their labels `(slots, ...)`; the others have none.
        units: From an operand to its shape without its rows.
        shapes: The shapes of the outputs without their rows.
        slots: How many there are.

    Returns:
        The labels of each output.

    Raises:
        NotImplementedError: If it moves rows too, or which units it moves is not known before it runs.
    """

    def operand(k: int) -> Labels:
        if k in labels:
            return labels[k]
        return np.full((slots, *units(operation.inputs[k])), -1)

    moved = MOVING[operation.type](operation, operand)
    if len(moved) != len(shapes):
        raise NotImplementedError
    return [np.reshape(array, (slots, *shape)) for array, shape in zip(moved, shapes, strict=True)]


_Operand = Callable[[int], Labels]


def _constant(operation: tf.Operation, k: int) -> Any:
    value = tf.get_static_value(operation.inputs[k])
    if value is None:
        raise NotImplementedError
    return value


def _unit_axis(axis: int, rank: int) -> int:
    """An axis that is not that of the rows."""
    axis = int(axis) % rank
    if axis == 0:
        raise NotImplementedError
    return axis


def _reshape(_: tf.Operation, operand: _Operand) -> list[Labels]:
    # `move` reshapes. A reshape that keeps the number of units per row keeps the rows.
    return [operand(0)]


def _transpose(op: tf.Operation, operand: _Operand) -> list[Labels]:
    permutation = _constant(op, 1)
    if permutation[0] != 0:
        raise NotImplementedError
    return [np.transpose(operand(0), permutation)]


def _split(op: tf.Operation, operand: _Operand) -> list[Labels]:
    x = operand(1)
    return list(np.split(x, op.get_attr("num_split"), _unit_axis(_constant(op, 0), x.ndim)))


def _split_v(op: tf.Operation, operand: _Operand) -> list[Labels]:
    x = operand(0)
    sizes = _constant(op, 1)
    return list(np.split(x, np.cumsum(sizes)[:-1], _unit_axis(_constant(op, 2), x.ndim)))


def _unpack(op: tf.Operation, operand: _Operand) -> list[Labels]:
    x = operand(0)
    return list(np.moveaxis(x, _unit_axis(op.get_attr("axis"), x.ndim), 0))


def _pack(op: tf.Operation, operand: _Operand) -> list[Labels]:
    parts = [operand(k) for k in range(len(op.inputs))]
    return [np.stack(parts, _unit_axis(op.get_attr("axis"), parts[0].ndim + 1))]


def _concat(op: tf.Operation, operand: _Operand) -> list[Labels]:
    last = len(op.inputs) - 1
    parts = [operand(k) for k in range(last)]
    return [np.concatenate(parts, _unit_axis(_constant(op, last), parts[0].ndim))]


def _slice(op: tf.Operation, operand: _Operand) -> list[Labels]:
    x = operand(0)
    begin, size = _constant(op, 1), _constant(op, 2)
    if begin[0] != 0 or size[0] != -1:
        raise NotImplementedError
    units = [slice(b, None if s == -1 else b + s) for b, s in zip(begin[1:], size[1:], strict=True)]
    window = (slice(None), *units)
    return [x[window]]


def _strided_slice(op: tf.Operation, operand: _Operand) -> list[Labels]:
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


def _gather(op: tf.Operation, operand: _Operand) -> list[Labels]:
    x = operand(0)
    if op.get_attr("batch_dims"):
        raise NotImplementedError
    return [np.take(x, _constant(op, 1), _unit_axis(_constant(op, 2), x.ndim))]


def _reverse(op: tf.Operation, operand: _Operand) -> list[Labels]:
    x = operand(0)
    return [np.flip(x, tuple(_unit_axis(axis, x.ndim) for axis in _constant(op, 1)))]


def _roll(op: tf.Operation, operand: _Operand) -> list[Labels]:
    x = operand(0)
    axes = [_unit_axis(axis, x.ndim) for axis in np.ravel(_constant(op, 2))]
    return [np.roll(x, [int(shift) for shift in np.ravel(_constant(op, 1))], axes)]


def _pad(op: tf.Operation, operand: _Operand) -> list[Labels]:
    paddings = _constant(op, 1)
    if any(paddings[0]):
        raise NotImplementedError
    return [np.pad(operand(0), paddings, constant_values=-1)]


MOVING: dict[str, Callable[[tf.Operation, _Operand], list[Labels]]] = {
    "ConcatV2": _concat,
    "ExpandDims": _reshape,
    "GatherV2": _gather,
    "Pack": _pack,
    "Pad": _pad,
    "PadV2": _pad,
    "Reshape": _reshape,
    "ReverseV2": _reverse,
    "Roll": _roll,
    "Slice": _slice,
    "Split": _split,
    "SplitV": _split_v,
    "Squeeze": _reshape,
    "StridedSlice": _strided_slice,
    "Transpose": _transpose,
    "Unpack": _unpack,
}


PRODUCTS = frozenset({"MatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum", "Conv2D", "Conv3D"})


def is_row_by_row(operation: tf.Operation, first: bool, rank: int, output_rank: int) -> bool:  # noqa: FBT001
    """Whether row r of the product is made from row r of the operand, which is the first or the second one."""
    if operation.type == "MatMul":
        return first and not operation.get_attr("transpose_a")
    if operation.type.startswith("BatchMatMul"):
        # From rank 3 on, the first axis only counts the products.
        plain = len(operation.outputs[0].shape) == len("ij")
        return first and not operation.get_attr("adj_x") if plain else output_rank == rank
    if operation.type == "Einsum":
        left, result = operation.get_attr("equation").decode().replace(" ", "").split("->")
        parts = left.split(",")
        if len(parts) == 1:
            return False
        own, other = parts if first else parts[::-1]
        if "..." in own or "..." in other:
            return own.startswith("...") and result.startswith("...") and "..." not in other
        return own[:1] == result[:1] and own[:1] not in other and own.count(own[0]) == 1
    return first
