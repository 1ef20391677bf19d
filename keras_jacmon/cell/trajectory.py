"""The trajectory of a cell: its states at each step, from one graph loop."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import keras
import tensorflow as tf

from keras_jacmon.cell.step import CellStep, widened
from keras_jacmon.cell.unroll_plan import UnrollPlan
from keras_jacmon.model.recording import RecurrentCall
from keras_jacmon.tensors import known_sizes


@dataclass(frozen=True)
class UnrollInputs:
    """The inputs of an unrolled cell, in the order of its steps: backwards in time for `go_backwards`.

    `inputs` is `(time, batch, ...)`; `states` are the flat initial states, `(batch, ...)`, in float32 or better; `mask`
    is None or `(time, batch)`, False where the step is skipped.
    """

    inputs: tf.Tensor
    states: tuple[tf.Tensor, ...]
    mask: tf.Tensor | None

    @classmethod
    def of(cls, call: RecurrentCall) -> "UnrollInputs":
        """The inputs of a recorded call."""
        inputs, mask = widened(_swapped(call.inputs)), None if call.mask is None else _swapped(call.mask)
        if call.layer.go_backwards:
            inputs, mask = inputs[::-1], None if mask is None else mask[::-1]
        return cls(inputs, tuple(widened(state) for state in keras.tree.flatten(call.states)), mask)

    def between(self, start: tf.Tensor, stop: tf.Tensor, states: Sequence[tf.Tensor]) -> "UnrollInputs":
        """The part from step `start` up to `stop`, from the states there."""
        mask = None if self.mask is None else self.mask[start:stop]
        return UnrollInputs(self.inputs[start:stop], tuple(states), mask)


@dataclass(frozen=True)
class Trajectory:
    """The points at which a cell is evaluated.

    `inputs` is `(time, batch, ...)`; `states` are the flat states *before* each step and `values` those of tensors of
    the cell's graph, by name, all `(time, batch, ...)`; `last` are the states behind the last step, `(batch, ...)`.
    Where only some samples of each step are kept, their number stands for the batch, and `new` are the states that the
    cell makes of them, whether the step is masked or not.
    """

    inputs: tf.Tensor
    states: tuple[tf.Tensor, ...]
    last: tuple[tf.Tensor, ...]
    values: dict[str, tf.Tensor] = field(default_factory=dict)
    new: tuple[tf.Tensor, ...] = ()


def unroll(
    step: CellStep, sequence: UnrollInputs, unroll_plan: UnrollPlan | None = None, keep: tf.Tensor | None = None
) -> Trajectory:
    """Leads a cell along a sequence, in one graph loop.

    Args:
        step: The cell's step.
        sequence: Where it is led.
        unroll_plan: If given, its graph is used and not the cell itself.
        keep: `(time, k)`, the samples whose points are kept, other ones at each step; None for all.

    Returns:
        The trajectory, in float32 or better.
    """
    inputs, mask = sequence.inputs, sequence.mask
    time = known_sizes(inputs)[0]
    kept: Sequence[tf.Tensor] = unroll_plan.saved if unroll_plan else ()
    beforehand = unroll_plan.precompute(inputs) if unroll_plan else None

    def body(
        t: tf.Tensor, states: list[tf.Tensor], arrays: list[tf.TensorArray]
    ) -> tuple[tf.Tensor, list[tf.Tensor], list[tf.TensorArray]]:
        new, values = beforehand.step(inputs[t], states, t) if beforehand else (step(inputs[t], states), [])
        points = [*states, *values] if keep is None else [tf.gather(x, keep[t]) for x in (*states, *values, *new)]
        arrays = [array.write(t, value) for array, value in zip(arrays, points, strict=True)]
        if mask is not None:
            new = [_keep_where(mask[t], value, old) for value, old in zip(new, states, strict=True)]
        new = [tf.ensure_shape(value, old.shape) for value, old in zip(new, states, strict=True)]
        return t + 1, new, arrays

    wanted = [*sequence.states, *kept] if keep is None else [*sequence.states, *kept, *sequence.states]
    width = inputs.shape[1] if keep is None else keep.shape[1]
    arrays = [tf.TensorArray(t.dtype, time, element_shape=[width, *t.shape[1:]]) for t in wanted]
    _, last, arrays = tf.while_loop(
        lambda t, *_: t < time,
        body,
        [tf.constant(0), list(sequence.states), arrays],
        # Known beforehand, so that XLA can differentiate the loop.
        maximum_iterations=inputs.shape[0],
    )
    stacks = [
        tf.ensure_shape(array.stack(), [inputs.shape[0], width, *tensor.shape[1:]])
        for array, tensor in zip(arrays, wanted, strict=True)
    ]
    count = len(sequence.states)
    states, values, new = stacks[:count], stacks[count : count + len(kept)], stacks[count + len(kept) :]
    known = dict(zip((tensor.name for tensor in kept), values, strict=True))
    hoisted = beforehand.values if beforehand else {}
    if keep is not None:
        inputs = tf.gather(inputs, keep, batch_dims=1)
        hoisted = {name: tf.gather(value, keep, batch_dims=1) for name, value in hoisted.items()}
    return Trajectory(inputs, tuple(states), tuple(last), {**hoisted, **known}, tuple(new))


def _swapped(tensor: tf.Tensor) -> tf.Tensor:
    """(batch, time, ...) -> (time, batch, ...)."""
    return tf.transpose(tensor, [1, 0, *range(2, tensor.shape.rank)])


def _keep_where(mask: tf.Tensor, new: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
    """The new state where the mask (batch,) is True; a masked step passes the state through."""
    return tf.where(tf.reshape(mask, [-1] + [1] * (new.shape.rank - 1)), new, old)
