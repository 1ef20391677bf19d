"""Lyapunov exponents that a tape can differentiate by the Jacobians of all steps.

The decompositions of the whole trajectory are kept, and none of them is differentiated. The columns that are led along
it are rows of tensors here, as `Steps.multiply` takes them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from keras_jacmon.measures.differentiable import TINY
from keras_jacmon.measures.lyapunov import diagonal_lengths, scaled_qr
from keras_jacmon.measures.steps import Steps

# Columns that keep this share of their length beside those before them are told apart by their products in double
# precision, with the digits of single precision.
_APART = 1e-4
_SHIFT = 1e-13
# The least length of a column there.
_LEAST = 1e-30

# From a step and vectors to their images, as `Steps.multiply`.
_Multiply = Callable[..., tf.Tensor]


class _Walk(NamedTuple):
    """The decompositions `Q_t R_t = J_t Q_{t-1}` of a whole trajectory; columns of Q are rows here.

    Attributes:
        rows: Tensor `(time + 1, samples, k, n)`, the transpose of Q before the first step and after each.
        triangles: Tensor `(time, samples, k, k)`, the transpose of R, with ones on the diagonal where a column has lost
            its direction; the identity at skipped steps.
        logs: Tensor `(time, samples, k)`, the logarithms of `|R_ii|`; zero where they do not count.
        found: Tensor `(time, samples, k)`, 1 where a logarithm counts and its column has not lost its direction.
        counts: Tensor `(samples,)`, number of steps of each sample that count.
    """

    rows: tf.Tensor
    triangles: tf.Tensor
    logs: tf.Tensor
    found: tf.Tensor
    counts: tf.Tensor


def differentiable_exponents(steps: Steps, start: tf.Tensor, *, warmup: int, formed: bool) -> tf.Tensor:
    """The leading exponents of whole trajectories, with a QR at each step, and with derivatives by the Jacobians.

    With D the derivatives by the sums of `log R_ii`, and `K_T = 0`, the derivative by `J_t` is `(Q_{t-1} X_t)ᵀ`, where
    `X_t = R_t⁻¹ (K_t + D Q_tᵀ)` and `K_{t-1} = X_t J_t - tril(X_t J_t Q_{t-1}) Q_{t-1}ᵀ`: the logarithms of all steps
    together are those of the product of the steps, and columns change a later logarithm as far as their own QR leaves
    them free to. So no decomposition is differentiated, and all Jacobians are differentiated at once.

    Args:
        steps: The steps, with `every`.
        start: Tensor `(samples, n, k)`, orthonormal columns.
        warmup: Integer, number of first steps of each sample that do not count.
        formed: Boolean, True to form the Jacobians of all points, which takes memory for all their entries. It is
            faster for many exponents; and in a branch of a graph it must be so, since no derivative can be taken there
            with operators that are made from tensors outside.

    Returns:
        `(k, samples)`, nats per step. A direction that a step does away with has a finite logarithm, log 1e-12, and no
        derivative there. NaN without a derivative for samples with no step after the warm-up.
    """
    if steps.every is None:
        raise ValueError("The exponents are differentiated by all Jacobians at once, and the steps do not have them.")
    whole, multiply = steps.every(), steps.multiply
    if formed:
        transposed = tf.linalg.matrix_transpose(whole.to_dense())
        multiply = _by_matrices(steps, tf.stop_gradient(transposed))
    walk = _walked(steps, multiply, tf.linalg.matrix_transpose(start), warmup)
    before = tf.reshape(walk.rows[:-1], [-1, *walk.rows.shape[2:]])

    @tf.custom_gradient
    def exponents(_: tf.Tensor) -> tuple[tf.Tensor, Any]:
        counts = tf.cast(walk.counts, start.dtype)[:, None]

        def slopes(upstream: tf.Tensor) -> tf.Tensor:
            by_sums = tf.math.divide_no_nan(tf.transpose(upstream), counts)
            solved = tf.reshape(_slopes(steps, multiply, walk, by_sums), tf.shape(before))
            return tf.matmul(before, solved, transpose_a=True) if formed else tf.linalg.matrix_transpose(solved)

        return tf.transpose(tf.reduce_sum(walk.logs, axis=0) / counts), slopes

    found: tf.Tensor = exponents(transposed if formed else whole.matmul(before, adjoint_arg=True))
    return found


def _by_matrices(steps: Steps, transposed: tf.Tensor) -> _Multiply:
    """Returns `steps.multiply` by the transposes of all Jacobians, `(points, n, n)`: without another transpose."""
    matrices = tf.reshape(transposed, [steps.time, steps.samples, steps.size, steps.size])

    def multiply(t: tf.Tensor, vectors: tf.Tensor, *, adjoint: bool = False) -> tf.Tensor:
        images = _product(vectors, matrices[t], transpose_b=adjoint)
        return images if steps.mask is None else tf.where(steps.mask[t][:, None, None], images, vectors)

    return multiply


def _product(left: tf.Tensor, right: tf.Tensor, *, transpose_b: bool = False) -> tf.Tensor:
    """The products of the matrices of each sample."""
    if left.shape[0] == 1:
        # TensorFlow needs several times as long for a batch of one.
        return tf.matmul(left[0], right[0], transpose_b=transpose_b)[None]
    return tf.matmul(left, right, transpose_b=transpose_b)


def _walked(steps: Steps, multiply: _Multiply, start: tf.Tensor, warmup: int) -> _Walk:
    """The decompositions along a trajectory, through which no derivative flows."""
    (samples, k), dtype, time = start.shape[:2], start.dtype, tf.convert_to_tensor(steps.time)

    def step(t: tf.Tensor, rows: tf.Tensor, *kept: tf.TensorArray) -> tuple[Any, ...]:
        split = _decomposed_rows(multiply(t, rows))
        following = split.q if steps.mask is None else tf.where(steps.mask[t][:, None, None], split.q, rows)
        written = (following, split.triangle, split.lengths)
        return t + 1, following, *(array.write(t, value) for array, value in zip(kept, written, strict=True))

    shapes = (start.shape, [samples, k, k], [samples, k])
    kept = [tf.TensorArray(dtype, time, element_shape=shape) for shape in shapes]
    _, _, *kept = tf.while_loop(lambda t, *_: t < time, step, [tf.constant(0), start, *kept])
    rows, triangles, lengths = (tf.stop_gradient(array.stack()) for array in kept)
    valid = tf.ones([time, steps.samples], tf.bool) if steps.mask is None else steps.mask
    counts = valid & (tf.cumsum(tf.cast(valid, tf.int32)) > warmup)
    logs = tf.math.log(tf.maximum(lengths, TINY))
    return _Walk(
        tf.concat([start[None], rows], axis=0),
        triangles if steps.mask is None else tf.where(valid[..., None, None], triangles, tf.eye(k, dtype=dtype)),
        tf.where(counts[:, :, None], logs, tf.zeros_like(logs)),
        tf.cast(counts[:, :, None] & (lengths > TINY), dtype),
        tf.math.count_nonzero(counts, axis=0),
    )


def _slopes(steps: Steps, multiply: _Multiply, walk: _Walk, by_sums: tf.Tensor) -> tf.Tensor:
    """X of all steps, `(time, samples, k, n)`, zero at skipped ones; the derivatives by the sums are `(samples, k)`."""
    time = tf.convert_to_tensor(steps.time)
    direct = walk.rows[1:] * (by_sums * walk.found)[..., None]

    def step(done: tf.Tensor, generator: tf.Tensor, kept: tf.TensorArray) -> tuple[Any, ...]:
        t = time - 1 - done
        solved = tf.linalg.triangular_solve(walk.triangles[t], generator + direct[t], adjoint=True)
        pulled, before = multiply(t, solved, adjoint=True), walk.rows[t]
        # A part that only rounding makes would grow from step to step.
        fixed = tf.linalg.band_part(_product(pulled, before, transpose_b=True), -1, 0)
        return done + 1, pulled - _product(fixed, before), kept.write(t, solved)

    kept = tf.TensorArray(direct.dtype, time, element_shape=direct.shape[1:])
    begin = [tf.constant(0), tf.zeros_like(direct[0]), kept]
    solved = tf.while_loop(lambda done, *_: done < time, step, begin)[2].stack()
    return solved if steps.mask is None else tf.where(steps.mask[:, :, None, None], solved, tf.zeros_like(solved))


class _Rows(NamedTuple):
    """The decomposition of columns that are rows here.

    Attributes:
        q: Tensor `(samples, k, n)`, orthonormal rows.
        triangle: Tensor `(samples, k, k)`, lower triangular, with which `rows = triangle q`, but for a diagonal of ones
            where a row has lost its direction, since a solver refuses a matrix that is singular.
        lengths: Tensor `(samples, k)`, the size of the diagonal; zero for a row that has lost its direction.
    """

    q: tf.Tensor
    triangle: tf.Tensor
    lengths: tf.Tensor


def _decomposed_rows(rows: tf.Tensor) -> _Rows:
    """The decomposition of columns that are rows here, `(samples, k, n)`.

    In single precision by the Cholesky decomposition of the products of the columns in double precision, which takes
    half of the time, except where the columns are so near to each other that this would lose digits.
    """
    if rows.dtype != tf.float32:
        return _by_reflections(rows)
    wide = tf.cast(rows, tf.float64)
    products = _product(wide, wide, transpose_b=True)
    squares = tf.linalg.diag_part(products)
    # What is added lies below the digits that count, and lets the decomposition succeed.
    triangle = tf.linalg.cholesky(tf.linalg.set_diag(products, squares * (1 + _SHIFT) + _LEAST**3))
    lengths = tf.linalg.diag_part(triangle)
    apart = tf.reduce_all(lengths > _APART * tf.sqrt(squares) + _LEAST)

    def by_products() -> _Rows:
        found = (tf.linalg.triangular_solve(triangle, wide), triangle, lengths)
        return _Rows(*(tf.cast(tensor, rows.dtype) for tensor in found))

    split = _Rows(*tf.cond(apart, by_products, lambda: _by_reflections(rows)))
    return split._replace(q=tf.ensure_shape(split.q, rows.shape))


def _by_reflections(rows: tf.Tensor) -> _Rows:
    """The decomposition of columns that are rows by Householder reflections."""
    split = scaled_qr(tf.linalg.matrix_transpose(rows))
    lengths = diagonal_lengths(split.r) * split.scale
    triangle = tf.linalg.matrix_transpose(split.r * split.scale[:, None])
    diagonal = tf.linalg.diag_part(triangle)
    diagonal = tf.where(lengths > TINY, diagonal, tf.ones_like(diagonal))
    return _Rows(tf.linalg.matrix_transpose(split.q), tf.linalg.set_diag(triangle, diagonal), lengths)
