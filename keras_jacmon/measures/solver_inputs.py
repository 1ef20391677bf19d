"""Matrices without NaN, which solvers accept, and vectors of length one."""

import numpy as np
import tensorflow as tf


def finite_or_zero(matrices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The matrices, zero if one holds NaN or inf, which solvers refuse; and Booleans, True for finite ones."""
    finite = tf.reduce_all(tf.math.is_finite(matrices), axis=[1, 2])
    return tf.where(finite[:, None, None], matrices, tf.zeros_like(matrices)), finite


def nan(dtype: tf.DType) -> tf.Tensor:
    """NaN as a real or complex number, `()`."""
    return tf.cast(tf.constant(np.nan), dtype)


def normalised(vectors: tf.Tensor, noise: tf.Tensor | None = None) -> tuple[tf.Tensor, tf.Tensor]:
    """Vectors of length one, or zero for noise, and their divisors, `(..., 1)`.

    Args:
        vectors: Tensor `(..., n)`.
        noise: Tensor `(..., 1)`, the norm up to which a vector is noise. Defaults to None: only zero is.
    """
    norm = tf.norm(vectors, axis=-1, keepdims=True)
    if noise is not None:
        norm = tf.where(norm <= noise, tf.zeros([], norm.dtype), norm)
    return tf.math.divide_no_nan(vectors, norm), norm
