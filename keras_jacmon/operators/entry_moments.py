"""The spread of the entries of a Jacobian: pooled over blocks, and in closed form for a structured block."""

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from keras_jacmon.graphs.trace import graph_of
from keras_jacmon.operators.factors import Diagonal, Kernel
from keras_jacmon.tensors import take, total


def pooled(
    counts: Sequence[int], means: Sequence[tf.Tensor], spreads: Sequence[tf.Tensor]
) -> tuple[tf.Tensor, tf.Tensor]:
    """The mean of the entries of several blocks, and the sum of their squared distances from it.

    The spread of a block is that about its own mean; the distance of this from the mean of all is added, so that
    nothing cancels.

    Args:
        counts: Sequence of integers, the number of entries of each block.
        means: For each block the mean of its entries, `(points,)`.
        spreads: For each block the sum of the squared distances of its entries from their mean, `(..., points)`.
    """
    if len(counts) == 1:
        return means[0], spreads[0]
    weights = tf.constant([[count] for count in counts], means[0].dtype)
    every = tf.stack(list(means))
    mean = tf.reduce_sum(weights * every, axis=0) / sum(counts)
    return mean, total([*spreads, tf.reduce_sum(weights * tf.square(every - mean), axis=0)])


@dataclass(frozen=True)
class _Factor:
    """The contribution of one slot of a product to a block: `Diag(a) Vᵀ Diag(b)`.

    a is `(points, m)` and b `(points, n)`, or None for ones; V is `(n, m)`, shared by all points, or `(1, m)` if all of
    its rows are alike and b is given.
    """

    a: tf.Tensor | None
    V: tf.Tensor
    b: tf.Tensor | None

    @property
    def entry_sum(self) -> tf.Tensor:
        """The sum of all entries, `(points,)`, or `()` without any derivative."""
        if self.a is None:
            with graph_of(self.V):
                per_source = tf.reduce_sum(self.V, axis=1)
                everything = tf.reduce_sum(per_source)
            return everything if self.b is None else tf.linalg.matvec(self._summed(self.b), per_source)
        if self.b is not None:
            return tf.reduce_sum(self.a * (self._summed(self.b) @ self.V), axis=-1)
        with graph_of(self.V):
            # A product with ones takes half of the time of a sum along the first axis.
            per_unit = tf.squeeze(tf.ones([1, self.V.shape[0]], self.V.dtype) @ self.V, axis=0)
        return tf.linalg.matvec(self.a, per_unit)

    def _summed(self, b: tf.Tensor) -> tf.Tensor:
        """b, summed if all rows of V are alike."""
        return tf.reduce_sum(b, axis=-1, keepdims=True) if self.V.shape[0] < b.shape[-1] else b

    @functools.cached_property
    def _row_of_means(self) -> tf.Tensor:
        with graph_of(self.V):
            return tf.reduce_mean(self.V, axis=0, keepdims=True)

    @functools.cached_property
    def _mean_of_b(self) -> tf.Tensor:
        return tf.reduce_mean(self.b, axis=-1, keepdims=True)

    def times(self, other: "_Factor") -> "_Factor":
        """The product entry by entry."""
        with graph_of(self.V):
            V = self.V * other.V
        return _Factor(_product_or_one(self.a, other.a), V, _product_or_one(self.b, other.b))

    @property
    def levels(self) -> tf.Tensor:
        """A number near the mean of each row, `(points, m)` or `(1, m)`."""
        level = self._row_of_means if self.b is None else self._mean_of_b * self._row_of_means
        return level if self.a is None else self.a * level

    def without_levels(self) -> list["_Factor"]:
        """Factors with the same entries, less the level of their row."""
        with graph_of(self.V):
            centred = _Factor(self.a, self.V - self._row_of_means, self.b)
        # V b = (V - mean V) b + mean V (b - mean b) + mean V mean b, and the last one is the level.
        return [centred] if self.b is None else [centred, _Factor(self.a, self._row_of_means, self.b - self._mean_of_b)]


def _factors(into: Diagonal, kernel: Kernel, out: Diagonal) -> list[_Factor]:
    """The factors of a kernel between the diagonals that lead to it and from it."""
    rows = kernel.rows(into.link.targets)
    return [_Factor(out.at(slot), rows.columns(slot), into.values) for slot in out.link.slots]


# From the source to a product, its kernel, and from the product to the new state.
Way = tuple[Diagonal, Kernel, Diagonal]


def spread_within_rows(
    direct: Diagonal | None, ways: Iterable[Way], row_sums: tf.Tensor, columns: int, dtype: tf.DType
) -> list[tf.Tensor]:
    """Returns the terms of the sum of `(J_ik - mean of row i)²` over a block: tensors `(points,)`, `(1,)` or `()`.

    Centred before squaring: the difference of the sum of squares and the square of the sum would cancel for entries
    that are nearly equal. Without forming the factors F of the block:
    `Σ_ik F_ik F'_ik = Σ_i a_i a'_i ((b∘b') @ (V∘V'))_i`.

    Args:
        direct: `Diagonal` from the source to the new state; None if there is none.
        ways: For each product between them, the diagonal to it, its kernel, and the diagonal from it.
        row_sums: `(points, m)` or `(1, m)`, the sums of the block's rows.
        columns: Integer, number of columns of the block.
        dtype: Type of the entries.
    """
    whole = [factor for way in ways for factor in _factors(*way)]
    factors = [part for factor in whole for part in factor.without_levels()]
    if all(factor.a is not None and factor.b is None for factor in factors):
        sums = _squares_after_kernels(factors)
    else:
        sums = [factor.times(factor).entry_sum for factor in factors]
        pairs = [left.times(right).entry_sum for left, right in itertools.combinations(factors, 2)]
        # Each pair of different factors stands twice in the square of their sum.
        sums += [2 * total(pairs)] if pairs else []
    if direct is not None:
        for slot in direct.link.slots:
            sums += _direct_sums(direct, slot, factors, dtype)
    # The sums of rows that are left, which are small.
    if any(factor.b is not None for factor in whole):
        # What cancels here is rounding, squared.
        rest = row_sums - columns * total([factor.levels for factor in whole])
    elif direct is not None:
        rest = direct.row_sums(dtype)
    else:
        return sums
    return [*sums, tf.reduce_sum(tf.square(rest), axis=-1) / -columns]


def _squares_after_kernels(factors: Sequence[_Factor]) -> list[tf.Tensor]:
    """The sum of the squares of the sum of factors with a and no b, in few operations."""
    if not factors:
        return []
    with graph_of(factors[0].V):
        ones = tf.ones([factors[0].V.shape[0], 1], factors[0].V.dtype)

    def products(left: _Factor, right: _Factor) -> tf.Tensor:
        product = left.times(right)
        with graph_of(product.V):
            # A product with ones takes half of the time of a sum along the first axis.
            per_unit = tf.matmul(product.V, ones, transpose_a=True)
        return tf.matmul(product.a, per_unit)

    # One pair after the other: all at once they would be moved about in memory, which takes longer than the products.
    sums = [products(factor, factor) for factor in factors]
    pairs = [products(left, right) for left, right in itertools.combinations(factors, 2)]
    # Each pair of different factors stands twice in the square of their sum.
    return [tf.squeeze(total([*sums, 2 * total(pairs)] if pairs else sums), axis=1)]


def _direct_sums(
    direct: Diagonal, slot: npt.NDArray[np.int64], factors: Sequence[_Factor], dtype: tf.DType
) -> list[tf.Tensor]:
    """The squares of the entries of a direct way, and twice their products with the factors' entries there."""
    units = np.flatnonzero(slot >= 0)
    places = slot[units]
    derivatives = direct.at(places)
    d = tf.ones([1, units.size], dtype) if derivatives is None else derivatives
    sums = [tf.reduce_sum(tf.square(d), axis=-1)]
    for factor in factors:
        with graph_of(factor.V):
            V = 2 * tf.gather_nd(factor.V, np.stack([np.minimum(places, factor.V.shape[0] - 1), units], axis=1))
        a = None if factor.a is None else take(factor.a, units)
        weights = _product_or_one(a, None if factor.b is None else take(factor.b, places))
        sums.append(tf.linalg.matvec(d if weights is None else d * weights, V))
    return sums


def _product_or_one(left: tf.Tensor | None, right: tf.Tensor | None) -> tf.Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left * right
