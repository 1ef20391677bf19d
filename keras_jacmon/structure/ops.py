"""The table of TensorFlow operations: the effect of each one on the units and points of a tensor `(points, ...)`.

Both analyses of a cell's graph read this table: the search for the structure of its Jacobian, and the proof that its
points are independent. An operation that is not in it leaves the structure to autodiff and the independence unproven.
To add an operation, add a row.
"""

import enum
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from keras_jacmon.structure import movers
from keras_jacmon.structure.movers import Labels, Mover

# Function from a product, the position of an operand, its rank and the rank of the result; True if point p of the
# result is made from point p of that operand.
KeepsPoints = Callable[[tf.Operation, int, int, int], bool]


class OpKind(enum.Enum):
    """The kinds of operations.

    ELEMENTWISE: each unit of the output is made from the units of the operands at the same place, after broadcasting.
    COPIES: each output is the operand at the same position.
    BROADCASTS: each unit of the output is a unit of an operand, which may be used several times.
    MOVES: each unit of an output is a unit of an operand, or a constant.
    PRODUCT: linear in each of two operands; with a kernel, one matrix for all points.
    SIZES: the output holds sizes, which do not depend on the values.
    REDUCES: all units along the axes that the second operand names make one unit.
    SORTS: the units along the last axis in another order, which their values decide.
    MIXES_AXES: units are mixed along the axes that the second operand names.
    MIXES_LAST_AXIS: units are mixed along the last axis.
    UNKNOWN: the operation is not in the table.
    """

    ELEMENTWISE = enum.auto()
    COPIES = enum.auto()
    BROADCASTS = enum.auto()
    MOVES = enum.auto()
    PRODUCT = enum.auto()
    SIZES = enum.auto()
    REDUCES = enum.auto()
    SORTS = enum.auto()
    MIXES_AXES = enum.auto()
    MIXES_LAST_AXIS = enum.auto()
    UNKNOWN = enum.auto()


ELEMENTWISE, COPIES, BROADCASTS, MOVES = OpKind.ELEMENTWISE, OpKind.COPIES, OpKind.BROADCASTS, OpKind.MOVES
PRODUCT, SIZES, REDUCES, SORTS = OpKind.PRODUCT, OpKind.SIZES, OpKind.REDUCES, OpKind.SORTS
MIXES_AXES, MIXES_LAST_AXIS = OpKind.MIXES_AXES, OpKind.MIXES_LAST_AXIS

# Number of operands that stands for all of them.
EVERY = sys.maxsize


@dataclass(frozen=True)
class Op:
    """A row of the table.

    Attributes:
        name: String, the type of the operation, as TensorFlow registers it.
        kind: `OpKind`.
        derivative: Boolean, False if no derivative passes the operation. Defaults to True.
        passes: Integer, number of leading operands by which the derivative of an elementwise operation is one. Defaults
            to 0.
        linear: Tuple of groups of operands, each a tuple of positions: with all others held, an elementwise operation
            is linear in the operands of a group together. A sum of all operands needs none. Defaults to `()`.
        mover: `Mover`, the rule of an operation that moves units; None for other kinds. Defaults to None.
        keeps_points: `KeepsPoints`, the rule of a product; None for other kinds. Defaults to None.
        pairs_points: Boolean, True for a product that multiplies point p of one operand with point p of the other, from
            rank 3 on. Defaults to False.
        size_operand: Integer, position of an operand that holds sizes of the output; None if there is none. Defaults to
            None.
    """

    name: str
    kind: OpKind
    derivative: bool = True
    passes: int = 0
    linear: tuple[tuple[int, ...], ...] = ()
    mover: Mover | None = None
    keeps_points: KeepsPoints | None = None
    pairs_points: bool = False
    size_operand: int | None = None


def _matmul_keeps_points(operation: tf.Operation, operand: int, _: int, __: int) -> bool:
    return operand == 0 and not operation.get_attr("transpose_a")


def _batch_matmul_keeps_points(operation: tf.Operation, operand: int, rank: int, output_rank: int) -> bool:
    if len(operation.outputs[0].shape) == len("ij"):
        return operand == 0 and not operation.get_attr("adj_x")
    # From rank 3 on, the first axis only counts the products.
    return output_rank == rank


def _einsum_keeps_points(operation: tf.Operation, operand: int, _: int, __: int) -> bool:
    left, result = operation.get_attr("equation").decode().replace(" ", "").split("->")
    parts = left.split(",")
    if len(parts) == 1:
        return False
    own, other = parts if operand == 0 else parts[::-1]
    if "..." in own or "..." in other:
        return own.startswith("...") and result.startswith("...") and "..." not in other
    return own[:1] == result[:1] and own[:1] not in other and own.count(own[0]) == 1


def _convolution_keeps_points(_: tf.Operation, operand: int, __: int, ___: int) -> bool:
    return operand == 0


# The rule of admission. A row is a promise about every use of the operation, whatever its attributes and whatever the
# shapes of its operands:
# - The operation draws no random numbers, keeps nothing between two runs, and runs no Python.
# - ELEMENTWISE: unit u of the output depends on unit u of each operand, after broadcasting, and on nothing else, and so
#   does the gradient that TensorFlow registers. `derivative=False` only if that gradient is None for all operands, or
#   if the output has no derivative by its type. `passes` only where the gradient is one for every value of the operand
#   (`Cast` may round). `linear` only without a constant term.
# - MOVES: the mover knows the place of each unit, or raises `NotImplementedError`; so it does if points are mixed.
# - PRODUCT: linear in each operand, with no other term, and `keeps_points` is true only if point p of the result
#   depends on point p of that operand and on no other point of it.
# - SIZES: the output depends on the shapes of the operands, and not on their values.
# - REDUCES: as ELEMENTWISE for the axes that are not named, which keep their order.
# - SORTS: the first output holds units of the first operand, and the second one their places there; the second operand
#   is the number of units.
# - MIXES_AXES and MIXES_LAST_AXIS: nothing is mixed along axes that are not named.
# At run time, checks compare each structure with autodiff; they find a wrong row, but only if it changes the result.
TABLE = (
    # Unit by unit.
    Op("Abs", ELEMENTWISE),
    Op("Acos", ELEMENTWISE),
    Op("Acosh", ELEMENTWISE),
    Op("Add", ELEMENTWISE, passes=EVERY),
    Op("AddN", ELEMENTWISE, passes=EVERY),
    Op("AddV2", ELEMENTWISE, passes=EVERY),
    Op("Angle", ELEMENTWISE),
    Op("Asin", ELEMENTWISE),
    Op("Asinh", ELEMENTWISE),
    Op("Atan", ELEMENTWISE),
    Op("Atan2", ELEMENTWISE),
    Op("Atanh", ELEMENTWISE),
    Op("BesselI0e", ELEMENTWISE),
    Op("BesselI1e", ELEMENTWISE),
    Op("BiasAdd", ELEMENTWISE, passes=EVERY),
    Op("Cast", ELEMENTWISE, passes=1, linear=((0,),)),
    Op("Ceil", ELEMENTWISE),
    Op("CheckNumerics", ELEMENTWISE),
    Op("ClipByValue", ELEMENTWISE),
    Op("Complex", ELEMENTWISE),
    Op("ComplexAbs", ELEMENTWISE),
    Op("Conj", ELEMENTWISE),
    Op("Cos", ELEMENTWISE),
    Op("Cosh", ELEMENTWISE),
    Op("Digamma", ELEMENTWISE),
    Op("Div", ELEMENTWISE, linear=((0,),)),
    Op("DivNoNan", ELEMENTWISE, linear=((0,),)),
    Op("Elu", ELEMENTWISE),
    Op("Erf", ELEMENTWISE),
    Op("Erfc", ELEMENTWISE),
    Op("Erfinv", ELEMENTWISE),
    Op("Exp", ELEMENTWISE),
    Op("Expm1", ELEMENTWISE),
    Op("Floor", ELEMENTWISE),
    Op("FloorDiv", ELEMENTWISE),
    Op("FloorMod", ELEMENTWISE),
    Op("Imag", ELEMENTWISE),
    Op("Identity", ELEMENTWISE, passes=1, linear=((0,),)),
    Op("Inv", ELEMENTWISE),
    Op("LeakyRelu", ELEMENTWISE),
    Op("Lgamma", ELEMENTWISE),
    Op("Log", ELEMENTWISE),
    Op("Log1p", ELEMENTWISE),
    Op("Maximum", ELEMENTWISE),
    Op("Minimum", ELEMENTWISE),
    Op("Mod", ELEMENTWISE),
    Op("Mul", ELEMENTWISE, linear=((0,), (1,))),
    Op("MulNoNan", ELEMENTWISE, linear=((0,),)),
    Op("Ndtri", ELEMENTWISE),
    Op("Neg", ELEMENTWISE, linear=((0,),)),
    Op("Pow", ELEMENTWISE),
    Op("Real", ELEMENTWISE),
    Op("RealDiv", ELEMENTWISE, linear=((0,),)),
    Op("Reciprocal", ELEMENTWISE),
    Op("Relu", ELEMENTWISE),
    Op("Relu6", ELEMENTWISE),
    Op("Rint", ELEMENTWISE),
    Op("Round", ELEMENTWISE),
    Op("Rsqrt", ELEMENTWISE),
    Op("Select", ELEMENTWISE, linear=((1, 2),)),
    Op("SelectV2", ELEMENTWISE, linear=((1, 2),)),
    Op("Selu", ELEMENTWISE),
    Op("Sigmoid", ELEMENTWISE),
    Op("Sign", ELEMENTWISE),
    Op("Sin", ELEMENTWISE),
    Op("Sinh", ELEMENTWISE),
    Op("Snapshot", ELEMENTWISE, passes=1, linear=((0,),)),
    Op("Softplus", ELEMENTWISE),
    Op("Softsign", ELEMENTWISE),
    Op("Sqrt", ELEMENTWISE),
    Op("Square", ELEMENTWISE),
    Op("SquaredDifference", ELEMENTWISE),
    Op("Sub", ELEMENTWISE, passes=1, linear=((0, 1),)),
    Op("Tan", ELEMENTWISE),
    Op("Tanh", ELEMENTWISE),
    Op("TruncateDiv", ELEMENTWISE),
    Op("Xdivy", ELEMENTWISE),
    Op("Xlog1py", ELEMENTWISE),
    Op("Xlogy", ELEMENTWISE),
    Op("Zeta", ELEMENTWISE),
    # Unit by unit, the gradients of operations above, in custom gradients.
    Op("EluGrad", ELEMENTWISE, linear=((0,),)),
    Op("InvGrad", ELEMENTWISE, linear=((1,),)),
    Op("LeakyReluGrad", ELEMENTWISE, linear=((0,),)),
    Op("ReciprocalGrad", ELEMENTWISE, linear=((1,),)),
    Op("Relu6Grad", ELEMENTWISE, linear=((0,),)),
    Op("ReluGrad", ELEMENTWISE, linear=((0,),)),
    Op("RsqrtGrad", ELEMENTWISE, linear=((1,),)),
    Op("SeluGrad", ELEMENTWISE, linear=((0,),)),
    Op("SigmoidGrad", ELEMENTWISE, linear=((1,),)),
    Op("SoftplusGrad", ELEMENTWISE, linear=((0,),)),
    Op("SqrtGrad", ELEMENTWISE, linear=((1,),)),
    Op("TanhGrad", ELEMENTWISE, linear=((1,),)),
    # Unit by unit, without a derivative.
    Op("BitwiseAnd", ELEMENTWISE, derivative=False),
    Op("BitwiseOr", ELEMENTWISE, derivative=False),
    Op("BitwiseXor", ELEMENTWISE, derivative=False),
    Op("Equal", ELEMENTWISE, derivative=False),
    Op("Greater", ELEMENTWISE, derivative=False),
    Op("GreaterEqual", ELEMENTWISE, derivative=False),
    Op("IsFinite", ELEMENTWISE, derivative=False),
    Op("IsInf", ELEMENTWISE, derivative=False),
    Op("IsNan", ELEMENTWISE, derivative=False),
    Op("Less", ELEMENTWISE, derivative=False),
    Op("LessEqual", ELEMENTWISE, derivative=False),
    Op("LogicalAnd", ELEMENTWISE, derivative=False),
    Op("LogicalNot", ELEMENTWISE, derivative=False),
    Op("LogicalOr", ELEMENTWISE, derivative=False),
    Op("NotEqual", ELEMENTWISE, derivative=False),
    Op("OnesLike", ELEMENTWISE, derivative=False),
    Op("StopGradient", ELEMENTWISE, derivative=False),
    Op("ZerosLike", ELEMENTWISE, derivative=False),
    # One output for each operand.
    Op("IdentityN", COPIES),
    # Broadcasting to a given size.
    Op("BroadcastTo", BROADCASTS, size_operand=1),
    Op("Fill", BROADCASTS, size_operand=0),
    # Units in other places.
    Op("ConcatV2", MOVES, mover=movers.move_concat),
    Op("ExpandDims", MOVES, mover=movers.move_reshape),
    Op("GatherV2", MOVES, mover=movers.move_gather),
    Op("Pack", MOVES, mover=movers.move_pack),
    Op("Pad", MOVES, mover=movers.move_pad),
    Op("PadV2", MOVES, mover=movers.move_pad),
    Op("Reshape", MOVES, mover=movers.move_reshape, size_operand=1),
    Op("ReverseV2", MOVES, mover=movers.move_reverse),
    Op("Roll", MOVES, mover=movers.move_roll),
    Op("Slice", MOVES, mover=movers.move_slice),
    Op("Split", MOVES, mover=movers.move_split),
    Op("SplitV", MOVES, mover=movers.move_split_v),
    Op("Squeeze", MOVES, mover=movers.move_reshape),
    Op("StridedSlice", MOVES, mover=movers.move_strided_slice),
    Op("Transpose", MOVES, mover=movers.move_transpose),
    Op("Unpack", MOVES, mover=movers.move_unpack),
    # Products with a kernel.
    Op("BatchMatMulV2", PRODUCT, keeps_points=_batch_matmul_keeps_points, pairs_points=True),
    Op("BatchMatMulV3", PRODUCT, keeps_points=_batch_matmul_keeps_points, pairs_points=True),
    Op("Conv2D", PRODUCT, keeps_points=_convolution_keeps_points),
    Op("Conv3D", PRODUCT, keeps_points=_convolution_keeps_points),
    Op("Einsum", PRODUCT, keeps_points=_einsum_keeps_points),
    Op("MatMul", PRODUCT, keeps_points=_matmul_keeps_points),
    # Sizes of a tensor.
    Op("Rank", SIZES, derivative=False),
    Op("Shape", SIZES, derivative=False),
    Op("ShapeN", SIZES, derivative=False),
    Op("Size", SIZES, derivative=False),
    # One unit of all units along the axes that the second operand names.
    Op("All", REDUCES, derivative=False),
    Op("Any", REDUCES, derivative=False),
    Op("ArgMax", REDUCES, derivative=False),
    Op("ArgMin", REDUCES, derivative=False),
    Op("Max", REDUCES),
    Op("Mean", REDUCES),
    Op("Min", REDUCES),
    Op("Prod", REDUCES),
    Op("Sum", REDUCES),
    # All units along the axes that the second operand names.
    Op("Cumprod", MIXES_AXES),
    Op("Cumsum", MIXES_AXES),
    Op("CumulativeLogsumexp", MIXES_AXES),
    # In the order of the values.
    Op("TopKV2", SORTS),
    # All units along the last axis.
    Op("LogSoftmax", MIXES_LAST_AXIS),
    Op("Softmax", MIXES_LAST_AXIS),
)

OPERATIONS = {op.name: op for op in TABLE}


def op_of(operation: tf.Operation) -> Op:
    """Returns the row of an operation; a row of kind UNKNOWN for an operation that is not in the table."""
    return OPERATIONS.get(operation.type) or Op(operation.type, OpKind.UNKNOWN)


def passes_unchanged(operation: tf.Operation, operand: int) -> bool:
    """Tells if the operation is elementwise with a derivative of one with respect to an operand."""
    # The real part that a cast takes of a complex number is not all of it.
    takes_part = operation.inputs[operand].dtype.is_complex and not operation.outputs[0].dtype.is_complex
    return operand < op_of(operation).passes and not takes_part


def is_linear(operation: tf.Operation, operands: Collection[int], zeros: Collection[int]) -> bool:
    """Tells if the operation is elementwise and linear in some operands together, where some others are zero."""
    row, given = op_of(operation), set(operands)
    groups = [tuple(range(len(operation.inputs)))] if row.passes == EVERY else row.linear
    return any(given <= set(group) <= given.union(zeros) for group in groups)


def moves_units(operation: tf.Operation) -> bool:
    """Tells if the operation only moves units."""
    return op_of(operation).kind is MOVES


def keeps_points(operation: tf.Operation, operand: int, rank: int, output_rank: int) -> bool:
    """Tells if point p of a product is made from point p of one of its operands.

    Args:
        operation: Operation of kind PRODUCT.
        operand: Integer, position of the operand.
        rank: Integer, rank of the operand.
        output_rank: Integer, rank of the product.
    """
    rule = op_of(operation).keeps_points
    return rule is not None and rule(operation, operand, rank, output_rank)


def move(
    operation: tf.Operation,
    labels: Mapping[int, Labels],
    units: Callable[[tf.Tensor], tuple[int, ...]],
    shapes: Sequence[tuple[int, ...]],
    slots: int,
) -> list[Labels]:
    """Follows the units through an operation that only moves them.

    Args:
        operation: Operation of kind MOVES.
        labels: Mapping by position, the labels `(slots, ...)` of some operands; the others have none.
        units: Function from an operand to its shape without the points.
        shapes: Sequence of the shapes of the outputs without the points.
        slots: Integer, number of slots.

    Returns:
        List of the labels `(slots, ...)` of each output.

    Raises:
        NotImplementedError: If the operation moves points too, or if the graph does not say which units it moves.
    """

    def operand(k: int) -> Labels:
        if k in labels:
            return labels[k]
        return np.full((slots, *units(operation.inputs[k])), -1)

    mover = op_of(operation).mover
    moved = [] if mover is None else mover(operation, operand)
    if [array.size for array in moved] != [slots * int(np.prod(shape)) for shape in shapes]:
        raise NotImplementedError
    return [np.reshape(array, (slots, *shape)) for array, shape in zip(moved, shapes, strict=True)]
