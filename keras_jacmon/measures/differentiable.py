"""The measures of a step in a form that a tape can differentiate: what penalties are made of.

XLA can compile all of them but the spectral radius, since it has no eigenvalues of a matrix that is not symmetric.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from keras_jacmon.measures.eigen import leading_eigenvectors
from keras_jacmon.measures.moments import closed_blocks, entries_of
from keras_jacmon.operators.contract import JacobianOperator
from keras_jacmon.operators.entry_moments import pooled

# Steps that bring singular vectors up to date, the length of the random part of their start, and the squarings of the
# Gram matrix of these steps. Of an orthogonal matrix that has changed, they find some nine tenths or more of what its
# norm has grown beyond 1, whatever vector led before.
_STEPS, _RANDOM_PART, _SQUARINGS = 8, 0.25, 12

# Below this a measure has no logarithm, and no square root with a finite derivative.
TINY = 1e-12


# An eigenvalue moves by `1 / |wᴴ v|` times a change of J, with its left and right unit vectors w and v. Up to this
# multiple of √ε, with ε the machine epsilon, an overlap `|wᴴ v|` may be zero but for rounding, and J defective.
_LEAST_OVERLAP = 3.0


@dataclass(frozen=True, eq=False)
class Directions:
    """The vectors that a measure is differentiated with.

    Attributes:
        vectors: Integer, number of random vectors for a block of J that has no structure and more rows than that.
        seed: Tensor `(2,)`, seed of these vectors.
        leading: Tensor, the vectors that the measure is differentiated along: `(points, n)`, leading right singular
            vectors of length one, for the spectral norm; those of `eigenvector_parts` for the spectral radius.
            Defaults to None.
    """

    vectors: int
    seed: tf.Tensor
    leading: tf.Tensor | None = None


def variance(operator: tf.linalg.LinearOperator, directions: Directions) -> tf.Tensor:
    """`n * Var(J)`, `(draws, points)`: one draw if it is exact, otherwise independent unbiased estimates."""
    _, centred = _moments(operator, directions)
    return centred / int(operator.shape[-2])


def rms_singular_value(operator: tf.linalg.LinearOperator, directions: Directions) -> tf.Tensor:
    """`sqrt(‖J‖_F² / n)`, `(1, points)`; from an unbiased estimate of the square where no exact value is known."""
    m, n = int(operator.shape[-2]), int(operator.shape[-1])
    mean, centred = _moments(operator, directions)
    mean_square = (tf.reduce_mean(centred, axis=0, keepdims=True) + m * n * mean**2) / n
    # The derivative of the root has a pole at zero.
    return tf.sqrt(tf.maximum(mean_square, TINY**2))


def spectral_norm(operator: tf.linalg.LinearOperator, directions: Directions) -> tf.Tensor:
    """`uᵀ J v`, `(1, points)`, with the leading singular vectors u and v held: its derivative is that of the norm.

    The error of the value is of second order in the error of the vectors.

    References:
        T. Miyato et al., "Spectral Normalization for Generative Adversarial Networks", 2018.
    """
    if directions.leading is None:
        raise ValueError("The spectral norm is differentiated along leading singular vectors, and there are none.")
    image = operator.matvec(directions.leading)
    return tf.reduce_sum(_unit(image) * image, axis=-1)[None]


def spectral_radius(operator: tf.linalg.LinearOperator, directions: Directions) -> tf.Tensor:
    """`|wᴴ J v / wᴴ v|`, `(1, points)`, with the left and right vectors w and v of the leading eigenvalue held.

    Its derivative is that of the radius. Where several eigenvalues have the largest modulus, the derivative is that of
    one of them. A nearly defective J, `|wᴴ v| -> 0`, has no derivative, and zero is taken: its radius may change by any
    multiple of a small change of J.

    References:
        J. R. Magnus, "On differentiating eigenvalues and eigenvectors", 1985.
    """
    parts = eigenvector_parts(operator) if directions.leading is None else directions.leading
    right, left = (tf.complex(parts[:, :, k], parts[:, :, k + 1]) for k in (0, 2))
    images = operator.matmul(parts[:, :, :2])
    image = tf.complex(images[:, :, 0], images[:, :, 1])
    overlap = tf.abs(_product(left, right))
    is_simple = overlap > _LEAST_OVERLAP * np.sqrt(np.finfo(overlap.dtype.as_numpy_dtype).eps)
    quotient = tf.abs(_product(left, image)) / tf.where(is_simple, overlap, 1.0)
    return tf.where(is_simple, quotient, tf.stop_gradient(tf.abs(_product(right, image))))[None]


def eigenvector_parts(operator: tf.linalg.LinearOperator) -> tf.Tensor:
    """Unit vectors of the leading eigenvalue, `(points, n, 4)`: real and imaginary part of the right, then of the left.

    No derivative flows through them.
    """
    found = leading_eigenvectors(tf.linalg.LinearOperatorFullMatrix(tf.stop_gradient(operator.to_dense())))
    parts = [part(vector) for vector in (found.right, found.left) for part in (tf.math.real, tf.math.imag)]
    return tf.stop_gradient(tf.stack(parts, axis=-1))


def refined_vectors(operator: tf.linalg.LinearOperator, vectors: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Leading right singular vectors, found from those of other weights or points in a fixed number of steps.

    They are the best ones in the Krylov space of `JᵀJ` that the known vectors span, with a random part: another
    direction may lead by now. No derivative flows through them, and XLA can compile it.

    Args:
        operator: The Jacobians, batch shape `(points,)`.
        vectors: Tensor `(points, n)`, vectors of length one or zero.
        seed: Tensor `(2,)`, seed of the random part.

    Returns:
        Tensor `(points, n)`, vectors of length one; zero for Jacobians that are zero or not finite.
    """
    m, n = map(int, operator.shape[-2:])
    steps, points = min(_STEPS, m, n), tf.shape(vectors)[0]
    random = tf.random.stateless_normal(tf.shape(vectors), seed, dtype=operator.dtype)

    def step(k: tf.Tensor, v: tf.Tensor, basis: tf.Tensor, images: tf.Tensor) -> tuple[tf.Tensor, ...]:
        image, here = operator.matvec(v), tf.one_hot(k, steps, dtype=v.dtype)[:, None]
        basis, images = basis + here * v[:, None], images + here * image[:, None]
        following = operator.matvec(image, adjoint=True)
        # Twice is enough (Kahan, Parlett).
        for _ in range(2):
            following -= tf.linalg.matvec(basis, tf.linalg.matvec(basis, following), transpose_a=True)
        return k + 1, _unit(following), basis, images

    start = _unit(vectors + _RANDOM_PART * _unit(random))
    nothing = [tf.zeros([points, steps, size], operator.dtype) for size in (n, m)]
    _, _, basis, images = tf.while_loop(lambda *_: True, step, (0, start, *nothing), maximum_iterations=steps)
    best = _unit(tf.linalg.matvec(basis, _leading_row(images), transpose_a=True))
    return tf.where(tf.math.is_finite(best), best, tf.zeros_like(best))


def _leading_row(rows: tf.Tensor) -> tf.Tensor:
    """The coefficients `(points, k)` that make the longest sum of the rows `(points, k, n)`, up to a factor.

    They are an eigenvector of the Gram matrix, found by squaring it: eigensolvers refuse NaN.
    """

    def scaled(tensor: tf.Tensor) -> tf.Tensor:
        return tf.math.divide_no_nan(tensor, tf.reduce_max(tf.abs(tensor), axis=[1, 2], keepdims=True))

    unit = scaled(rows)
    gram = tf.matmul(unit, unit, transpose_b=True)
    (power,) = tf.while_loop(
        lambda _: True, lambda power: (tf.matmul(scaled(power), scaled(power)),), (gram,), maximum_iterations=_SQUARINGS
    )
    column = tf.argmax(tf.linalg.diag_part(power), axis=-1)
    return tf.gather(power, column, axis=1, batch_dims=1)


# By the names of the registry. Measures of whole trajectories are in `differentiable_over_time`.
DIFFERENTIABLE: dict[str, Callable[[tf.linalg.LinearOperator, Directions], tf.Tensor]] = {
    "variance": variance,
    "rms_singular_value": rms_singular_value,
    "spectral_norm": spectral_norm,
    "spectral_radius": spectral_radius,
}


def _product(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """`leftᴴ right`, `(points,)`."""
    return tf.reduce_sum(tf.math.conj(left) * right, axis=-1)


def _unit(vectors: tf.Tensor) -> tf.Tensor:
    """Vectors of length one, or zero, through which no derivative flows."""
    return tf.stop_gradient(tf.math.divide_no_nan(vectors, tf.norm(vectors, axis=-1, keepdims=True)))


def _moments(operator: tf.linalg.LinearOperator, directions: Directions) -> tuple[tf.Tensor, tf.Tensor]:
    """The mean of the entries, `(points,)`, and the sum of their squared distances from it, `(draws, points)`."""
    blocks = closed_blocks(operator)
    means = [block.entry_sum() / entries_of(block) for block in blocks]
    spreads = [
        block.spread()[None] if block.has_closed_form else _centred(block, mean, directions, stream)
        for stream, (block, mean) in enumerate(zip(blocks, means, strict=True))
    ]
    return pooled(list(map(entries_of, blocks)), means, spreads)


def _centred(operator: JacobianOperator, mean: tf.Tensor, directions: Directions, stream: int) -> tf.Tensor:
    """`‖J - mean‖_F²` from products with Jᵀ, `(draws, points)`: with all unit vectors if they are few, or random ones.

    `E ‖Aᵀ z‖² = ‖A‖_F²` for independent signs z (Hutchinson 1989).
    """
    m, points = int(operator.shape[-2]), operator.batch_shape_tensor()[0]
    every = m <= directions.vectors
    if every:
        vectors = tf.eye(m, batch_shape=[points], dtype=operator.dtype)
    else:
        seed = tf.random.experimental.stateless_fold_in(directions.seed, stream)
        shape = [operator.shape[0] or points, m, directions.vectors]
        vectors = tf.cast(2 * tf.random.stateless_uniform(shape, seed, 0, 2, tf.int32) - 1, operator.dtype)
    of_mean = mean[:, None, None] * tf.reduce_sum(vectors, axis=1, keepdims=True)
    squares = tf.reduce_sum((operator.matmul(vectors, adjoint=True) - of_mean) ** 2, axis=1)
    return tf.reduce_sum(squares, axis=-1)[None] if every else tf.transpose(squares)
