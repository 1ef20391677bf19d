"""Arnoldi's method: eigenvalues of a Jacobian from products with vectors, in Krylov spaces."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_jacmon.measures.context import MeasureContext, Measured, Purpose
from keras_jacmon.measures.solver_inputs import finite_or_zero, nan, normalised

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


def arnoldi_radius(operator: tf.linalg.LinearOperator, context: MeasureContext) -> Measured:
    """The spectral radius at each point, from Krylov spaces of 48 dimensions that are restarted up to 12 times.

    Args:
        operator: The Jacobians, `(n, n)`, batch shape `(points,)`.
        context: `MeasureContext`; `tolerance` is relative, and the start vector comes from `seed`.

    Returns:
        The modulus of the largest Ritz value, and the residual of its vector: see `eigen.spectral_radius`.
    """
    n, dtype = int(operator.shape[-1]), operator.dtype
    points = operator.batch_shape_tensor()[0]

    def unfinished(value: tf.Tensor, residual: tf.Tensor) -> tf.Tensor:
        # A NaN compares as finished: such a point never gets better.
        return residual > context.tolerance * value

    def body(value: tf.Tensor, residual: tf.Tensor, start: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        space = krylov_space(operator, start, KRYLOV)
        new_value, new_residual = (tf.abs(x[:, 0]) for x in ritz_values(*space))
        mixture = _leading_directions(space.hessenberg, new_value)
        # A point that is done goes on as long as others do. NaN compares as better: it stays.
        worse = new_residual > residual
        start = normalised(tf.linalg.matvec(space.basis, mixture, transpose_a=True))[0]
        return tf.where(worse, value, new_value), tf.where(worse, residual, new_residual), start

    seed = context.seeds(Purpose.SPECTRAL_RADIUS)
    start, _ = normalised(tf.random.stateless_normal([points, n], seed, dtype=dtype))
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


class KrylovSpace(NamedTuple):
    """A Krylov space of each Jacobian: `J V = V H + beyond v eᵀ` with orthonormal V.

    Attributes:
        basis: Tensor `(points, k, n)`, the columns of V; zeros from where on the space is invariant.
        hessenberg: Tensor `(points, k, k)`, H.
        beyond: Tensor `(points,)`, the length of the part of the last image that lies outside of the space.
    """

    basis: tf.Tensor
    hessenberg: tf.Tensor
    beyond: tf.Tensor


def krylov_space(operator: tf.linalg.LinearOperator, start: tf.Tensor, size: int) -> KrylovSpace:
    """The Krylov space of `start`, `J start`, ... with k dimensions.

    Args:
        operator: The Jacobians, `(n, n)`, batch shape `(points,)`.
        start: Tensor `(points, n)`, vectors of length one.
        size: Integer k.
    """
    points, n = tf.shape(start)[0], start.shape[1]

    def step(
        j: tf.Tensor, basis: tf.Tensor, vector: tf.Tensor, hessenberg: tf.Tensor, _: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        basis = tf.concat([basis, vector[:, None]], axis=1)
        image = operator.matvec(vector)
        noise = 10 * np.finfo(image.dtype.as_numpy_dtype).eps * tf.norm(image, axis=-1, keepdims=True)
        column = tf.zeros([points, j + 1], image.dtype)
        for _again in range(2):
            part = tf.linalg.matvec(basis, image)
            image -= tf.linalg.matvec(basis, part, transpose_a=True)
            column += part
        # What is left below rounding is no direction: the space is invariant, and zeros follow.
        vector, beyond = normalised(image, noise)
        column = tf.pad(tf.concat([column, beyond], axis=1), [[0, 0], [0, size - 1 - j]])
        return j + 1, basis, vector, tf.concat([hessenberg, column[:, :, None]], axis=2), tf.squeeze(beyond, 1)

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
    return KrylovSpace(basis, tf.ensure_shape(hessenberg, [None, size + 1, size])[:, :size], beyond)


def ritz_values(basis: tf.Tensor, hessenberg: tf.Tensor, beyond: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The eigenvalues of H, the largest modulus first, and the residuals of their vectors, each `(points, k)`."""
    safe, finite = finite_or_zero(hessenberg)
    values, vectors = tf.linalg.eig(safe)
    order = tf.argsort(tf.abs(values), axis=-1, direction="DESCENDING")
    values = tf.gather(values, order, batch_dims=1)
    parts = tf.abs(tf.gather(vectors, order, axis=2, batch_dims=1))
    # An eigenvector of H that is made of zeros in V, after an invariant space, is none of J.
    exists = tf.cast(tf.reduce_any(tf.not_equal(basis, 0), axis=2), parts.dtype)
    norms = tf.norm(parts * exists[:, :, None], axis=1)
    infinite = tf.constant(np.inf, norms.dtype)
    residuals = tf.where(norms > _SPURIOUS, beyond[:, None] * parts[:, -1] / norms, infinite)
    values, residuals = (tf.where(finite[:, None], x, nan(x.dtype)) for x in (values, residuals))
    return values, residuals


def _leading_directions(hessenberg: tf.Tensor, largest: tf.Tensor) -> tf.Tensor:
    """Coefficients of a new start vector, `(points, k)`: powers of H favour the largest of its eigenvalues."""
    power = tf.math.divide_no_nan(hessenberg, largest[:, None, None])
    for _ in range(SQUARINGS):
        power = power @ power
    return power[:, :, 0]
