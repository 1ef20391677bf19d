"""One step of a cell as a function of its inputs and flat states, in float32 or better."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.model.adapted_cell import AdaptedCell
from keras_jacmon.model.internals import sublayers, training_argument, without_masks
from keras_jacmon.tensors import HALF_PRECISION


class CellStep:
    """One step of a cell, from inputs and flat states to flat new states, without dropout, in float32 or better.

    Args:
        cell: Keras layer or other object that `keras.layers.RNN` takes as a cell.
        states: Structure of the cell's states; only the structure is kept.
        weights: Sequence of pairs of a Keras variable and a tensor that the cell uses in its place. Defaults to `()`;
            the cell reads its variables.

    Attributes:
        structure: The structure of the states.
    """

    def __init__(self, cell: Any, states: Any, weights: "Sequence[tuple[keras.Variable, tf.Tensor]]" = ()) -> None:
        self.cell, self.weights = cell, list(weights)
        self.structure = keras.tree.map_structure(lambda _: 0, states)
        # By identity, the variables of Keras that the last step wrote to, in a scope that forgot it.
        self._written: set[int] = set()

    def __call__(self, inputs: tf.Tensor, states: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Takes one step from each point by itself.

        Args:
            inputs: Tensor `(points, ...)`.
            states: Sequence of tensors `(points, ...)`, the flat states.

        Returns:
            List of tensors `(points, ...)`, the flat new states, of the same types.

        Raises:
            ValueError: If number or shapes of the new states differ from the old ones.
        """
        return self.with_output(inputs, states)[1]

    def with_output(self, inputs: tf.Tensor, states: Sequence[tf.Tensor]) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """Takes one step, and returns the tensors of the output too.

        Args:
            inputs: Tensor `(points, ...)`.
            states: Sequence of tensors `(points, ...)`, the flat states.

        Returns:
            List of the output's tensors, flat, and list of the flat new states. An output that is a new state is the
            same tensor.

        Raises:
            ValueError: If number or shapes of the new states differ from the old ones.
        """
        # A cell may draw a dropout mask that it does not use: neither its seed nor the mask may remain.
        scope = keras.StatelessScope(state_mapping=self.weights)
        given = dict(scope.state_mapping)
        with full_precision(self.cell), scope, without_masks(self.cell):
            output, new = self.cell(inputs, self.packed(states), **training_argument(self.cell))
        self._written = {key for key, value in scope.state_mapping.items() if value is not given.get(key)}
        flat = keras.tree.flatten(new)
        if len(flat) != len(states):
            raise ValueError(
                f"Cell {cell_type(self.cell).__name__} was given {len(states)} state tensors and returned {len(flat)}. "
                "Expected as many new states as old ones."
            )
        like = [_like(value, old, self.cell) for value, old in zip(flat, states, strict=True)]
        # A state that was cast or converted is still the output that it was before.
        same = {id(value): state for value, state in zip(flat, like, strict=True)}
        return [same.get(id(value), tf.convert_to_tensor(value)) for value in keras.tree.flatten(output)], like

    def with_weights(self, weights: "Sequence[tuple[keras.Variable, tf.Tensor]]") -> "CellStep":
        """Returns the step of the same cell with tensors in place of its weights, in pairs."""
        return CellStep(self.cell, self.structure, weights)

    def with_tensors(self) -> "CellStep":
        """Returns the step with a tensor in place of each weight of a Keras layer, the present value."""
        if self.weights or not isinstance(self.cell, keras.Layer):
            return self
        return self.with_weights([(weight, tf.convert_to_tensor(weight.value)) for weight in self.cell.weights])

    def written(self) -> "list[keras.Variable]":
        """Returns the Keras variables that the last step wrote to, except for the states of random generators."""
        weights = {id(weight): weight for layer in sublayers(self.cell) for weight in layer.weights}
        return [weight for key, weight in weights.items() if key in self._written]

    def packed(self, states: Sequence[tf.Tensor]) -> tuple[Any, ...]:
        """Returns flat states in the structure that the cell takes, a tuple as Keras' own loop passes it."""
        return tuple(keras.tree.pack_sequence_as(self.structure, list(states)))


class _WidePolicy(keras.dtype_policies.DTypePolicy):
    """A policy that computes in float32, with variables of any type: Keras casts them when a layer reads them.

    Args:
        of_variables: String, the type of the variables.
    """

    def __init__(self, of_variables: str) -> None:
        super().__init__("float32")
        self._of_variables = of_variables

    @property
    def variable_dtype(self) -> str:
        """String, the type of the variables."""
        return self._of_variables


@contextlib.contextmanager
def full_precision(cell: Any) -> Iterator[None]:
    """Lets the layers of a cell with a half-precision policy compute in float32.

    A float16 Jacobian has three digits, and its variance underflows to zero from 256 units on.
    """
    half = half_precision_layers(cell)
    # The policy object itself is swapped: the public setter would write into a policy map that other layers share.
    policies = [layer._dtype_policy for layer in half]  # noqa: SLF001
    try:
        for layer in half:
            layer._dtype_policy = _WidePolicy(layer.variable_dtype)  # noqa: SLF001
        yield
    finally:
        for layer, policy in zip(half, policies, strict=True):
            layer._dtype_policy = policy  # noqa: SLF001


def half_precision_layers(layer: Any) -> list[keras.Layer]:
    """Returns a layer and the layers in it, as far as they compute in half precision."""
    return [inner for inner in sublayers(layer) if tf.as_dtype(inner.compute_dtype) in HALF_PRECISION]


def cell_type(cell: Any) -> type:
    """Returns the class that tells a reader what a cell is: for a registered recurrence, the class of the layer."""
    return type(cell.layer) if isinstance(cell, AdaptedCell) else type(cell)


def widened(tensor: Any) -> tf.Tensor:
    """Returns the tensor in float32 if it has half precision, and unchanged otherwise."""
    tensor = tf.convert_to_tensor(tensor)
    return tf.cast(tensor, tf.float32) if tensor.dtype in HALF_PRECISION else tensor


def _like(value: tf.Tensor, old: tf.Tensor, cell: Any) -> tf.Tensor:
    """Returns a new state with the type and shape of the old one."""
    value = tf.cast(tf.convert_to_tensor(value), old.dtype)
    if not value.shape.is_compatible_with(old.shape):
        raise ValueError(
            f"Cell {cell_type(cell).__name__} was given a state of shape {tuple(old.shape)} and returned one of shape "
            f"{tuple(value.shape)}. Expected a state to keep its shape."
        )
    value.set_shape(old.shape)
    return value
