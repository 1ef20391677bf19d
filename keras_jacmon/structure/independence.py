"""The proof that each row of a cell's step is a function of the same row of its inputs and states, by its graph."""

import enum
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from keras_jacmon.cell.cell_graph import CellGraph
from keras_jacmon.structure.ops import Kind, keeps_rows, move, op_of
from keras_jacmon.traced_graph import has_custom_gradient


class _Made(enum.Enum):
    """The materials that a tensor is made from.

    ROWS: its row r from row r of inputs and states. SIZES: integers, from shapes alone. MIXED: perhaps otherwise.
    """

    ROWS = enum.auto()
    SIZES = enum.auto()
    MIXED = enum.auto()


def independent_tensors(graph: CellGraph) -> frozenset[str]:
    """Returns the names of the tensors of a cell's graph whose row r is proven to be made from row r.

    Their derivatives are then row by row too. Of other tensors it is not known.
    """
    made = {tensor.name: _Made.ROWS for tensor in (graph.step_inputs, *graph.states)}
    for operation in graph.operations:
        known = {k: made[tensor.name] for k, tensor in enumerate(operation.inputs) if tensor.name in made}
        if known:
            made |= dict.fromkeys((tensor.name for tensor in operation.outputs), _made(graph, operation, known))
    return frozenset(name for name, kind in made.items() if kind is _Made.ROWS)


def _made(graph: CellGraph, operation: tf.Operation, known: Mapping[int, _Made]) -> _Made:
    """Returns the material of an operation's outputs, given that of its operands that are no constants."""
    row = op_of(operation)
    if _Made.MIXED in known.values() or has_custom_gradient(operation):
        return _Made.MIXED
    if row.kind is Kind.SIZES:
        return _Made.SIZES
    rows = [k for k, material in known.items() if material is _Made.ROWS]
    if not rows and all(tensor.dtype.is_integer for tensor in operation.outputs):
        return _Made.SIZES
    if any(material is _Made.SIZES and k != row.size_operand for k, material in known.items()):
        return _Made.MIXED
    try:
        proven = _keeps_rows(graph, operation, rows)
    except NotImplementedError:
        proven = False
    return _Made.ROWS if proven else _Made.MIXED


def _keeps_rows(graph: CellGraph, operation: tf.Operation, rows: list[int]) -> bool:
    """Tells if row r of the outputs is made from row r of the operands at these positions, and of no other row.

    Raises:
        NotImplementedError: If it is not known.
    """
    row, proven = op_of(operation), False
    outputs = [graph.units(tensor) for tensor in operation.outputs]
    operands = {k: graph.units(operation.inputs[k]) for k in rows}
    if row.kind is Kind.COPIES:
        proven = True
    elif row.kind in (Kind.ELEMENTWISE, Kind.BROADCASTS):
        # Of another rank, the rows of one would meet the units of the other.
        proven = all(len(units) == len(outputs[0]) for units in operands.values())
    elif row.kind is Kind.MOVES:
        labels = {k: np.zeros((1, *units), np.int64) for k, units in operands.items()}
        # Sizes alone make no rows.
        proven = bool(rows) and bool(move(operation, labels, graph.units, outputs, 1))
    elif row.kind is Kind.MIXES_AXES:
        axes = tf.get_static_value(operation.inputs[1])
        proven = rows == [0] and axes is not None and all(axis % (1 + len(operands[0])) for axis in np.ravel(axes))
    elif row.kind is Kind.MIXES_LAST_AXIS:
        proven = len(outputs[0]) > 0
    elif row.pairs_rows and len(rows) == len(operation.inputs):
        # From rank 3 on, the first axis only counts the products.
        proven = all(len(units) > 1 for units in operands.values())
    elif row.kind is Kind.PRODUCT and len(rows) == 1:
        proven = keeps_rows(operation, rows[0], 1 + len(operands[rows[0]]), 1 + len(outputs[0]))
    return proven
