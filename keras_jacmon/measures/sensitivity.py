"""Sensitivity of the last state to the recurrent weights: the norm of `A = d s_T / dθ`, by span.

Each step adds to A what the weights do in this step: `A = Σ_t J_T ... J_{t+1} ∂s_t/∂θ`. With a vector w at the end of
the sequence, `Aᵀ w` is the sum of what w, led backwards through the steps, finds at each of them. The sum over the last
k steps alone is the part of the last k steps, so one backward pass has all spans. A long sequence is run through in
segments of time, the last one first; a carry leads from one to the next.

As in a flow, the vectors are rescaled at each step. The sums are kept in units of the largest scale so far, in float64:
only the norm itself may overflow, not what it is made from.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from keras_jacmon.measures.flow import FlowPlan
from keras_jacmon.measures.gains import by_span, gains_by_span
from keras_jacmon.measures.steps import Steps
from keras_jacmon.report.arrays import FloatArray
from keras_jacmon.report.reductions import at_whole_length


class SensitivityCarry(NamedTuple):
    """The state of the backward pass.

    Attributes:
        vectors: Tensor `(samples, vectors, n)`, the propagated vectors; all of a sample have one scale.
        logs: Tensor `(samples,)`, float64, the logarithm of that scale.
        unit: Tensor `(samples,)`, float64, the logarithm of the unit of `sums` and of the root of `grams`.
        sums: Tuple of tensors `(samples, vectors, ...)`, float64, `Aᵀ w` for the steps so far; empty if no step is to
            come that needs it.
        grams: Tensor `(samples, vectors, vectors)`, float64, the products of these sums with each other.
        deviation: Scalar tensor, the largest relative error that a check found so far.
    """

    vectors: tf.Tensor
    logs: tf.Tensor
    unit: tf.Tensor
    sums: tuple[tf.Tensor, ...]
    grams: tf.Tensor
    deviation: tf.Tensor

    @classmethod
    def start(cls, vectors: tf.Tensor, shapes: Sequence[Sequence[int]]) -> "SensitivityCarry":
        """The state at the end of the sequence.

        Args:
            vectors: Tensor `(samples, vectors, n)`.
            shapes: Sequence of the shapes of the sums, without samples and vectors.
        """
        samples, count = tf.shape(vectors)[0], vectors.shape[1]
        zeros = tf.zeros([samples], tf.float64)
        sums = tuple(tf.zeros([samples, count, *shape], tf.float64) for shape in shapes)
        return cls(vectors, zeros, zeros, sums, tf.zeros([samples, count, count], tf.float64), tf.constant(0.0))


class Cotangents(NamedTuple):
    """The vectors at the new states of each step of a segment.

    Attributes:
        vectors: Tensor `(time, samples, vectors, n)`.
        scales: Tensor `(time, samples)`, float64, their scales in the carry's unit; 0 at skipped steps.
    """

    vectors: tf.Tensor
    scales: tf.Tensor


def lead_backwards(steps: Steps, carry: SensitivityCarry) -> tuple[Cotangents, SensitivityCarry]:
    """Leads the vectors through a segment, from its last step to its first.

    Args:
        steps: The segment.
        carry: From `SensitivityCarry.start`, or from the segment that follows in time.

    Returns:
        The vectors at each step, and the carry, with its sums in the unit that fits the segment.
    """

    def body(t: tf.Tensor, vectors: tf.Tensor, logs: tf.Tensor, kept: list[tf.TensorArray]) -> tuple[tf.Tensor, ...]:
        kept = [array.write(t, value) for array, value in zip(kept, (vectors, logs), strict=True)]
        pulled = steps.multiply(t, vectors, adjoint=True)
        norm = tf.norm(tf.cast(pulled, tf.float64), axis=[1, 2])
        vectors = tf.math.divide_no_nan(pulled, tf.cast(norm, pulled.dtype)[:, None, None])
        return t - 1, vectors, logs + tf.math.log(norm), kept

    empty = [tf.TensorArray(dtype, steps.time) for dtype in (carry.vectors.dtype, tf.float64)]
    last = tf.convert_to_tensor(steps.time) - 1
    _, vectors, logs, kept = tf.while_loop(lambda t, *_: t >= 0, body, [last, carry.vectors, carry.logs, empty])
    led, scales = (array.stack() for array in kept)
    unit = tf.maximum(carry.unit, tf.reduce_max(scales, axis=0))
    factor = tf.exp(carry.unit - unit)
    sums = tuple(part * tf.reshape(factor, [-1] + [1] * (part.shape.rank - 1)) for part in carry.sums)
    grams = carry.grams * tf.square(factor)[:, None, None]
    scales = tf.exp(scales - unit)
    if steps.mask is not None:
        scales = tf.where(steps.mask, scales, tf.zeros_like(scales))
    return Cotangents(led, scales), carry._replace(vectors=vectors, logs=logs, unit=unit, sums=sums, grams=grams)


def add_outer_products(
    found: Cotangents, factors: Sequence[tuple[tf.Tensor, tf.Tensor]], carry: SensitivityCarry
) -> tuple[tf.Tensor, SensitivityCarry]:
    """Adds the steps of a segment whose derivatives by the weights are outer products, `a_t h_tᵀ`.

    The products of sums need none of the sums: `⟨a_t h_tᵀ, a_s h_sᵀ⟩ = (a_t · a_s) (h_t · h_s)`.

    Args:
        found: From `lead_backwards`.
        factors: Sequence of pairs, one for each weight: a `(time, samples, vectors, outputs)` and h
            `(time, samples, operands)`.
        carry: From `lead_backwards`. Without sums there is no step after the segment; there may be none before either.

    Returns:
        Numbers `(time, 2, samples)` as `flow_segment` returns them, and the carry.
    """
    time = tf.shape(found.scales)[0]
    # A step with itself counts once, and each pair twice.
    pairs = tf.linalg.band_part(tf.ones([time, time], tf.float64), 0, -1) - tf.eye(time, dtype=tf.float64) / 2
    halves, sums = [], []
    for place, (left, right) in enumerate(factors):
        a = tf.transpose(tf.cast(left, tf.float64) * found.scales[..., None, None], [1, 2, 0, 3])
        h = tf.transpose(tf.cast(right, tf.float64), [1, 0, 2])[:, None]
        later = tf.matmul(tf.matmul(h, h, transpose_b=True) * pairs, a)
        if carry.sums:
            later += tf.matmul(h, carry.sums[place])
            sums.append(carry.sums[place] + tf.matmul(h, a, transpose_a=True))
        halves.append(tf.einsum("bjto,blto->tbjl", a, later))
    half = tf.add_n(halves)
    added = half + tf.linalg.matrix_transpose(half)
    grams = carry.grams + tf.cumsum(added, axis=0, reverse=True)
    return _numbers(grams, carry.unit), carry._replace(sums=tuple(sums), grams=grams[0])


def add_derivatives(
    found: Cotangents, at: Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]], carry: SensitivityCarry
) -> tuple[tf.Tensor, SensitivityCarry]:
    """Adds the steps of a segment one by one, for derivatives of any form.

    Args:
        found: From `lead_backwards`.
        at: Function from the index of a step and the vectors there, `(samples, vectors, n)`, to their products with the
            derivatives by the weights, `(samples, vectors, entries)`, and to the relative error that a check found.
        carry: From `lead_backwards`, with one sum.

    Returns:
        As for `add_outer_products`.
    """

    def body(
        t: tf.Tensor, sums: tf.Tensor, deviation: tf.Tensor, kept: tf.TensorArray
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.TensorArray]:
        added, error = at(t, found.vectors[t])
        scales = found.scales[t][:, None, None]
        # Of a skipped step nothing counts, not even NaN.
        more = tf.where(scales > 0, tf.cast(added, tf.float64) * scales, tf.zeros([], tf.float64))
        # A sum of one sample and of an open number of samples has an open number.
        sums = tf.ensure_shape(sums + more, sums.shape)
        kept = kept.write(t, tf.matmul(sums, sums, transpose_b=True))
        return t - 1, sums, tf.maximum(deviation, tf.cast(error, deviation.dtype)), kept

    time = tf.shape(found.scales)[0]
    (sums,) = carry.sums
    _, sums, deviation, kept = tf.while_loop(
        lambda t, *_: t >= 0, body, [time - 1, sums, carry.deviation, tf.TensorArray(tf.float64, time)]
    )
    grams = kept.stack()
    return _numbers(grams, carry.unit), carry._replace(sums=(sums,), grams=grams[0], deviation=deviation)


def _numbers(grams: tf.Tensor, unit: tf.Tensor) -> tf.Tensor:
    """Returns the numbers of each step, `(time, 2, samples)`, from the Gram matrices of the sums."""
    total = tf.maximum(tf.linalg.trace(grams), 0)
    squares = tf.reduce_sum(tf.square(grams), axis=[2, 3])
    spread = tf.math.divide_no_nan(squares, tf.square(total)) - 1 / grams.shape[-1]
    return tf.stack([tf.math.log(total) / 2 + unit, spread], axis=1)


class Sensitivities(NamedTuple):
    """The sensitivity of a call.

    Attributes:
        by_span: Float array `(spans, samples)`, `‖d s_T / dθ‖` for weights that act in the last 1, 2, ... steps alone;
            NaN beyond a sample's length.
        standard_error: Float array like `by_span`.
        state_norm: Float array `(samples,)`, `‖s_T‖`; NaN for a sample without a step.
    """

    by_span: FloatArray
    standard_error: FloatArray
    state_norm: FloatArray

    @classmethod
    def of(
        cls, numbers: FloatArray, state_norm: FloatArray, mask: npt.NDArray[np.bool_] | None, plan: FlowPlan
    ) -> "Sensitivities":
        """Reads the sensitivity off the numbers of its graph.

        The mean square over the random vectors is unbiased, and is not changed here; so is the mean of the squares of
        several samples.

        Args:
            numbers: Float64 array `(time, 2, samples)`, in the order of time.
            state_norm: Float array `(samples,)`.
            mask: Boolean array `(time, samples)`, False for the steps that a sample skips; None for no mask.
            plan: `FlowPlan`, the vectors at the end of the sequence.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            found = np.exp(by_span(numbers[:, 0], mask)) * np.sqrt(plan.units / plan.vectors)
            error = found * gains_by_span(numbers, mask, plan).standard_error
        known = ~np.isnan(found[:1]).all(axis=0) if mask is None else mask.any(axis=0)
        return cls(found, error, np.where(known, state_norm, np.nan))

    @property
    def whole(self) -> tuple[FloatArray, FloatArray]:
        """The sensitivity to all steps of each sample and its standard error, `(samples,)`."""
        return at_whole_length(self.by_span), at_whole_length(self.standard_error)


def relative(found: Sensitivities) -> tuple[FloatArray, FloatArray]:
    """Returns `‖d s_T / dθ‖ / ‖s_T‖` of each sample and its standard error, `(samples,)`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value, error = (part / found.state_norm for part in found.whole)
    return value, error
