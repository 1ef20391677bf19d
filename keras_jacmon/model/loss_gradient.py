"""How does the loss change with the states that a recurrent layer goes through?"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.model.layers import RecurrentLayer
from keras_jacmon.model.recording import numbered, shadowing, training_argument
from keras_jacmon.tensors import known_sizes
from keras_jacmon.traced_graph import TracedGraph


@dataclass(frozen=True)
class LossGradients:
    """The gradients of the loss by the hidden states.

    Attributes:
        by_call: `(batch, time, units)`, named as recurrent calls are.
        graph: Must live as long as these.
    """

    by_call: dict[str, tf.Tensor]
    graph: TracedGraph


def loss_gradients(
    model: keras.Model, inputs: Any, targets: Any, layers: Mapping[int, RecurrentLayer]
) -> LossGradients:
    """Differentiates the loss that the model is compiled with by the hidden state behind each step.

    Zeros are added to that state as the cell hands it on, to its next step and, where the output is the same tensor, to
    what comes behind the layer; the loss is differentiated by these zeros. So the gradient is the one that training
    would see there, from all later steps and layers together.

    Args:
        model: A compiled model.
        inputs: The probe, in the structure that the model takes.
        targets: Of the probe's samples.
        layers: Those to look at, by the position that names their operations.

    Returns:
        The gradients, times the number of samples: what a sample feels of its own loss, if the loss is a mean over
        them. Time is the position in the input; zero at steps that are skipped.

    Raises:
        ValueError: If the loss cannot be computed from these targets.
    """
    names: list[str] = []
    counts: Counter[str] = Counter()

    def run(*flat: tf.Tensor) -> list[tf.Tensor]:
        graph = tf.compat.v1.get_default_graph()
        here, wanted = keras.tree.pack_sequence_as([inputs, targets], list(flat))
        zeros: list[tf.Tensor] = []

        def around(item: RecurrentLayer, loop: Callable[..., Any], sequences: tf.Tensor, states: Any, mask: Any,
                   **kwargs: Any) -> Any:  # fmt: skip
            if sequences.graph is not graph:
                return loop(sequences, states, mask, **kwargs)
            with _handing_on(item.layer, sequences.shape[2:], states) as cell:
                zero = tf.zeros([*known_sizes(sequences)[:2], cell.units], sequences.dtype)
                tape.watch(zero)
                names.append(numbered(item.name, counts))
                zeros.append(zero)
                return loop(cell.widened(sequences, zero), states, mask, **kwargs)

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            with shadowing(model, layers, around):
                outputs = model(here, **training_argument(model))
            try:
                loss = model.compute_loss(x=here, y=wanted, y_pred=outputs, training=False)
            except Exception as error:
                shapes = keras.tree.map_structure(lambda tensor: tuple(tensor.shape), targets)
                raise ValueError(
                    "Invalid value for argument `targets`. Expected targets that the loss of the model takes. "
                    f"Received: shapes {shapes}, for which it raised {type(error).__name__}: {error}"
                ) from error
        gradients = tape.gradient(loss, zeros, unconnected_gradients="zero")
        # The precision may be half: what is small is scaled afterwards, as training without loss scaling would see it.
        return [tf.cast(g, _wide(g)) * tf.cast(tf.shape(g)[0], _wide(g)) for g in gradients]

    flat = keras.tree.flatten([inputs, targets])
    traced = TracedGraph(run, [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in flat])
    feeds = {inner.name: tensor for inner, tensor in zip(traced.inputs, flat, strict=True)}
    return LossGradients(dict(zip(names, traced.replay(traced.outputs, feeds), strict=True)), traced)


@contextlib.contextmanager
def _handing_on(layer: keras.layers.RNN, features: tf.TensorShape, states: Any) -> "Iterator[_HandingOn]":
    """Puts a `_HandingOn` in the place of the cell that makes the hidden state: in a stack, of the lowest one."""
    owner, name, place = layer, "cell", layer.cell
    while isinstance(place, keras.layers.StackedRNNCells):
        owner, name, place = place, "cells", place.cells[0]
    cell, before = _HandingOn(place, features, states), vars(owner)[name]
    # Past Keras' `__setattr__`, which would track it as a layer of its own.
    vars(owner)[name] = [cell, *before[1:]] if name == "cells" else cell
    try:
        yield cell
    finally:
        vars(owner)[name] = before


class _HandingOn:
    """A cell whose inputs carry, behind their features, what is added to the hidden state that it hands on.

    Args:
        cell: The true one.
        features: Shape of its inputs.
        states: Its initial states.
    """

    def __init__(self, cell: Any, features: tf.TensorShape, states: Any) -> None:
        flat = [tf.convert_to_tensor(state) for state in keras.tree.flatten(states)]
        self._hidden = next(place for place, state in enumerate(flat) if state.dtype.is_floating)
        self._features = features
        self._cell = cell
        self.units = int(flat[self._hidden].shape[1:].num_elements())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cell, name)

    def widened(self, sequences: tf.Tensor, added: tf.Tensor) -> tf.Tensor:
        """What this cell takes in the place of the sequences, `(batch, time, features + units)`."""
        flat = tf.reshape(sequences, [*known_sizes(sequences)[:2], self._features.num_elements()])
        return tf.concat([flat, added], axis=-1)

    def __call__(self, inputs: tf.Tensor, states: Any) -> tuple[tf.Tensor, Any]:
        added = inputs[:, -self.units :]
        inputs = tf.reshape(inputs[:, : -self.units], [-1, *self._features])
        output, new_states = self._cell(inputs, states, **training_argument(self._cell))
        new_states = new_states if keras.tree.is_nested(new_states) else [new_states]
        flat = keras.tree.flatten(new_states)
        hidden = flat[self._hidden]
        moved = hidden + tf.reshape(tf.cast(added, hidden.dtype), tf.shape(hidden))
        flat[self._hidden] = moved
        return moved if output is hidden else output, keras.tree.pack_sequence_as(new_states, flat)


def _wide(tensor: tf.Tensor) -> tf.DType:
    return tf.float64 if tensor.dtype == tf.float64 else tf.float32
