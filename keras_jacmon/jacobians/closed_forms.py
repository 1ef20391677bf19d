"""The sums of the entries, and of their squares, of a block of diagonals and kernels, without forming the block."""

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from keras_jacmon.jacobians.diagonal import Diagonal, take


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
        with _where(kernel):
            V = take(take(kernel, into.link.targets, axis=0), out.link.slots.ravel())
            V = tf.reshape(V, [-1, slots, m])
        a = None if out.values is None else tf.reshape(take(out.values, out.link.slots.ravel()), [-1, slots, m])
        return cls(a, V, into.values)

    def entry_sum(self) -> tf.Tensor:
        """The sum of all entries, `(rows,)`, or `()` without any derivative."""
        return _weighted_sum(self.a, self.V, self.b)

    @property
    def slots(self) -> int:
        """How many units of the product each unit of the new state is made from."""
        return int(self.V.shape[1])


Ways = Iterable[tuple[Diagonal, tf.Tensor, Diagonal]]


def entry_sums(direct: Diagonal | None, ways: Ways, dtype: tf.DType) -> list[tf.Tensor]:
    """What adds up to the sum of the entries of a block: tensors `(rows,)`, `(1,)` or `()`.

    Args:
        direct: From the source to the new state.
        ways: For each product between them what leads to it, its kernel, and what leads from it.
        dtype: Of the entries.
    """
    sums = [_Product.of(*way).entry_sum() for way in ways]
    if direct is not None:
        used = np.concatenate([slot[slot >= 0] for slot in direct.link.slots])
        count = tf.constant(float(used.size), dtype)
        sums.append(count if direct.values is None else tf.reduce_sum(take(direct.values, np.sort(used)), axis=-1))
    return sums


def square_sums(direct: Diagonal | None, ways: Ways, dtype: tf.DType) -> list[tf.Tensor]:
    """What adds up to the sum of the squares of a block; as `entry_sums`."""
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
        with _where(product.V):
            V = tf.stack(
                [tf.gather_nd(slot_V, np.stack([places, units], axis=1)) for slot_V in tf.unstack(product.V, axis=1)]
            )
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
    with _where(left.V):
        V = left.V[:, slot : slot + 1] * right.V[:, first:] * tf.constant(weights, left.V.dtype)
    a = _product_or_one(
        None if left.a is None else left.a[:, slot : slot + 1], None if right.a is None else right.a[:, first:]
    )
    if a is not None and a.shape[1] != count:
        # Where the right product has no derivatives of its own, the left one's hold for all its slots.
        a = tf.repeat(a, count, axis=1)
    return _weighted_sum(a, V, _product_or_one(left.b, right.b))


def _weighted_sum(a: tf.Tensor | None, V: tf.Tensor, b: tf.Tensor | None) -> tf.Tensor:
    """`Σ_si a_si (b @ V)_si` of each row: a is `(rows, slots, m)`, V `(n, slots, m)`, b `(rows, n)`; None for ones."""
    units = int(np.prod(V.shape[1:]))
    with _where(V):
        flat = tf.reshape(V, [-1, units])
        per_source, per_unit = tf.reduce_sum(flat, axis=1), tf.reduce_sum(flat, axis=0)
        everything = tf.reduce_sum(per_source)
    if a is None:
        return everything if b is None else tf.linalg.matvec(b, per_source)
    a = tf.reshape(a, [-1, units])
    return tf.linalg.matvec(a, per_unit) if b is None else tf.reduce_sum(a * (b @ flat), axis=-1)


def _where(kernel: tf.Tensor) -> contextlib.AbstractContextManager[Any]:
    """The graph that a kernel stands in: what is made of kernels alone is made once, and not for each chunk of rows."""
    return contextlib.nullcontext() if tf.executing_eagerly() else kernel.graph.as_default()


def _product_or_one(left: tf.Tensor | None, right: tf.Tensor | None) -> tf.Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left * right
