"""What does each recurrent layer receive when the model runs on the probe?"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.model.layers import RecurrentLayer, sublayers
from keras_jacmon.traced_graph import TracedGraph


@dataclass(frozen=True)
class RecurrentCall:
    """One call of a recurrent layer.

    `inputs` is `(batch, time, ...)`, `states` the initial states as the layer holds them, `mask` is None or a boolean
    `(batch, time)`, False at the steps to skip.
    """

    name: str
    layer: keras.layers.RNN
    inputs: tf.Tensor
    states: Any
    mask: tf.Tensor | None


@dataclass(frozen=True)
class Recording:
    """What happened when the model ran on the probe.

    Attributes:
        calls: In the order in which they happened, named like their layers, and `layer:1`, `layer:2`, ... from the
            second call of a layer on.
        unmeasured: By layer name, why a layer has no call that can be measured.
        graph: Of the model; must live as long as the calls.
    """

    calls: tuple[RecurrentCall, ...]
    unmeasured: dict[str, str]
    graph: TracedGraph


def record_calls(model: keras.Layer, inputs: Any, layers: Sequence[RecurrentLayer]) -> Recording:
    """Runs the model on the probe, inside the graph that is being traced, and records its recurrent calls.

    A layer's `inner_loop` receives what its cell sees: the sequence as it is unrolled, the initial states as tensors
    (those of a stateful layer, of the caller, or zeros) and the mask. So that is what is recorded.

    Only what these calls depend on is laid into that graph: not what the last recurrent layer makes of its input, for
    instance.

    Args:
        model: A built model.
        inputs: The probe, in the structure that the model takes.
        layers: The layers to record.

    Returns:
        The calls.
    """
    calls: list[RecurrentCall] = []
    counts: Counter[str] = Counter()
    reasons = {item.name: "it is not called when the model runs on the probe" for item in layers}

    def record(item: RecurrentLayer, loop: Callable[..., Any], inputs: tf.Tensor, states: Any, mask: Any,
               **kwargs: Any) -> Any:  # fmt: skip
        if inputs.graph is graphs[0]:
            name = numbered(item.name, counts)
            # Read now: the states of a stateful layer are variables, which the model has moved on once it has run.
            held = keras.tree.map_structure(lambda state: tf.identity(tf.convert_to_tensor(state)), states)
            calls.append(RecurrentCall(name, item.layer, inputs, held, _as_mask(mask)))
        else:
            reasons[item.name] = (
                "it is called inside a graph of its own (a loop, `vectorized_map` or `tf.function`), "
                "where its states cannot be observed"
            )
        return loop(inputs, states, mask, **kwargs)

    observable: dict[int, RecurrentLayer] = {}
    for position, item in enumerate(layers):
        if not type(item.layer).inner_loop.__module__.startswith("keras."):
            reasons[item.name] = (
                f"its class {type(item.layer).__name__} overrides `inner_loop`, so how it steps its cell is not known"
            )
        else:
            observable[position] = item
    graphs: list[tf.Graph] = []

    def run(*flat: tf.Tensor) -> list[list[tf.Tensor]]:
        graphs.append(tf.compat.v1.get_default_graph())
        with shadowing(model, observable, record):
            model(keras.tree.pack_sequence_as(inputs, list(flat)), **training_argument(model))
        return [_tensors(call) for call in calls]

    flat = keras.tree.flatten(inputs)
    graph = TracedGraph(run, [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in flat])
    feeds = {inner.name: tensor for inner, tensor in zip(graph.inputs, flat, strict=True)}
    laid = iter(graph.replay(graph.outputs, feeds))
    unmeasured = {name: reason for name, reason in reasons.items() if not counts[name]}
    return Recording(tuple(_with_tensors(call, laid) for call in calls), unmeasured, graph)


def _tensors(call: RecurrentCall) -> list[tf.Tensor]:
    return [call.inputs, *keras.tree.flatten(call.states), *([] if call.mask is None else [call.mask])]


def _with_tensors(call: RecurrentCall, tensors: Iterator[tf.Tensor]) -> RecurrentCall:
    """The call with others in the place of its tensors, in the order of `_tensors`."""
    return RecurrentCall(
        call.name,
        call.layer,
        next(tensors),
        keras.tree.map_structure(lambda _: next(tensors), call.states),
        None if call.mask is None else next(tensors),
    )


def training_argument(layer: Any) -> dict[str, bool]:
    """`{"training": False}` if the layer's `call` takes it, as Keras itself decides."""
    return {"training": False} if getattr(layer, "_call_has_training_arg", False) else {}


def _as_mask(mask: Any) -> tf.Tensor | None:
    flat = [leaf for leaf in keras.tree.flatten(mask) if leaf is not None]
    if not flat:
        return None
    mask = tf.cast(flat[0], tf.bool)
    return tf.reshape(mask, tf.shape(mask)[:2])


def numbered(name: str, counts: Counter[str]) -> str:
    """The name of the next call of a layer: its own for the first one, then with `:1`, `:2`, ... behind it."""
    counts[name] += 1
    return name if counts[name] == 1 else f"{name}:{counts[name] - 1}"


@contextlib.contextmanager
def shadowing(model: keras.Layer, layers: Mapping[int, RecurrentLayer], around: Callable[..., Any]) -> Iterator[None]:
    """Shadows `inner_loop` on the layers' instances while the model is traced.

    What is called in its place is `around(item, inner_loop, sequences, initial_state, mask, **kwargs)`.
    The operations of the layer at position 2 get a name with `forward_of_layer_2` in it, which leads from one that
    fails at run time back to its layer.
    """

    def shadow(position: int, item: RecurrentLayer) -> Callable[..., Any]:
        original = item.layer.inner_loop

        def inner_loop(sequences: Any, initial_state: Any, mask: Any, **kwargs: Any) -> Any:
            with tf.name_scope(f"forward_of_layer_{position}"):
                return around(item, original, sequences, initial_state, mask, **kwargs)

        return inner_loop

    fused = [layer for layer in sublayers(model) if hasattr(layer, "use_cudnn")]
    use_cudnn = [layer.use_cudnn for layer in fused]
    try:
        for layer in fused:
            # On a GPU `Bidirectional` hands both directions to one fused kernel, past its layers.
            layer.use_cudnn = False
        for position, item in layers.items():
            # Past Keras' `__setattr__`: a locked layer tracks nothing new.
            vars(item.layer)["inner_loop"] = shadow(position, item)
        yield
    finally:
        for item in layers.values():
            vars(item.layer).pop("inner_loop", None)
        for layer, value in zip(fused, use_cudnn, strict=True):
            layer.use_cudnn = value
