"""Eigenvalues of a Jacobian, and the vectors of the leading one."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_jacmon.measures.arnoldi import KRYLOV, arnoldi_radius, krylov_space, ritz_values
from keras_jacmon.measures.context import MeasureContext, Measured, Purpose
from keras_jacmon.measures.solver_inputs import finite_or_zero, nan, normalised

# Up to this number of units the eigenvalues are found by forming J: 128 units take 5 ms per point, 256 take 43 ms.
EXACT_SIZE = 128

# Up to this number of columns all eigenvalues are found: 0.3 s per point for 512 columns and 3 s for 1024.
SPECTRUM_SIZE = 512

# Number of eigenvalues found for larger matrices, and number of vectors of the one Krylov space that they are found in.
# For random matrices and steps of LSTMs and GRUs with 600 to 1024 columns 240 vectors find all 16 to 1e-2; 192 vectors
# miss some of a GRU. A multiple of 256 would be slow: see `_PADDING`.
LEADING, SPECTRUM_KRYLOV = 16, 240

# Columns that are a multiple of 2 KiB apart fall into the same few lines of a cache. These zeros beside them make the
# eigenvalues of 512 units four times faster, of 1024 units seven times.
_PADDING, _SPACING = 8, 256

# Seeds of the border and of the start of a Krylov space, always the same: eigenvectors are found by almost any of them.
_BORDER_SEED, _START_SEED = (0, 8), (0, 9)


def eigenvalues(operator: tf.linalg.LinearOperator) -> tf.Tensor:
    """All eigenvalues at each point, by forming J: O(n³) per point, 5 ms for 128 units.

    Args:
        operator: The Jacobians, `(n, n)`, batch shape `(points,)`.

    Returns:
        `(points, n)`, complex, the largest modulus first; NaN at points where J holds NaN or inf.
    """
    dense, finite = finite_or_zero(operator.to_dense())
    n = int(operator.shape[-1])
    if n % _SPACING == 0:
        dense = tf.pad(dense, [[0, 0], [0, _PADDING], [0, _PADDING]])
    values = tf.linalg.eigvals(dense)
    # The zeros that the padding adds are the last ones.
    order = tf.argsort(tf.abs(values), axis=-1, direction="DESCENDING")[:, :n]
    return tf.where(finite[:, None], tf.gather(values, order, batch_dims=1), nan(values.dtype))


def leading_eigenvalues(operator: tf.linalg.LinearOperator, context: MeasureContext) -> tf.Tensor:
    """All eigenvalues at each point up to 512 columns; for larger J the 16 largest, as far as they are found.

    Above, they are Ritz values in a Krylov space of 240 dimensions (Arnoldi's method), whose residual `‖J x - θ x‖` of
    the unit vector x is at most `tolerance` times the modulus of θ: see `spectral_radius` for what that says. The
    others are NaN. Many are NaN where many eigenvalues are equally large, as for an orthogonal J. A repeated
    eigenvalue is found once.

    Args:
        operator: The Jacobians, `(n, n)`, batch shape `(points,)`.
        context: `MeasureContext`; `tolerance` is relative, and the start vector comes from `seed`.

    Returns:
        `(points, n)` or `(points, 16)`, complex, the largest modulus first, NaN for eigenvalues that are not found, and
        at points where J holds NaN or inf.
    """
    n = int(operator.shape[-1])
    if n <= SPECTRUM_SIZE:
        return eigenvalues(operator)
    points = operator.batch_shape_tensor()[0]
    seed = context.seeds(Purpose.EIGENVALUES)
    start, _ = normalised(tf.random.stateless_normal([points, n], seed, dtype=operator.dtype))
    values, residuals = (x[:, :LEADING] for x in ritz_values(*krylov_space(operator, start, SPECTRUM_KRYLOV)))
    return tf.where(residuals <= context.tolerance * tf.abs(values), values, nan(values.dtype))


def spectral_radius(operator: tf.linalg.LinearOperator, context: MeasureContext) -> Measured:
    """The largest modulus of an eigenvalue at each point. Dimensionless; the gain of a step that is repeated for ever.

    Up to 128 units from all eigenvalues. Above, by Arnoldi's method in Krylov spaces of 48 dimensions, orthogonalised
    twice and restarted up to 12 times, until the residual of the largest Ritz value is at most `tolerance` times its
    modulus at every point.

    Args:
        operator: The Jacobians, `(n, n)`, batch shape `(points,)`.
        context: `MeasureContext`; `tolerance` is relative, and the start vector comes from `seed`.

    Returns:
        The value `(points,)`, NaN at points where J holds NaN or inf. The uncertainty is None if the value is exact up
        to rounding, otherwise the residual `‖J x - θ x‖` of the unit vector x: θ is an eigenvalue of a matrix that
        differs from J by that norm at most. An eigenvalue of J may be further away from θ, by the factor of its
        condition number.

    References:
        W. E. Arnoldi, "The principle of minimized iterations in the solution of the matrix eigenvalue problem", 1951.
        Y. Saad, "Numerical methods for large eigenvalue problems", 2011, chapters 6 and 7.
    """
    if int(operator.shape[-1]) <= EXACT_SIZE:
        return Measured(tf.abs(eigenvalues(operator)[:, 0]), None)
    return arnoldi_radius(operator, context)


class LeadingEigenvectors(NamedTuple):
    """The eigenvalue of the largest modulus at each point, with its vectors.

    Attributes:
        value: Complex tensor `(points,)`; zero at points where J holds NaN or inf.
        right: Complex tensor `(points, n)`, unit vectors v with `J v = value v`.
        left: Complex tensor `(points, n)`, unit vectors w with `wᴴ J = value wᴴ`.
    """

    value: tf.Tensor
    right: tf.Tensor
    left: tf.Tensor


def leading_eigenvectors(operator: tf.linalg.LinearOperator) -> LeadingEigenvectors:
    """The eigenvalue of the largest modulus and its vectors, by forming J and solving with it and a random border.

    Above 128 units the eigenvalue is the leading one in a single Krylov space of 48 dimensions, and the vectors are
    those of the eigenvalue next to it.

    Args:
        operator: The Jacobians, `(n, n)`, batch shape `(points,)`.

    References:
        H. B. Keller, "Numerical solution of bifurcation and nonlinear eigenvalue problems", 1977: with a border, the
        matrix has an inverse.
    """
    dense, _ = finite_or_zero(operator.to_dense())
    points, n = tf.shape(dense)[0], int(operator.shape[-1])
    value = _leading_value(tf.linalg.LinearOperatorFullMatrix(dense))
    largest = tf.reduce_max(tf.abs(dense), axis=[1, 2])
    size = tf.where(largest > 0, largest, tf.ones_like(largest))
    # Beside the eigenvalue by rounding, for a repeated one with several vectors.
    shift = value + tf.cast(10 * np.finfo(dense.dtype.as_numpy_dtype).eps * size, value.dtype)
    shifted = tf.cast(dense, value.dtype) - shift[:, None, None] * tf.eye(n, dtype=value.dtype)
    parts = size[:, None] * tf.random.stateless_normal([4, points, n], _BORDER_SEED, dtype=dense.dtype)
    above = tf.concat([shifted, tf.complex(parts[0], parts[1])[:, :, None]], axis=2)
    below = tf.pad(tf.complex(parts[2], parts[3])[:, None], [[0, 0], [0, 0], [0, 1]])
    # A solver refuses a matrix that is singular. With a border it is not, at an eigenvalue with one vector.
    lu, order = tf.linalg.lu(tf.concat([above, below], axis=1))
    last = tf.one_hot(tf.fill([points], n), n + 1, dtype=value.dtype)
    solutions = [_solved(lu, order, last, adjoint=adjoint)[:, :n] for adjoint in (False, True)]
    return LeadingEigenvectors(value, *(x / tf.cast(tf.norm(x, axis=-1, keepdims=True), x.dtype) for x in solutions))


def _solved(lu: tf.Tensor, order: tf.Tensor, vector: tf.Tensor, *, adjoint: bool) -> tf.Tensor:
    """The solution x of `A x = b`, or of `Aᴴ x = b`, `(points, n)`, from `A[order] = L U` in one matrix."""
    lower = tf.linalg.set_diag(lu, tf.ones_like(vector))
    solve = tf.linalg.triangular_solve
    if adjoint:
        half = solve(lu, vector[:, :, None], lower=False, adjoint=True)
        back = tf.argsort(order, axis=-1)
        return tf.gather(solve(lower, half, adjoint=True)[:, :, 0], back, batch_dims=1)
    half = solve(lower, tf.gather(vector, order, batch_dims=1)[:, :, None])
    return solve(lu, half, lower=False)[:, :, 0]


def _leading_value(operator: tf.linalg.LinearOperator) -> tf.Tensor:
    """The eigenvalue of the largest modulus, `(points,)`, or the leading one in a Krylov space of a larger matrix."""
    n = int(operator.shape[-1])
    if n <= EXACT_SIZE:
        return eigenvalues(operator)[:, 0]
    points = operator.batch_shape_tensor()[0]
    start, _ = normalised(tf.random.stateless_normal([points, n], _START_SEED, dtype=operator.dtype))
    return ritz_values(*krylov_space(operator, start, KRYLOV))[0][:, 0]
