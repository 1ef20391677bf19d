"""Gradients of the compiled loss by the hidden states of recurrent layers."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.errors import invalid_argument, message_of
from keras_jacmon.graphs.trace import trace
from keras_jacmon.graphs.traced_graph import TracedGraph
from keras_jacmon.model.adapted_cell import AdaptedCall, hidden_place
from keras_jacmon.model.internals import training_argument
from keras_jacmon.model.layers import RecurrentLayer
from keras_jacmon.model.observing import call_names, in_graph, shadowing
from keras_jacmon.model.packing import like_original
from keras_jacmon.tensors import as_points, known_sizes, spec_of, swapped

# A power of two, so that it rounds nothing.
_SCALE = 1024.0


@dataclass(frozen=True)
class LossGradients:
    """The gradients of the loss by the hidden states.

    Attributes:
        by_call: Dict by name of a recurrent call, tensors `(batch, time, units)`.
        graph: `TracedGraph` of the loss; must live as long as the gradients.
    """

    by_call: dict[str, tf.Tensor]
    graph: TracedGraph


def loss_gradients(
    model: keras.Model, inputs: Any, targets: Any, layers: Mapping[int, RecurrentLayer]
) -> LossGradients:
    """Differentiates the loss that the model is compiled with by the hidden state after each step.

    Zeros are added to the state that the cell returns, and the loss is differentiated by these zeros. They reach the
    next step and, if the output of the cell is the same tensor, the following layers. So the gradient is the one of the
    training, from all later steps and layers together.

    Args:
        model: Compiled Keras model.
        inputs: Structure of tensors `(batch, ...)`, the probe as the model takes it.
        targets: Structure of tensors `(batch, ...)`, the targets of the probe.
        layers: Mapping from the position that names their operations to the layers to differentiate.

    Returns:
        `LossGradients`, times the number of samples: if the loss is a mean over the samples, the gradient of each
        sample's own loss. Time is the position in the input; the gradient is zero at steps that are skipped.

    Raises:
        ValueError: If the loss cannot be computed from these targets.
    """

    def run(*flat: tf.Tensor) -> tuple[list[tf.Tensor], list[str]]:
        here, wanted = keras.tree.pack_sequence_as([inputs, targets], list(flat))
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            adder = _ZeroAdder(tape, tf.compat.v1.get_default_graph())
            with shadowing(model, layers, adder):
                outputs = model(here, **training_argument(model))
            loss = _loss(model, here, wanted, outputs)
        gradients = tape.gradient(loss, adder.zeros, unconnected_gradients="zero")
        return [_times_samples(gradient) for gradient in gradients], call_names(adder.layers)

    flat = keras.tree.flatten([inputs, targets])
    specs = list(map(spec_of, flat))
    traced = trace(run, specs)
    graph = TracedGraph(traced, specs)
    replayed = graph.replay(graph.outputs, dict(zip([i.name for i in graph.inputs], flat, strict=True)))
    return LossGradients(dict(zip(traced.static, replayed, strict=True)), graph)


def gradients_by_weights(
    model: keras.Model, inputs: Any, targets: Any, weights: Sequence[keras.Variable]
) -> list[tf.Tensor]:
    """Differentiates the loss that the model is compiled with by some of its trained weights, in the present graph.

    The model is called as at inference, so without dropout.

    Args:
        model: Compiled Keras model.
        inputs: Structure of tensors `(batch, ...)`, the probe as the model takes it.
        targets: Structure of tensors `(batch, ...)`, the targets of the probe.
        weights: Sequence of the weights.

    Returns:
        List of tensors, the gradient by each weight; zero where the loss does not depend on it.

    Raises:
        ValueError: If the loss cannot be computed from these targets.
    """
    values = [tf.convert_to_tensor(weight.value) for weight in weights]
    # With the losses that layers add, such as activity regularizers; those of weights look for these in the scope.
    scope = keras.StatelessScope(state_mapping=list(zip(weights, values, strict=True)), collect_losses=True)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        with scope:
            outputs = model(inputs, **training_argument(model))
            # In half precision small gradients would be zero.
            loss = _SCALE * tf.cast(_loss(model, inputs, targets, outputs), tf.float32)
    gradients = tape.gradient(loss, values, unconnected_gradients="zero")
    return [gradient / tf.cast(_SCALE, gradient.dtype) for gradient in gradients]


def _loss(model: keras.Model, inputs: Any, targets: Any, outputs: Any) -> tf.Tensor:
    try:
        return model.compute_loss(x=inputs, y=targets, y_pred=outputs, training=False)
    except Exception as error:
        shapes = keras.tree.map_structure(lambda tensor: tuple(tensor.shape), targets)
        raise invalid_argument(
            "targets",
            "targets that the loss of the model takes",
            f"shapes {shapes}. The loss says: {message_of(error)}",
        ) from error


def _times_samples(gradient: tf.Tensor) -> tf.Tensor:
    """Returns the gradient times the number of samples, in at least single precision.

    The gradient may have half precision, with the same rounding as in a training without loss scaling.
    """
    wide = tf.float64 if gradient.dtype == tf.float64 else tf.float32
    return tf.cast(gradient, wide) * tf.cast(tf.shape(gradient)[0], wide)


class _ZeroAdder:
    """Adds zeros that a tape watches to the hidden states of the layers that are called in one graph.

    Args:
        tape: `tf.GradientTape`.
        graph: `tf.Graph`, in which calls can be observed.

    Attributes:
        layers: List of the names of the called layers, in the order of the calls.
        zeros: List of tensors `(batch, time, units)`, the zeros of each call.
    """

    def __init__(self, tape: tf.GradientTape, graph: tf.Graph) -> None:
        self._tape, self._graph = tape, graph
        self.layers: list[str] = []
        self.zeros: list[tf.Tensor] = []
        self._is_adapting = False

    def inner_loop(
        self,
        item: RecurrentLayer,
        loop: Callable[..., Any],
        inputs: tf.Tensor,
        states: Any,
        mask: Any,
        **kwargs: Any,
    ) -> Any:
        if inputs.graph is not self._graph:
            return loop(inputs, states, mask, **kwargs)
        with _adding_cell(item.layer, inputs, states) as cell:
            zero = tf.zeros([*known_sizes(inputs)[:2], cell.units], cell.added_dtype)
            self._tape.watch(zero)
            self.layers.append(item.name)
            self.zeros.append(zero)
            return loop(cell.widened(inputs, zero), states, mask, **kwargs)

    def call(self, item: RecurrentLayer, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a layer with a registered recurrence, whose first output then depends on zeros as its steps do."""
        returned = call(*args, **kwargs)
        if item.adapter is None or self._is_adapting or not in_graph(self._graph, (args, kwargs)):
            return returned
        self._is_adapting = True
        try:
            adapted = AdaptedCall.of(item.layer, item.adapter, args, kwargs)
            linked = self._linked(item, keras.tree.flatten(returned)[0], adapted)
        finally:
            self._is_adapting = False
        return keras.tree.pack_sequence_as(returned, [linked, *keras.tree.flatten(returned)[1:]])

    def _linked(self, item: RecurrentLayer, returned: Any, adapted: AdaptedCall) -> tf.Tensor:
        hidden = adapted.states[hidden_place(adapted.states)]
        zero = tf.zeros([*known_sizes(adapted.inputs)[:2], hidden.shape[1:].num_elements()], hidden.dtype)
        self._tape.watch(zero)
        self.layers.append(item.name)
        self.zeros.append(zero)
        return _linked(tf.convert_to_tensor(returned), adapted, adapted.outputs(zero))


def _linked(returned: tf.Tensor, adapted: AdaptedCall, outputs: tf.Tensor) -> tf.Tensor:
    """Returns what a layer returned, with the derivatives of the outputs of its steps."""
    time, batch, *_ = known_sizes(outputs)
    stepped = like_original(as_points(outputs), returned)
    stepped = tf.reshape(stepped, [time, batch, *stepped.shape[1:]])
    fixed = tf.stop_gradient(returned)
    if returned.shape.rank == stepped.shape.rank - 1:
        return fixed + stepped[-1] - tf.stop_gradient(stepped[-1])
    by_position = swapped(stepped)
    if adapted.go_backwards:
        # Keras returns the outputs in the order of the steps, a scan in the order of the positions.
        turned = by_position[:, ::-1]
        is_turned = tf.reduce_max(tf.abs(turned - fixed)) < tf.reduce_max(tf.abs(by_position - fixed))
        by_position = tf.where(is_turned, turned, by_position)
    return fixed + by_position - tf.stop_gradient(by_position)


@contextlib.contextmanager
def _adding_cell(layer: keras.layers.RNN, inputs: tf.Tensor, states: Any) -> "Iterator[_AddingCell]":
    """Replaces the cell that makes the hidden state (in a stack, the lowest one) by an `_AddingCell`."""
    owner, name, place = layer, "cell", layer.cell
    while isinstance(place, keras.layers.StackedRNNCells):
        owner, name, place = place, "cells", place.cells[0]
    cell, before = _AddingCell(place, inputs, states), vars(owner)[name]
    # Without Keras' `__setattr__`, which would track it as a layer of its own.
    vars(owner)[name] = [cell, *before[1:]] if name == "cells" else cell
    try:
        yield cell
    finally:
        vars(owner)[name] = before


class _AddingCell:
    """A cell that adds the last part of its inputs to the hidden state that it returns.

    The first part holds the features of the true cell; whole numbers are there bit by bit, since what is added has a
    derivative.

    Args:
        cell: The true cell.
        inputs: Tensor `(batch, time, ...)`, the inputs of the true cell.
        states: Structure of tensors `(batch, ...)`, its initial states.

    Attributes:
        units: Integer, number of units of the hidden state.
        added_dtype: Type of what is added.
    """

    def __init__(self, cell: Any, inputs: tf.Tensor, states: Any) -> None:
        flat = [tf.convert_to_tensor(state) for state in keras.tree.flatten(states)]
        self._hidden = hidden_place(flat)
        self._features, self._dtype = inputs.shape[2:], inputs.dtype
        self._bits = tf.int32 if self._dtype.size < tf.int32.size or self._dtype == tf.int32 else tf.int64
        of_bits = tf.float32 if self._bits == tf.int32 else tf.float64
        self.added_dtype = self._dtype if self._dtype.is_floating else of_bits
        self._cell = cell
        self.units = int(flat[self._hidden].shape[1:].num_elements())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cell, name)

    def widened(self, sequences: tf.Tensor, added: tf.Tensor) -> tf.Tensor:
        """Returns the inputs of this cell, `(batch, time, features + units)`.

        Args:
            sequences: Tensor `(batch, time, ...)`, the inputs of the true cell.
            added: Tensor `(batch, time, units)`, added to the hidden states.
        """
        flat = tf.reshape(sequences, [*known_sizes(sequences)[:2], self._features.num_elements()])
        if not self._dtype.is_floating:
            flat = tf.bitcast(tf.cast(flat, self._bits), self.added_dtype)
        return tf.concat([flat, added], axis=-1)

    def __call__(self, inputs: tf.Tensor, states: Any) -> tuple[tf.Tensor, Any]:
        added = inputs[:, -self.units :]
        inputs = tf.reshape(inputs[:, : -self.units], [-1, *self._features])
        if not self._dtype.is_floating:
            inputs = tf.cast(tf.bitcast(inputs, self._bits), self._dtype)
        output, new_states = self._cell(inputs, states, **training_argument(self._cell))
        new_states = new_states if keras.tree.is_nested(new_states) else [new_states]
        flat = keras.tree.flatten(new_states)
        hidden = flat[self._hidden]
        moved = hidden + tf.reshape(tf.cast(added, hidden.dtype), tf.shape(hidden))
        flat[self._hidden] = moved
        return moved if output is hidden else output, keras.tree.pack_sequence_as(new_states, flat)
