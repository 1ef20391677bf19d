"""Eigenvalues of a Jacobian, and all of its singular values."""

import numpy as np
import tensorflow as tf

from keras_jacmon.measures.options import Measured, Options

# Up to so many units the eigenvalues are found by forming J: 128 units take 5 ms a row, 256 already 43 ms.
EXACT_SIZE = 128

# Vectors of a Krylov space. With 32 the edge of a random orthogonal matrix, all of whose eigenvalues are as large as
# the largest, is found four times worse.
KRYLOV = 48

# Random matrices of 512 units converge to 1e-2 in 1 to 5 spaces, an orthogonal one never: after 12 its value is 0.3 to
# 0.8 % too small, and its residual says that it is not certain.
MAX_RESTARTS = 12

# A restart weighs the directions that it found by the 2⁶-th power of their eigenvalues: enough to favour the largest,
# and too little to lose its neighbours.
SQUARINGS = 6


def eigenvalues(operator: tf.linalg.LinearOperator) -> tf.Tensor:
    """All eigenvalues of each row, by forming J: `4 n²` bytes and O(n³) a row, 5 ms for 128 units.

    Args:
        operator: The Jacobians, `(n, n)`, batch shape `(rows,)`.

    Returns:
        `(rows, n)`, complex, the largest modulus first; NaN for rows that hold NaN or inf.
    """
    dense, finite = _finite(operator.to_dense())
    values = tf.linalg.eigvals(dense)
    order = tf.argsort(tf.abs(values), axis=-1, direction="DESCENDING")
    return tf.where(finite[:, None], tf.gather(values, order, batch_dims=1), _nan(values.dtype))


def spectral_radius(operator: tf.linalg.LinearOperator, options: Options) -> Measured:
    """The largest modulus of an eigenvalue of each row. Dimensionless; what a step repeated for ever would gain.

    Up to 128 units from all eigenvalues. Above, by Arnoldi's method in Krylov spaces of 48 dimensions, orthogonalised
    twice and restarted up to 12 times, until the residual of the largest Ritz value is at most `tolerance` times its
    modulus in every row.

    Args:
        operator: The Jacobians, `(n, n)`, batch shape `(rows,)`.
        options: `tolerance` is relative; the start vector comes from `seed`.

    Returns:
        The value `(rows,)`, NaN for rows that hold NaN or inf. The uncertainty is None if it is exact up to rounding,
        otherwise the residual `‖J x - θ x‖` of the unit vector x: θ is an eigenvalue of a matrix that differs from J by
        that norm at most. Of an eigenvalue of J it may be further away, by the condition number of that eigenvalue.

    References:
        W. E. Arnoldi, "The principle of minimized iterations in the solution of the matrix eigenvalue problem", 1951.
        Y. Saad, "Numerical methods for large eigenvalue problems", 2011, chapters 6 and 7.
    """
    if int(operator.shape[-1]) <= EXACT_SIZE:
        return Measured(tf.abs(eigenvalues(operator)[:, 0]), None)
    return _arnoldi_radius(operator, options)


def singular_values(operator: tf.linalg.LinearOperator) -> tf.Tensor:
    """All singular values of each row, by forming J: 3 ms for 128 units, O(n³). All near 1 is dynamical isometry.

    Args:
        operator: The Jacobians, `(m, n)`, batch shape `(rows,)`.

    Returns:
        `(rows, min(m, n))`, the largest first; NaN for rows that hold NaN or inf.
    """
    dense, finite = _finite(operator.to_dense())
    values = tf.linalg.svd(dense, compute_uv=False)
    return tf.where(finite[:, None], values, _nan(values.dtype))


def condition_number(operator: tf.linalg.LinearOperator, options: Options) -> Measured:  # noqa: ARG001 - as every measure
    """The largest singular value over the smallest, for each row. Dimensionless; 1 for an orthogonal J.

    Args:
        operator: The Jacobians, `(m, n)`, batch shape `(rows,)`.
        options: Has no part in it: the value is exact up to rounding.

    Returns:
        The value `(rows,)`; inf if the smallest one is zero but for rounding, NaN for rows that hold NaN or inf.
    """
    values = singular_values(operator)
    largest, smallest = values[:, 0], values[:, -1]
    # As in the rank that LAPACK's users take.
    rounding = max(operator.shape[-2:]) * np.finfo(values.dtype.as_numpy_dtype).eps * largest
    return Measured(tf.where(smallest <= rounding, tf.constant(np.inf, values.dtype), largest / smallest), None)


def _arnoldi_radius(operator: tf.linalg.LinearOperator, options: Options) -> Measured:
    n, dtype = int(operator.shape[-1]), operator.dtype
    rows = operator.batch_shape_tensor()[0]

    def unfinished(value: tf.Tensor, residual: tf.Tensor) -> tf.Tensor:
        # A NaN compares as finished: such a row never gets better.
        return residual > options.tolerance * value

    def body(value: tf.Tensor, residual: tf.Tensor, start: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        basis, hessenberg, beyond = _krylov(operator, start)
        new_value, new_residual, mixture = _largest_ritz_value(hessenberg, beyond)
        # A row that is done goes on as long as others do. NaN compares as better: it stays.
        worse = new_residual > residual
        start = _unit(tf.linalg.matvec(basis, mixture, transpose_a=True))[0]
        return tf.where(worse, value, new_value), tf.where(worse, residual, new_residual), start

    start, _ = _unit(tf.random.stateless_normal([rows, n], options.seeds(4), dtype=dtype))
    infinite = tf.fill([rows], tf.constant(np.inf, dtype))
    scalar = tf.TensorShape([None])
    value, residual, _ = tf.while_loop(
        lambda value, residual, _: tf.reduce_any(unfinished(value, residual)),
        body,
        (tf.zeros([rows], dtype), infinite, start),
        shape_invariants=(scalar, scalar, tf.TensorShape([None, n])),
        maximum_iterations=MAX_RESTARTS,
    )
    return Measured(value, residual)


def _krylov(operator: tf.linalg.LinearOperator, start: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """`J V = V H + beyond v eᵀ` with orthonormal V: the rows of the basis `(rows, k, n)`, H, and `beyond` `(rows,)`."""
    rows, n = tf.shape(start)[0], start.shape[1]

    def step(
        j: tf.Tensor, basis: tf.Tensor, vector: tf.Tensor, hessenberg: tf.Tensor, _: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        basis = tf.concat([basis, vector[:, None]], axis=1)
        image = operator.matvec(vector)
        noise = 10 * np.finfo(image.dtype.as_numpy_dtype).eps * tf.norm(image, axis=-1)
        column = tf.zeros([rows, j + 1], image.dtype)
        for _again in range(2):
            part = tf.linalg.matvec(basis, image)
            image -= tf.linalg.matvec(basis, part, transpose_a=True)
            column += part
        # What is left below rounding is no direction: the space is invariant, and zeros follow.
        vector, beyond = _unit(image, noise)
        column = tf.pad(tf.concat([column, beyond[:, None]], axis=1), [[0, 0], [0, KRYLOV - 1 - j]])
        return j + 1, basis, vector, tf.concat([hessenberg, column[:, :, None]], axis=2), beyond

    vector, growing = tf.TensorShape([None, n]), tf.TensorShape([None, None, n])
    _, basis, _, hessenberg, beyond = tf.while_loop(
        lambda j, *_: j < KRYLOV,
        step,
        (
            tf.constant(0),
            tf.zeros([rows, 0, n], start.dtype),
            start,
            tf.zeros([rows, KRYLOV + 1, 0], start.dtype),
            tf.zeros([rows], start.dtype),
        ),
        shape_invariants=(
            tf.TensorShape([]),
            growing,
            vector,
            tf.TensorShape([None, KRYLOV + 1, None]),
            tf.TensorShape([None]),
        ),
    )
    return basis, tf.ensure_shape(hessenberg, [None, KRYLOV + 1, KRYLOV])[:, :KRYLOV], beyond


def _largest_ritz_value(hessenberg: tf.Tensor, beyond: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The modulus and residual of the largest Ritz value, `(rows,)`, and what to mix a new start of, `(rows, k)`."""
    safe, finite = _finite(hessenberg)
    values, vectors = tf.linalg.eig(safe)
    moduli = tf.abs(values)
    leading = tf.argmax(moduli, axis=-1)
    value = tf.gather(moduli, leading, batch_dims=1)
    vector = tf.abs(tf.gather(vectors, leading, axis=2, batch_dims=1))
    residual = beyond * tf.math.divide_no_nan(vector[:, -1], tf.norm(vector, axis=-1))
    power = tf.math.divide_no_nan(safe, value[:, None, None])
    for _ in range(SQUARINGS):
        power = power @ power
    nan = _nan(value.dtype)
    return tf.where(finite, value, nan), tf.where(finite, residual, nan), power[:, :, 0]


def _finite(matrices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The matrices, zeros in place of those that hold NaN or inf, which solvers refuse; and which rows are finite."""
    finite = tf.reduce_all(tf.math.is_finite(matrices), axis=[1, 2])
    return tf.where(finite[:, None, None], matrices, tf.zeros_like(matrices)), finite


def _nan(dtype: tf.DType) -> tf.Tensor:
    return tf.cast(tf.constant(np.nan), dtype)


def _unit(vectors: tf.Tensor, noise: tf.Tensor | float = 0.0) -> tuple[tf.Tensor, tf.Tensor]:
    """Vectors of norm one and the norms; both zero where that is nothing but noise."""
    norms = tf.norm(vectors, axis=-1)
    norms = tf.where(norms <= noise, tf.zeros_like(norms), norms)
    return tf.math.divide_no_nan(vectors, norms[:, None]), norms
