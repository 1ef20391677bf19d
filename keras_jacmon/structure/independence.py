"""The proof, from a cell's graph, that each point of a step is made from the same point of its inputs and states."""

import enum
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from keras_jacmon.cell.cell_graph import CellGraph
from keras_jacmon.graphs.calls import has_custom_gradient
from keras_jacmon.graphs.constants import constant_value
from keras_jacmon.structure.custom_gradients import acts_unit_by_unit
from keras_jacmon.structure.ops import OpKind, keeps_points, move, op_of


class _Made(enum.Enum):
    """The materials that a tensor is made from.

    POINTS: its point p is made from point p of inputs and states. SIZES: integers that are made from shapes alone.
    MIXED: neither is proven.
    """

    POINTS = enum.auto()
    SIZES = enum.auto()
    MIXED = enum.auto()


def independent_tensors(graph: CellGraph) -> frozenset[str]:
    """Returns the names of the tensors whose point p is proven to be made from point p of inputs and states.

    Their derivatives then keep the points apart too. About the other tensors nothing is known.

    Args:
        graph: `CellGraph`, the cell's step.
    """
    made = {tensor.name: _Made.POINTS for tensor in (graph.step_inputs, *graph.states)}
    for operation in graph.operations:
        known = {k: made[tensor.name] for k, tensor in enumerate(operation.inputs) if tensor.name in made}
        if known:
            apart = _derivative_keeps_points(graph, operation, made)
            found = _made(graph, operation, known) if apart else _Made.MIXED
            made |= dict.fromkeys((tensor.name for tensor in operation.outputs), found)
    return frozenset(name for name, kind in made.items() if kind is _Made.POINTS)


def _derivative_keeps_points(graph: CellGraph, operation: tf.Operation, made: Mapping[str, _Made]) -> bool:
    """Tells if the derivative is that of the table, or one that is proven to keep the points apart too."""
    if not has_custom_gradient(operation):
        return True
    gradient = graph.custom_gradients.get(operation.name)
    if gradient is None:
        return False
    slopes = {k: slope for k, slope in gradient.slopes.items() if operation.inputs[k].name in made}
    apart = all(made.get(slope.name, _Made.POINTS) is _Made.POINTS for slope in slopes.values())
    return apart and acts_unit_by_unit(graph, gradient, slopes)


def _made(graph: CellGraph, operation: tf.Operation, known: Mapping[int, _Made]) -> _Made:
    """Returns the material of an operation's outputs, given the materials of its operands (constants have none)."""
    row = op_of(operation)
    if _Made.MIXED in known.values():
        return _Made.MIXED
    if row.kind is OpKind.SIZES:
        return _Made.SIZES
    points = [k for k, material in known.items() if material is _Made.POINTS]
    if not points and all(tensor.dtype.is_integer for tensor in operation.outputs):
        return _Made.SIZES
    sizes = [k for k, material in known.items() if material is _Made.SIZES and k != row.size_operand]
    if any(constant_value(operation.inputs[k]) is None for k in sizes):
        return _Made.MIXED
    try:
        proven = _keeps_points(graph, operation, points)
    except NotImplementedError:
        proven = False
    return _Made.POINTS if proven else _Made.MIXED


def _keeps_points(graph: CellGraph, operation: tf.Operation, positions: list[int]) -> bool:
    """Tells if point p of the outputs is made from point p of the operands, and from no other point.

    Args:
        graph: `CellGraph`, the cell's step.
        operation: Operation of that graph.
        positions: List of the positions of the operands that are made from points.

    Raises:
        NotImplementedError: If it is not known.
    """
    row, proven = op_of(operation), False
    if row.kind is OpKind.COPIES:
        return True
    outputs = [graph.units(tensor) for tensor in operation.outputs]
    operands = {k: graph.units(operation.inputs[k]) for k in positions}
    if row.kind in (OpKind.ELEMENTWISE, OpKind.BROADCASTS):
        # With different ranks, broadcasting would pair the points of one operand with the units of another.
        proven = all(len(units) == len(outputs[0]) for units in operands.values())
    elif row.kind is OpKind.MOVES:
        labels = {k: np.zeros((1, *units), np.int64) for k, units in operands.items()}
        # An output that is made from sizes alone has no points.
        proven = bool(positions) and bool(move(operation, labels, graph.units, outputs, 1))
    elif row.kind in (OpKind.REDUCES, OpKind.MIXES_AXES):
        axes = constant_value(operation.inputs[1])
        proven = positions == [0] and axes is not None and all(axis % (1 + len(operands[0])) for axis in np.ravel(axes))
    elif row.kind in (OpKind.SORTS, OpKind.MIXES_LAST_AXIS):
        proven = len(outputs[0]) > 0
    elif row.pairs_points and len(positions) == len(operation.inputs):
        # From rank 3 on, the first axis only counts the products.
        proven = all(len(units) > 1 for units in operands.values())
    elif row.kind is OpKind.PRODUCT and len(positions) == 1:
        proven = keeps_points(operation, positions[0], 1 + len(operands[positions[0]]), 1 + len(outputs[0]))
    return proven
