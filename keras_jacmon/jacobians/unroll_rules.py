"""Rules for unrolling a cell with a known structure at a lower cost than by calling it at each step."""

from collections.abc import Collection, Mapping, Sequence

import tensorflow as tf

from keras_jacmon.cell.unroll_plan import Sum, UnrollPlan
from keras_jacmon.operators.factors import Kernel
from keras_jacmon.structure.index_map import Node
from keras_jacmon.structure.movers import Labels
from keras_jacmon.structure.ops import moves_units, passes_unchanged
from keras_jacmon.structure.structure import Structure

# With more parts than this, or with narrower or wider ones, one product for each part takes longer than one product for
# all of them and a split: 1.1 times as long at 64 units, 0.6 times at 128, as long at 256 and 1.1 times at 1024.
_MOST_PARTS, _LEAST_UNITS, _MOST_UNITS = 8, 128, 511


def unroll_plan_of(
    structure: Structure, weights_only: Mapping[str, tf.Tensor], kernels: Mapping[Node, Kernel]
) -> UnrollPlan:
    """Plans the unrolling of a cell with a known structure.

    Args:
        structure: `Structure` of the cell's step.
        weights_only: Mapping by name, the values of the tensors of its graph that depend on weights alone.
        kernels: Mapping from the nodes of its products to their kernels.

    Returns:
        `UnrollPlan`.
    """
    graph = structure.graph
    states = [Node.state(q) for q in range(len(graph.states))]
    products = [node for node in map(Node.product, range(len(structure.products))) if structure.reaches(node, states)]
    segments = {node: [segment.tensor for segment in structure.segments(node, states)] for node in products}
    by_node = {node: _as_sums(structure, segments[node], node, weights_only, kernels) for node in products}
    sums = [part for parts in by_node.values() for part in parts]
    ends = [segments[node] if parts else _whole(structure, segments[node]) for node, parts in by_node.items()]
    saved = [tensor for tensors in ends for tensor in tensors]
    done = {part.tensor.name for part in sums}
    wanted = [*graph.new_states, *saved, *(part.of_states[0] for part in sums if part.of_states)]
    wanted = [tensor for tensor in wanted if tensor.name not in done]
    inputs_only = {tensor.name: tensor for tensor in structure.inputs_only}
    needed = graph.between(done | inputs_only.keys(), wanted)[1] | {tensor.name for tensor in wanted}
    rest = [tensor for name, tensor in inputs_only.items() if name in needed]
    of_inputs = _as_sums(structure, rest, None, weights_only, kernels)
    return UnrollPlan(graph, weights_only, [] if of_inputs else rest, [*sums, *of_inputs], saved)


def _whole(structure: Structure, parts: Sequence[tf.Tensor]) -> Sequence[tf.Tensor]:
    """Finds the one tensor that others are the parts of: it is saved in each step, and divided for all steps at once.

    Returns:
        List of this tensor; the parts themselves if they are not all that one operation makes of it.
    """
    operation = parts[0].op
    if len(parts) == 1 or {part.name for part in parts} != {part.name for part in operation.outputs}:
        return parts
    return [tensor for tensor in operation.inputs if structure.varies(tensor)]


def _as_sums(
    structure: Structure,
    tensors: Sequence[tf.Tensor],
    of_states: Node | None,
    weights_only: Mapping[str, tf.Tensor],
    kernels: Mapping[Node, Kernel],
) -> list[Sum]:
    """Writes tensors as sums of products of the inputs, and of one product of the states if it is given.

    Returns:
        List of `Sum`s; empty unless all of the tensors are such sums. If one of them is not, the wide product that they
        have in common is still needed, and nothing is gained.
    """
    sizes = list(map(structure.size, tensors))
    if len(sizes) > 1 and (len(sizes) > _MOST_PARTS or min(sizes) < _LEAST_UNITS or max(sizes) > _MOST_UNITS):
        return []
    sums = [_as_sum(structure, tensor, of_states, weights_only, kernels) for tensor in tensors]
    found = [part for part in sums if part is not None]
    return found if len(found) == len(sums) else []


def _as_sum(
    structure: Structure,
    tensor: tf.Tensor,
    of_states: Node | None,
    weights_only: Mapping[str, tf.Tensor],
    kernels: Mapping[Node, Kernel],
) -> Sum | None:
    """Writes one tensor as a sum; returns None if it is not a sum."""
    summands = _summands(structure, tensor)
    if summands is None:
        return None
    products = {node: structure.product(node) for node in summands}
    of_inputs = [node for node in summands if node != of_states]
    if not all(structure.depends_on_inputs_only(products[node].y) for node in of_inputs):
        return None
    if any(kernels[node].matrix.dtype != tensor.dtype for node in summands):
        return None
    parts = {node: (products[node].y, kernels[node].columns(units)) for node, units in summands.items()}
    results = [product.z for product in products.values()]
    zeros = {z.name: tf.zeros([1, *structure.units(z)], z.dtype) for z in results}
    (constant,) = structure.graph.replay([tensor], {**weights_only, **zeros})
    constant = tf.reshape(constant, [structure.size(tensor)])
    return Sum(tensor, [parts[node] for node in of_inputs], None if of_states is None else parts[of_states], constant)


def _summands(structure: Structure, tensor: tf.Tensor) -> dict[Node, Labels] | None:
    """Finds the products that add up to a tensor, except for a constant.

    Returns:
        Dict from each product to the labels of the tensor: the unit of the product that each unit is made from. None if
        the tensor is not such a sum, or is itself a product.
    """
    summands: dict[Node, Labels] = {}
    for node, index_map in structure.index_maps(tensor).items():
        slots = index_map.slots
        if not node.is_product or not index_map.unchanged or len(slots) != 1 or (slots < 0).any():
            return None
        product = structure.product(node)
        if product.operation.type != "MatMul" or not product.z.dtype == product.y.dtype == tensor.dtype:
            return None
        summands[node] = slots[0]
    results = {structure.product(node).z.name for node in summands}
    return summands if tensor.name not in results and _adds_up(structure, tensor, results) else None


def _adds_up(structure: Structure, tensor: tf.Tensor, results: Collection[str]) -> bool:
    """Tells if a tensor is made only by moving and adding these results of products, and constants.

    That the derivatives are one does not suffice. A part of the values may have no derivative (integers, a stopped
    gradient) or no index map (a unit that is used several times), and a narrower type rounds.
    """
    pending = [tensor]
    while pending:
        part = pending.pop()
        if part.name in results or not structure.varies(part):
            continue
        if part.dtype != tensor.dtype or structure.is_unstructured(part) or not part.op.inputs:
            return False
        varying = [k for k, operand in enumerate(part.op.inputs) if structure.varies(operand)]
        if not moves_units(part.op) and not all(passes_unchanged(part.op, k) for k in varying):
            return False
        pending += [part.op.inputs[k] for k in varying]
    return True
