"""Samples of the points that a cell visits, which stand for all of its points."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from keras_jacmon.cell.step import CellStep
from keras_jacmon.cell.trajectory import UnrollInputs, unroll
from keras_jacmon.cell.unroll_plan import UnrollPlan
from keras_jacmon.tensors import aligned, as_points, finite_points, golden_shares, known_sizes


class Sample(NamedTuple):
    """Some points of a trajectory.

    Attributes:
        inputs: Tensor `(points, ...)`.
        states: Tuple of tensors `(points, ...)`, the flat states before the step.
        new: Tuple of tensors `(points, ...)`, the flat states after the step.
        weights: Tensor `(points,)`, 1 for a valid point, 0 for a placeholder: its step is masked or its state is not
            finite, and its inputs and states are replaced by zeros.
    """

    inputs: tf.Tensor
    states: tuple[tf.Tensor, ...]
    new: tuple[tf.Tensor, ...]
    weights: tf.Tensor


def sample(
    step: CellStep, sequence: UnrollInputs, unroll_plan: UnrollPlan | None, count: int, draw: tf.Tensor
) -> Sample:
    """Unrolls a cell along a sequence and keeps at most `count` points, the same number of samples at each step.

    The samples rotate with the draw. If the sequence has more than `count` steps, the steps rotate too. So every step,
    and every sample at it, has its turn.

    Args:
        step: `CellStep`, the cell's step.
        sequence: `UnrollInputs`.
        unroll_plan: `UnrollPlan`; None to call the cell.
        count: Integer, maximum number of points.
        draw: Integer tensor `()`, number of draws before this one.

    Returns:
        `Sample`.
    """
    time, samples = known_sizes(sequence.inputs)[:2]
    width = max(1, count // time) if isinstance(time, int) else 1
    width = min(width, samples) if isinstance(samples, int) else 1
    # All steps have their turn before the samples move on.
    stride = -(-time // count)
    chosen, valid = _choose_samples(sequence.mask, time, samples, width, draw // stride)
    trajectory = unroll(step, sequence, unroll_plan, chosen)
    tensors = [trajectory.inputs, *trajectory.states, *trajectory.new, valid]
    if not isinstance(time, int) or time > count:
        steps = (tf.range(time // stride) * stride + draw) % time
        tensors = [tf.gather(tensor, steps) for tensor in tensors]
    inputs, *points, valid = map(as_points, tensors)
    finite = [finite_points(x) for x in points if x.dtype.is_floating]
    valid = tf.reduce_all(tf.stack([valid, *finite]), axis=0)
    inputs, *points = (tf.where(aligned(valid, x), x, tf.zeros_like(x)) for x in (inputs, *points))
    states, new = points[: len(sequence.states)], points[len(sequence.states) :]
    dtype = next(state.dtype for state in states if state.dtype.is_floating)
    return Sample(inputs, tuple(states), tuple(new), tf.cast(valid, dtype))


def without_values(
    unroll_plan: UnrollPlan | None, steps: Sequence[int | tf.Tensor], most_values: int
) -> UnrollPlan | None:
    """Returns the plan without saved values, if its prepared tensors take little memory.

    Args:
        unroll_plan: `UnrollPlan`; None if there is none.
        steps: Sequence of the sizes whose product is the number of points; a tensor for a size that is not known.
        most_values: Integer, maximum number of values in the prepared tensors.

    Returns:
        `UnrollPlan`; None without a plan, with more values than `most_values`, or if their number is not known.
    """
    if unroll_plan is None:
        return None
    num_points = 1
    for size in steps:
        if not isinstance(size, int):
            return None
        num_points *= size
    prepared = sum(int(tensor.shape[1:].num_elements()) for tensor in unroll_plan.prepared)
    return dataclasses.replace(unroll_plan, saved=()) if num_points * prepared <= most_values else None


def _choose_samples(
    mask: tf.Tensor | None, time: int | tf.Tensor, samples: int | tf.Tensor, width: int, draw: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Chooses the samples to keep at each step, unmasked ones first.

    Returns:
        Integer tensor `(time, width)`, the samples; Boolean tensor `(time, width)`, True for an unmasked one.
    """
    # Neighbouring steps begin with different samples.
    share = golden_shares(tf.range(time))
    first = tf.cast(share * tf.cast(samples, tf.float64), tf.int32)[:, None] + draw * width
    turn = first + tf.range(width)
    if mask is None:
        return turn % samples, tf.ones([time, width], tf.bool)
    count = tf.reduce_sum(tf.cast(mask, tf.int32), axis=1, keepdims=True)
    order = tf.argsort(tf.cast(mask, tf.int32), axis=1, direction="DESCENDING", stable=True)
    return tf.gather(order, turn % tf.maximum(count, 1), batch_dims=1), tf.range(width) < count
