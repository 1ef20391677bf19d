"""A sample of the points that a cell visits, to stand for all of them."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from keras_jacmon.cell.step import CellStep
from keras_jacmon.cell.trajectory import UnrollInputs, unroll
from keras_jacmon.cell.unroll_plan import UnrollPlan
from keras_jacmon.tensors import as_rows, known_sizes

_GOLDEN = 0.6180339887498949


class Sample(NamedTuple):
    """Some points of a trajectory.

    Attributes:
        inputs: `(rows, ...)`.
        states: Flat, those before the step, each `(rows, ...)`.
        new: Those that the cell makes of them.
        weights: `(rows,)`, 0 for a row that stands for nothing, because its step is masked or its state not finite;
            zeros stand there.
    """

    inputs: tf.Tensor
    states: tuple[tf.Tensor, ...]
    new: tuple[tf.Tensor, ...]
    weights: tf.Tensor


def sample(
    step: CellStep, sequence: UnrollInputs, unroll_plan: UnrollPlan | None, count: int, draw: tf.Tensor
) -> Sample:
    """Leads a cell along a sequence and keeps at most `count` points, in every step the same number of samples.

    Which samples they are, and of a sequence with more steps than that which steps, goes round with the draw, so that
    every step, and every sample of it, has its turn.

    Args:
        step: The cell's step.
        sequence: Where it is led.
        unroll_plan: How, if there is a faster way.
        count: The most points.
        draw: Counts the samples that were taken before.
    """
    time, samples = known_sizes(sequence.inputs)[:2]
    width = max(1, count // time) if isinstance(time, int) else 1
    width = min(width, samples) if isinstance(samples, int) else 1
    # Every step has had its turn before another sample has.
    stride = -(-time // count)
    chosen, valid = _choose_samples(sequence.mask, time, samples, width, draw // stride)
    trajectory = unroll(step, sequence, unroll_plan, chosen)
    tensors = [trajectory.inputs, *trajectory.states, *trajectory.new, valid]
    if not isinstance(time, int) or time > count:
        steps = (tf.range(time // stride) * stride + draw) % time
        tensors = [tf.gather(tensor, steps) for tensor in tensors]
    inputs, *points, valid = map(as_rows, tensors)
    finite = [tf.reduce_all(tf.math.is_finite(x), axis=range(1, x.shape.rank)) for x in points if x.dtype.is_floating]
    valid = tf.reduce_all(tf.stack([valid, *finite]), axis=0)
    inputs, *points = (
        tf.where(tf.reshape(valid, [-1] + [1] * (x.shape.rank - 1)), x, tf.zeros_like(x)) for x in (inputs, *points)
    )
    states, new = points[: len(sequence.states)], points[len(sequence.states) :]
    dtype = next(state.dtype for state in states if state.dtype.is_floating)
    return Sample(inputs, tuple(states), tuple(new), tf.cast(valid, dtype))


def without_values(
    unroll_plan: UnrollPlan | None, steps: Sequence[int | tf.Tensor], most_values: int
) -> UnrollPlan | None:
    """Returns the plan for a trajectory without saved values; None if its hoisted tensors would take much memory."""
    if unroll_plan is None:
        return None
    rows = 1
    for size in steps:
        if not isinstance(size, int):
            return None
        rows *= size
    hoisted = sum(int(tensor.shape[1:].num_elements()) for tensor in unroll_plan.prepared)
    return dataclasses.replace(unroll_plan, saved=()) if rows * hoisted <= most_values else None


def _choose_samples(
    mask: tf.Tensor | None, time: int | tf.Tensor, samples: int | tf.Tensor, width: int, draw: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """For each step the samples to keep, `(time, width)`, unmasked ones first, and whether they are unmasked."""
    # Neighbouring steps begin with different samples.
    share = tf.cast(tf.range(time), tf.float64) * _GOLDEN % 1.0
    first = tf.cast(share * tf.cast(samples, tf.float64), tf.int32)[:, None] + draw * width
    turn = first + tf.range(width)
    if mask is None:
        return turn % samples, tf.ones([time, width], tf.bool)
    count = tf.reduce_sum(tf.cast(mask, tf.int32), axis=1, keepdims=True)
    order = tf.argsort(tf.cast(mask, tf.int32), axis=1, direction="DESCENDING", stable=True)
    return tf.gather(order, turn % tf.maximum(count, 1), batch_dims=1), tf.range(width) < count
