"""Entry statistics of a Jacobian: variance and RMS singular value."""

import weakref
from dataclasses import dataclass

import tensorflow as tf

from keras_jacmon.measures.context import MeasureContext, Measured, Purpose
from keras_jacmon.operators.contract import JacobianOperator
from keras_jacmon.operators.entry_moments import pooled
from keras_jacmon.operators.formed import as_jacobian_operator
from keras_jacmon.tensors import known_sizes

# Random vectors of an estimate. The error of a mean over p points falls as 1/√(16 p).
ESTIMATE_VECTORS = 16

# Pairs of a point and a vector that are multiplied in a pass: fewer take longer to start than to multiply, and the
# products of more do not stay in the processor's cache.
_PAIRS = 2**10


def variance(operator: tf.linalg.LinearOperator, context: MeasureContext) -> Measured:
    """`n * Var(J)` at each point: population variance over all entries, mean removed, times the units.

    Dimensionless; 1.0 for a linear cell with Glorot weights, 0.5 with ReLU.

    Args:
        operator: The Jacobians, batch shape `(points,)`.
        context: `MeasureContext`; up to `max_entries` entries the value is exact, above it an estimate.

    Returns:
        Value and standard error, each `(points,)`.
    """
    moments = _moments(operator, context)
    m, n = _dimensions(operator)
    scale = tf.constant(n / (m * n), operator.dtype)
    error = None if moments.error is None else scale * moments.error
    return Measured(scale * moments.centred, error)


def rms_singular_value(operator: tf.linalg.LinearOperator, context: MeasureContext) -> Measured:
    """`sqrt(‖J‖_F² / n)` at each point: the RMS gain of a random direction.

    Dimensionless; 1 keeps norms. Sees the mean of the entries, to which the variance is blind.

    Args:
        operator: The Jacobians, batch shape `(points,)`.
        context: `MeasureContext`; up to `max_entries` entries the value is exact, above it an estimate.

    Returns:
        Value and standard error, each `(points,)`; the error by the delta method.
    """
    moments = _moments(operator, context)
    m, n = _dimensions(operator)
    value = tf.sqrt(moments.centred / n + m * tf.square(moments.mean))
    error = None if moments.error is None else tf.math.divide_no_nan(moments.error, 2 * n * value)
    return Measured(value, error)


@dataclass(frozen=True)
class _Moments:
    """`mean` over the entries, `centred` = Σ (J_ik - mean)², and the standard error of `centred` if estimated."""

    mean: tf.Tensor
    centred: tf.Tensor
    error: tf.Tensor | None


# Both measures above rest on the same sums; a second pass over all columns of J would double the cost.
_known: weakref.WeakKeyDictionary[tf.linalg.LinearOperator, tuple[MeasureContext, _Moments]] = (
    weakref.WeakKeyDictionary()
)


def _moments(operator: tf.linalg.LinearOperator, context: MeasureContext) -> _Moments:
    context_then, moments = _known.get(operator, (None, None))
    if moments is None or context_then is not context:
        moments = _moments_by_blocks(operator, context)
        _known[operator] = (context, moments)
    return moments


def _moments_by_blocks(operator: tf.linalg.LinearOperator, context: MeasureContext) -> _Moments:
    blocks = closed_blocks(operator)
    means = [block.entry_sum() / entries_of(block) for block in blocks]
    found = [_spread(block, mean, context) for block, mean in zip(blocks, means, strict=True)]
    errors = [error**2 for _, error in found if error is not None]
    mean, centred = pooled(list(map(entries_of, blocks)), means, [value for value, _ in found])
    return _Moments(mean, centred, tf.sqrt(tf.add_n(errors)) if errors else None)


def closed_blocks(operator: tf.linalg.LinearOperator) -> list[JacobianOperator]:
    """The operator itself if it has closed forms, otherwise its blocks, divided until they have closed forms."""
    operator = as_jacobian_operator(operator)
    if operator.has_closed_form:
        return [operator]
    blocks = operator.blocks()
    return [blocks[0]] if len(blocks) == 1 else [part for block in blocks for part in closed_blocks(block)]


def entries_of(operator: tf.linalg.LinearOperator) -> int:
    """The number of entries of J."""
    m, n = _dimensions(operator)
    return m * n


def _spread(operator: JacobianOperator, mean: tf.Tensor, context: MeasureContext) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Σ (J_ik - mean)² by a closed form or from products with vectors, and its standard error if it is an estimate."""
    if operator.has_closed_form:
        return operator.spread(), None
    return _exact(operator, mean, context) if context.exact(operator) else _estimated(operator, mean, context)


def _exact(operator: JacobianOperator, mean: tf.Tensor, context: MeasureContext) -> tuple[tf.Tensor, None]:
    """Σ_ik (J_ik - mean)², some rows or columns of J at a time.

    Centred before squaring: the difference of sums would cancel.
    """
    m, n = _dimensions(operator)
    # By the smaller side. A product with J takes about as long as two with Jᵀ where a tape gives both.
    adjoint = m <= 2 * n
    side = m if adjoint else n
    points = known_sizes(mean)[0]
    width, at_a_time = _passes(points, side, context.workspace_vectors)

    def body(start: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        basis = tf.one_hot(start + tf.range(tf.minimum(width, side - start)), side, dtype=operator.dtype)
        if isinstance(width, int) and side % width == 0:
            basis = tf.ensure_shape(basis, [width, side])
        images = operator.columns(tf.broadcast_to(basis[:, None], [tf.shape(basis)[0], points, side]), adjoint=adjoint)
        # One axis after the other: a sum over the last one loses fewer digits than one over both.
        squares = tf.reduce_sum(tf.reduce_sum(tf.square(images - mean[:, None]), axis=2), axis=0)
        # The static shape of the mean may say that there is a single point where the shape of the images does not.
        return start + width, total + tf.ensure_shape(squares, mean.shape)

    _, total = tf.while_loop(
        lambda start, _: start < side, body, [tf.constant(0), tf.zeros_like(mean)], parallel_iterations=at_a_time
    )
    return total, None


def _passes(points: int | tf.Tensor, side: int, most: int) -> tuple[int | tf.Tensor, int]:
    """The number of vectors of a pass over J, and of passes at a time; `most` pairs of point and vector at once."""
    if not isinstance(points, int):
        return tf.clip_by_value(min(most, _PAIRS) // tf.maximum(points, 1), 1, side), 1
    width = min(max(min(most, _PAIRS) // max(points, 1), 1), side)
    return width, 2 if 2 * width * points <= most else 1


def _estimated(
    operator: tf.linalg.LinearOperator, mean: tf.Tensor, context: MeasureContext
) -> tuple[tf.Tensor, tf.Tensor]:
    """Hutchinson's estimate: `E ‖Aᵀ z‖² = ‖A‖_F²` for independent signs z, with A = J - mean, unbiased.

    With Aᵀ, since a tape gives products with Jᵀ in half the time.

    M. F. Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989.
    """
    m, _ = _dimensions(operator)
    points = known_sizes(mean)[0]
    _, at_a_time = _passes(points, 1, context.workspace_vectors)

    def body(draw: tf.Tensor, draws: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
        bits = tf.random.stateless_uniform([points, m], context.seeds(Purpose.MOMENTS, draw), 0, 2, tf.int32)
        z = tf.cast(2 * bits - 1, operator.dtype)
        image = operator.matvec(z, adjoint=True) - (mean * tf.reduce_sum(z, axis=-1))[:, None]
        return draw + 1, draws.write(draw, tf.reduce_sum(image**2, axis=-1))

    draws = tf.TensorArray(operator.dtype, ESTIMATE_VECTORS, element_shape=mean.shape)
    _, draws = tf.while_loop(
        lambda draw, _: draw < ESTIMATE_VECTORS, body, [tf.constant(0), draws], parallel_iterations=at_a_time
    )
    samples = draws.stack()
    spread = tf.math.reduce_variance(samples, axis=0) / (ESTIMATE_VECTORS - 1)
    return tf.reduce_mean(samples, axis=0), tf.sqrt(spread)


def _dimensions(operator: tf.linalg.LinearOperator) -> tuple[int, int]:
    return int(operator.shape[-2]), int(operator.shape[-1])


def norms_by_step(gradients: tf.Tensor) -> tf.Tensor:
    """The norms of vectors `(samples, time, units)`, `(time, samples)`."""
    return tf.transpose(tf.norm(gradients, axis=-1))
