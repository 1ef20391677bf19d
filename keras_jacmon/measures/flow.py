"""Flow: the part of a gradient that survives a sequence, the logarithm of the gain of products of Jacobians.

The product of the last k steps is `P_k = J_T J_{T-1} ... J_{T-k+1} = d s_T / d s_{T-k}`. A gradient that arrives at s_T
reaches s_{T-k} as `P_kᵀ w`, so everything here runs backwards, from the last step to the first one. A long sequence is
run through in segments of time, the last one first; a carry leads from one to the next.

All logarithms are natural. They are summed in float64: after 10,000 steps float32 would round the sum by more than a
step adds to it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from keras_jacmon.measures.steps import Steps


class FlowCarry(NamedTuple):
    """The state of the propagation.

    Attributes:
        vectors: Tensor `(samples, vectors, n)`, the propagated vectors, rescaled.
        logs: Tensor `(samples, vectors)`, float64, logarithms of all their divisors so far; `(samples, 1)` if all
            vectors of a sample have one scale.
    """

    vectors: tf.Tensor
    logs: tf.Tensor


class Flow(NamedTuple):
    """Gains by span and sample, `(spans, samples)`, and their standard errors, both as natural logarithms."""

    log_gain: tf.Tensor
    standard_error: tf.Tensor


def start_flow(
    samples: int | tf.Tensor, size: int, vectors: int, seed: tf.Tensor | tuple[int, int], dtype: tf.DType
) -> FlowCarry:
    """Random vectors of norm `sqrt(n)` at the end of the sequence, for the RMS gain.

    Entries are ±1: `E ‖Pᵀ w‖² = ‖P‖_F²` as for Gaussian ones, with a smaller variance.

    Args:
        samples: Integer, number of samples.
        size: Integer, number of units n.
        vectors: Integer, number of vectors for each sample; at least 2 for a standard error.
        seed: Tensor `(2,)`, seed of `tf.random.stateless_uniform`.
        dtype: Type of the operators.

    References:
        M. F. Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989.
    """
    bits = tf.random.stateless_uniform([samples, vectors, size], seed, 0, 2, tf.int32)
    # Of norm one, so that a logarithm is log(‖Pᵀ w‖ / sqrt(n)).
    return FlowCarry(tf.cast(2 * bits - 1, dtype) / math.sqrt(size), tf.zeros([samples, vectors], tf.float64))


def start_exact_flow(samples: int | tf.Tensor, size: int, dtype: tf.DType) -> FlowCarry:
    """All unit vectors at the end of the sequence, for the spectral norm.

    Args:
        samples: Integer, number of samples.
        size: Integer, number of units n.
        dtype: Type of the operators.
    """
    return FlowCarry(tf.eye(size, batch_shape=[samples], dtype=dtype), tf.zeros([samples, 1], tf.float64))


def flow_segment(steps: Steps, carry: FlowCarry) -> tuple[tf.Tensor, FlowCarry]:
    """Leads random vectors through a segment of time, from its last step to its first.

    Costs one product with Jᵀ for each vector and step; all vectors of a step are multiplied at once.

    Args:
        steps: The segment.
        carry: From `start_flow`, or from the segment that follows in time.

    Returns:
        The logarithms of `‖Pᵀ w‖ / sqrt(n)`, `(time, vectors, samples)`, at each step for the product from there
        to the end of the sequence; and the carry.
    """

    def advance(pulled: tf.Tensor, logs: tf.Tensor) -> tuple[FlowCarry, tf.Tensor]:
        # In float64, where the square of a float32 can neither overflow nor underflow.
        norms = tf.sqrt(tf.reduce_sum(tf.cast(pulled, tf.float64) ** 2, axis=2))
        logs += tf.math.log(norms)
        return FlowCarry(tf.math.divide_no_nan(pulled, tf.cast(norms, pulled.dtype)[..., None]), logs), logs

    return _backwards(steps, carry, advance)


def exact_flow_segment(steps: Steps, carry: FlowCarry) -> tuple[tf.Tensor, FlowCarry]:
    """Forms the product of a segment of time, from its last step to its first.

    Costs n products with Jᵀ and a singular value decomposition, O(n³), for each sample and step: for tens of units.

    Args:
        steps: The segment.
        carry: From `start_exact_flow`, or from the segment that follows in time.

    Returns:
        The logarithms of the spectral norm `‖P‖`, `(time, 1, samples)`, at each step for the product from there to
        the end of the sequence; and the carry.
    """

    def advance(pulled: tf.Tensor, logs: tf.Tensor) -> tuple[FlowCarry, tf.Tensor]:
        scale = tf.reduce_max(tf.abs(pulled), axis=[1, 2], keepdims=True)
        pulled = tf.math.divide_no_nan(pulled, scale)
        logs += tf.math.log(tf.cast(scale[:, 0], tf.float64))
        norm = tf.linalg.svd(pulled, compute_uv=False)[:, :1]
        return FlowCarry(pulled, logs), logs + tf.math.log(tf.cast(norm, tf.float64))

    return _backwards(steps, carry, advance)


def flow_by_span(logs: tf.Tensor, mask: tf.Tensor | None) -> Flow:
    """The RMS gain of the product of the last k steps, `‖P_k‖_F / sqrt(n)`, for each span k = 1..time.

    The square of the gain of random vectors is averaged, so that this square is unbiased; its logarithm is biased by
    about `-standard_error²`.

    Args:
        logs: From `flow_segment`, all segments one after the other in the order of time, `(time, vectors, samples)`.
        mask: `(time, samples)`, as in `Steps`.

    Returns:
        The logarithms: -inf where nothing is left, NaN or inf from where a Jacobian holds such. The standard error is
        over the vectors of a sample, by the delta method. A span counts the steps that the sample does not skip; NaN
        for those longer than its sequence.
    """
    vectors = logs.shape[1]
    count = tf.cast(vectors, logs.dtype)
    log_squares = tf.reduce_logsumexp(2 * logs, axis=1) - tf.math.log(count)
    # The squares relative to their mean; where all are zero there is nothing to be wrong about.
    relative = tf.exp(
        2 * logs - tf.where(tf.math.is_inf(log_squares), tf.zeros_like(log_squares), log_squares)[:, None]
    )
    variance = tf.reduce_sum((relative - tf.reduce_mean(relative, axis=1, keepdims=True)) ** 2, axis=1) / (count - 1)
    return Flow(by_span(log_squares / 2, mask), by_span(tf.sqrt(variance / count) / 2, mask))


def by_span(values: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """Sorts the values of the steps by their distance from the end of the sample's sequence.

    Args:
        values: `(time, samples)`, in the order of time.
        mask: `(time, samples)`, False for steps that do not count.

    Returns:
        `(spans, samples)`: in place k - 1 the value of the k-th real step from the end, NaN if there are fewer.
    """
    if mask is None:
        return values[::-1]
    spans = tf.cumsum(tf.cast(mask, tf.int64), axis=0, reverse=True)
    places = tf.where(mask)
    targets = tf.stack([tf.gather_nd(spans, places) - 1, places[:, 1]], axis=1)
    nothing = tf.fill(tf.shape(values), tf.constant(float("nan"), values.dtype))
    return tf.tensor_scatter_nd_update(nothing, targets, tf.gather_nd(values, places))


def growth(log_gain: tf.Tensor) -> tf.Tensor:
    """Returns the growth of the flow in nats per step: the slope of its logarithm over the spans.

    Least squares through all finite spans and through span 0, whose gain is 1. Unlike `log_gain[K] / K` at the longest
    span K it does not ascribe to each step what the flow gains or loses once, when a random direction turns into those
    that survive; and one span alone still has a slope.

    Args:
        log_gain: Natural logarithms, `(spans, samples)`, NaN where there are none.

    Returns:
        `(samples,)`; -inf if the flow ends at exactly zero, NaN if nothing is known of it.
    """
    gains = tf.pad(tf.cast(log_gain, tf.float64), [[1, 0], [0, 0]])
    finite = tf.math.is_finite(gains)
    weights = tf.cast(finite, tf.float64)
    spans = tf.cast(tf.range(tf.shape(gains)[0]), tf.float64)[:, None]
    centred = weights * (spans - tf.reduce_sum(weights * spans, axis=0) / tf.reduce_sum(weights, axis=0))
    slope = tf.reduce_sum(centred * tf.where(finite, gains, tf.zeros_like(gains)), axis=0)
    slope /= tf.reduce_sum(centred**2, axis=0)
    dead = tf.reduce_any(tf.equal(gains, -math.inf), axis=0)
    return tf.cast(tf.where(dead, tf.constant(-math.inf, tf.float64), slope), log_gain.dtype)


def horizon(log_gain: tf.Tensor, fall: float = 0.01, rise: float = 100.0) -> tf.Tensor:
    """The number of steps until the flow has fallen to 1 %, or grown 100-fold.

    Args:
        log_gain: Natural logarithms, `(spans, samples)`, NaN where there are none.
        fall: The gain at which a gradient has vanished.
        rise: The gain at which it has exploded.

    Returns:
        The smallest such span, `(samples,)`; inf if it is beyond the sequence, NaN if nothing is known of the flow.
    """
    gone = (log_gain <= math.log(fall)) | (log_gain >= math.log(rise))
    first = tf.cast(tf.argmax(gone, axis=0) + 1, log_gain.dtype)
    beyond = tf.where(tf.reduce_all(tf.math.is_nan(log_gain), axis=0), math.nan, math.inf)
    return tf.where(tf.reduce_any(gone, axis=0), first, tf.cast(beyond, log_gain.dtype))


Advance = Callable[[tf.Tensor, tf.Tensor], tuple[FlowCarry, tf.Tensor]]


def _backwards(steps: Steps, carry: FlowCarry, advance: Advance) -> tuple[tf.Tensor, FlowCarry]:
    """Multiplies with Jᵀ from the last step to the first; `advance` rescales the products and reads the gains off."""

    def body(t: tf.Tensor, carry: FlowCarry, gains: tf.TensorArray) -> tuple[tf.Tensor, FlowCarry, tf.TensorArray]:
        after, gain = advance(steps.multiply(t, carry.vectors, adjoint=True), carry.logs)
        return t - 1, after, gains.write(t, tf.transpose(gain))

    gains = tf.TensorArray(tf.float64, steps.time, element_shape=carry.logs.shape[::-1])
    last = tf.convert_to_tensor(steps.time) - 1
    _, carry, gains = tf.while_loop(lambda t, *_: t >= 0, body, [last, carry, gains])
    return gains.stack(), carry
