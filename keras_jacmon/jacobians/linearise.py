"""Evaluation of a structured Jacobian at points: the kernels and the diagonals of a structure as tensors."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from keras_jacmon.jacobians.views import flattened
from keras_jacmon.operators.factors import Diagonal, Kernel, Order, SplitDiagonal
from keras_jacmon.operators.structured import StructuredJacobian
from keras_jacmon.structure.index_map import IndexMap, Node, separated
from keras_jacmon.structure.structure import Product, Segment, Structure


def weights_only_values(structure: Structure) -> dict[str, tf.Tensor]:
    """The tensors that the cell computes from its weights alone, by their names in its graph."""
    values = structure.graph.replay(structure.weights_only, {})
    return {tensor.name: value for tensor, value in zip(structure.weights_only, values, strict=True)}


def kernels_of(structure: Structure, weights_only: Mapping[str, tf.Tensor], dtype: tf.DType) -> dict[Node, Kernel]:
    """The kernels of the products that all points share, in the type of the states."""
    return {
        Node.product(k): Kernel(tf.cast(_in_parts(_matrix(structure, product, weights_only)), dtype))
        for k, product in enumerate(structure.products)
        if not product.is_order
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
    orders = [product for product in products if structure.product(product).is_order]
    places = graph.replay([structure.product(product).operation.outputs[1] for product in orders], values)
    found = dict(zip(orders, map(Order, places), strict=True))
    return StructuredJacobian(
        points=point.shape[0] if point.shape[0] is not None else tf.shape(point)[0],
        outputs={new: structure.size(graph.new_states[new]) for new in outputs},
        sources={source: structure.size(structure.tensor(source)) for source in sources},
        kernels={product: found.get(product) or kernels[product] for product in products},
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
) -> dict[tuple[Node, Node], Diagonal | SplitDiagonal]:
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
    diagonals: dict[tuple[Node, Node], Diagonal | SplitDiagonal] = {}
    for target, ways in index_maps.items():
        places = [(node, segment) for node, way in ways.items() if not way.unchanged for segment in segments[node]]
        bases = [feeds[segment.tensor.name] for _, segment in places]
        to_complex = structure.target(target).dtype.is_complex
        chosen = separated([way.slots for way in ways.values()]) if ways else []
        ends = [(units, part) for units in chosen for part in ([0, 1] if to_complex else [None])]
        by_end = [_derivatives(replayed.get(target), units, part, bases, stops) for units, part in ends]
        for node, way in ways.items():
            like = [feeds[segment.tensor.name] for segment in segments[node]]
            mine = [k for k, (other, _) in enumerate(places) if other == node]
            pieces = [_pieces(segments[node], like, [found[k] for k in mine], dtype) for found in by_end]
            diagonal = _diagonal(way, ends, pieces, from_complex=structure.tensor(node).dtype.is_complex)
            if diagonal is not None:
                diagonals[target, node] = diagonal
    return diagonals


_Pieces = tuple[tuple[npt.NDArray[np.int64], tf.Tensor], ...]


def _diagonal(
    way: IndexMap,
    ends: Sequence[tuple[npt.NDArray[np.bool_], int | None]],
    pieces: Sequence[_Pieces],
    *,
    from_complex: bool,
) -> Diagonal | SplitDiagonal | None:
    """The diagonal of a way, None if it is zero.

    Args:
        way: The way.
        ends: The units of the target that are reached by one backward pass each, and of complex ones the part.
        pieces: For each end the derivatives by the units of the node, from `_pieces`; no matter if all are one.
        from_complex: True if the node is complex.
    """
    if len(ends) == 1 and not from_complex:
        return Diagonal(way, None if way.unchanged else pieces[0]) if way.unchanged or pieces[0] else None
    parts = [
        Diagonal(way.part(units, part, from_complex=from_complex), None if way.unchanged else derivatives)
        for (units, part), derivatives in zip(ends, pieces, strict=True)
        if way.unchanged or derivatives
    ]
    return SplitDiagonal(tuple(parts)) if parts else None


def _pieces(
    segments: Sequence[Segment], like: Sequence[tf.Tensor], found: Sequence[tf.Tensor | None], dtype: tf.DType
) -> _Pieces:
    """Pairs of units of a node and the derivatives by them, by the real and the imaginary part of a complex number.

    Args:
        segments: The tensors that the units are in.
        like: Their values.
        found: The derivatives by them, None for zeros.
        dtype: Type of the states.

    Returns:
        Tuple of the pairs, empty if there are only zeros.
    """
    if all(derivative is None for derivative in found):
        return ()
    pieces = []
    for segment, value, derivative in zip(segments, like, found, strict=True):
        values, units = flattened(tf.zeros_like(value) if derivative is None else derivative), segment.units
        if value.dtype.is_complex:
            values = flattened(tf.stack([tf.math.real(values), tf.math.imag(values)], axis=-1))
            units = np.stack([2 * units, 2 * units + 1], axis=-1).ravel()
        # A product may be computed in another type than the states have.
        pieces.append((units, tf.cast(values, dtype)))
    return tuple(pieces)


def _derivatives(
    value: tf.Tensor | None,
    units: npt.NDArray[np.bool_],
    part: int | None,
    bases: Sequence[tf.Tensor],
    all_bases: Sequence[tf.Tensor],
) -> list[tf.Tensor | None]:
    """The derivative of some units of the value by the units of the base tensors, each of which reaches one of them.

    One backward pass from ones, so no two derivatives add up. TensorFlow gives the derivatives by the real and the
    imaginary part of a base as one complex number.

    Args:
        value: The value.
        units: Boolean array `(units,)`, the units that are differentiated.
        part: 0 for the real and 1 for the imaginary parts of complex values; None for real values.
        bases: The tensors to differentiate by.
        all_bases: The tensors at which the derivative ends.
    """
    if not bases or value is None:
        return []
    ones = tf.ones_like(value)
    if not units.all():
        ones *= tf.constant(units.reshape(value.shape[1:]), value.dtype)
    gradients = tf.gradients(value, bases, 1j * ones if part else ones, stop_gradients=all_bases)
    return [None if gradient is None else tf.convert_to_tensor(gradient) for gradient in gradients]


def _in_parts(matrix: tf.Tensor) -> tf.Tensor:
    """A complex kernel as one between real and imaginary parts that stand beside each other; a real one as it is."""
    if not matrix.dtype.is_complex:
        return matrix
    real, imaginary = tf.math.real(matrix), tf.math.imag(matrix)
    by_part = tf.stack([tf.stack([real, imaginary], axis=-1), tf.stack([-imaginary, real], axis=-1)], axis=1)
    rows, columns = matrix.shape
    return tf.reshape(by_part, [2 * rows, 2 * columns])


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
