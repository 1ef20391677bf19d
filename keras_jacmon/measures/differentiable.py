"""The measures of a step in a form that a tape can differentiate, and XLA can compile: what penalties are made of."""

from collections.abc import Callable
from dataclasses import dataclass

import tensorflow as tf

from keras_jacmon.measures.moments import closed_blocks

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
    m, n = int(operator.shape[-2]), int(operator.shape[-1])
    mean, squares = _moments(operator, directions)
    return n / (m * n) * (squares - m * n * mean**2)


def rms_singular_value(operator: tf.linalg.LinearOperator, directions: Directions) -> tf.Tensor:
    """`sqrt(‖J‖_F² / n)`, `(1, points)`; from an unbiased estimate of the square where no exact value is known."""
    _, squares = _moments(operator, directions)
    mean_square = tf.reduce_mean(squares, axis=0, keepdims=True) / int(operator.shape[-1])
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
    """The mean of the entries, `(points,)`, and the sum of their squares, `(draws, points)`."""
    m, n = int(operator.shape[-2]), int(operator.shape[-1])
    blocks = closed_blocks(operator)
    mean = tf.add_n([block.entry_sum() for block in blocks]) / (m * n)
    squares = []
    for stream, block in enumerate(blocks):
        closed = block.square_sum()
        squares.append(_squares(block, directions, stream) if closed is None else closed[None])
    total = squares[0]
    for part in squares[1:]:
        total = total + part
    return mean, total


def _squares(operator: tf.linalg.LinearOperator, directions: Directions, stream: int) -> tf.Tensor:
    """`‖J‖_F²` from products with Jᵀ, `(draws, points)`: with all unit vectors if they are few, or with random ones.

    `E ‖Jᵀ z‖² = ‖J‖_F²` for independent signs z (Hutchinson 1989).
    """
    m = int(operator.shape[-2])
    points = operator.batch_shape_tensor()[0]
    if m <= directions.vectors:
        images = operator.matmul(tf.eye(m, batch_shape=[points], dtype=operator.dtype), adjoint=True)
        return tf.reduce_sum(images**2, axis=[1, 2])[None]
    seed = tf.random.experimental.stateless_fold_in(directions.seed, stream)
    shape = [operator.shape[0] or points, m, directions.vectors]
    bits = tf.random.stateless_uniform(shape, seed, 0, 2, tf.int32)
    images = operator.matmul(tf.cast(2 * bits - 1, operator.dtype), adjoint=True)
    return tf.transpose(tf.reduce_sum(images**2, axis=1))
