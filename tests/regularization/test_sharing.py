"""Calls of one kind share the functions of their penalty, and XLA compiles them once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import processes
import pytest
import tensorflow as tf
from helpers import WeightedCell, normal, randomize

from keras_jacmon import JacobianRegularizer

if TYPE_CHECKING:
    from pathlib import Path

BATCH, STEPS, UNITS, LAYERS, TARGET = 3, 5, 4, 12, 0.7
PROBE = normal(BATCH, STEPS, UNITS, seed=3)


class TanhCell(WeightedCell):
    """Takes the step that the loop below takes."""

    def call(self, inputs: Any, states: Any) -> Any:
        new = tf.tanh(self.preactivation(inputs, states[0]))
        return new, [new]


class CountedCell(TanhCell):
    """Counts its calls in a weight of Keras, so that it shares nothing."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        super().build(input_shape)
        self.calls = self.add_weight(shape=(), trainable=False, name="calls", initializer="zeros")

    def call(self, inputs: Any, states: Any) -> Any:
        self.calls.assign_add(1.0)
        return super().call(inputs, states)


def stack_of(cell: type[TanhCell], layers: int) -> Any:
    model = keras.Sequential(
        [keras.Input((STEPS, UNITS)), *(keras.layers.RNN(cell(UNITS), return_sequences=True) for _ in range(layers))]
    )
    randomize(model)
    return model


def loop_penalty(model: Any) -> Any:
    """The penalty by a plain loop over layers and steps, in TensorFlow, so that a tape can differentiate it."""
    distances, inputs = [], tf.constant(PROBE)
    for layer in model.layers:
        weights, h, states = layer.cell, tf.zeros([BATCH, UNITS]), []
        for t in range(STEPS):
            h = tf.tanh(inputs[:, t] @ weights.kernel.value + tf.stop_gradient(h) @ weights.recurrent_kernel.value)
            states.append(h)
            J = (1 - h**2)[:, :, None] * tf.transpose(weights.recurrent_kernel.value)
            distances.append((UNITS * tf.math.reduce_variance(J, axis=(1, 2)) - TARGET) ** 2)
        inputs = tf.stop_gradient(tf.stack(states, axis=1))
    return tf.reduce_mean(distances)


def assert_penalty_is_that_of_the_loop(model: Any) -> None:
    weights = [weight.value for weight in model.trainable_variables]
    with tf.GradientTape(persistent=True) as tape:
        found, expected = tf.add_n(model.losses), loop_penalty(model)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for one, other in zip(tape.gradient(found, weights), tape.gradient(expected, weights), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("cell", "layers", "traces"), [(TanhCell, LAYERS, 1), (CountedCell, 2, 2)])
def test_equal_layers_share_one_trace_and_have_a_penalty_of_their_own(
    cell: type[TanhCell], layers: int, traces: int
) -> None:
    model = stack_of(cell, layers)
    with JacobianRegularizer(TARGET, 1.0).attached(model, PROBE) as held:
        assert held.trace_count == traces
        assert_penalty_is_that_of_the_loop(model)
        randomize(model, seed=99)
        held.begin(0)
        assert_penalty_is_that_of_the_loop(model)
        assert held.trace_count == traces


def test_xla_compiles_a_training_with_a_penalty_once(tmp_path: Path) -> None:
    """The step of a training would be compiled at each batch if the places of the valid points were constants of it."""
    script = """
        import keras, numpy as np
        from keras_jacmon import JacobianRegularizer

        x, y = np.random.default_rng(0).normal(size=(24, 5, 3)).astype("float32"), np.ones((24, 1), "float32")
        x[:, 0] = 0
        layers = [keras.layers.Masking(), keras.layers.SimpleRNN(3), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((5, 3)), *layers])
        model.compile("sgd", "mse", jit_compile=True)
        # Two of the five steps at each batch, and the first one is masked.
        regularizer = JacobianRegularizer(1.0, 1.0, refresh=1, rows=3)
        with regularizer.attached(model, x[:4]) as held:
            for step in range(6):
                held.begin(step)
                regularizer.target = 1.0 + step
                model.train_on_batch(x[4 * step : 4 * step + 4], y[:4])
    """
    finished = processes.run(script, environment={"XLA_FLAGS": f"--xla_dump_to={tmp_path}"})
    assert finished.returncode == 0, finished.stderr[-3000:]
    steps = {path.name.split(".")[0] for path in tmp_path.iterdir() if "train" in path.name or "step" in path.name}
    assert len(steps) == 1, steps
