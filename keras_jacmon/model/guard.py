"""Guards: what a measurement or a trace touches is put back."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.model.layers import sublayers


@contextlib.contextmanager
def shielded(model: keras.Layer) -> Iterator[None]:
    """Keeps what calls of a model would change: its variables, the masks of its cells and the losses of its layers.

    A `tf.Variable` that a layer writes to past Keras is not shielded: see `put_back`.
    """
    # At the beginning of a call Keras forgets the losses that the last one has added.
    layers = sublayers(model)
    losses = [(list(layer._losses), set(layer._loss_ids)) for layer in layers]  # noqa: SLF001
    try:
        with keras.StatelessScope(), without_masks(model):
            yield
    finally:
        for layer, (added, ids) in zip(layers, losses, strict=True):
            layer._losses[:] = added  # noqa: SLF001
            layer._loss_ids.clear()  # noqa: SLF001
            layer._loss_ids.update(ids)  # noqa: SLF001


def foreign_variables(graph: tf.Graph, model: keras.Layer, own: Iterable[tf.Variable]) -> list[tf.Variable]:
    """The variables that a graph uses and that are neither the model's nor among some others."""
    # A graph knows a variable that is mirrored by that of its replica.
    parts = [part for variable in model.variables for part in getattr(variable.value, "values", [variable.value])]
    known = {id(variable) for variable in [*parts, *own]}
    return [variable for variable in graph.variables if id(variable) not in known]


@contextlib.contextmanager
def put_back(variables: Sequence[tf.Variable]) -> Iterator[None]:
    """Gives variables their values back."""
    saved = [variable.read_value() for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, saved, strict=True):
            variable.assign(value)


@contextlib.contextmanager
def without_masks(layer: Any) -> Iterator[None]:
    """Resets the dropout masks that cells keep: one from a trace is symbolic, and would fail in `fit`."""
    try:
        yield
    finally:
        for part in sublayers(layer):
            for reset in ("reset_dropout_mask", "reset_recurrent_dropout_mask"):
                if hasattr(part, reset):
                    getattr(part, reset)()
