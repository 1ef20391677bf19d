"""The measures of whole trajectories in a form that a tape can differentiate.

XLA cannot compile their gradients: it knows no loop in a branch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import tensorflow as tf

from keras_jacmon.measures.differentiable import TINY
from keras_jacmon.measures.differentiable_exponents import differentiable_exponents
from keras_jacmon.measures.flow import FlowPlan, start_flow
from keras_jacmon.measures.lyapunov import start_lyapunov
from keras_jacmon.measures.steps import Steps
from keras_jacmon.options import Options, default_warmup


@dataclass(frozen=True, eq=False)
class Beginnings:
    """The vectors that are led through a trajectory.

    Attributes:
        plan: `FlowPlan`, the vectors that a flow begins with.
        seed: Tensor `(2,)`, seed of these vectors.
        first: Tensor `(2,)`, seed of the columns that exponents begin with; always the same.
    """

    plan: FlowPlan
    seed: tf.Tensor
    first: tf.Tensor


def flow(steps: Steps, beginnings: Beginnings) -> tf.Tensor:
    """The logarithm of the RMS gain over all steps of each sample, `(1, samples)`; see `keras_jacmon.measures.flow`."""
    return _log_gains(steps, beginnings)[:1]


def growth(steps: Steps, beginnings: Beginnings) -> tf.Tensor:
    """The slope of the flow over its spans 0, 1, ..., K by least squares, `(1, samples)`, nats per step."""
    gains = _log_gains(steps, beginnings)
    valid = tf.ones_like(gains) if steps.mask is None else tf.cast(steps.mask, gains.dtype)
    spans = tf.cumsum(valid, axis=0, reverse=True)
    longest = spans[0]
    squares = longest * (longest + 1) * (longest + 2) / 12
    return (tf.reduce_sum(valid * (spans - longest / 2) * gains, axis=0) / squares)[None]


def lyapunov(steps: Steps, beginnings: Beginnings) -> tf.Tensor:
    """The leading Lyapunov exponents, `(exponents, samples)`, nats per step, through the QR of each step.

    References:
        R. Engelken, "Gradient flossing: improving gradient descent through dynamic control of Jacobians", 2023.
    """
    count = min(Options.exponents, steps.size)
    start = start_lyapunov(steps.samples, steps.size, count, beginnings.first, steps.dtype).vectors
    return differentiable_exponents(steps, start, warmup=default_warmup(steps.time), formed=True)


# By the names of the registry.
DIFFERENTIABLE_OVER_TIME: dict[str, Callable[[Steps, Beginnings], tf.Tensor]] = {
    "flow": flow,
    "growth": growth,
    "lyapunov": lyapunov,
}


def _log_gains(steps: Steps, beginnings: Beginnings) -> tf.Tensor:
    """The logarithm of the RMS gain from each step to the end, `(time, samples)`."""
    start = start_flow(steps.samples, beginnings.plan, beginnings.seed, steps.dtype).vectors
    time = tf.convert_to_tensor(steps.time)

    def step(done: tf.Tensor, vectors: tf.Tensor, log: tf.Tensor, kept: tf.TensorArray) -> tuple[tf.Tensor, ...]:
        t = time - 1 - done
        pulled = steps.multiply(t, vectors, adjoint=True)
        length = tf.sqrt(tf.maximum(tf.reduce_sum(pulled**2, axis=[1, 2]), TINY**2))
        log += tf.math.log(length)
        return done + 1, pulled / length[:, None, None], log, kept.write(t, log)

    # The vectors have the length of one together.
    share = tf.cast(beginnings.plan.vectors, steps.dtype) ** -0.5
    kept = tf.TensorArray(steps.dtype, steps.time, element_shape=start.shape[:1])
    nothing = tf.zeros([steps.samples], steps.dtype)
    *_, kept = tf.while_loop(
        lambda done, *_: done < time,
        step,
        [tf.constant(0), share * start, nothing, kept],
    )
    return kept.stack()
