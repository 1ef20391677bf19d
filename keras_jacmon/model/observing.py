"""Observing a model's recurrent layers while it is called."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import keras
import tensorflow as tf

from keras_jacmon.model.internals import without_fused_kernels
from keras_jacmon.model.layers import RecurrentLayer


class Observer(Protocol):
    """An object that is called in the place of the loops of recurrent layers."""

    def inner_loop(
        self, item: RecurrentLayer, loop: Callable[..., Any], inputs: tf.Tensor, states: Any, mask: Any, **kwargs: Any
    ) -> Any:
        """Stands in for the `inner_loop` of a `keras.layers.RNN`, which is `loop`."""

    def call(self, item: RecurrentLayer, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands in for the `call` of a layer with a registered recurrence, which is `call`."""


@contextlib.contextmanager
def shadowing(model: keras.Layer, layers: Mapping[int, RecurrentLayer], observer: Observer) -> Iterator[None]:
    """Shadows `inner_loop`, or `call` where a recurrence is registered, on the layers' instances.

    The names of the operations of the layer at position 2 contain `forward_of_layer_2`. So the name of an operation
    that fails at run time tells the layer.

    Args:
        model: Keras model.
        layers: Mapping from positions to layers.
        observer: `Observer`.
    """

    def shadow(position: int, item: RecurrentLayer) -> tuple[str, Callable[..., Any]]:
        name = "call" if item.adapter else "inner_loop"
        original = getattr(item.layer, name)

        def inner_loop(sequences: Any, initial_state: Any, mask: Any, **kwargs: Any) -> Any:
            with tf.name_scope(f"forward_of_layer_{position}"):
                return observer.inner_loop(item, original, sequences, initial_state, mask, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            with tf.name_scope(f"forward_of_layer_{position}"):
                return observer.call(item, original, *args, **kwargs)

        return name, call if item.adapter else inner_loop

    with without_fused_kernels(model):
        shadows = {position: shadow(position, item) for position, item in layers.items()}
        try:
            for position, (name, shadowed) in shadows.items():
                # Without Keras' `__setattr__`: a locked layer tracks nothing new.
                vars(layers[position].layer)[name] = shadowed
            yield
        finally:
            for position, (name, _) in shadows.items():
                vars(layers[position].layer).pop(name, None)


def call_names(layers: Iterable[str]) -> list[str]:
    """Returns the names of calls.

    The first call of a layer has the name of the layer; the next ones are `layer:1`, `layer:2`, ...

    Args:
        layers: Iterable of the names of the called layers, in the order of the calls.
    """
    counts: Counter[str] = Counter()
    names = []
    for layer in layers:
        names.append(f"{layer}:{counts[layer]}" if counts[layer] else layer)
        counts[layer] += 1
    return names


def in_graph(graph: tf.Graph, tensors: Any) -> bool:
    """Returns True if all tensors of a structure that belong to a graph belong to this one."""
    return all(leaf.graph is graph for leaf in keras.tree.flatten(tensors) if tf.is_symbolic_tensor(leaf))
