"""Strategies of `tf.distribute` that a model may be made in."""

from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

from keras_jacmon.errors import invalid_argument


def check_distribution(model: keras.Layer) -> None:
    """Refuses the distributions that this package does not support.

    Args:
        model: Keras model.

    Raises:
        ValueError: If the model belongs to a strategy other than `MirroredStrategy` and `OneDeviceStrategy`, or a
            `keras.distribution` is set, with which Keras distributes nothing on TensorFlow.
    """
    if keras.distribution.distribution() is not None:
        raise ValueError(
            "Expected no `keras.distribution`: on TensorFlow Keras does not distribute anything with it. Use "
            f"`tf.distribute.MirroredStrategy`. Received: {type(keras.distribution.distribution()).__name__}"
        )
    strategy = getattr(model, "distribute_strategy", None)
    alone = strategy is None or strategy is _default_strategy()
    if not alone and not isinstance(strategy, (tf.distribute.MirroredStrategy, tf.distribute.OneDeviceStrategy)):
        raise invalid_argument(
            "model",
            "a model made without a strategy of `tf.distribute`, or in the scope of a `MirroredStrategy` or "
            "`OneDeviceStrategy`",
            f"model={model.name}, made in the scope of a {type(strategy).__name__}",
        )


def check_outside_of_scopes(what: str) -> None:
    """Refuses to trace in the scope of a strategy, where the variables of replicas cannot be read.

    Args:
        what: String, a phrase for what is refused there.

    Raises:
        ValueError: If it is called in the scope of a `tf.distribute` strategy with replicas.
    """
    if tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context():
        raise ValueError(
            f"Expected {what} outside of the scope of a strategy; making and compiling the model belong in it. "
            f"Received: the scope of a {type(tf.distribute.get_strategy()).__name__}"
        )


def own_variable(value: Any, shape: tf.TensorShape | None = None) -> tf.Variable:
    """Returns a variable that is not trained, and has one copy even in the scope of a strategy.

    In such a scope `tf.Variable` makes one copy for each replica, which can be read only inside of the replicas.
    TensorFlow has no public way around the scope.

    Args:
        value: Tensor, the initial value.
        shape: `tf.TensorShape`; None for the shape of the value. Defaults to None.
    """
    with tf.init_scope():
        return ResourceVariable(value, trainable=False, shape=shape)


def _default_strategy() -> Any:
    """Returns the strategy of a model that was made in no scope."""
    with tf.Graph().as_default():
        return tf.distribute.get_strategy()
