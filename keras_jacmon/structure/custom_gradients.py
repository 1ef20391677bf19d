"""The proof that a custom gradient acts unit by unit, from the graph of the gradient."""

from collections.abc import Iterable

import numpy as np
import tensorflow as tf

from keras_jacmon.cell.cell_graph import CellGraph
from keras_jacmon.graphs.inlining import CustomGradient
from keras_jacmon.structure.ops import OpKind, is_linear, op_of


def acts_unit_by_unit(graph: CellGraph, gradient: CustomGradient, positions: Iterable[int]) -> bool:
    """Tells if unit u of the gradient by some operands is unit u of the gradient by the result, times a slope.

    The slope may be made from anything at the same point. A gradient that is clipped, for example, has none.

    Args:
        graph: `CellGraph`, the cell's step.
        gradient: `CustomGradient` of that graph.
        positions: Iterable of the positions of operands.
    """
    try:
        units = graph.units(gradient.seed)
    except NotImplementedError:
        return False
    affected, linear, sums = {gradient.seed.name}, {gradient.seed.name}, set[str]()
    for operation in graph.operations:
        made_from = [k for k, tensor in enumerate(operation.inputs) if tensor.name in affected]
        if not made_from or op_of(operation).kind is OpKind.SIZES or operation.type == "ZerosLike":
            continue
        names = [tensor.name for tensor in operation.outputs]
        affected.update(names)
        sources = {operation.inputs[k].name for k in made_from}
        zeros = [k for k, tensor in enumerate(operation.inputs) if _is_zero(tensor)]
        if operation.type == "Sum" and sources <= linear:
            sums.update(names)
        elif _has_units(graph, operation.outputs[0], units) and (
            (sources <= linear and is_linear(operation, made_from, zeros))
            # The tape adds up along axes that were broadcast. If as many units are left, there were none.
            or (sources <= sums and operation.type == "Reshape")
        ):
            linear.update(names)
    return all(k in gradient.slopes and gradient.slopes[k].name in linear for k in positions)


def _has_units(graph: CellGraph, tensor: tf.Tensor, units: tuple[int, ...]) -> bool:
    """Tells if a tensor is known to have these units at each point."""
    try:
        return graph.units(tensor) == units
    except NotImplementedError:
        return False


def _is_zero(tensor: tf.Tensor) -> bool:
    value = tf.get_static_value(tensor)
    return tensor.op.type == "ZerosLike" or (value is not None and not np.any(value))
