"""Guards: a measurement or a trace puts back what it changes."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import keras
import tensorflow as tf

from keras_jacmon.model.internals import losses_put_back, without_masks


@contextlib.contextmanager
def shielded(model: keras.Layer) -> Iterator[None]:
    """Puts back what calls of a model change: its variables, the masks of its cells and the losses of its layers.

    A `tf.Variable` that a layer writes to past Keras is not shielded: see `put_back`.
    """
    with losses_put_back(model), keras.StatelessScope(), without_masks(model):
        yield


def foreign_variables(graph: tf.Graph, model: keras.Layer, own: Iterable[tf.Variable]) -> list[tf.Variable]:
    """Returns the variables that a graph uses and that are neither the model's nor among our own.

    Args:
        graph: `tf.Graph` of a traced function.
        model: Keras model.
        own: Iterable of `tf.Variable`.
    """
    # In place of a mirrored variable a graph knows the variable of its replica.
    parts = [part for variable in model.variables for part in getattr(variable.value, "values", [variable.value])]
    known = {id(variable) for variable in [*parts, *own]}
    return [variable for variable in graph.variables if id(variable) not in known]


@contextlib.contextmanager
def put_back(variables: Sequence[tf.Variable]) -> Iterator[None]:
    """Gives variables the values back that they had."""
    saved = [variable.read_value() for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, saved, strict=True):
            variable.assign(value)
