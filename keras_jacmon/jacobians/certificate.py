"""How far are vectors from what they should be, in almost all rows?"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

# Far below the least state or gradient that training could use.
_NEGLIGIBLE = 1e-30

# A single row may differ by itself, so that a part must be tested in more than one.
_LEAST_TURNS = 4

# One row in so many may differ.
_ROWS_FOR_AN_OUTLIER = 200


def in_turns(vectors: tf.Tensor, sizes: Sequence[int], every: int = 1) -> tf.Tensor:
    """Vectors `(rows, n)` with one of some parts in each row, and zero for the others; of few rows with all parts.

    Args:
        vectors: As they are with all parts.
        sizes: Of the parts.
        every: The turn goes to the next part after so many rows.
    """
    if len(sizes) == 1:
        return vectors
    rows = vectors.shape[0] or tf.shape(vectors)[0]
    part = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    few = rows < _LEAST_TURNS * len(sizes) * every
    turn = tf.equal(tf.expand_dims(tf.range(rows) // every % len(sizes), axis=1), part) | few
    return tf.where(turn, vectors, tf.zeros([], vectors.dtype))


def relative_differences(
    found: tf.Tensor, expected: tf.Tensor, sizes: Sequence[int], negligible: tf.Tensor | float = _NEGLIGIBLE
) -> tf.Tensor:
    """How far each part of vectors is from the one expected, relative to the latter.

    Infinite where one of the two is finite and the other is not. Where both are NaN or infinite they agree: that is the
    network's own.

    Args:
        found: `(rows, n)`.
        expected: `(rows, n)`.
        sizes: Of the parts that the vectors are made of.
        negligible: Errors whose norm is not above this are none, `(rows,)` or a number.

    Returns:
        `(parts, rows)`.
    """
    parts = tf.split(tf.stack([found - expected, expected, found]) ** 2, sizes, axis=-1)
    norms = tf.sqrt(tf.stack([tf.reduce_sum(part, axis=-1) for part in parts], axis=1))
    error, of_expected, of_found = tf.unstack(norms)
    zero, infinite = tf.zeros([], norms.dtype), tf.constant(np.inf, norms.dtype)
    relative = tf.where(error <= negligible, zero, error / of_expected)
    one, other = tf.math.is_finite(of_expected), tf.math.is_finite(of_found)
    return tf.where(one & other, relative, tf.where(one | other, infinite, zero))


def largest(differences: tf.Tensor) -> tf.Tensor:
    """The largest of some differences `(..., rows)`, but for one row in 200, or a single one of fewer, `(...,)`.

    Where a unit stands at the kink of a ReLU or the step of a rounding, the side that it is on is up to rounding
    errors, so that in rare rows a right structure differs. A wrong one differs in all of them.
    """
    rows = tf.shape(differences)[-1]
    outliers = tf.maximum(tf.minimum(tf.maximum(rows // _ROWS_FOR_AN_OUTLIER, 1), rows - 1), 0)
    # The zero is for no rows at all.
    padded = tf.pad(differences, [[0, 0]] * (differences.shape.rank - 1) + [[0, 1]])
    return tf.math.top_k(padded, outliers + 1).values[..., -1]
