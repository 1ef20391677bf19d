"""Guards that restore the state of a model after a measurement or a trace."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.model.internals import losses_put_back, without_masks


@contextlib.contextmanager
def shielded(model: keras.Layer) -> Iterator[None]:
    """Restores what calls of a model change: its variables, the masks of its cells and the losses of its layers.

    A `tf.Variable` that a layer writes to without Keras is not shielded; see `foreign_put_back`.

    Args:
        model: Keras model.
    """
    with losses_put_back(model), keras.StatelessScope(), without_masks(model):
        yield


def foreign_put_back(graph: tf.Graph, model: keras.Layer) -> contextlib.AbstractContextManager[None]:
    """Restores the values of the `foreign_variables` of a graph at the end of the context.

    Args:
        graph: `tf.Graph` of a traced function.
        model: Keras model.
    """
    return put_back(foreign_variables(graph, model))


def foreign_variables(graph: tf.Graph, model: keras.Layer) -> list[tf.Variable]:
    """Returns the variables that a graph uses and that do not belong to the model.

    Args:
        graph: `tf.Graph` of a traced function.
        model: Keras model.
    """
    # A graph refers to a mirrored variable by the copy of its replica.
    parts = [part for variable in model.variables for part in getattr(variable.value, "values", [variable.value])]
    known = {id(variable) for variable in parts}
    return [variable for variable in graph.variables if id(variable) not in known]


@contextlib.contextmanager
def put_back(variables: Sequence[tf.Variable]) -> Iterator[None]:
    """Restores the values of variables at the end of the context.

    Args:
        variables: Sequence of `tf.Variable`.
    """
    saved = [variable.read_value() for variable in variables]
    try:
        yield
    finally:
        assign_all(variables, saved)


def assign_all(variables: Sequence[Any], values: Sequence[Any]) -> None:
    """Gives variables values, each of them, also if that is interrupted.

    Args:
        variables: Sequence of variables.
        values: Sequence of their values.

    Raises:
        KeyboardInterrupt: If it was interrupted, when all variables have their values.
    """
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
