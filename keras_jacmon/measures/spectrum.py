"""Singular values of a Jacobian from products with vectors."""

import math

import numpy as np
import tensorflow as tf

from keras_jacmon.measures.options import Measured, Options

# Random matrices of 128 x 128 need at most about 25 steps for 1e-2 and 30 for 1e-3. A row that has not converged after
# so many says so by its residual.
MAX_STEPS = 96

# A small residual says that some singular value is near. With fewer steps that is not the largest one in some rows of a
# thousand, where the random start vector happens to be almost orthogonal to its singular vector.
LEAST_STEPS = 16

# The small problem that tells whether a row has converged costs as much as some products with J.
STEPS_BETWEEN_CHECKS = 3


def spectral_norm(operator: tf.linalg.LinearOperator, options: Options) -> Measured:
    """The largest singular value of each row, the worst-case gain of one step. Dimensionless.

    Golub-Kahan-Lanczos bidiagonalisation of at least 16 steps, until the residual of the leading singular triplet is
    at most half of `tolerance` times its value in every row. Without reorthogonalisation: that would keep copies of a
    converged singular value from appearing, but the largest stays the largest with copies. So no basis is kept.

    Args:
        operator: The Jacobians, batch shape `(rows,)`.
        options: `tolerance` is relative; the start vector comes from `seed`.

    Returns:
        Value and residual norm, each `(rows,)`: some singular value is at most the residual away from the value.
        That it is the largest one is as good as certain, but no theorem.

    References:
        G. H. Golub, W. Kahan, "Calculating the singular values and pseudo-inverse of a matrix", 1965.
        C. C. Paige, "Accuracy and effectiveness of the Lanczos algorithm for the symmetric eigenproblem", 1980.
    """
    m, n = int(operator.shape[-2]), int(operator.shape[-1])
    rows = operator.batch_shape_tensor()[0]
    dtype = operator.dtype
    squarings = math.ceil(math.log2(1 / max(options.tolerance, 1e-6))) + 4
    vector, scalar, growing = tf.TensorShape([None, n]), tf.TensorShape([None]), tf.TensorShape([None, None])

    def step(u: tf.Tensor, v: tf.Tensor, beta: tf.Tensor, alphas: tf.Tensor, betas: tf.Tensor) -> tuple[tf.Tensor, ...]:
        betas = tf.concat([betas, beta[:, None]], axis=1)
        u, alpha = _normalised(operator.matvec(v) - beta[:, None] * u, _noise(alphas))
        alphas = tf.concat([alphas, alpha[:, None]], axis=1)
        v, beta = _normalised(operator.matvec(u, adjoint=True) - alpha[:, None] * v, _noise(alphas))
        return u, v, beta, alphas, betas

    def unfinished(value: tf.Tensor, residual: tf.Tensor) -> tf.Tensor:
        # Half: what still changes after the whole tolerance is often the second singular value giving way to the first.
        # A NaN compares as finished: such a row never gets better.
        return residual > options.tolerance / 2 * value

    def some_steps(value: tf.Tensor, residual: tf.Tensor, *state: tf.Tensor) -> tuple[tf.Tensor, ...]:
        first = tf.equal(tf.shape(state[-1])[1], 0)
        state = tf.while_loop(
            lambda *_: True,
            step,
            state,
            shape_invariants=(tf.TensorShape([None, m]), vector, scalar, growing, growing),
            maximum_iterations=tf.where(first, LEAST_STEPS, STEPS_BETWEEN_CHECKS),
        )
        _, _, beta, alphas, betas = state
        # The first of the betas belongs to no pair of vectors.
        new_value, new_residual = _leading_singular_value(alphas, betas[:, 1:], beta, squarings)
        # A row that is done goes on as long as others do, and may still get better; copies of its singular value may
        # also blur the residual. NaN compares as better: it stays.
        worse = new_residual > residual
        return tf.where(worse, value, new_value), tf.where(worse, residual, new_residual), *state

    zeros = tf.zeros([rows], dtype)
    infinite, none = tf.fill([rows], tf.constant(np.inf, dtype)), tf.zeros([rows, 0], dtype)
    start, _ = _normalised(tf.random.stateless_normal([rows, n], options.seeds(2), dtype=dtype))
    value, residual, *_ = tf.while_loop(
        lambda value, residual, *_: tf.reduce_any(unfinished(value, residual)),
        some_steps,
        (zeros, infinite, tf.zeros([rows, m], dtype), start, zeros, none, none),
        shape_invariants=(scalar, scalar, tf.TensorShape([None, m]), vector, scalar, growing, growing),
        maximum_iterations=1 + (MAX_STEPS - LEAST_STEPS) // STEPS_BETWEEN_CHECKS,
    )
    return Measured(value, residual)


def _noise(alphas: tf.Tensor) -> tf.Tensor:
    """What is below this is rounding: an invariant subspace has been found, and noise must not become a direction."""
    largest = tf.reduce_max(tf.pad(alphas, [[0, 0], [1, 0]]), axis=1)
    return 10 * np.finfo(alphas.dtype.as_numpy_dtype).eps * largest


def _normalised(vector: tf.Tensor, noise: tf.Tensor | float = 0.0) -> tuple[tf.Tensor, tf.Tensor]:
    norm = tf.norm(vector, axis=-1)
    norm = tf.where(norm <= noise, tf.zeros_like(norm), norm)
    return tf.math.divide_no_nan(vector, norm[:, None]), norm


def _leading_singular_value(
    alphas: tf.Tensor, betas: tf.Tensor, beta: tf.Tensor, squarings: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """The largest singular value of the upper bidiagonal B and the residual of its triplet in the whole matrix.

    With `A V = U B` and `Aᵀ U = V Bᵀ + β v eᵀ`, a unit vector p and `q = Bᵀ p / θ`, `θ = ‖Bᵀ p‖`, the triplet
    (θ, U p, V q) has the residuals `B q - θ p` and `β p_k`. p is the leading eigenvector of the small `B Bᵀ`, found by
    squaring that matrix: batched eigensolvers refuse NaN and take longer than the products with J.
    """
    gram = _gram(alphas, betas)
    power = gram
    for _ in range(squarings):
        # The trace of a positive semidefinite matrix bounds its norm.
        power = tf.math.divide_no_nan(power, tf.linalg.trace(power)[:, None, None])
        power = power @ power
    column = tf.argmax(tf.linalg.diag_part(power), axis=-1)
    p, _ = _normalised(tf.gather(power, column, axis=2, batch_dims=1))
    image = tf.linalg.matvec(gram, p)
    square = tf.reduce_sum(p * image, axis=-1)
    value = tf.sqrt(square)
    inner = tf.math.divide_no_nan(tf.norm(image - square[:, None] * p, axis=-1), value)
    return value, tf.sqrt(inner**2 + (beta * p[:, -1]) ** 2)


def _gram(alphas: tf.Tensor, betas: tf.Tensor) -> tf.Tensor:
    """`B Bᵀ` of the upper bidiagonal B with diagonal alphas (rows, k) and superdiagonal betas (rows, k - 1)."""
    above = tf.roll(tf.linalg.diag(tf.pad(betas, [[0, 0], [0, 1]])), 1, axis=-1)
    bidiagonal = tf.linalg.diag(alphas) + above
    return tf.matmul(bidiagonal, bidiagonal, transpose_b=True)
