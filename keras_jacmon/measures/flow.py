"""Flow: the part of a gradient that survives a sequence, the logarithm of the gain of products of Jacobians.

The product of the last k steps is `P_k = J_T J_{T-1} ... J_{T-k+1} = d s_T / d s_{T-k}`. A gradient that arrives at s_T
reaches s_{T-k} as `P_kᵀ w`, so everything here runs backwards, from the last step to the first one. A long sequence is
run through in segments of time, the last one first; a carry leads from one to the next.

All logarithms are natural. They are summed in float64: after 10,000 steps float32 would round the sum by more than a
step adds to it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_jacmon.measures.steps import Steps
from keras_jacmon.tensors import take

# With this many units or fewer all directions are taken where products are cheap: then the flow is exact.
_FEW_UNITS = 8


class FlowCarry(NamedTuple):
    """The state of the propagation.

    Attributes:
        vectors: Tensor `(samples, vectors, n)`, the propagated vectors; all of a sample have one scale.
        logs: Tensor `(samples,)`, float64, the logarithm of the divisors of each sample so far.
    """

    vectors: tf.Tensor
    logs: tf.Tensor


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
        parts = [
            np.arange(end - size, end) if begins else np.full(size, -1)
            for size, end, begins in zip(
                self.sizes, np.cumsum(np.multiply(self.sizes, self.begins)), self.begins, strict=True
            )
        ]
        return take(vectors, np.concatenate(parts))


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
        where all directions are taken. `gains_by_span` reads the gains off them.
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
    last = tf.convert_to_tensor(steps.time - 1)
    _, vectors, kept = tf.while_loop(lambda t, *_: t >= 0, body, [last, vectors, kept])
    return kept.stack(), vectors
