"""Relative differences of vectors that were computed in two ways."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

# The gain of a step is known up to this many roundings of 1: `1 - tanh²` of a unit that saturates is little else.
_ROUNDINGS = 16

# Far below the least state or gradient that training could use.
_NEGLIGIBLE = 1e-30

# A single point may differ by itself, so a block must be checked at several of them.
_LEAST_TURNS = 4

# The multiples of a vector that are multiplied at once; different ones, so that columns that are mixed up are noticed.
_MULTIPLES = (1.0, -2.0, 3.0)

# One point in this number of points may differ.
_POINTS_PER_OUTLIER = 200


def in_turns(vectors: tf.Tensor, sizes: Sequence[int], count: int | tf.Tensor, every: int = 1) -> tf.Tensor:
    """Vectors with one of their parts at each point and zero for the others, or with all parts if points are few.

    Args:
        vectors: Tensor `(points, n)`, with all parts.
        sizes: Sizes of the parts, together n.
        count: Integer or scalar tensor, number of points.
        every: Integer, number of points after which the turn goes to the next part. Defaults to 1.
    """
    if len(sizes) == 1:
        return vectors
    part = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    few = count < _LEAST_TURNS * len(sizes) * every
    number = tf.range(count) if every == 1 else tf.range(count) // every
    turn = tf.equal(tf.expand_dims(number % len(sizes), axis=1), part) | few
    return tf.where(turn, vectors, tf.zeros([], vectors.dtype))


def relative_differences(
    found: tf.Tensor, expected: tf.Tensor, sizes: Sequence[int], negligible: tf.Tensor | float = _NEGLIGIBLE
) -> tf.Tensor:
    """The distance of each part of the vectors from the expected part, relative to the norm of the expected part.

    Infinite where one of the two is finite and the other is not. Where both are NaN or infinite they agree: that is the
    network's own.

    Args:
        found: Tensor `(points, n)`.
        expected: Tensor `(points, n)`.
        sizes: Sizes of the parts that the vectors are made of.
        negligible: Norm up to which an error counts as none, `(points,)` or a number.

    Returns:
        `(parts, points)`.
    """
    parts = tf.split(tf.square(tf.stack([found - expected, expected, found])), sizes, axis=-1)
    norms = tf.sqrt(tf.stack([tf.reduce_sum(part, axis=-1) for part in parts], axis=1))
    error, of_expected, of_found = tf.unstack(norms)
    zero, infinite = tf.zeros([], norms.dtype), tf.constant(np.inf, norms.dtype)
    relative = tf.where(error <= negligible, zero, error / of_expected)
    one, other = tf.math.is_finite(of_expected), tf.math.is_finite(of_found)
    return tf.where(one & other, relative, tf.where(one | other, infinite, zero))


def largest(differences: tf.Tensor) -> tf.Tensor:
    """The largest of some differences `(..., points)`, but for one point in 200, or a single one of fewer, `(...,)`.

    Where a unit stands at the kink of a ReLU or the step of a rounding, rounding errors decide on which side it is, so
    that a right structure differs at rare points. A wrong one differs at all of them.
    """
    count = tf.shape(differences)[-1]
    outliers = tf.maximum(tf.minimum(tf.maximum(count // _POINTS_PER_OUTLIER, 1), count - 1), 0)
    # The zero is for no points at all.
    padded = tf.pad(differences, [[0, 0]] * (differences.shape.rank - 1) + [[0, 1]])
    return tf.math.top_k(padded, outliers + 1).values[..., -1]


def column_differences(
    J: tf.linalg.LinearOperator, vectors: tf.Tensor, products: tf.Tensor, *, adjoint: bool = False
) -> tf.Tensor:
    """Differences of the products with several multiples of vectors at once from the products known, `(1, points)`."""
    multiples = tf.constant(_MULTIPLES, vectors.dtype)
    found, expected = J.matmul(vectors[..., None] * multiples, adjoint=adjoint), products[..., None] * multiples
    width = len(_MULTIPLES) * int(products.shape[-1])
    found, expected = (tf.reshape(x, [-1, width]) for x in (found, expected))
    return relative_differences(found, expected, [width], rounding(vectors))


def rounding(w: tf.Tensor) -> tf.Tensor:
    """The rounding error of a product with these vectors, `(points,)`."""
    return _ROUNDINGS * np.finfo(w.dtype.as_numpy_dtype).eps * tf.sqrt(tf.reduce_sum(tf.square(w), axis=-1))
