"""Singular values of a Jacobian from products with vectors."""

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_jacmon.measures.context import MeasureContext, Measured
from keras_jacmon.operators.formed import as_jacobian_operator

# Random matrices of 128 x 128 need at most about 25 steps for 1e-2 and 30 for 1e-3. The residual of a
# point that has not converged after this number of steps shows it.
MAX_STEPS = 96

# A small residual says that some singular value is near. With fewer steps it is not the largest one at more than
# one point in a hundred, where the random start vector happens to be almost orthogonal to its singular vector.
LEAST_STEPS = 12

# The small problem that decides if a point has converged costs as much as some products with J.
STEPS_BETWEEN_CHECKS = 2


def spectral_norm(operator: tf.linalg.LinearOperator, context: MeasureContext) -> Measured:
    """The largest singular value at each point, the worst-case gain of one step. Dimensionless.

    Golub-Kahan-Lanczos bidiagonalisation with one-sided reorthogonalisation, of at least 12 steps, until the residual
    of the leading singular triplet is at most half of `tolerance` times its value; points that have
    converged are left out of the further steps.

    Args:
        operator: The Jacobians, batch shape `(points,)`.
        context: `MeasureContext`; `tolerance` is relative, and the start vector comes from `seed`.

    Returns:
        Value and residual norm, each `(points,)`: some singular value is at most the residual away from the value.
        That it is the largest one is very likely, but no theorem: of 5,000 random matrices and LSTM steps with 64 and
        256 units, in one of two hundred it was another one, at most 5 % below the largest.

    References:
        G. H. Golub, W. Kahan, "Calculating the singular values and pseudo-inverse of a matrix", 1965.
        H. D. Simon, H. Zha, "Low-rank matrix approximation using the Lanczos bidiagonalization process with
        applications", 2000: that to reorthogonalise one side is enough.
    """
    value, residual, _ = _lanczos(operator, context, with_vectors=False)
    return Measured(value, residual)


class LeadingTriplet(NamedTuple):
    """The largest singular value of each matrix `(points,)`, its residual, and right singular vectors `(points, n)`."""

    value: tf.Tensor
    residual: tf.Tensor
    vectors: tf.Tensor


def leading_singular_vectors(operator: tf.linalg.LinearOperator, context: MeasureContext) -> LeadingTriplet:
    """The largest singular values as `spectral_norm` finds them, with right singular vectors.

    Args:
        operator: The Jacobians, batch shape `(points,)`.
        context: As for `spectral_norm`.

    Returns:
        The triplet; vectors of length one, or zero for matrices that are not finite.
    """
    value, residual, vectors = _lanczos(operator, context, with_vectors=True)
    finite = tf.reduce_all(tf.math.is_finite(vectors[0]), axis=-1, keepdims=True)
    return LeadingTriplet(value, residual, tf.where(finite, vectors[0], tf.zeros_like(vectors[0])))


def _lanczos(
    operator: tf.linalg.LinearOperator, context: MeasureContext, *, with_vectors: bool
) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
    """Values and residuals, and the right singular vectors if they are wanted."""
    operator = as_jacobian_operator(operator)
    points, n = operator.shape[0] or operator.batch_shape_tensor()[0], int(operator.shape[-1])
    squarings = math.ceil(math.log2(1 / max(context.tolerance, 1e-6))) + 4
    start, _ = _normalised(tf.random.stateless_normal([points, n], context.seeds(2), dtype=operator.dtype))
    every = tf.range(tf.cast(points, tf.int64))
    # Asked with all points: Keras cannot trace an LSTM for none.
    separable = operator.take(every) is not None

    def unfinished(value: tf.Tensor, residual: tf.Tensor) -> tf.Tensor:
        # Half: what still changes after the whole tolerance is often the second singular value giving way to the first.
        # A NaN compares as finished: such a point never gets better.
        going = tf.squeeze(residual > context.tolerance / 2 * value, axis=1)
        return going if separable else tf.fill(tf.shape(going), tf.reduce_any(going))

    def some_steps(
        steps: tf.Tensor, active: tf.Tensor, found: tuple[tf.Tensor, ...], progress: _Progress
    ) -> tuple[tf.Tensor, tf.Tensor, tuple[tf.Tensor, ...], _Progress]:
        here = operator.take(active) or operator
        progress = _advance(here, progress, steps)
        value, residual, q = _leading_singular_value(progress, squarings)
        new = [value, residual, *([_combined(q, progress.basis)] if with_vectors else [])]
        old = [tf.gather(array, active) for array in found]
        # Where an invariant subspace has been found, rounding may blur the residual. NaN compares as better: it stays.
        worse = residual > old[1]
        places = tf.expand_dims(active, axis=1)
        found = tuple(
            tf.tensor_scatter_nd_update(array, places, tf.where(worse, x, y))
            for array, x, y in zip(found, old, new, strict=True)
        )
        going = tf.squeeze(tf.where(unfinished(value, residual)), axis=1)
        return tf.constant(STEPS_BETWEEN_CHECKS), tf.gather(active, going), found, progress.take(going)

    nothing = tf.zeros_like(start[:, :1])
    found = (nothing, nothing + np.inf, *([tf.zeros_like(start)] if with_vectors else []))
    progress = _Progress.start(operator, start)
    _, _, found, _ = tf.while_loop(
        lambda _, active, *__: tf.size(active) > 0,
        some_steps,
        (tf.constant(LEAST_STEPS), every, found, progress),
        shape_invariants=(
            tf.TensorShape([]),
            tf.TensorShape([None]),
            tuple(x.shape for x in found),
            _Progress.shapes(operator),
        ),
        maximum_iterations=1 + (MAX_STEPS - LEAST_STEPS) // STEPS_BETWEEN_CHECKS,
    )
    value, residual, *vectors = found
    return tf.squeeze(value, axis=1), tf.squeeze(residual, axis=1), vectors


class _Progress(NamedTuple):
    """The state of the bidiagonalisation `J V = U B` at some points.

    Attributes:
        u: Tensor `(points, m)`, the last left vector.
        v: Tensor `(points, n)`, the last right vector.
        beta: Tensor `(points, 1)`, the entry of B that belongs to the next left vector.
        alphas: Tensor `(points, steps)`, the diagonal of B.
        betas: Tensor `(points, steps)`, the entries above the diagonal, after a zero.
        basis: Tensor `(points, steps, n)`, the right vectors before v.
    """

    u: tf.Tensor
    v: tf.Tensor
    beta: tf.Tensor
    alphas: tf.Tensor
    betas: tf.Tensor
    basis: tf.Tensor

    @classmethod
    def start(cls, operator: tf.linalg.LinearOperator, v: tf.Tensor) -> "_Progress":
        u, none = tf.zeros([tf.shape(v)[0], int(operator.shape[-2])], v.dtype), v[:, :0]
        return cls(u, v, tf.zeros_like(u[:, :1]), none, none, tf.expand_dims(v, axis=1)[:, :0])

    @staticmethod
    def shapes(operator: tf.linalg.LinearOperator) -> "_Progress":
        m, n = operator.shape[-2:]
        shapes = ([None, m], [None, n], [None, 1], [None, None], [None, None], [None, None, n])
        return _Progress(*map(tf.TensorShape, shapes))

    def take(self, points: tf.Tensor) -> "_Progress":
        return _Progress(*(tf.gather(part, points) for part in self))


def _advance(operator: tf.linalg.LinearOperator, progress: _Progress, steps: int | tf.Tensor) -> _Progress:
    """Continues the bidiagonalisation by some steps."""

    def step(*state: tf.Tensor) -> tuple[tf.Tensor, ...]:
        u, v, beta, alphas, betas, basis = state
        basis = tf.concat([basis, tf.expand_dims(v, axis=1)], axis=1)
        betas = tf.concat([betas, beta], axis=1)
        u, alpha = _normalised(operator.matvec(v) - beta * u, _noise(alphas))
        alphas = tf.concat([alphas, alpha], axis=1)
        following = _orthogonal(operator.matvec(u, adjoint=True) - alpha * v, basis)
        v, beta = _normalised(following, _noise(alphas))
        return u, v, beta, alphas, betas, basis

    shapes = tuple(_Progress.shapes(operator))
    return _Progress(
        *tf.while_loop(lambda *_: True, step, tuple(progress), shape_invariants=shapes, maximum_iterations=steps)
    )


def _orthogonal(vectors: tf.Tensor, basis: tf.Tensor) -> tf.Tensor:
    """Vectors `(points, n)` without their projections on the vectors of a basis `(points, steps, n)`."""

    def cleaned(vectors: tf.Tensor) -> tf.Tensor:
        # Written with the vectors on the left, which is twice as fast as `tf.linalg.matvec`.
        common = tf.matmul(tf.expand_dims(vectors, axis=1), basis, transpose_b=True)
        return vectors - _combined(common, basis)

    once = cleaned(vectors)
    # Of a vector that has become much shorter, what is left may be rounding: twice is enough (Kahan, Parlett).
    shorter = tf.reduce_any(tf.norm(once, axis=-1) < 0.7 * tf.norm(vectors, axis=-1))
    return tf.cond(shorter, lambda: cleaned(once), lambda: once)


def _combined(coefficients: tf.Tensor, basis: tf.Tensor) -> tf.Tensor:
    """The sums `(points, n)` of the vectors of a basis `(points, steps, n)` times coefficients `(points, 1, steps)`."""
    return tf.squeeze(coefficients @ basis, axis=1)


def _noise(alphas: tf.Tensor) -> tf.Tensor:
    """The norm below which all is rounding: in an invariant subspace, noise must not become a direction."""
    # Of no alphas at all the maximum is -inf, and nothing is below that.
    return 10 * np.finfo(alphas.dtype.as_numpy_dtype).eps * tf.reduce_max(alphas, axis=1, keepdims=True)


def _normalised(vectors: tf.Tensor, noise: tf.Tensor | None = None) -> tuple[tf.Tensor, tf.Tensor]:
    """Vectors `(..., n)` of length one, or zero for noise, and their divisors, `(..., 1)`."""
    norm = tf.norm(vectors, axis=-1, keepdims=True)
    if noise is not None:
        norm = tf.where(norm <= noise, tf.zeros([], norm.dtype), norm)
    return tf.math.divide_no_nan(vectors, norm), norm


def _leading_singular_value(progress: _Progress, squarings: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The largest singular value of the upper bidiagonal B, the residual of its triplet in the whole matrix, and q.

    With `A V = U B` and `Aᵀ U = V Bᵀ + β v eᵀ`, a unit vector p and `q = Bᵀ p / θ`, `θ = ‖Bᵀ p‖`, the triplet
    (θ, U p, V q) has the residuals `B q - θ p` and `β p_k`. p is the leading eigenvector of the small `B Bᵀ`, found by
    squaring that matrix: batched eigensolvers refuse NaN and take longer than the products with J.

    Returns:
        Value and residual, `(points, 1)`, and q, `(points, 1, steps)`.
    """
    # The entry above the diagonal in the first column, which there is not, is the first of the betas.
    bidiagonal = tf.linalg.diag(tf.stack([progress.betas, progress.alphas], axis=1), k=(0, 1))
    gram = tf.matmul(bidiagonal, bidiagonal, transpose_b=True)
    power = gram
    for squaring in range(squarings):
        if squaring % 2 == 0:
            # The largest entry of a positive semidefinite matrix is on its diagonal. If it is 1, the entries after two
            # squarings are k³ at most.
            power = tf.math.divide_no_nan(power, tf.reduce_max(power, axis=[1, 2], keepdims=True))
        power = power @ power
    column = tf.argmax(tf.linalg.diag_part(power), axis=-1)
    # As rows, for the matrix is symmetric.
    p, _ = _normalised(tf.gather(power, tf.expand_dims(column, axis=1), axis=1, batch_dims=1))
    image = p @ gram
    square = tf.reduce_sum(p * image, axis=-1, keepdims=True)
    value = tf.sqrt(square)
    inner = tf.math.divide_no_nan(tf.norm(image - square * p, axis=-1, keepdims=True), value)
    q = tf.math.divide_no_nan(p @ bidiagonal, value)
    residual = tf.sqrt(tf.squeeze(inner, axis=2) ** 2 + (progress.beta * p[:, 0, -1:]) ** 2)
    return tf.squeeze(value, axis=2), residual, q
