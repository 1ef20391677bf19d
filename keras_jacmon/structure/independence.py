"""Is each row of a cell's step a function of the same row of its inputs and states? Proven in its graph, or not."""

import enum
import math
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from keras_jacmon.cell.cell_graph import ROWS, CellGraph
from keras_jacmon.structure.ops import ELEMENTWISE, MOVING, PRODUCTS, is_row_by_row, move
from keras_jacmon.traced_graph import has_custom_gradient

_SIZES = frozenset({"Rank", "Shape", "ShapeN", "Size"})

# Where sizes may stand beside a tensor of rows, or beside a constant to become one.
_SHAPING = frozenset({("BroadcastTo", 1), ("Fill", 0), ("Reshape", 1)})

# Unit by unit, as `ELEMENTWISE`, but without a derivative.
_FLAT = frozenset(
    [
        "BitwiseAnd",
        "BitwiseOr",
        "BitwiseXor",
        "Equal",
        "Greater",
        "GreaterEqual",
        "IsFinite",
        "IsInf",
        "IsNan",
        "Less",
        "LessEqual",
        "LogicalAnd",
        "LogicalNot",
        "LogicalOr",
        "NotEqual",
        "OnesLike",
        "StopGradient",
        "ZerosLike",
    ]
)

# They mix units along the axes that their second operand names.
_ALONG_AXES = frozenset(
    ["All", "Any", "ArgMax", "ArgMin", "Cumprod", "Cumsum", "CumulativeLogsumexp", "Max", "Mean", "Min", "Prod", "Sum"]
)

# Along the last axis.
_ALONG_THE_LAST = frozenset({"LogSoftmax", "Softmax"})


class _Made(enum.Enum):
    """What a tensor is made from.

    `ROWS`: its row r from row r of inputs and states. `SIZES`: integers, from shapes alone. `MIXED`: maybe otherwise.
    """

    ROWS = enum.auto()
    SIZES = enum.auto()
    MIXED = enum.auto()


def row_by_row(graph: CellGraph) -> frozenset[str]:
    """The names of the tensors of a cell's graph of which it is proven that row r is made from row r.

    Their derivatives are then row by row too. Of other tensors it is not known.
    """
    made = {tensor.name: _Made.ROWS for tensor in (graph.step_inputs, *graph.states)}
    for operation in graph.operations:
        known = {k: made[tensor.name] for k, tensor in enumerate(operation.inputs) if tensor.name in made}
        if known:
            made |= dict.fromkeys((tensor.name for tensor in operation.outputs), _made(graph, operation, known))
    return frozenset(name for name, kind in made.items() if kind is _Made.ROWS)


def _made(graph: CellGraph, operation: tf.Operation, known: Mapping[int, _Made]) -> _Made:
    """What the outputs of an operation are made from, given that for those of its operands that are no constants."""
    if _Made.MIXED in known.values() or has_custom_gradient(operation):
        return _Made.MIXED
    if operation.type in _SIZES:
        return _Made.SIZES
    rows = [k for k, kind in known.items() if kind is _Made.ROWS]
    if not rows and all(tensor.dtype.is_integer for tensor in operation.outputs):
        return _Made.SIZES
    shaped_well = all((operation.type, k) in _SHAPING for k, kind in known.items() if kind is _Made.SIZES)
    try:
        proven = shaped_well and _keeps_rows(graph, operation, rows)
    except NotImplementedError:
        proven = False
    return _Made.ROWS if proven else _Made.MIXED


def _keeps_rows(graph: CellGraph, operation: tf.Operation, rows: list[int]) -> bool:
    """Whether row r of the outputs is made from row r of the operands at these places, and of nothing else that varies.

    Raises:
        NotImplementedError: If it is not known.
    """
    outputs = [_units(graph, tensor) for tensor in operation.outputs]
    operands = {k: _units(graph, operation.inputs[k]) for k in rows}
    kind, proven = operation.type, False
    if kind == "IdentityN":
        proven = True
    elif kind in ("Fill", "BroadcastTo") or kind in ELEMENTWISE | _FLAT:
        # Of another rank, the rows of one would meet the units of the other.
        proven = all(len(units) == len(outputs[0]) for units in operands.values())
    elif kind == "Reshape":
        proven = rows == [0] and math.prod(operands[0]) == math.prod(outputs[0])
    elif kind in MOVING:
        labels = {k: np.zeros((1, *units), np.int64) for k, units in operands.items()}
        proven = bool(move(operation, labels, lambda tensor: _units(graph, tensor), outputs, 1))
    elif kind in _ALONG_AXES:
        axes = tf.get_static_value(operation.inputs[1])
        proven = rows == [0] and axes is not None and all(axis % (1 + len(operands[0])) for axis in np.ravel(axes))
    elif kind in _ALONG_THE_LAST:
        proven = len(outputs[0]) > 0
    elif kind.startswith("BatchMatMul") and len(rows) == len(operation.inputs):
        # From rank 3 on, the first axis only counts the products.
        proven = all(len(units) > 1 for units in operands.values())
    elif kind in PRODUCTS and len(rows) == 1:
        ranks = (1 + len(operands[rows[0]]), 1 + len(outputs[0]))
        proven = is_row_by_row(operation, rows == [0], *ranks)
    return proven


def _units(graph: CellGraph, tensor: tf.Tensor) -> tuple[int, ...]:
    """The shape without the rows.

    Raises:
        NotImplementedError: If the first axis is not known to be that of the rows.
    """
    shape = graph.shapes.get(tensor.name)
    if shape is None or None in shape or not shape or shape[0] != ROWS:
        raise NotImplementedError
    return tuple(int(size) for size in shape[1:] if size is not None)
