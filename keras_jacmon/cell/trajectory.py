"""Trajectories of cells: the states at each step, from one graph loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import keras
import tensorflow as tf

from keras_jacmon.cell.step import CellStep, widened
from keras_jacmon.cell.unroll_plan import UnrollPlan
from keras_jacmon.model.recording import RecurrentCall
from keras_jacmon.tensors import aligned, known_sizes, swapped, with_shape


@dataclass(frozen=True)
class UnrollInputs:
    """The inputs of an unrolled cell, in the order of its steps: backwards in time for `go_backwards`.

    Attributes:
        inputs: Tensor `(time, batch, ...)`, in float32 or better.
        states: Tuple of tensors `(batch, ...)`, the flat initial states, in float32 or better.
        mask: Boolean tensor `(time, batch)`, False where a step is skipped; None without a mask.
    """

    inputs: tf.Tensor
    states: tuple[tf.Tensor, ...]
    mask: tf.Tensor | None

    @property
    def of_a_step(self) -> tf.TensorSpec:
        """Shape and type of the inputs of one step."""
        return tf.TensorSpec(self.inputs.shape[1:], self.inputs.dtype)

    @classmethod
    def of(cls, call: RecurrentCall) -> "UnrollInputs":
        """Returns the inputs of a recorded call."""
        inputs, mask = widened(swapped(call.inputs)), None if call.mask is None else swapped(call.mask)
        if call.go_backwards:
            inputs, mask = tf.reverse(inputs, [0]), None if mask is None else tf.reverse(mask, [0])
        return cls(inputs, tuple(widened(state) for state in keras.tree.flatten(call.states)), mask)

    def between(self, start: tf.Tensor, stop: tf.Tensor, states: Sequence[tf.Tensor]) -> "UnrollInputs":
        """Returns the part from step `start` up to `stop`, with the states before it as initial states."""
        mask = None if self.mask is None else self.mask[start:stop]
        return UnrollInputs(self.inputs[start:stop], tuple(states), mask)


@dataclass(frozen=True)
class Trajectory:
    """The points at which a cell is evaluated.

    If only some samples of each step are kept, `batch` is their number (but not for `last`).

    Attributes:
        inputs: Tensor `(time, batch, ...)`.
        states: Tuple of tensors `(time, batch, ...)`, the flat states *before* each step.
        last: Tuple of tensors `(batch, ...)`, the flat states after the last step, of all samples.
        values: Dict by name, tensors `(time, batch, ...)`, the values of tensors of the cell's graph.
        new: Tuple of tensors `(time, batch, ...)`, the flat states that the cell returns, masked or not; empty if all
            samples are kept.
    """

    inputs: tf.Tensor
    states: tuple[tf.Tensor, ...]
    last: tuple[tf.Tensor, ...]
    values: dict[str, tf.Tensor] = field(default_factory=dict)
    new: tuple[tf.Tensor, ...] = ()


def unroll(
    step: CellStep, sequence: UnrollInputs, unroll_plan: UnrollPlan | None = None, keep: tf.Tensor | None = None
) -> Trajectory:
    """Unrolls a cell along a sequence, in one graph loop.

    Args:
        step: The cell's step.
        sequence: Inputs, initial states and mask.
        unroll_plan: A plan whose graph is used instead of the cell itself; None to call the cell. Defaults to None.
        keep: Integer tensor `(time, k)`, the samples whose points are kept at each step; None for all. Defaults to
            None.

    Returns:
        The trajectory, in float32 or better.
    """
    inputs, mask, count = sequence.inputs, sequence.mask, len(sequence.states)
    saved: Sequence[tf.Tensor] = unroll_plan.saved if unroll_plan else ()
    precomputed = unroll_plan.precompute(inputs) if unroll_plan else None

    def take_step(t: tf.Tensor, states: list[tf.Tensor]) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        new, values = precomputed.step(states, t) if precomputed else (step(inputs[t], states), [])
        points = [*states, *values]
        if keep is not None:
            kept = tf.gather(keep, t)
            points = [tf.gather(tensor, kept) for tensor in (*points, *new)]
        if mask is not None:
            here = tf.gather(mask, t)
            new = [_keep_where(here, value, old) for value, old in zip(new, states, strict=True)]
        return new, points

    stored = [*sequence.states, *saved] if keep is None else [*sequence.states, *saved, *sequence.states]
    last, stacks = _loop(take_step, sequence, stored, inputs.shape[1] if keep is None else keep.shape[1])
    states, values, new = stacks[:count], stacks[count : count + len(saved)], stacks[count + len(saved) :]
    known = dict(zip((tensor.name for tensor in saved), values, strict=True))
    hoisted = precomputed.values if precomputed else {}
    if keep is not None:
        inputs = tf.gather(inputs, keep, batch_dims=1)
        hoisted = {name: tf.gather(value, keep, batch_dims=1) for name, value in hoisted.items()}
    return Trajectory(inputs, tuple(states), tuple(last), {**hoisted, **known}, tuple(new))


def _loop(
    take_step: Callable[[tf.Tensor, list[tf.Tensor]], tuple[list[tf.Tensor], list[tf.Tensor]]],
    sequence: UnrollInputs,
    stored: Sequence[tf.Tensor],
    width: int | None,
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Takes all steps of a sequence in one graph loop.

    Args:
        take_step: Function from the step and the states before it to the states after it and the tensors to store.
        sequence: Inputs, initial states and mask.
        stored: Sequence of tensors `(batch, ...)` with the types and shapes of the tensors to store.
        width: Integer, number of samples that are stored at each step; None if it is not known.

    Returns:
        The states after the last step, and the stored tensors of all steps, each `(time, width, ...)`.
    """
    # As one tensor for all arrays.
    time, known_time = tf.convert_to_tensor(known_sizes(sequence.inputs)[0]), sequence.inputs.shape[0]

    def body(
        t: tf.Tensor, states: list[tf.Tensor], arrays: list[tf.TensorArray]
    ) -> tuple[tf.Tensor, list[tf.Tensor], list[tf.TensorArray]]:
        new, points = take_step(t, states)
        arrays = [array.write(t, value) for array, value in zip(arrays, points, strict=True)]
        new = [with_shape(value, old.shape) for value, old in zip(new, states, strict=True)]
        return t + 1, new, arrays

    arrays = [tf.TensorArray(tensor.dtype, time, element_shape=[width, *tensor.shape[1:]]) for tensor in stored]
    _, last, arrays = tf.while_loop(
        lambda t, *_: t < time,
        body,
        [tf.constant(0), list(sequence.states), arrays],
        # Set before the loop runs, so that XLA can differentiate it.
        maximum_iterations=known_time,
    )
    stacks = [
        with_shape(array.stack(), [known_time, width, *tensor.shape[1:]])
        for array, tensor in zip(arrays, stored, strict=True)
    ]
    return last, stacks


def _keep_where(mask: tf.Tensor, new: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
    """Returns the new state where the mask `(batch,)` is True, and the old state elsewhere."""
    return tf.where(aligned(mask, new), new, old)
