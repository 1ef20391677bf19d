"""Jacobians made of diagonals, and of kernels that all points share."""

import functools
from collections.abc import Mapping
from typing import Any, final

import numpy as np
import tensorflow as tf

from keras_jacmon.operators.contract import JacobianOperator
from keras_jacmon.operators.entry_moments import pooled, spread_within_rows
from keras_jacmon.operators.factors import Diagonal, Kernel, Order, SplitDiagonal
from keras_jacmon.structure.index_map import Node
from keras_jacmon.tensors import Points, joined, total

# Maximum number of slots of the diagonals of a block beyond the first ones; the pairs of all are taken one by one.
_MOST_WAYS = 16


@final
class StructuredJacobian(JacobianOperator):
    """`J = D + Σ A_m W_mᵀ B_m` at each point: D, A, B index-mapped diagonals, the kernels W shared by all points.

    Where a product multiplies the result of another one, B holds that product: a chain. Products with vectors take
    one product with each kernel. The sum of the entries and their spread are closed forms, O(units) per point where
    `B_m = 1`, O(units²) at most; a chain has none for the spread, nor have the others that `has_closed_form` names.

    Args:
        points: Integer or scalar tensor, number of points.
        outputs: Dictionary from new states to their sizes, in the order of J's rows.
        sources: Dictionary from old states (or the inputs) to their sizes, in the order of J's columns.
        kernels: Dictionary from products to their kernels, in the order of computation.
        outer: Dictionary from (new state, node) to the diagonal that leads from the node to the state.
        inner: Dictionary from (product, node) to the diagonal that leads from the node to the operand of the product.
        dtype: Type of the entries.

    References:
        The closed forms follow from `J[i, k] = δ_ik d_k + Σ_m a_mi W_m[k, i] b_mk` by summation.
    """

    def __init__(
        self,
        *,
        points: tf.Tensor | int,
        outputs: Mapping[int, int],
        sources: Mapping[Node, int],
        kernels: Mapping[Node, Kernel | Order],
        outer: Mapping[tuple[int, Node], Diagonal | SplitDiagonal],
        inner: Mapping[tuple[Node, Node], Diagonal | SplitDiagonal],
        dtype: tf.DType,
    ) -> None:
        kernels, outer, inner = _needed(sources, kernels, outer, inner)
        self._given: dict[str, Any] = {
            "points": points,
            "outputs": dict(outputs),
            "sources": dict(sources),
            "kernels": kernels,
            "outer": outer,
            "inner": inner,
            "dtype": dtype,
        }
        super().__init__(dtype=dtype, parameters=self._given, name="structured_jacobian")
        self._points = points
        self._outputs, self._sources, self._kernels = (
            self._given["outputs"],
            self._given["sources"],
            self._given["kernels"],
        )
        self._outer, self._inner = self._given["outer"], self._given["inner"]
        self._blocks: dict[tuple[int, Node], StructuredJacobian] = {}

    def _shape(self) -> tf.TensorShape:
        points = tf.get_static_value(self._points)
        return tf.TensorShape([points, sum(self._outputs.values()), sum(self._sources.values())])

    def _shape_tensor(self) -> tf.Tensor:
        return tf.stack([self._points, sum(self._outputs.values()), sum(self._sources.values())])

    def _matmul(self, x: tf.Tensor, adjoint: bool = False, adjoint_arg: bool = False) -> tf.Tensor:  # noqa: FBT001, FBT002 - as in the base class
        x = tf.linalg.adjoint(x) if adjoint_arg else x
        if x.shape[-1] == 1:
            return tf.expand_dims(self._matvec(tf.squeeze(x, axis=-1), adjoint), axis=-1)
        return tf.linalg.matrix_transpose(self.products(tf.linalg.matrix_transpose(x), adjoint=adjoint))

    def products(self, vectors: tf.Tensor, *, adjoint: bool = False) -> tf.Tensor:
        """The products with rows, as shared kernels multiply them, so that nothing is transposed."""
        return self._matvec(vectors, adjoint)

    def _matvec(self, x: tf.Tensor, adjoint: bool = False) -> tf.Tensor:  # noqa: FBT001, FBT002 - as in the base class
        return self._backward(x) if adjoint else self._forward(x)

    def _to_dense(self) -> tf.Tensor:
        if len(self.blocks()) > 1:
            return super()._to_dense()
        # Up to the first diagonal that is no constant, what all points share is computed once.
        columns = self._forward(tf.eye(sum(self._sources.values()), dtype=self.dtype)[None])
        return tf.linalg.matrix_transpose(
            tf.broadcast_to(columns, tf.concat([[self._points], tf.shape(columns)[1:]], 0))
        )

    def _forward(self, v: tf.Tensor) -> tf.Tensor:
        """J v, `(points, ..., m)` from `(points, ..., n)`."""
        parts = self._forward_parts(v)
        zeros = {new: _zeros_beside(v, size) for new, size in self._outputs.items() if parts[new] is None}
        return joined([(zeros if new in zeros else parts)[new] for new in self._outputs])

    def _forward_parts(self, v: tf.Tensor) -> dict[int, tf.Tensor | None]:
        """J v by new state; None if none of the sources leads to it."""
        tangents = dict(zip(self._sources, _split(v, list(self._sources.values())), strict=True))
        for product, kernel in self._kernels.items():
            ways = [d.forward(tangents[base]) for (into, base), d in self._inner.items() if into == product]
            tangents[product] = kernel.forward(total(ways))
        ways_to = {
            new: [d.forward(tangents[base]) for (into, base), d in self._outer.items() if into == new]
            for new in self._outputs
        }
        return {new: total(ways) if ways else None for new, ways in ways_to.items()}

    def _backward(self, w: tf.Tensor) -> tf.Tensor:
        """Jᵀ w, `(points, ..., n)` from `(points, ..., m)`."""
        cotangents = dict(zip(self._outputs, _split(w, list(self._outputs.values())), strict=True))
        ways: dict[Node, list[tf.Tensor]] = {base: [] for base in (*self._sources, *self._kernels)}
        for (new, base), diagonal in self._outer.items():
            ways[base].append(diagonal.backward(cotangents[new]))
        for product, kernel in reversed(list(self._kernels.items())):
            pulled = kernel.backward(total(ways[product]))
            for (into, base), diagonal in self._inner.items():
                if into == product:
                    ways[base].append(diagonal.backward(pulled))
        parts = [total(ways[s]) if ways[s] else _zeros_beside(w, size) for s, size in self._sources.items()]
        return joined(parts)

    def take(self, points: Points) -> "StructuredJacobian":
        """The operator of some of the points."""
        outer = {key: diagonal.take(points) for key, diagonal in self._outer.items()}
        inner = {key: diagonal.take(points) for key, diagonal in self._inner.items()}
        kernels = {product: kernel.take(points) for product, kernel in self._kernels.items()}
        return StructuredJacobian(
            **{**self._given, "points": points.count, "kernels": kernels, "outer": outer, "inner": inner}
        )

    def block(self, output: int, old: int) -> "StructuredJacobian":
        """The derivative of one new state by one old one; the same operator each time."""
        return self._block(output, Node.state(old))

    def _block(self, output: int, source: Node) -> "StructuredJacobian":
        if len(self._outputs) == len(self._sources) == 1:
            return self
        if (output, source) not in self._blocks:
            given = {
                **self._given,
                "outputs": {output: self._outputs[output]},
                "sources": {source: self._sources[source]},
                "outer": {key: diagonal for key, diagonal in self._outer.items() if key[0] == output},
            }
            self._blocks[output, source] = StructuredJacobian(**given)
        return self._blocks[output, source]

    def blocks(self) -> "list[StructuredJacobian]":
        """The derivative of each new state by each source, as operators of their own."""
        return [self._block(output, source) for output in self._outputs for source in self._sources]

    @property
    def _is_chain(self) -> bool:
        """True if a product multiplies the result of another one."""
        return any(node in self._kernels for _, node in self._inner)

    @property
    def _sorts(self) -> bool:
        """True if units are in an order of their own at each point."""
        return any(isinstance(kernel, Order) for kernel in self._kernels.values())

    def entry_sum(self) -> tf.Tensor:
        """The sum of all entries, `(points,)`; the same tensor each time."""
        return self._entry_sum

    @functools.cached_property
    def _entry_sum(self) -> tf.Tensor:
        return self._at_each_point([tf.reduce_sum(self.row_sums, axis=-1)])

    @functools.cached_property
    def row_sums(self) -> tf.Tensor:
        """The sums of the rows of each block, side by side, `(points, blocks * m)` or `(1, blocks * m)`."""
        blocks = self.blocks()
        if len(blocks) == 1:
            return self._forward(tf.ones([1, sum(self._sources.values())], self.dtype))
        sums = [block.row_sums for block in blocks]
        if len({rows.shape[0] for rows in sums}) > 1:
            sums = [tf.broadcast_to(rows, [self._points, rows.shape[1]]) for rows in sums]
        return joined(sums)

    @property
    def has_closed_form(self) -> bool:
        """True unless a product multiplies the result of another one, or units are sorted, complex or made from many.

        The closed form takes each pair of the ways from a unit of a product to a new state.
        """
        more = 0
        for diagonal in (*self._inner.values(), *self._outer.values()):
            if isinstance(diagonal, SplitDiagonal):
                return False
            more += len(diagonal.link.slots) - 1
        return not self._is_chain and not self._sorts and more <= _MOST_WAYS * len(self.blocks())

    def spread(self) -> tf.Tensor:
        """The sum of `(J_ik - mean)²`, by closed forms where there are; the same tensor each time."""
        return self._spread

    @functools.cached_property
    def _spread(self) -> tf.Tensor:
        blocks = self.blocks()
        if not all(block.has_closed_form for block in blocks):
            if len(blocks) == 1:
                return super().spread()
            counts = [int(block.shape[-2]) * int(block.shape[-1]) for block in blocks]
            means = [block.entry_sum() / count for block, count in zip(blocks, counts, strict=True)]
            return pooled(counts, means, [block.spread() for block in blocks])[1]
        # The spread within the rows of the blocks, and that of the means of these rows.
        columns = np.concatenate([np.full(int(block.shape[-2]), int(block.shape[-1])) for block in blocks])
        width = columns[0] if np.all(columns == columns[0]) else columns
        mean = tf.expand_dims(self.entry_sum(), axis=1) * tf.constant(width / columns.sum(), self.dtype)
        of_means = tf.square(self.row_sums - mean) @ tf.constant(1 / columns[:, None], self.dtype)
        within_rows = [term for block in blocks for term in block.within_rows]
        return self._at_each_point([*within_rows, tf.squeeze(of_means, axis=1)])

    @functools.cached_property
    def within_rows(self) -> list[tf.Tensor]:
        """The terms of the spread within the rows of a single block, each `(points,)`, `(1,)` or `()`."""
        return spread_within_rows(*self._ways(), self.row_sums, sum(self._sources.values()), self.dtype)

    def _ways(self) -> tuple[Diagonal | None, list[tuple[Diagonal, Kernel, Diagonal]]]:
        """The direct diagonal of a single block, and for each product its inner diagonal, kernel and outer diagonal."""
        ((new, _),) = self._outputs.items()
        ((source, _),) = self._sources.items()
        ways = [
            (self._inner[product, source], kernel, self._outer[new, product])
            for product, kernel in self._kernels.items()
            if (product, source) in self._inner and (new, product) in self._outer
        ]
        return self._outer.get((new, source)), ways

    def _at_each_point(self, sums: list[tf.Tensor]) -> tf.Tensor:
        """The total of tensors `(points,)`, `(1,)` or `()`."""
        everything = total(sums) if sums else tf.zeros([], self.dtype)
        is_there = everything.shape.rank == 1 and everything.shape[0] != 1
        return everything if is_there else tf.broadcast_to(everything, [self._points])


def _needed(
    sources: Mapping[Node, int],
    kernels: Mapping[Node, Kernel | Order],
    outer: Mapping[tuple[int, Node], Diagonal | SplitDiagonal],
    inner: Mapping[tuple[Node, Node], Diagonal | SplitDiagonal],
) -> tuple[
    dict[Node, Kernel | Order],
    dict[tuple[int, Node], Diagonal | SplitDiagonal],
    dict[tuple[Node, Node], Diagonal | SplitDiagonal],
]:
    """The products and diagonals on a way from a source to a new state."""
    begun = set(sources)
    for product in kernels:
        if any(into == product and base in begun for into, base in inner):
            begun.add(product)
    outer = {key: diagonal for key, diagonal in outer.items() if key[1] in begun}
    ended = {base for _, base in outer}
    for product in reversed(list(kernels)):
        if product in ended:
            ended |= {base for into, base in inner if into == product}
    kernels = {product: kernel for product, kernel in kernels.items() if product in begun & ended}
    inner = {key: d for key, d in inner.items() if key[0] in kernels and key[1] in begun}
    return kernels, outer, inner


def _split(vectors: tf.Tensor, sizes: list[int]) -> list[tf.Tensor]:
    if len(sizes) == 1:
        return [vectors]
    return tf.split(vectors, len(sizes) if len(set(sizes)) == 1 else sizes, axis=-1)


def _zeros_beside(vectors: tf.Tensor, size: int) -> tf.Tensor:
    return tf.zeros(tf.concat([tf.shape(vectors)[:-1], [size]], axis=0), vectors.dtype)
