"""Which tensors of a cell are sums of products, and had better be computed as such when it is unrolled?"""

from collections.abc import Collection, Mapping, Sequence

import tensorflow as tf

from keras_jacmon.cell.unroll_plan import Sum, UnrollPlan
from keras_jacmon.operators.factors import Kernel
from keras_jacmon.structure.ops import MOVING, Labels, passes_unchanged
from keras_jacmon.structure.structure import Node, Structure

# More parts than this, or narrower ones, take longer as products of their own than one product for all of them, and its
# split: 1.1 times as long at 64 units, 0.75 times at 128.
_MOST_PARTS, _LEAST_UNITS = 8, 128


def shortcut_of(structure: Structure, fixed: Mapping[str, tf.Tensor], kernels: Mapping[Node, Kernel]) -> UnrollPlan:
    """How a cell with a known structure is unrolled."""
    graph = structure.graph
    states = [("state", q) for q in range(len(graph.states))]
    products = [k for k in range(len(structure.products)) if structure.reaches(k, states)]
    pieces = {k: [piece.tensor for piece in structure.pieces(k, states)] for k in products}
    kept = [tensor for tensors in pieces.values() for tensor in tensors]

    sums = [part for k in products for part in _as_sums(structure, pieces[k], k, fixed, kernels)]
    done = {part.tensor.name for part in sums}
    wanted = [*graph.new_states, *kept, *(part.of_states[0] for part in sums if part.of_states)]
    wanted = [tensor for tensor in wanted if tensor.name not in done]
    hoisted = {tensor.name: tensor for tensor in structure.hoisted}
    needed = graph.between(done | hoisted.keys(), wanted)[1] | {tensor.name for tensor in wanted}
    rest = [tensor for name, tensor in hoisted.items() if name in needed]
    of_inputs = _as_sums(structure, rest, None, fixed, kernels)
    return UnrollPlan(graph, fixed, [] if of_inputs else rest, [*sums, *of_inputs], kept)


def _as_sums(
    structure: Structure,
    tensors: Sequence[tf.Tensor],
    of_states: int | None,
    fixed: Mapping[str, tf.Tensor],
    kernels: Mapping[Node, Kernel],
) -> list[Sum]:
    """Tensors as sums of products of the inputs, and one of the states if it is given; nothing unless all of them are.

    As long as one of them is not, the wide product that they have in common is needed anyway.
    """
    sums: list[Sum] = []
    if len(tensors) > 1 and (len(tensors) > _MOST_PARTS or min(map(structure.size, tensors)) < _LEAST_UNITS):
        return sums
    for tensor in tensors:
        summands = _summands(structure, tensor)
        of_inputs = [k for k in summands or {} if k != of_states]
        alone = all(structure.is_of_inputs_alone(structure.products[k].y) for k in of_inputs)
        alike = all(kernels["product", k].matrix.dtype == tensor.dtype for k in summands or {})
        if summands is None or not alone or not alike:
            return []
        parts = {k: (structure.products[k].y, kernels["product", k].columns(units)) for k, units in summands.items()}
        results = [structure.products[k].z for k in summands]
        zeros = {z.name: tf.zeros([1, *structure.units(z)], z.dtype) for z in results}
        (constant,) = structure.graph.replay([tensor], {**fixed, **zeros})
        constant = tf.reshape(constant, [structure.size(tensor)])
        sums.append(
            Sum(tensor, [parts[k] for k in of_inputs], None if of_states is None else parts[of_states], constant)
        )
    return sums


def _summands(structure: Structure, tensor: tf.Tensor) -> dict[int, Labels] | None:
    """The products that add up to a tensor, but for a constant, each with the unit that each unit of it is made from.

    None if it is not such a sum, or no other than a product itself.
    """
    summands: dict[int, Labels] = {}
    for (kind, k), link in structure.links(tensor).items():
        slots = link.slots
        if kind != "product" or not link.unchanged or len(slots) != 1 or (slots < 0).any():
            return None
        product = structure.products[k]
        if product.operation.type != "MatMul" or not product.z.dtype == product.y.dtype == tensor.dtype:
            return None
        summands[k] = slots[0]
    results = {structure.products[k].z.name for k in summands}
    return summands if tensor.name not in results and _adds_up(structure, tensor, results) else None


def _adds_up(structure: Structure, tensor: tf.Tensor, results: Collection[str]) -> bool:
    """Whether nothing but these results of products, and constants, is moved and added on all ways to a tensor.

    Derivatives of one do not tell it all: what has none (integers, a stopped gradient) and what has no labels (a unit
    that is used several times) may be a part of the values, and a narrower type rounds them.
    """
    pending = [tensor]
    while pending:
        part = pending.pop()
        if part.name in results or not structure.varies(part):
            continue
        if part.dtype != tensor.dtype or structure.is_spoilt(part) or not part.op.inputs:
            return False
        varying = [k for k, operand in enumerate(part.op.inputs) if structure.varies(operand)]
        if part.op.type not in MOVING and not all(passes_unchanged(part.op, k) for k in varying):
            return False
        pending += [part.op.inputs[k] for k in varying]
    return True
