"""Small models, monitors and trainings for the tests of what happens in `fit`."""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import WeightedCell, normal, randomize

from keras_jacmon import JacobianMonitor, JacobianRegularizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

BATCH, STEPS, FEATURES, SAMPLES = 4, 5, 3, 32
X, Y = normal(SAMPLES, STEPS, FEATURES, seed=1), normal(SAMPLES, 1, seed=2)
PROBE = normal(BATCH, STEPS, FEATURES, seed=3)


def compiled(*layers: Any, batch_size: int | None = None, optimizer: Any = "sgd", **arguments: Any) -> Any:
    """Make a compiled model of the layers, by default of a `SimpleRNN` named `rnn`, with random weights.

    Keras traces a training step with Adam three times as long as one with SGD.
    """
    keras.utils.set_random_seed(4)
    layers = layers or (keras.layers.SimpleRNN(3, name="rnn"),)
    inputs = keras.Input(batch_shape=(batch_size, STEPS, FEATURES))
    model = keras.Sequential([inputs, *layers, keras.layers.Dense(1, name="dense")])
    randomize(model)
    model.compile(optimizer, **({"loss": "mse"} | arguments))
    return model


@functools.cache
def _made_once() -> tuple[Any, list[Any], list[NDArray[Any]]]:
    model = compiled()
    variables = [*model.variables, *model.optimizer.variables]
    return model, variables, values_of(variables)


def usual() -> Any:
    """The model of `compiled()` as it was made. It is one for all tests, so that Keras traces its training once."""
    model, variables, start = _made_once()
    for variable, value in zip(variables, start, strict=True):
        variable.assign(value)
    keras.utils.set_random_seed(4)
    return model


def fit(model: Any, *callbacks: Any, **arguments: Any) -> Any:
    """Train for one epoch of eight batches."""
    defaults = {"batch_size": BATCH, "epochs": 1, "verbose": 0, "callbacks": list(callbacks)}
    return model.fit(X, Y, **(defaults | arguments))


def quick_monitor(**arguments: Any) -> JacobianMonitor:
    """Make a monitor that writes no files, and measures what is traced fastest."""
    return JacobianMonitor(PROBE, **({"log_dir": None, "measures": ["variance"]} | arguments))


def holding(regularizer: JacobianRegularizer | None = None, **arguments: Any) -> JacobianMonitor:
    """Make a monitor that holds the model while it trains, and raises what fails."""
    return quick_monitor(on_error="raise", regularizer=regularizer or JacobianRegularizer(1.0, 10.0), **arguments)


def steps_of(monitor: JacobianMonitor) -> list[int]:
    return [step for step, _ in monitor.reports]


def user_warnings(caught: Any) -> list[str]:
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


def values_of(variables: Any) -> list[NDArray[Any]]:
    return [variable.numpy() for variable in variables]


def assert_equal(left: list[NDArray[Any]], right: list[NDArray[Any]]) -> None:
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


class AtBatch(keras.callbacks.Callback):
    """Calls a function at one batch, counted from 1 over all epochs and trainings; by default at its end."""

    def __init__(self, number: int, function: Callable[[], object], where: str = "on_train_batch_end") -> None:
        super().__init__()
        self.number, self.function, self.seen = number, function, 0
        setattr(self, where, self.act)

    def act(self, *_: Any, **__: Any) -> None:
        self.seen += 1
        if self.seen == self.number:
            self.function()


class Stops(io.StringIO):
    """Is where the user presses Ctrl+C, as soon as the progress bar has come to an end such as `15/15`."""

    def __init__(self, end: str) -> None:
        super().__init__()
        self.end = end

    def write(self, text: str) -> int:
        if self.end in text:
            raise KeyboardInterrupt
        return super().write(text)


class CountingCell(WeightedCell):
    """Counts its calls in a variable that Keras does not know."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        super().build(input_shape)
        self.calls = tf.Variable(0.0, trainable=False)

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        self.calls.assign_add(1.0)
        new_h = tf.tanh(self.preactivation(inputs, states[0]))
        return new_h, [new_h]


class CountedDense(keras.layers.Dense):
    """Counts how often Python calls it, which is while it is traced."""

    traces = 0

    def call(self, inputs: Any) -> Any:
        type(self).traces += 1
        return super().call(inputs)


class FailingCell(WeightedCell):
    """Computes in training, and in inference too until `broken` is set: then its graph fails."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        super().build(input_shape)
        self.broken = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name="broken")

    def call(self, inputs: Any, states: Any, training: bool = False) -> tuple[Any, list[Any]]:  # noqa: FBT001, FBT002 - Keras' signature
        new_h = tf.tanh(self.preactivation(inputs, states[0]))
        if not training:
            with tf.control_dependencies([tf.debugging.assert_equal(self.broken, 0, "the cell is broken")]):
                new_h = tf.identity(new_h)
        return new_h, [new_h]


class RaisingCell(WeightedCell):
    """Raises in Python when it is called in inference, once `broken` is the class of an error."""

    broken: type[BaseException] | None = None

    def call(self, inputs: Any, states: Any, training: bool = False) -> tuple[Any, list[Any]]:  # noqa: FBT001, FBT002 - Keras' signature
        if self.broken and not training:
            raise self.broken("the cell divides by zero")
        new_h = tf.tanh(self.preactivation(inputs, states[0]))
        return new_h, [new_h]


class AtInference(keras.layers.Layer):
    """Hands its inputs on, and calls a function whenever a graph runs it in inference, as a measurement does once."""

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__()
        self.function = function

    def call(self, inputs: Any, training: bool = False) -> Any:  # noqa: FBT001, FBT002 - Keras' signature
        if training:
            return inputs
        with tf.control_dependencies([tf.py_function(self.act, [], [])]):
            return tf.identity(inputs)

    def act(self) -> None:
        self.function()


class Begun(keras.callbacks.Callback):
    begun = False

    def on_train_begin(self, logs: Any = None) -> None:
        del logs
        self.begun = True


def assert_refused(model: Any, pattern: str, probe: Any = PROBE, **arguments: Any) -> None:
    """`fit` raises the sentence before any callback's `on_train_begin` and before the first batch."""
    monitor = JacobianMonitor(probe, **({"log_dir": None} | arguments))
    begun = Begun()
    before = model.get_weights()
    with pytest.raises(ValueError, match=pattern):
        fit(model, begun, monitor)
    assert not begun.begun
    assert monitor.reports == []
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then, strict=True)
