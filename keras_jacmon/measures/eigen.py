"""Eigenvalues of a Jacobian, and all of its singular values."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_jacmon.measures.context import MeasureContext, Measured

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

# Vectors of a Krylov space. With 32 the edge of a random orthogonal matrix, all of whose eigenvalues are as large as
# the largest, is found four times worse.
KRYLOV = 48

# Random matrices of 512 units converge to 1e-2 in 1 to 5 spaces, an orthogonal one never: after 12 its value is 0.3 to
# 0.8 % too small, and its residual says that it is not certain.
MAX_RESTARTS = 12

# A restart weighs the directions that it found by the 2⁶-th power of their eigenvalues: enough to favour the largest,
# and too little to lose its neighbours.
SQUARINGS = 6

# An eigenvector of H of norm one with no more than this in V is rounding.
_SPURIOUS = 1e-3


def eigenvalues(operator: tf.linalg.LinearOperator) -> tf.Tensor:
    """All eigenvalues at each point, by forming J: O(n³) per point, 5 ms for 128 units.

    Args:
        operator: The Jacobians, `(n, n)`, batch shape `(points,)`.

    Returns:
        `(points, n)`, complex, the largest modulus first; NaN at points where J holds NaN or inf.
    """
    dense, finite = _finite(operator.to_dense())
    n = int(operator.shape[-1])
    if n % _SPACING == 0:
        dense = tf.pad(dense, [[0, 0], [0, _PADDING], [0, _PADDING]])
    values = tf.linalg.eigvals(dense)
    # The zeros that the padding adds are the last ones.
    order = tf.argsort(tf.abs(values), axis=-1, direction="DESCENDING")[:, :n]
    return tf.where(finite[:, None], tf.gather(values, order, batch_dims=1), _nan(values.dtype))


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
    start, _ = _unit(tf.random.stateless_normal([points, n], context.seeds(7), dtype=operator.dtype))
    values, residuals = (x[:, :LEADING] for x in _ritz_values(*_krylov(operator, start, SPECTRUM_KRYLOV)))
    return tf.where(residuals <= context.tolerance * tf.abs(values), values, _nan(values.dtype))


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
    return _arnoldi_radius(operator, context)


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
    dense, _ = _finite(operator.to_dense())
    points, n = tf.shape(dense)[0], int(operator.shape[-1])
    value = _leading_value(tf.linalg.LinearOperatorFullMatrix(dense))
    largest = tf.reduce_max(tf.abs(dense), axis=[1, 2])
    size = tf.where(largest > 0, largest, tf.ones_like(largest))
    # Beside the eigenvalue by rounding, for a repeated one with several vectors.
    shift = value + tf.cast(10 * np.finfo(dense.dtype.as_numpy_dtype).eps * size, value.dtype)
    shifted = tf.cast(dense, value.dtype) - shift[:, None, None] * tf.eye(n, dtype=value.dtype)
    parts = size[:, None] * tf.random.stateless_normal([4, points, n], [0, 8], dtype=dense.dtype)
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
    start, _ = _unit(tf.random.stateless_normal([points, n], [0, 9], dtype=operator.dtype))
    return _ritz_values(*_krylov(operator, start, KRYLOV))[0][:, 0]


def singular_values(operator: tf.linalg.LinearOperator) -> tf.Tensor:
    """All singular values at each point, by forming J: O(n³), 3 ms for 128 units. All near 1 is dynamical isometry.

    Args:
        operator: The Jacobians, `(m, n)`, batch shape `(points,)`.

    Returns:
        `(points, min(m, n))`, the largest first; NaN at points where J holds NaN or inf.
    """
    dense, finite = _finite(operator.to_dense())
    values = tf.linalg.svd(dense, compute_uv=False)
    return tf.where(finite[:, None], values, _nan(values.dtype))


def largest_singular_value(operator: tf.linalg.LinearOperator) -> tf.Tensor:
    """The largest singular value at each point, by forming J: 20 us per point for 24 units, 40 us for 32.

    Args:
        operator: The Jacobians, `(m, n)`, batch shape `(points,)`.

    Returns:
        `(points,)`, exact up to rounding; NaN at points where J holds NaN or inf.
    """
    m, n = map(int, operator.shape[-2:])
    unit_vectors = tf.eye(n, batch_shape=[operator.batch_shape_tensor()[0]], dtype=operator.dtype)
    # `to_dense` takes a derivative for each row, of which the inputs' J may have many more than columns.
    dense, finite = _finite(operator.to_dense() if m <= n else operator.matmul(unit_vectors))
    # The squares of large entries would overflow.
    largest = tf.reduce_max(tf.abs(dense), axis=[1, 2], keepdims=True)
    scaled = tf.math.divide_no_nan(dense, largest)
    gram = tf.matmul(scaled, scaled, transpose_a=m > n, transpose_b=m <= n)
    # By rounding, the largest eigenvalue of zeros may be negative.
    values = tf.sqrt(tf.maximum(tf.linalg.eigvalsh(gram)[:, -1], 0)) * largest[:, 0, 0]
    return tf.where(finite, values, _nan(values.dtype))


def condition_number(operator: tf.linalg.LinearOperator, context: MeasureContext) -> Measured:  # noqa: ARG001 - as every measure
    """The largest singular value over the smallest, at each point. Dimensionless; 1 for an orthogonal J.

    Args:
        operator: The Jacobians, `(m, n)`, batch shape `(points,)`.
        context: `MeasureContext`, unused: the value is exact up to rounding.

    Returns:
        The value `(points,)`; inf if the smallest one is zero but for rounding, NaN at points where J holds NaN or inf.
    """
    values = singular_values(operator)
    largest, smallest = values[:, 0], values[:, -1]
    # As in the rank that LAPACK's users take.
    rounding = max(operator.shape[-2:]) * np.finfo(values.dtype.as_numpy_dtype).eps * largest
    return Measured(tf.where(smallest <= rounding, tf.constant(np.inf, values.dtype), largest / smallest), None)


def _arnoldi_radius(operator: tf.linalg.LinearOperator, context: MeasureContext) -> Measured:
    n, dtype = int(operator.shape[-1]), operator.dtype
    points = operator.batch_shape_tensor()[0]

    def unfinished(value: tf.Tensor, residual: tf.Tensor) -> tf.Tensor:
        # A NaN compares as finished: such a point never gets better.
        return residual > context.tolerance * value

    def body(value: tf.Tensor, residual: tf.Tensor, start: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        space = _krylov(operator, start, KRYLOV)
        new_value, new_residual = (tf.abs(x[:, 0]) for x in _ritz_values(*space))
        mixture = _leading_directions(space.hessenberg, new_value)
        # A point that is done goes on as long as others do. NaN compares as better: it stays.
        worse = new_residual > residual
        start = _unit(tf.linalg.matvec(space.basis, mixture, transpose_a=True))[0]
        return tf.where(worse, value, new_value), tf.where(worse, residual, new_residual), start

    start, _ = _unit(tf.random.stateless_normal([points, n], context.seeds(4), dtype=dtype))
    infinite = tf.fill([points], tf.constant(np.inf, dtype))
    scalar = tf.TensorShape([None])
    value, residual, _ = tf.while_loop(
        lambda value, residual, _: tf.reduce_any(unfinished(value, residual)),
        body,
        (tf.zeros([points], dtype), infinite, start),
        shape_invariants=(scalar, scalar, tf.TensorShape([None, n])),
        maximum_iterations=MAX_RESTARTS,
    )
    return Measured(value, residual)


class _Krylov(NamedTuple):
    """`J V = V H + beyond v eᵀ` with orthonormal V.

    `basis` `(points, k, n)` are the columns of V, zeros where the space is invariant before; `hessenberg`
    `(points, k, k)` is H, and `beyond` is `(points,)`.
    """

    basis: tf.Tensor
    hessenberg: tf.Tensor
    beyond: tf.Tensor


def _krylov(operator: tf.linalg.LinearOperator, start: tf.Tensor, size: int) -> _Krylov:
    """The Krylov space of `start`, `J start`, ... with `size` dimensions."""
    points, n = tf.shape(start)[0], start.shape[1]

    def step(
        j: tf.Tensor, basis: tf.Tensor, vector: tf.Tensor, hessenberg: tf.Tensor, _: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        basis = tf.concat([basis, vector[:, None]], axis=1)
        image = operator.matvec(vector)
        noise = 10 * np.finfo(image.dtype.as_numpy_dtype).eps * tf.norm(image, axis=-1)
        column = tf.zeros([points, j + 1], image.dtype)
        for _again in range(2):
            part = tf.linalg.matvec(basis, image)
            image -= tf.linalg.matvec(basis, part, transpose_a=True)
            column += part
        # What is left below rounding is no direction: the space is invariant, and zeros follow.
        vector, beyond = _unit(image, noise)
        column = tf.pad(tf.concat([column, beyond[:, None]], axis=1), [[0, 0], [0, size - 1 - j]])
        return j + 1, basis, vector, tf.concat([hessenberg, column[:, :, None]], axis=2), beyond

    vector, growing = tf.TensorShape([None, n]), tf.TensorShape([None, None, n])
    _, basis, _, hessenberg, beyond = tf.while_loop(
        lambda j, *_: j < size,
        step,
        (
            tf.constant(0),
            tf.zeros([points, 0, n], start.dtype),
            start,
            tf.zeros([points, size + 1, 0], start.dtype),
            tf.zeros([points], start.dtype),
        ),
        shape_invariants=(
            tf.TensorShape([]),
            growing,
            vector,
            tf.TensorShape([None, size + 1, None]),
            tf.TensorShape([None]),
        ),
    )
    return _Krylov(basis, tf.ensure_shape(hessenberg, [None, size + 1, size])[:, :size], beyond)


def _ritz_values(basis: tf.Tensor, hessenberg: tf.Tensor, beyond: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The eigenvalues of H, the largest modulus first, and the residuals of their vectors, each `(points, k)`."""
    safe, finite = _finite(hessenberg)
    values, vectors = tf.linalg.eig(safe)
    order = tf.argsort(tf.abs(values), axis=-1, direction="DESCENDING")
    values = tf.gather(values, order, batch_dims=1)
    parts = tf.abs(tf.gather(vectors, order, axis=2, batch_dims=1))
    # An eigenvector of H that is made of zeros in V, after an invariant space, is none of J.
    exists = tf.cast(tf.reduce_any(tf.not_equal(basis, 0), axis=2), parts.dtype)
    norms = tf.norm(parts * exists[:, :, None], axis=1)
    infinite = tf.constant(np.inf, norms.dtype)
    residuals = tf.where(norms > _SPURIOUS, beyond[:, None] * parts[:, -1] / norms, infinite)
    values, residuals = (tf.where(finite[:, None], x, _nan(x.dtype)) for x in (values, residuals))
    return values, residuals


def _leading_directions(hessenberg: tf.Tensor, largest: tf.Tensor) -> tf.Tensor:
    """Coefficients of a new start vector, `(points, k)`: powers of H favour the largest of its eigenvalues."""
    power = tf.math.divide_no_nan(hessenberg, largest[:, None, None])
    for _ in range(SQUARINGS):
        power = power @ power
    return power[:, :, 0]


def _finite(matrices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The matrices, zero if one holds NaN or inf, which solvers refuse; and Booleans, True for finite ones."""
    finite = tf.reduce_all(tf.math.is_finite(matrices), axis=[1, 2])
    return tf.where(finite[:, None, None], matrices, tf.zeros_like(matrices)), finite


def _nan(dtype: tf.DType) -> tf.Tensor:
    return tf.cast(tf.constant(np.nan), dtype)


def _unit(vectors: tf.Tensor, noise: tf.Tensor | float = 0.0) -> tuple[tf.Tensor, tf.Tensor]:
    """Vectors of norm one and the norms; both zero where the norm is at most `noise`."""
    norms = tf.norm(vectors, axis=-1)
    norms = tf.where(norms <= noise, tf.zeros_like(norms), norms)
    return tf.math.divide_no_nan(vectors, norms[:, None]), norms
