"""The measures of a step in a form that a tape can differentiate, and XLA can compile: what penalties are made of."""

from collections.abc import Callable
from dataclasses import dataclass

import tensorflow as tf

from keras_jacmon.measures.moments import closed_blocks
from keras_jacmon.operators.contract import JacobianOperator
from keras_jacmon.tensors import total

# Below this a measure has no logarithm, and no square root with a finite derivative.
TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Directions:
    """The vectors that a measure is differentiated with.

    Attributes:
        vectors: Integer, number of random vectors for a block of J that has no structure and more rows than that.
        seed: Tensor `(2,)`, seed of these vectors.
        leading: Tensor `(points, n)`, leading right singular vectors, possibly from a few steps of training ago.
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

    One step of the power method brings vectors from a few steps of training ago up to date; the error is of second
    order in the distance that remains.

    References:
        T. Miyato et al., "Spectral Normalization for Generative Adversarial Networks", 2018.
    """
    if directions.leading is None:
        raise ValueError("The spectral norm is differentiated along leading singular vectors, and there are none.")
    v = _unit(operator.matvec(_unit(operator.matvec(directions.leading)), adjoint=True))
    image = operator.matvec(v)
    return tf.reduce_sum(_unit(image) * image, axis=-1)[None]


# By the names of the registry. Measures over time, such as the flow and the Lyapunov exponents, are functions of whole
# trajectories and not of points: they belong in a table of their own, of functions of `Steps`.
DIFFERENTIABLE: dict[str, Callable[[tf.linalg.LinearOperator, Directions], tf.Tensor]] = {
    "variance": variance,
    "rms_singular_value": rms_singular_value,
    "spectral_norm": spectral_norm,
}


def _unit(vectors: tf.Tensor) -> tf.Tensor:
    """Vectors of length one, or zero, through which no derivative flows."""
    return tf.stop_gradient(tf.math.divide_no_nan(vectors, tf.norm(vectors, axis=-1, keepdims=True)))


def _moments(operator: tf.linalg.LinearOperator, directions: Directions) -> tuple[tf.Tensor, tf.Tensor]:
    """The mean of the entries, `(points,)`, and the sum of their squared distances from it, `(draws, points)`."""
    blocks = closed_blocks(operator)
    entries = int(operator.shape[-2]) * int(operator.shape[-1])
    mean = tf.add_n([block.entry_sum() for block in blocks]) / entries
    parts = [
        block.centred_square_sum(mean)[None] if block.has_closed_form else _centred(block, mean, directions, stream)
        for stream, block in enumerate(blocks)
    ]
    return mean, total(parts)


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
