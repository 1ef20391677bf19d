"""The structured Jacobian at given rows: the kernels and the diagonals that a structure speaks of, in numbers."""

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from keras_jacmon.jacobians.views import flattened
from keras_jacmon.operators.factors import Diagonal, Kernel
from keras_jacmon.operators.structured import StructuredJacobian
from keras_jacmon.structure.index_map import IndexMap, Node
from keras_jacmon.structure.structure import Product, Segment, Structure


def fixed_values(structure: Structure) -> dict[str, tf.Tensor]:
    """What the cell computes from its weights alone, by the names of the cell's graph; the same for all rows."""
    values = structure.graph.replay(structure.weights_only, {})
    return {tensor.name: value for tensor, value in zip(structure.weights_only, values, strict=True)}


def kernels_of(structure: Structure, fixed: Mapping[str, tf.Tensor], dtype: tf.DType) -> dict[Node, Kernel]:
    """The kernels of the products, in the type of the states."""
    return {
        Node.product(k): Kernel(tf.cast(_matrix(structure, product, fixed), dtype))
        for k, product in enumerate(structure.products)
    }


def structured_jacobian(
    structure: Structure,
    values: Mapping[str, tf.Tensor],
    kernels: Mapping[Node, Kernel],
    news: Sequence[int],
    sources: Sequence[Node],
) -> StructuredJacobian:
    """The Jacobian of some new states by some sources, at given rows.

    Args:
        structure: Of the cell; the blocks must have one.
        values: What tensors of the cell's graph, by their names, are at these rows: inputs and states, and whatever
            need not be computed again.
        kernels: From `kernels_of`.
        news: Positions of new states.
        sources: Nodes of old states, or of the inputs.

    Returns:
        The operator, batch shape `(rows,)`.
    """
    graph, point = structure.graph, values[structure.tensor(sources[0]).name]
    # What leads to a new state, or to what a product multiplies; the latter before the former only in the graph.
    links: dict[Node, dict[Node, IndexMap]] = {}
    pending: list[Node] = [Node.new_state(new) for new in news]
    while pending:
        target = pending.pop()
        links[target] = {
            base: link
            for base, link in structure.index_maps(structure.target(target)).items()
            if base in sources or (base.is_product and structure.reaches(base, sources))
        }
        pending += [base for base in links[target] if base.is_product and base not in links]
    products = sorted(target for target in links if target.is_product)

    # A tensor of its own for each base: two states may be one tensor, and the derivatives must tell them apart.
    pieces = {source: [Segment(t := structure.tensor(source), np.arange(structure.size(t)))] for source in sources}
    pieces |= {product: structure.segments(product, sources) for product in products}
    everything = [piece.tensor for parts in pieces.values() for piece in parts]
    feeds = dict(values)
    results = graph.replay(everything, feeds)
    feeds |= {tensor.name: tf.identity(value) for tensor, value in zip(everything, results, strict=True)}

    # All at once, since they have most of their operations in common.
    bent = [target for target, into in links.items() if not all(link.unchanged for link in into.values())]
    values_of = dict(zip(bent, graph.replay([structure.target(target) for target in bent], feeds), strict=True))
    stops = [feeds[tensor.name] for tensor in everything]
    diagonals: dict[tuple[Node, Node], Diagonal] = {}
    for target, into in links.items():
        changed = [(base, piece) for base, link in into.items() if not link.unchanged for piece in pieces[base]]
        derivatives = _derivatives(values_of.get(target), [feeds[piece.tensor.name] for _, piece in changed], stops)
        by_base: dict[Node, list[tuple[Segment, tf.Tensor | None]]] = {base: [] for base, _ in changed}
        for (base, piece), derivative in zip(changed, derivatives, strict=True):
            by_base[base].append((piece, derivative))
        for base, link in into.items():
            if link.unchanged:
                diagonals[target, base] = Diagonal(link, None)
            elif any(derivative is not None for _, derivative in by_base[base]):
                like = [feeds[piece.tensor.name] for piece in pieces[base]]
                diagonals[target, base] = _diagonal(link, by_base[base], like, point.dtype)
    return StructuredJacobian(
        rows=point.shape[0] if point.shape[0] is not None else tf.shape(point)[0],
        news={new: structure.size(graph.new_states[new]) for new in news},
        sources={source: structure.size(structure.tensor(source)) for source in sources},
        kernels={product: kernels[product] for product in products},
        outer={(target.position, base): d for (target, base), d in diagonals.items() if not target.is_product},
        inner={(target, base): d for (target, base), d in diagonals.items() if target.is_product},
        dtype=point.dtype,
    )


def _diagonal(
    link: IndexMap, found: Sequence[tuple[Segment, tf.Tensor | None]], like: Sequence[tf.Tensor], dtype: tf.DType
) -> Diagonal:
    """The diagonal with the derivatives that were found for each piece of its base, None for zeros."""
    derivatives = [
        tf.zeros_like(value) if derivative is None else derivative
        for (_, derivative), value in zip(found, like, strict=True)
    ]
    # A product may be computed in another type than the states have.
    parts = [tf.cast(flattened(derivative), dtype) for derivative in derivatives]
    return Diagonal(link, tuple((piece.units, part) for (piece, _), part in zip(found, parts, strict=True)))


def _derivatives(
    value: tf.Tensor | None, bases: Sequence[tf.Tensor], all_bases: Sequence[tf.Tensor]
) -> list[tf.Tensor | None]:
    """The derivative of each unit of the value by the one unit of each base that reaches it.

    One backward pass from ones: each unit of a base reaches one unit of the value at most, so that no two derivatives
    add up.
    """
    if not bases:
        return []
    gradients = tf.gradients(value, bases, tf.ones_like(value), stop_gradients=all_bases)
    return [None if gradient is None else tf.convert_to_tensor(gradient) for gradient in gradients]


def _matrix(structure: Structure, product: Product, fixed: Mapping[str, tf.Tensor]) -> tf.Tensor:
    operation, graph = product.operation, structure.graph
    if operation.type == "MatMul":
        (kernel,) = graph.replay([operation.inputs[1]], fixed)
        kernel = tf.transpose(kernel) if operation.get_attr("transpose_b") else kernel
        # A variable may leave its shape open.
        return kernel if kernel.shape.is_fully_defined() else tf.ensure_shape(kernel, product.shape)
    # Whatever form the product has: what it makes of the unit vectors are the rows of its matrix.
    size, units = product.shape
    vectors = tf.reshape(tf.eye(size, dtype=product.y.dtype), [size, *structure.units(product.y)])
    (images,) = graph.replay([product.z], {**fixed, product.y.name: vectors})
    return tf.reshape(images, [size, units])
