"""Evaluation of a structured Jacobian at points: the kernels and the diagonals of a structure as tensors."""

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from keras_jacmon.jacobians.views import flattened
from keras_jacmon.operators.factors import Diagonal, Kernel
from keras_jacmon.operators.structured import StructuredJacobian
from keras_jacmon.structure.index_map import IndexMap, Node
from keras_jacmon.structure.structure import Product, Segment, Structure


def weights_only_values(structure: Structure) -> dict[str, tf.Tensor]:
    """The tensors that the cell computes from its weights alone, by their names in its graph."""
    values = structure.graph.replay(structure.weights_only, {})
    return {tensor.name: value for tensor, value in zip(structure.weights_only, values, strict=True)}


def kernels_of(structure: Structure, weights_only: Mapping[str, tf.Tensor], dtype: tf.DType) -> dict[Node, Kernel]:
    """The kernels of the products, in the type of the states."""
    return {
        Node.product(k): Kernel(tf.cast(_matrix(structure, product, weights_only), dtype))
        for k, product in enumerate(structure.products)
    }


def structured_jacobian(
    structure: Structure,
    values: Mapping[str, tf.Tensor],
    kernels: Mapping[Node, Kernel],
    outputs: Sequence[int],
    sources: Sequence[Node],
) -> StructuredJacobian:
    """Evaluates the Jacobian of some new states by some sources at the given points.

    Args:
        structure: The structure of the cell; the blocks must have one.
        values: Values at these points of tensors of the cell's graph, by their names: inputs and states, and whatever
            need not be computed again.
        kernels: From `kernels_of`.
        outputs: Positions of new states.
        sources: Nodes of old states, or of the inputs.

    Returns:
        The operator, batch shape `(points,)`.
    """
    graph, point = structure.graph, values[structure.tensor(sources[0]).name]
    index_maps = _index_maps(structure, outputs, sources)
    products = sorted(target for target in index_maps if target.is_product)
    segments = {source: [Segment(t := structure.tensor(source), np.arange(structure.size(t)))] for source in sources}
    segments |= {product: structure.segments(product, sources) for product in products}
    diagonals = _diagonals(structure, values, index_maps, segments, point.dtype)
    return StructuredJacobian(
        points=point.shape[0] if point.shape[0] is not None else tf.shape(point)[0],
        outputs={new: structure.size(graph.new_states[new]) for new in outputs},
        sources={source: structure.size(structure.tensor(source)) for source in sources},
        kernels={product: kernels[product] for product in products},
        outer={(target.position, node): d for (target, node), d in diagonals.items() if not target.is_product},
        inner={(target, node): d for (target, node), d in diagonals.items() if target.is_product},
        dtype=point.dtype,
    )


# By target, a new state or a product (for what it multiplies), and by node: the way from the node to the target.
_IndexMaps = dict[Node, dict[Node, IndexMap]]


def _index_maps(structure: Structure, outputs: Sequence[int], sources: Sequence[Node]) -> _IndexMaps:
    """The elementwise ways on which the sources reach the new states, directly and through products."""
    index_maps: _IndexMaps = {}
    pending = [Node.new_state(new) for new in outputs]
    while pending:
        target = pending.pop()
        index_maps[target] = {
            node: index_map
            for node, index_map in structure.index_maps(structure.target(target)).items()
            if node in sources or (node.is_product and structure.reaches(node, sources))
        }
        pending += [node for node in index_maps[target] if node.is_product and node not in index_maps]
    return index_maps


def _diagonals(
    structure: Structure,
    values: Mapping[str, tf.Tensor],
    index_maps: _IndexMaps,
    segments: Mapping[Node, Sequence[Segment]],
    dtype: tf.DType,
) -> dict[tuple[Node, Node], Diagonal]:
    """The diagonals by target and node, without those that are zero.

    Args:
        structure: The structure of the cell.
        values: Values of tensors of the cell's graph at the points, by their names.
        index_maps: The ways to find the derivatives of.
        segments: By node, the tensors that its units are in.
        dtype: Type of the states.
    """
    graph = structure.graph
    # A tensor of its own for each segment: two states may be one tensor, and the derivatives must tell them apart.
    tensors = [segment.tensor for parts in segments.values() for segment in parts]
    feeds = dict(values)
    results = graph.replay(tensors, feeds)
    feeds |= {tensor.name: tf.identity(value) for tensor, value in zip(tensors, results, strict=True)}
    # All at once, since they have most of their operations in common.
    changed = [target for target, ways in index_maps.items() if not all(way.unchanged for way in ways.values())]
    replayed = dict(zip(changed, graph.replay([structure.target(target) for target in changed], feeds), strict=True))
    stops = [feeds[tensor.name] for tensor in tensors]
    diagonals: dict[tuple[Node, Node], Diagonal] = {}
    for target, ways in index_maps.items():
        places = [(node, segment) for node, way in ways.items() if not way.unchanged for segment in segments[node]]
        bases = [feeds[segment.tensor.name] for _, segment in places]
        derivatives = _derivatives(replayed.get(target), bases, stops)
        by_node: dict[Node, list[tuple[Segment, tf.Tensor | None]]] = {node: [] for node, _ in places}
        for (node, segment), derivative in zip(places, derivatives, strict=True):
            by_node[node].append((segment, derivative))
        for node, way in ways.items():
            if way.unchanged:
                diagonals[target, node] = Diagonal(way, None)
            elif any(derivative is not None for _, derivative in by_node[node]):
                like = [feeds[segment.tensor.name] for segment in segments[node]]
                diagonals[target, node] = _diagonal(way, by_node[node], like, dtype)
    return diagonals


def _diagonal(
    index_map: IndexMap, found: Sequence[tuple[Segment, tf.Tensor | None]], like: Sequence[tf.Tensor], dtype: tf.DType
) -> Diagonal:
    """The diagonal with the derivatives that were found for each segment of its node, None for zeros."""
    derivatives = [
        tf.zeros_like(value) if derivative is None else derivative
        for (_, derivative), value in zip(found, like, strict=True)
    ]
    # A product may be computed in another type than the states have.
    parts = [tf.cast(flattened(derivative), dtype) for derivative in derivatives]
    return Diagonal(index_map, tuple((segment.units, part) for (segment, _), part in zip(found, parts, strict=True)))


def _derivatives(
    value: tf.Tensor | None, bases: Sequence[tf.Tensor], all_bases: Sequence[tf.Tensor]
) -> list[tf.Tensor | None]:
    """The derivative of each unit of the value by the one unit of each base tensor that reaches it.

    One backward pass from ones: each unit of a base reaches one unit of the value at most, so that no two derivatives
    add up.
    """
    if not bases:
        return []
    gradients = tf.gradients(value, bases, tf.ones_like(value), stop_gradients=all_bases)
    return [None if gradient is None else tf.convert_to_tensor(gradient) for gradient in gradients]


def _matrix(structure: Structure, product: Product, weights_only: Mapping[str, tf.Tensor]) -> tf.Tensor:
    operation, graph = product.operation, structure.graph
    if operation.type == "MatMul":
        (kernel,) = graph.replay([operation.inputs[1]], weights_only)
        kernel = tf.transpose(kernel) if operation.get_attr("transpose_b") else kernel
        # A variable may leave its shape open.
        return kernel if kernel.shape.is_fully_defined() else tf.ensure_shape(kernel, product.shape)
    # Whatever form the product has, its images of the unit vectors are the rows of its matrix.
    size, units = product.shape
    vectors = tf.reshape(tf.eye(size, dtype=product.y.dtype), [size, *structure.units(product.y)])
    (images,) = graph.replay([product.z], {**weights_only, product.y.name: vectors})
    return tf.reshape(images, [size, units])
