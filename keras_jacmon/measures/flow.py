"""Flow: the part of a gradient that survives a sequence, the logarithm of the gain of products of Jacobians.

The product of the last k steps is `P_k = J_T J_{T-1} ... J_{T-k+1} = d s_T / d s_{T-k}`. A gradient that arrives at s_T
reaches s_{T-k} as `P_kᵀ w`, so everything here runs backwards, from the last step to the first one. A long sequence is
run through in segments of time, the last one first; a carry leads from one to the next.

All logarithms are natural. They are summed in float64: after 10,000 steps float32 would round the sum by more than a
step adds to it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import tensorflow as tf

from keras_jacmon.measures.steps import Steps

# With this many units or fewer all directions are taken where products are cheap: then the flow is exact.
_FEW_UNITS = 8

# The relative variance that rounding may leave where there is none.
_NO_SPREAD = 1e-12

# Two standard errors of a normal distribution hold 95 %.
_NORMAL_95 = 1.96


class FlowCarry(NamedTuple):
    """The state of the propagation.

    Attributes:
        vectors: Tensor `(samples, vectors, n)`, the propagated vectors; all of a sample have one scale.
        logs: Tensor `(samples,)`, float64, the logarithm of the divisors of each sample so far.
    """

    vectors: tf.Tensor
    logs: tf.Tensor


class Flow(NamedTuple):
    """Gains by span and sample, `(spans, samples)`, and their standard errors, both as natural logarithms."""

    log_gain: tf.Tensor
    standard_error: tf.Tensor


@dataclass(frozen=True)
class FlowPlan:
    """The vectors that a flow begins with.

    Attributes:
        sizes: Tuple of integers, the size of each state, in the order of J's rows.
        begins: Tuple of booleans, for each state True if the flow begins in it.
        vectors: Integer, number of vectors for each sample; as many as the units of these states give an exact flow.
    """

    sizes: tuple[int, ...]
    begins: tuple[bool, ...]
    vectors: int

    @classmethod
    def of(cls, sizes: tuple[int, ...], begins: tuple[bool, ...], wanted: int, *, cheap: bool) -> "FlowPlan":
        """Chooses the number of vectors.

        Args:
            sizes: Tuple of integers, the size of each state.
            begins: Tuple of booleans, True for the states in which the flow begins.
            wanted: Integer, number of vectors that the user asks for.
            cheap: Boolean, True if the products with many vectors cost little more than those with one.
        """
        units = cls(sizes, begins, 0).units
        return cls(sizes, begins, units if cheap and units <= _FEW_UNITS else min(wanted, units))

    def of_all(self, wanted: int) -> "FlowPlan":
        """Returns the plan of a flow that begins in all states, from the number of vectors that the user asks for."""
        return FlowPlan.of(self.sizes, (True,) * len(self.sizes), wanted, cheap=False)

    @property
    def units(self) -> int:
        """The number of units in which the flow begins."""
        return sum(size for size, begins in zip(self.sizes, self.begins, strict=True) if begins)

    @property
    def is_exact(self) -> bool:
        """True if all directions are taken."""
        return self.vectors == self.units

    def spread(self, vectors: tf.Tensor) -> tf.Tensor:
        """Returns vectors `(samples, vectors, units)` as `(samples, vectors, n)`, zero in the other states."""
        if all(self.begins):
            return vectors
        begun = [size for size, begins in zip(self.sizes, self.begins, strict=True) if begins]
        given = iter(tf.split(vectors, begun, axis=-1))
        # Zeros beside the vectors, whose number of samples may be unknown.
        beside = tf.zeros_like(vectors[..., :1])
        parts = [
            next(given) if begins else tf.repeat(beside, size, axis=-1)
            for size, begins in zip(self.sizes, self.begins, strict=True)
        ]
        return tf.concat(parts, axis=-1)


def start_flow(
    samples: int | tf.Tensor, plan: FlowPlan, seed: tf.Tensor | tuple[int, int], dtype: tf.DType
) -> FlowCarry:
    """Random orthonormal vectors at the end of the sequence, for the RMS gain.

    Their directions are uniform on the sphere. So no Jacobian that is not zero takes all of them to zero, as one of
    rank one does with vectors of ±1; and vectors at right angles have a smaller variance than independent ones.

    Args:
        samples: Integer, number of samples.
        plan: Number of vectors, and the states in which they begin.
        seed: Tensor `(2,)`, seed of `tf.random.stateless_normal`.
        dtype: Type of the operators.
    """
    if plan.is_exact:
        return start_exact_flow(samples, plan, dtype)
    # In float32, so that they are the same ones whatever the precision.
    normal = tf.random.stateless_normal([samples, plan.units, plan.vectors], seed)
    frames, _ = tf.linalg.qr(tf.cast(normal, dtype))
    return FlowCarry(plan.spread(tf.linalg.matrix_transpose(frames)), tf.zeros([samples], tf.float64))


def start_exact_flow(samples: int | tf.Tensor, plan: FlowPlan, dtype: tf.DType) -> FlowCarry:
    """All unit vectors at the end of the sequence.

    Args:
        samples: Integer, number of samples.
        plan: The states in which they begin; its number of vectors does not count.
        dtype: Type of the operators.
    """
    return FlowCarry(
        plan.spread(tf.eye(plan.units, batch_shape=[samples], dtype=dtype)), tf.zeros([samples], tf.float64)
    )


def flow_segment(steps: Steps, carry: FlowCarry, plan: FlowPlan) -> tuple[tf.Tensor, FlowCarry]:
    """Leads random vectors through a segment of time, from its last step to its first.

    Costs one product with Jᵀ for each vector and step; all vectors of a step are multiplied at once.

    Args:
        steps: The segment.
        carry: From `start_flow`, or from the segment that follows in time.
        plan: The vectors that the flow began with.

    Returns:
        Two numbers of each step and sample, `(time, 2, samples)`, for the product from there to the end of the
        sequence, and the carry. The first is the logarithm of the root of the sum of `‖Pᵀ w‖²` over the vectors. The
        second is the variance of the eigenvalues of the vectors' Gram matrix, relative to the square of their sum: 0
        where the product treats all vectors alike, and `1 - 1/vectors` where it makes them parallel. It is left at 0
        where all directions are taken.
    """

    def advance(pulled: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        # In float64, where the square of a float32 can neither overflow nor underflow.
        wide = tf.cast(pulled, tf.float64)
        total = tf.reduce_sum(tf.square(wide), axis=[1, 2], keepdims=True)
        vectors = tf.math.divide_no_nan(pulled, tf.cast(tf.sqrt(total), pulled.dtype))
        return vectors, total if plan.is_exact else tf.matmul(wide, wide, transpose_b=True)

    grams, vectors = _backwards(steps, carry.vectors, advance)
    total = tf.linalg.trace(grams)
    logs = carry.logs + tf.cumsum(tf.math.log(total) / 2, axis=0, reverse=True)
    if plan.is_exact:
        spread = tf.zeros_like(total)
    else:
        squares = tf.reduce_sum(tf.square(grams), axis=[2, 3])
        spread = tf.math.divide_no_nan(squares, tf.square(total)) - 1 / plan.vectors
    return tf.stack([logs, spread], axis=1), FlowCarry(vectors, logs[0])


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

    def advance(pulled: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        scale = tf.reduce_max(tf.abs(pulled), axis=[1, 2], keepdims=True)
        vectors = tf.math.divide_no_nan(pulled, scale)
        norm = tf.linalg.svd(vectors, compute_uv=False)[:, None, :1]
        return vectors, tf.cast(tf.concat([scale, norm], axis=2), tf.float64)

    found, vectors = _backwards(steps, carry.vectors, advance)
    scale, norm = tf.unstack(tf.math.log(found[:, :, 0]), axis=2)
    logs = carry.logs + tf.cumsum(scale, axis=0, reverse=True)
    return (logs + norm)[:, None], FlowCarry(vectors, logs[0])


def flow_by_span(numbers: tf.Tensor, mask: tf.Tensor | None, plan: FlowPlan) -> Flow:
    """The RMS gain of the product of the last k steps, `‖P_k‖_F / sqrt(n)`, for each span k = 1..time.

    n is the number of units in which the flow begins, and the norm that of the rows of P_k that belong to them. The
    mean square over m random orthonormal vectors is unbiased. Its relative variance follows from the vectors' Gram
    matrix, which shows how unlike the gains of different directions are. A beta distribution of this mean and variance,
    the true one for a product of rank one, gives the bias of the logarithm, which is taken off, and its standard error.

    Args:
        numbers: From `flow_segment`, all segments one after the other in the order of time, `(time, 2, samples)`.
        mask: `(time, samples)`, as in `Steps`.
        plan: The vectors that the flow began with.

    Returns:
        The logarithms: -inf where nothing is left, NaN or inf from where a Jacobian holds such. The standard error is
        wider than the beta distribution's: the relative variance is itself estimated from few vectors, and two standard
        errors are to hold 95 %. A span counts the steps that the sample does not skip; NaN for those longer than its
        sequence.
    """
    logs, spread = tf.unstack(numbers, axis=1)
    logs -= math.log(plan.vectors) / 2
    if plan.is_exact:
        return Flow(by_span(logs, mask), by_span(tf.zeros_like(logs), mask))
    share = plan.vectors / plan.units
    # The factor makes the variance unbiased, and that of a product of rank one exact.
    factor = 2 * plan.vectors * (1 - share) / ((plan.vectors + 2) * (plan.vectors - 1))
    relative = factor * tf.clip_by_value(spread, _NO_SPREAD, 1 - 1 / plan.vectors)
    # The first parameter of the beta distribution, and the sum of both.
    alpha = (1 - share) * (1 - relative) / relative - share
    bias, variance = (at - of for at, of in zip(_log_gamma(alpha), _log_gamma(alpha / share), strict=True))
    error = tf.where(spread <= _NO_SPREAD, tf.zeros_like(spread), _widening(plan.vectors) / 2 * tf.sqrt(variance))
    return Flow(by_span(logs - bias / 2, mask), by_span(error, mask))


def _log_gamma(shape: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the bias and the variance of the logarithm of a gamma distribution, for shapes of at least 1.

    By the asymptotic series of `digamma(shape) - log(shape)` and `trigamma(shape)`, to 1 %: TensorFlow's own functions
    would cost more than the vectors.
    """
    u = 1 / shape
    square = u * u
    bias = -u / 2 - square / 12 + square * square / 120
    return bias, u + square / 2 + u * square / 6 - u * square * square / 30


def _widening(vectors: int) -> float:
    """Returns the factor by which a standard error grows as its square is estimated from a few vectors.

    It is the 97.5 % quantile of Student's t distribution over that of the normal one, by a series in the degrees of
    freedom: those of a symmetric matrix `(vectors, vectors)` without trace.
    """
    freedom, z = (vectors - 1) * (vectors + 2) / 2, _NORMAL_95
    series = ((z**2 + 1) / 4, (5 * z**4 + 16 * z**2 + 3) / 96, (3 * z**6 + 19 * z**4 + 17 * z**2 - 15) / 384)
    return 1 + sum(term / freedom**power for power, term in enumerate(series, 1))


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


def _backwards(
    steps: Steps, vectors: tf.Tensor, advance: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Multiplies with Jᵀ from the last step to the first.

    Args:
        steps: The segment.
        vectors: Tensor `(samples, vectors, n)` at its end.
        advance: Function from the products of a step to the rescaled vectors, and to a float64 tensor of rank 3 that is
            kept.

    Returns:
        What was kept, with the time as its first axis, and the vectors at the beginning of the segment.
    """

    def body(t: tf.Tensor, vectors: tf.Tensor, kept: tf.TensorArray) -> tuple[tf.Tensor, tf.Tensor, tf.TensorArray]:
        vectors, number = advance(steps.multiply(t, vectors, adjoint=True))
        return t - 1, vectors, kept.write(t, number)

    kept = tf.TensorArray(tf.float64, steps.time)
    last = tf.convert_to_tensor(steps.time) - 1
    _, vectors, kept = tf.while_loop(lambda t, *_: t >= 0, body, [last, vectors, kept])
    return kept.stack(), vectors
