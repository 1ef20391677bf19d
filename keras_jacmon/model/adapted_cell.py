"""Cells made of a registered recurrence, which the stages below take like any other cell."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.model.packing import Packing, real_form
from keras_jacmon.model.recurrences import Adapter, Recurrence, Step
from keras_jacmon.tensors import HALF_PRECISION, as_points, known_sizes, spec_of, swapped

# The rank of a batch of steps.
_RANK_OF_STEPS = 2


class AdaptedCell(keras.layers.Layer):
    """A cell whose inputs are one real tensor and whose states are a flat sequence of real tensors.

    Args:
        layer: The Keras layer that the weights belong to.
        make_step: Function without arguments that returns the step, made in the present graph: what a step takes from
            around it belongs to one graph.
        inputs: `Packing` of the inputs of one step.
        states: `Packing` of the states.
    """

    def __init__(self, layer: keras.Layer, make_step: Callable[[], Step], inputs: Packing, states: Packing) -> None:
        # A name of its own would be counted, and change the names of the user's next layers.
        super().__init__(name=f"step_of_{layer.name}", dtype=layer.dtype_policy)
        self.layer = layer
        self._make_step, self._inputs, self._states = make_step, inputs, states
        self.built = True

    def call(self, inputs: tf.Tensor, states: Sequence[tf.Tensor]) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Takes one step.

        Args:
            inputs: Tensor `(points, ...)`, the joined inputs.
            states: Sequence of tensors `(points, ...)`, the real form of the flat states.

        Returns:
            The real form of the output, and the list of the new states.
        """
        step = self._make_step()
        output, new = step(self._inputs.from_joined(inputs), self._states.from_separate(states))
        output, *_ = keras.tree.flatten(output)
        flat = keras.tree.flatten(new)
        if len(flat) != len(states):
            raise ValueError(
                f"Its step was given {len(states)} state tensors and returned {len(flat)}. Expected as many new states "
                "as old ones"
            )
        separate = self._states.separate([tf.convert_to_tensor(value) for value in flat])
        # An output that is a new state remains the same tensor.
        same = {id(value): state for value, state in zip(flat, separate, strict=True)}
        return same.get(id(output), real_form(tf.convert_to_tensor(output))), separate


@dataclass(frozen=True)
class AdaptedCall:
    """One call of a layer with a registered recurrence, in the form in which a call of an RNN layer is recorded.

    Attributes:
        cell: `AdaptedCell`.
        inputs: Tensor `(batch, time, ...)`, the joined inputs.
        states: List of tensors `(batch, ...)`, the real form of the initial states.
        mask: Boolean tensor `(batch, time)`; None without a mask.
        go_backwards: Boolean, True if the steps run from the last position to the first.
    """

    cell: AdaptedCell
    inputs: tf.Tensor
    states: list[tf.Tensor]
    mask: tf.Tensor | None
    go_backwards: bool

    @classmethod
    def of(cls, layer: keras.Layer, adapter: Adapter, args: Sequence[Any], kwargs: dict[str, Any]) -> "AdaptedCall":
        """Asks the adapter for the recurrence of a call, in the graph that is being traced.

        Args:
            layer: The layer.
            adapter: Its adapter.
            args: Sequence of the positional arguments of the call.
            kwargs: Dict of its other arguments.

        Raises:
            ValueError: If the recurrence is not well formed.
        """
        given = {key: value for key, value in kwargs.items() if key != "training" and value is not None}
        recurrence = adapter(layer, *args, **given)
        if not isinstance(recurrence, Recurrence):
            raise TypeError(f"it returned an object of type {type(recurrence).__name__}, not a `Recurrence`")
        inputs, states = (
            keras.tree.map_structure(tf.convert_to_tensor, x) for x in (recurrence.inputs, recurrence.states)
        )
        mask = None if recurrence.mask is None else tf.cast(recurrence.mask, tf.bool)
        _check_shapes(inputs, states, mask)
        _check_types(states)
        inputs = _at_all_steps(inputs)
        of_inputs, of_states = Packing.of(inputs, leading=2), Packing.of(states, leading=1)
        specs = keras.tree.map_structure(_spec, (list(args), given))

        def make_step() -> Step:
            zeros, named = keras.tree.map_structure(lambda spec: _zeros(spec, layer.compute_dtype), specs)
            return adapter(layer, *zeros, **named).step

        return cls(
            AdaptedCell(layer, make_step, of_inputs, of_states),
            of_inputs.joined(inputs),
            of_states.separate(keras.tree.flatten(states)),
            mask,
            bool(recurrence.go_backwards),
        )

    def outputs(self, added: tf.Tensor) -> tf.Tensor:
        """Returns the outputs of all steps, with something added to the hidden state after each step.

        Args:
            added: Tensor `(batch, time, units)` of the type of the hidden state, by position.

        Returns:
            Tensor `(time, batch, ...)` in the order of the steps, in the real form.
        """
        place = hidden_place(self.states)
        valid = tf.ones(tf.shape(self.inputs)[:2], tf.bool) if self.mask is None else self.mask
        by_step = [swapped(tensor) for tensor in (self.inputs, added, valid)]
        by_step = [tensor[::-1] if self.go_backwards else tensor for tensor in by_step]

        def take_step(states: list[tf.Tensor], here: list[tf.Tensor]) -> list[tf.Tensor]:
            inputs, moved, kept = here
            _, new = self.cell(inputs, states)
            new[place] += tf.reshape(moved, tf.shape(new[place]))
            return [
                tf.where(tf.reshape(kept, [-1, *[1] * (value.shape.rank - 1)]), value, old)
                for value, old in zip(new, states, strict=True)
            ]

        after = tf.scan(take_step, by_step, list(self.states))
        before = [tf.concat([first[None], stack[:-1]], axis=0) for first, stack in zip(self.states, after, strict=True)]
        output, new = self.cell(as_points(by_step[0]), list(map(as_points, before)))
        if output is new[place]:
            return after[place]
        return tf.reshape(output, [*known_sizes(by_step[0])[:2], *output.shape[1:]])


def hidden_place(states: Sequence[tf.Tensor]) -> int:
    """Returns the place of the hidden state among flat states: that of the first one with a derivative."""
    return next(place for place, state in enumerate(states) if state.dtype.is_floating)


def _spec(value: Any) -> Any:
    """Returns the specification of a tensor; any other argument as it is."""
    return spec_of(value) if tf.is_tensor(value) else value


def _zeros(spec: Any, compute_dtype: str) -> Any:
    """Returns zeros in the place of a tensor; for half precision, of the type in which the layer computes now."""
    if not isinstance(spec, tf.TensorSpec):
        return spec
    sizes = [1 if size is None else size for size in spec.shape]
    return tf.zeros(sizes, compute_dtype if spec.dtype in HALF_PRECISION else spec.dtype)


def _check_shapes(inputs: Any, states: Any, mask: tf.Tensor | None) -> None:
    """Checks the shapes of a recurrence.

    Raises:
        ValueError: If they do not fit together, or no input or no state is there.
    """
    of_inputs, of_states = (
        [tuple(tensor.shape) for tensor in keras.tree.flatten(structure)] for structure in (inputs, states)
    )
    of_mask = [] if mask is None else [tuple(mask.shape)]
    if not of_inputs or not of_states:
        missing = "`inputs`" if not of_inputs else "`states`"
        raise ValueError(f"the {missing} of its recurrence hold no tensor")
    fits = all(len(shape) >= _RANK_OF_STEPS and None not in shape[2:] for shape in of_inputs)
    fits &= all(shape and None not in shape[1:] for shape in of_states)
    fits &= all(len(shape) == _RANK_OF_STEPS for shape in of_mask)
    fits &= len({shape[0] for shape in [*of_inputs, *of_states, *of_mask] if shape and shape[0] is not None}) <= 1
    times = {shape[1] for shape in of_inputs if len(shape) >= _RANK_OF_STEPS} - {1, None}
    times |= {shape[1] for shape in of_mask if len(shape) == _RANK_OF_STEPS} - {None}
    if not fits or len(times) > 1:
        received = f"inputs of shapes {of_inputs}, states of shapes {of_states}"
        received += f", a mask of shape {of_mask[0]}" if of_mask else ", no mask"
        raise ValueError(
            "expected inputs `(batch, time, ...)`, states `(batch, ...)` and a mask `(batch, time)`, and received "
            + received
        )


def _check_types(states: Any) -> None:
    """Checks that the states of a recurrence are of one floating-point type; half precision is computed in float32.

    Raises:
        ValueError: If they are of several.
    """
    real = [state.dtype.real_dtype for state in keras.tree.flatten(states)]
    found = {tf.float32 if dtype in HALF_PRECISION else dtype for dtype in real if dtype.is_floating}
    if len(found) > 1:
        names = " and ".join(sorted(dtype.name for dtype in found))
        raise ValueError(f"expected states of one floating-point type, and received {names}: cast them to one")


def _at_all_steps(inputs: Any) -> Any:
    """Returns the inputs with the same number of steps: a time axis of size 1 is repeated."""
    flat = keras.tree.flatten(inputs)
    longest = max(flat, key=lambda tensor: float("inf") if tensor.shape[1] is None else tensor.shape[1])
    time = tf.shape(longest)[1] if longest.shape[1] is None else longest.shape[1]

    def repeated(tensor: tf.Tensor) -> tf.Tensor:
        return tf.repeat(tensor, time, axis=1) if tensor.shape[1] == 1 and len(flat) > 1 else tensor

    return keras.tree.map_structure(repeated, inputs)
