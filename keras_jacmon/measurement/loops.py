"""The loops of recurrent layers in the pass of a model, traced once for each kind of cell."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from keras_jacmon.cell.kind import CellKind, CellKinds
from keras_jacmon.cell.step import half_precision_layers
from keras_jacmon.graphs.trace import Traced, chosen_device, optimized_briefly, trace
from keras_jacmon.measurement.shared import Shared
from keras_jacmon.model.guard import shielded
from keras_jacmon.model.layers import RecurrentLayer
from keras_jacmon.model.recording import Recording, record_calls
from keras_jacmon.tensors import spec_of, specs_of

if TYPE_CHECKING:
    from collections.abc import Hashable

# For models to come, as the compiled measurements. They hold no model and no weights.
_SHARED: "Shared[Traced[Any]]" = Shared(most=16)

# Attributes of a layer that choose the order of its steps, and which of them it returns.
_FORWARDS = {"go_backwards": False, "return_sequences": True}


def record_with_shared_loops(
    model: keras.Layer, inputs: Any, layers: Sequence[RecurrentLayer]
) -> tuple[Recording, CellKinds]:
    """Records the calls of a model as `record_calls` does, with one function for all loops of a kind.

    Keras traces a loop anew for each call of a layer, which takes most of the time of tracing a stack. The loop of the
    only recurrent layer is not traced, unless something that is recorded depends on it, such as a second call.

    Args:
        model: As for `record_calls`.
        inputs: As for `record_calls`.
        layers: As for `record_calls`.

    Returns:
        `Recording`, and the kinds of the cells of the layers.
    """
    kinds = CellKinds([item.layer.cell for item in layers if item.adapter is None])
    if len(layers) == 1 and layers[0].adapter is None and kinds.is_of_keras(layers[0].layer.cell):
        stand_ins: list[tf.Tensor] = []
        # What a stateful layer writes in vain must not be met by the other run.
        with shielded(model):
            recording = record_calls(model, inputs, layers, partial(_left_out, stand_ins))
        if not recording.graph.between((), recording.graph.outputs)[0] & {tensor.op.name for tensor in stand_ins}:
            return recording, kinds
    return record_calls(model, inputs, layers, partial(_shared, kinds)), kinds


def _left_out(stand_ins: list[tf.Tensor], layer: keras.layers.RNN, _: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that gives tensors without values in place of those of a loop, and lists them.

    Args:
        stand_ins: List that the tensors are added to.
        layer: The layer, with a cell of Keras, whose output is its first state.
    """

    def run(inputs: tf.Tensor, states: Any, *_: Any, **__: Any) -> Any:
        new = [tf.compat.v1.placeholder(state.dtype, state.shape) for state in map(tf.convert_to_tensor, states)]
        batch, *units = new[0].shape
        time = inputs.shape[1] if layer.return_sequences else 1
        last, sequence = (
            tf.compat.v1.placeholder(new[0].dtype, shape) for shape in (new[0].shape, [batch, time, *units])
        )
        stand_ins.extend([last, sequence, *new])
        return last, sequence, new

    return run


def _shared(kinds: CellKinds, layer: keras.layers.RNN, loop: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that does what the loop of a layer does, in the graph that is being traced.

    A loop that may do something else for each layer is called itself: one in half precision, which is not
    `optimized_briefly`, one with dropout, or of a cell that reads more than it is given, or whose weights Keras casts.
    """

    def run(inputs: tf.Tensor, states: Any, mask: Any, **kwargs: Any) -> Any:
        given = keras.tree.map_structure(tf.convert_to_tensor, states)
        kind = None if kwargs.get("training") else _kind_of(kinds, layer, inputs, given)
        if kind is None:
            return loop(inputs, states, mask, **kwargs)
        return _call(layer, loop, kind, (inputs, given, mask, kind.values()))

    return run


def _kind_of(kinds: CellKinds, layer: keras.layers.RNN, inputs: tf.Tensor, states: Any) -> CellKind | None:
    """Returns the kind of a layer's cell; None if its loop cannot be shared."""
    if half_precision_layers(layer) or kinds.are_cast(layer.cell) or tf.distribute.has_strategy():
        return None
    if not vars(layer).keys() >= _FORWARDS.keys():
        return None
    first = tf.TensorSpec([inputs.shape[0], *inputs.shape[2:]], inputs.dtype)
    kind = kinds.of(layer.cell, states, [first, *map(spec_of, keras.tree.flatten(states))])
    return kind if kind.is_self_contained else None


def _call(layer: keras.layers.RNN, loop: Callable[..., Any], kind: CellKind, given: tuple[Any, ...]) -> Any:
    """Calls the loop of a layer as a function of all that it depends on: inputs, states, mask and weights."""

    def in_order(sequence: tf.Tensor | None) -> tf.Tensor | None:
        return tf.reverse(sequence, [1]) if layer.go_backwards and sequence is not None else sequence

    def run(inputs: tf.Tensor, states: Any, mask: Any, weights: list[tf.Tensor]) -> tuple[Any, None]:
        scope = keras.StatelessScope(state_mapping=list(zip(kind.weights, weights, strict=True)))
        with scope, _forwards(layer):
            return loop(inputs, states, mask), None

    inputs, states, mask, weights = given
    given = (in_order(inputs), states, keras.tree.map_structure(in_order, mask), weights)
    specs = specs_of(given)
    is_masked = any(leaf is not None for leaf in keras.tree.flatten(mask))
    settings = type(layer).inner_loop, layer.unroll, is_masked and layer.zero_output_for_mask, chosen_device()
    key: Hashable = (kind.key, str(specs), *settings)
    # Keras may read the seed of a dropout that is not applied, which the step does not show.
    function = _SHARED.get(key, lambda: trace(run, specs, inline=False), lambda traced: not traced.refers_to_variables)
    with optimized_briefly():
        last, sequence, new = function(*given)
    return last, sequence if layer.return_sequences else sequence[:, -1:], new


@contextlib.contextmanager
def _forwards(layer: keras.layers.RNN) -> Iterator[None]:
    """Lets a layer take its steps from the first one on, and return all of them."""
    # Without Keras' `__setattr__`: a locked layer tracks nothing new.
    before = {name: vars(layer)[name] for name in _FORWARDS}
    try:
        vars(layer).update(_FORWARDS)
        yield
    finally:
        vars(layer).update(before)
