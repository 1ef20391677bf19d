"""A Jacobian made of diagonals and of kernels that all rows share, as a linear operator."""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from keras_jacmon.jacobians.discovery import Base, Link

# More runs of neighbouring units than this are gathered one by one.
_MOST_RUNS = 16


@dataclass(frozen=True)
class Diagonal:
    """An elementwise way from a base (a source or a product) to a target (a new state or what a product multiplies).

    Attributes:
        link: Which unit leads to which.
        values: The derivatives, `(rows, units of the base)`; None if all are one.
    """

    link: Link
    values: tf.Tensor | None

    def forward(self, tangent: tf.Tensor) -> tf.Tensor:
        """From a change of the base to that of the target, `(rows, ..., units)`."""
        scaled = tangent if self.values is None else _beside(self.values, tangent) * tangent
        return _sum([take(scaled, slot) for slot in self.link.slots])

    def backward(self, cotangent: tf.Tensor) -> tf.Tensor:
        """The transpose of `forward`."""
        pulled = take(cotangent, self.link.targets)
        return pulled if self.values is None else _beside(self.values, cotangent) * pulled


class StructuredJacobian(tf.linalg.LinearOperator):
    """`J = D + Σ A_m W_mᵀ B_m` for each row: D, A, B index-mapped diagonals, the kernels W shared by all rows.

    Where a product multiplies what another one has given, B holds that product: a chain. Products with vectors take
    one product with each kernel. The sum of the entries and the sum of their squares are closed forms, O(units) per row
    where `B_m = 1`, O(units²) at most; of a block behind a chain the sum of squares has none.

    Args:
        rows: How many there are, a scalar.
        news: New states and their sizes, in the order of J's rows.
        sources: Old states (or the inputs) and their sizes, in the order of J's columns.
        kernels: By product, in the order in which they are computed: `(units in, units out)`.
        outer: What leads to a new state, by that and the base.
        inner: What leads to what a product multiplies, by that product and the base.
        dtype: Of the entries.

    References:
        The closed forms follow from `J[i, k] = δ_ik d_k + Σ_m a_mi W_m[k, i] b_mk` by summation.
    """

    def __init__(
        self,
        *,
        rows: tf.Tensor | int,
        news: Mapping[int, int],
        sources: Mapping[Base, int],
        kernels: Mapping[Base, tf.Tensor],
        outer: Mapping[tuple[int, Base], Diagonal],
        inner: Mapping[tuple[Base, Base], Diagonal],
        dtype: tf.DType,
    ) -> None:
        kernels, outer, inner = _needed(sources, kernels, outer, inner)
        self._given: dict[str, Any] = {
            "rows": rows,
            "news": dict(news),
            "sources": dict(sources),
            "kernels": kernels,
            "outer": outer,
            "inner": inner,
            "dtype": dtype,
        }
        super().__init__(dtype=dtype, parameters=self._given, name="structured_jacobian")
        self._rows = rows
        self._news, self._sources, self._kernels = self._given["news"], self._given["sources"], self._given["kernels"]
        self._outer, self._inner = self._given["outer"], self._given["inner"]
        self._blocks: dict[tuple[int, Base], StructuredJacobian] = {}

    def _shape(self) -> tf.TensorShape:
        rows = tf.get_static_value(self._rows)
        return tf.TensorShape([rows, sum(self._news.values()), sum(self._sources.values())])

    def _shape_tensor(self) -> tf.Tensor:
        return tf.stack([self._rows, sum(self._news.values()), sum(self._sources.values())])

    def _matmul(self, x: tf.Tensor, adjoint: bool = False, adjoint_arg: bool = False) -> tf.Tensor:  # noqa: FBT001, FBT002 - as in the base class
        x = tf.linalg.adjoint(x) if adjoint_arg else x
        multiply = self._backward if adjoint else self._forward
        if x.shape[-1] == 1:
            return multiply(x[..., 0])[..., None]
        return tf.linalg.matrix_transpose(multiply(tf.linalg.matrix_transpose(x)))

    def _forward(self, v: tf.Tensor) -> tf.Tensor:
        """J v, `(rows, ..., m)` from `(rows, ..., n)`."""
        parts = self._forward_parts(v)
        zeros = {new: _zeros_beside(v, size) for new, size in self._news.items() if parts[new] is None}
        return tf.concat([(zeros if new in zeros else parts)[new] for new in self._news], axis=-1)

    def _forward_parts(self, v: tf.Tensor) -> dict[int, tf.Tensor | None]:
        """J v by new state; None if none of the sources leads to it."""
        tangents = dict(zip(self._sources, tf.split(v, list(self._sources.values()), axis=-1), strict=True))
        for product, kernel in self._kernels.items():
            ways = [d.forward(tangents[base]) for (into, base), d in self._inner.items() if into == product]
            tangents[product] = _times(_sum(ways), kernel)
        ways_to = {
            new: [d.forward(tangents[base]) for (into, base), d in self._outer.items() if into == new]
            for new in self._news
        }
        return {new: _sum(ways) if ways else None for new, ways in ways_to.items()}

    def _backward(self, w: tf.Tensor) -> tf.Tensor:
        """Jᵀ w, `(rows, ..., n)` from `(rows, ..., m)`."""
        cotangents = dict(zip(self._news, tf.split(w, list(self._news.values()), axis=-1), strict=True))
        ways: dict[Base, list[tf.Tensor]] = {base: [] for base in (*self._sources, *self._kernels)}
        for (new, base), diagonal in self._outer.items():
            ways[base].append(diagonal.backward(cotangents[new]))
        for product, kernel in reversed(list(self._kernels.items())):
            pulled = _times(_sum(ways[product]), kernel, transposed=True)
            for (into, base), diagonal in self._inner.items():
                if into == product:
                    ways[base].append(diagonal.backward(pulled))
        parts = [_sum(ways[s]) if ways[s] else _zeros_beside(w, size) for s, size in self._sources.items()]
        return tf.concat(parts, axis=-1)

    def block(self, new: int, source: Base) -> "StructuredJacobian":
        """The derivative of one new state by one source; the same operator each time."""
        if len(self._news) == len(self._sources) == 1:
            return self
        if (new, source) not in self._blocks:
            given = {
                **self._given,
                "news": {new: self._news[new]},
                "sources": {source: self._sources[source]},
                "outer": {key: diagonal for key, diagonal in self._outer.items() if key[0] == new},
            }
            self._blocks[new, source] = StructuredJacobian(**given)
        return self._blocks[new, source]

    def blocks(self) -> "list[StructuredJacobian]":
        """The derivative of each new state by each source, as operators of their own."""
        return [self.block(new, source) for new in self._news for source in self._sources]

    @property
    def is_chain(self) -> bool:
        """Whether a product multiplies what another one has given."""
        return any(base in self._kernels for _, base in self._inner)

    @functools.cached_property
    def entry_sum(self) -> tf.Tensor:
        """The sum of all entries of each row's Jacobian, `(rows,)`."""
        if len(self.blocks()) > 1:
            return tf.add_n([block.entry_sum for block in self.blocks()])
        # One row of ones broadcasts against the diagonals: products that come before any diagonal are taken once.
        parts = self._forward_parts(tf.ones([1, sum(self._sources.values())], self.dtype)).values()
        return self._for_each_row([tf.reduce_sum(part, axis=-1) for part in parts if part is not None])

    @functools.cached_property
    def square_sum(self) -> tf.Tensor:
        """The sum of the squares of all entries of each row's Jacobian, `(rows,)`, unless that is a chain."""
        if len(self.blocks()) > 1:
            return tf.add_n([block.square_sum for block in self.blocks()])
        ((new, _),) = self._news.items()
        ((source, _),) = self._sources.items()
        ways = [
            (self._inner[product, source], kernel, self._outer[new, product])
            for product, kernel in self._kernels.items()
            if (product, source) in self._inner and (new, product) in self._outer
        ]
        return self._for_each_row(_square_sums(self._outer.get((new, source)), ways, self.dtype))

    def _for_each_row(self, sums: list[tf.Tensor]) -> tf.Tensor:
        """The total of tensors `(rows,)`, `(1,)` or `()`."""
        total = _sum(sums) if sums else tf.zeros([], self.dtype)
        return tf.broadcast_to(total, [self._rows])


def _needed(
    sources: Mapping[Base, int],
    kernels: Mapping[Base, tf.Tensor],
    outer: Mapping[tuple[int, Base], Diagonal],
    inner: Mapping[tuple[Base, Base], Diagonal],
) -> tuple[dict[Base, tf.Tensor], dict[tuple[int, Base], Diagonal], dict[tuple[Base, Base], Diagonal]]:
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


@dataclass(frozen=True)
class _Product:
    """What one product gives to a block: `Σ_s Diag(a_s) V_sᵀ Diag(b)`.

    a is `(rows, slots, m)` and b `(rows, n)`, or None for ones; V is `(n, slots, m)`, shared by all rows.
    """

    a: tf.Tensor | None
    V: tf.Tensor
    b: tf.Tensor | None

    @classmethod
    def of(cls, into: Diagonal, kernel: tf.Tensor, out: Diagonal) -> "_Product":
        """What a kernel gives, with what leads to it and from it."""
        slots, m = out.link.slots.shape
        V = take(take(kernel, into.link.targets, axis=0), out.link.slots.ravel())
        a = None if out.values is None else tf.reshape(take(out.values, out.link.slots.ravel()), [-1, slots, m])
        return cls(a, tf.reshape(V, [-1, slots, m]), into.values)

    @property
    def slots(self) -> int:
        """How many units of the product each unit of the new state is made from."""
        return int(self.V.shape[1])


def _square_sums(
    direct: Diagonal | None, ways: Iterable[tuple[Diagonal, tf.Tensor, Diagonal]], dtype: tf.DType
) -> list[tf.Tensor]:
    """What adds up to the sum of the squares of a block: tensors `(rows,)`, `(1,)` or `()`.

    Args:
        direct: From the source to the new state.
        ways: For each product between them what leads to it, its kernel, and what leads from it.
        dtype: Of the entries.
    """
    products = [_Product.of(*way) for way in ways]
    sums = [
        _inner_product(left, slot, right, slot if left is right else 0)
        for left, right in itertools.combinations_with_replacement(products, 2)
        for slot in range(left.slots)
    ]
    if direct is not None:
        for slot in direct.link.slots:
            sums += _direct_sums(direct.values, slot, products, dtype)
    return sums


def _direct_sums(
    values: tf.Tensor | None, slot: npt.NDArray[np.int64], products: Sequence[_Product], dtype: tf.DType
) -> list[tf.Tensor]:
    """The squares of the entries of a direct way, and twice their products with the products' entries there."""
    units = np.flatnonzero(slot >= 0)
    places = slot[units]
    d = tf.ones([1, units.size], dtype) if values is None else take(values, places)
    sums = [tf.reduce_sum(d**2, axis=-1)]
    for product in products:
        # (slots, units): the entries of V where the direct way is.
        V = tf.gather_nd(tf.transpose(product.V, [0, 2, 1]), np.stack([places, units], axis=1))
        V = tf.transpose(V)
        scale = d if product.b is None else d * take(product.b, places)
        scaled = V if product.a is None else take(product.a, units) * V
        sums.append(2 * tf.reduce_sum(scale * tf.reduce_sum(scaled, axis=-2), axis=-1))
    return sums


def _inner_product(left: _Product, slot: int, right: _Product, first: int) -> tf.Tensor:
    """`Σ_ik L_ik R_ik` for each row, L slot `slot` of one product and R the slots from `first` on of another one.

    Without forming either: `Σ_i a_i a'_i ((b∘b') @ (V∘V'))_i`. Every pair of different slots counts twice.
    """
    count = right.slots - first
    weights = np.full([count, 1], 2.0)
    if left is right:
        weights[0] = 1.0
    V = left.V[:, slot : slot + 1] * right.V[:, first:] * tf.constant(weights, left.V.dtype)
    units = count * int(V.shape[2])
    V = tf.reshape(V, [-1, units])
    a = _product_or_one(
        None if left.a is None else left.a[:, slot : slot + 1], None if right.a is None else right.a[:, first:]
    )
    b = _product_or_one(left.b, right.b)
    if a is not None:
        # Where the right product has no derivatives of its own, the left one's hold for all its slots.
        a = tf.repeat(a, count, axis=1) if a.shape[1] != count else a
        a = tf.reshape(a, [-1, units])
    if a is None:
        per_source = tf.reduce_sum(V, axis=1)
        return tf.reduce_sum(per_source) if b is None else tf.linalg.matvec(b, per_source)
    if b is None:
        return tf.linalg.matvec(a, tf.reduce_sum(V, axis=0))
    return tf.reduce_sum(a * (b @ V), axis=-1)


def take(tensor: tf.Tensor, index: npt.NDArray[np.int64], axis: int = -1) -> tf.Tensor:
    """Picks units along an axis, zero where the index is -1; as few slices as possible, since a gather is slow."""
    axis %= tensor.shape.rank
    size = tensor.shape[axis]
    if np.array_equal(index, np.arange(size)):
        return tensor
    none = index < 0
    breaks = (np.diff(index) != np.where(none[1:], 0, 1)) | (none[1:] != none[:-1])
    runs = np.split(index, np.flatnonzero(breaks) + 1)
    if len(runs) > _MOST_RUNS:
        # The zero stands behind the last unit.
        padded = tf.pad(tensor, [[0, int(k == axis)] for k in range(tensor.shape.rank)])
        return tf.gather(padded, np.where(index < 0, size, index), axis=axis)
    before = [slice(None)] * axis
    pieces = []
    for run in runs:
        if run[0] < 0:
            shape = tf.concat([tf.shape(tensor)[:axis], [run.size], tf.shape(tensor)[axis + 1 :]], axis=0)
            pieces.append(tf.zeros(shape, tensor.dtype))
        else:
            pieces.append(tensor[(*before, slice(int(run[0]), int(run[-1]) + 1))])
    return pieces[0] if len(pieces) == 1 else tf.concat(pieces, axis=axis)


def _times(vectors: tf.Tensor, kernel: tf.Tensor, *, transposed: bool = False) -> tf.Tensor:
    """Products of vectors `(rows, ..., units)` with a kernel, as one product of two matrices."""
    *leading, units = vectors.shape
    flat = tf.matmul(tf.reshape(vectors, [-1, units]), kernel, transpose_b=transposed)
    if len(leading) == 1:
        return flat
    return tf.reshape(flat, tf.concat([tf.shape(vectors)[:-1], [flat.shape[-1]]], axis=0))


def _beside(values: tf.Tensor, vectors: tf.Tensor) -> tf.Tensor:
    """Values `(rows, units)` shaped to go with vectors `(rows, ..., units)`."""
    return values if vectors.shape.rank == values.shape.rank else values[:, None]


def _product_or_one(left: tf.Tensor | None, right: tf.Tensor | None) -> tf.Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left * right


def _sum(tensors: list[tf.Tensor]) -> tf.Tensor:
    """Like `tf.add_n`, but broadcasting."""
    return functools.reduce(tf.add, tensors)


def _zeros_beside(vectors: tf.Tensor, size: int) -> tf.Tensor:
    return tf.zeros(tf.concat([tf.shape(vectors)[:-1], [size]], axis=0), vectors.dtype)
