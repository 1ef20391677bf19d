"""Which states does a cell visit?"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.probe.capture import RecurrentCall, training_argument
from keras_jacmon.probe.layers import sublayers

_HALF = (tf.float16, tf.bfloat16)


class CellStep:
    """One step of a cell, from inputs and flat states to flat new states, without dropout, in float32 or better.

    Args:
        cell: Anything that `keras.layers.RNN` takes as a cell.
        states: The cell's states in their own structure; only the structure is kept.
    """

    def __init__(self, cell: Any, states: Any) -> None:
        self.cell = cell
        self._structure = keras.tree.map_structure(lambda _: 0, states)

    def __call__(self, inputs: tf.Tensor, states: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Steps rows `(rows, ...)` of inputs and states, each row by itself."""
        packed = keras.tree.pack_sequence_as(self._structure, list(states))
        with full_precision(self.cell):
            # A tuple, as Keras' own loop passes it.
            _, new = self.cell(inputs, tuple(packed), **training_argument(self.cell))
        flat = keras.tree.flatten(new)
        if len(flat) != len(states):
            raise ValueError(
                f"Cell {type(self.cell).__name__} was given {len(states)} state tensors and returned {len(flat)}. "
                "Expected as many new states as old ones."
            )
        return [_like(value, old, self.cell) for value, old in zip(flat, states, strict=True)]


@dataclass(frozen=True)
class Trajectory:
    """The points at which a cell is evaluated on the probe; time is the position in the input.

    `inputs` is `(time, batch, ...)`; `states` are the flat states *before* each step, `(time, batch, ...)`; `mask` is
    `(time, batch)`, False where the step is skipped.
    """

    step: CellStep
    inputs: tf.Tensor
    states: tuple[tf.Tensor, ...]
    mask: tf.Tensor


def unroll(call: RecurrentCall) -> Trajectory:
    """Unrolls a layer's cell on what the layer received, in one graph loop.

    Args:
        call: A recorded call.

    Returns:
        The trajectory, in float32 or better.
    """
    step = CellStep(call.layer.cell, call.states)
    inputs = _widen(_swap(call.inputs))
    states = [_widen(state) for state in keras.tree.flatten(call.states)]
    time = tf.shape(inputs)[0]
    mask = None if call.mask is None else _swap(call.mask)
    backwards = call.layer.go_backwards
    arrays = [tf.TensorArray(s.dtype, time, element_shape=s.shape, clear_after_read=False) for s in states]

    def body(
        t: tf.Tensor, states: list[tf.Tensor], arrays: list[tf.TensorArray]
    ) -> tuple[tf.Tensor, list[tf.Tensor], list[tf.TensorArray]]:
        position = time - 1 - t if backwards else t
        arrays = [array.write(position, state) for array, state in zip(arrays, states, strict=True)]
        new = step(inputs[position], states)
        if mask is not None:
            new = [_keep_where(mask[position], value, old) for value, old in zip(new, states, strict=True)]
        return t + 1, new, arrays

    _, _, arrays = tf.while_loop(lambda t, *_: t < time, body, [tf.constant(0), states, arrays])
    shape = tf.shape(inputs)[:2]
    return Trajectory(
        step=step,
        inputs=inputs,
        states=tuple(
            tf.ensure_shape(array.stack(), [inputs.shape[0], *state.shape])
            for array, state in zip(arrays, states, strict=True)
        ),
        mask=tf.ones(shape, tf.bool) if mask is None else mask,
    )


@contextlib.contextmanager
def full_precision(cell: Any) -> Iterator[None]:
    """Lets the layers of a cell with a half-precision policy compute in float32.

    A float16 Jacobian has three digits, and its variance underflows to zero from 256 units on.
    """
    half = [layer for layer in sublayers(cell) if tf.as_dtype(layer.compute_dtype) in _HALF]
    # The policy object itself is swapped: the public setter would write into a policy map that other layers share.
    policies = [layer._dtype_policy for layer in half]  # noqa: SLF001
    try:
        for layer in half:
            layer._dtype_policy = keras.dtype_policies.DTypePolicy("float32")  # noqa: SLF001
        yield
    finally:
        for layer, policy in zip(half, policies, strict=True):
            layer._dtype_policy = policy  # noqa: SLF001


def _widen(tensor: tf.Tensor) -> tf.Tensor:
    return tf.cast(tensor, tf.float32) if tensor.dtype in _HALF else tensor


def _swap(tensor: tf.Tensor) -> tf.Tensor:
    """(batch, time, ...) -> (time, batch, ...)."""
    return tf.transpose(tensor, [1, 0, *range(2, tensor.shape.rank)])


def _keep_where(mask: tf.Tensor, new: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
    """The new state where the mask (batch,) is True; a masked step passes the state through."""
    return tf.where(tf.reshape(mask, [-1] + [1] * (new.shape.rank - 1)), new, old)


def _like(value: tf.Tensor, old: tf.Tensor, cell: Any) -> tf.Tensor:
    value = tf.cast(tf.convert_to_tensor(value), old.dtype)
    if not value.shape.is_compatible_with(old.shape):
        raise ValueError(
            f"Cell {type(cell).__name__} was given a state of shape {tuple(old.shape)} and returned one of shape "
            f"{tuple(value.shape)}. Expected a state to keep its shape."
        )
    value.set_shape(old.shape)
    return value
