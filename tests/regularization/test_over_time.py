"""Measures of whole trajectories that the regularizer holds: flow, growth and Lyapunov exponents."""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import normal, randomize
from trainings import compiled, fit, holding

from keras_jacmon import JacobianRegularizer, measure

BATCH, STEPS, FEATURES, TARGET = 4, 12, 3, -0.1
PROBE = normal(BATCH, STEPS, FEATURES, seed=3)
L = keras.layers


def model_of(layer: Any) -> Any:
    model = keras.Sequential([keras.Input((STEPS, FEATURES)), L.Masking(), layer])
    randomize(model, scale=0.8)
    return model


def penalty_and_slopes(model: Any, held: Any, recurrent: Any) -> tuple[float, float, float]:
    """The penalty, its derivative in a direction by the tape, and the same by a central difference."""
    with tf.GradientTape() as tape:
        penalty = tf.add_n(model.losses)
    direction, start = normal(*recurrent.shape, seed=5), recurrent.numpy()
    found = float(tf.reduce_sum(tape.gradient(penalty, recurrent.value) * direction))
    ends = []
    for distance in (1e-2, -1e-2):
        recurrent.assign(start + distance * direction)
        ends.append(held.penalty())
    recurrent.assign(start)
    return float(penalty), found, (ends[0] - ends[1]) / 2e-2


# One unit has one exponent, whatever vector it begins with.
@pytest.mark.parametrize(
    ("name", "view", "layer"),
    [
        ("growth", "joint", L.LSTM(2, name="rnn")),
        ("flow", "hidden", L.SimpleRNN(4, name="rnn")),
        ("lyapunov", "hidden", L.SimpleRNN(1, name="rnn")),
        ("lyapunov", "joint", L.GRU(3, name="rnn")),
    ],
)
def test_values_are_those_of_the_report_and_slopes_those_of_differences(name: str, view: str, layer: Any) -> None:
    probe, model = PROBE.copy(), model_of(layer)
    probe[1, 8:] = 0
    with JacobianRegularizer(TARGET, 1.0, measure=name, view=view).attached(model, probe) as held:
        penalty, found, expected = penalty_and_slopes(model, held, layer.cell.recurrent_kernel)
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=1e-4)
    if name == "lyapunov" and layer.units > 1:
        return
    key = f"joint/{name}" if view == "joint" else name
    values = measure(model, probe, measures=[key], exact_flow=False, flow_vectors=4)["rnn"][key]
    if name == "flow":
        values = np.array([column[np.isfinite(column)][-1] for column in values.T])
    np.testing.assert_allclose(penalty, np.mean((np.asarray(values) - TARGET) ** 2), rtol=1e-3)


@pytest.mark.soak
@pytest.mark.parametrize("states", ["cached", "fresh"])
def test_the_growth_moves_to_its_target_in_a_compiled_training(states: Any) -> None:
    regularizer = JacobianRegularizer(0.0, 10.0, measure="growth", states=states, refresh=4)
    monitor = holding(regularizer, measures=["growth"])
    model = compiled(L.SimpleRNN(4, name="rnn"), optimizer=keras.optimizers.SGD(0.02), jit_compile=False)
    history = fit(model, monitor, epochs=4).history["jac_penalty"]
    assert history[-1] < 0.4 * history[0]
    assert np.isfinite(history).all()


def test_trajectories_that_overflow_have_no_penalty_and_no_gradient() -> None:
    model = model_of(L.SimpleRNN(3, activation="linear", name="rnn"))
    kernel = model.layers[-1].cell.recurrent_kernel
    kernel.assign(np.full((3, 3), 1e30))
    regularizer = JacobianRegularizer(0.0, 1.0, measure="growth")
    with contextlib.ExitStack() as stack:
        with pytest.warns(UserWarning, match="the penalty is not finite|states are not finite"):
            stack.enter_context(regularizer.attached(model, PROBE))
        with tf.GradientTape() as tape:
            penalty = tf.add_n(model.losses)
        assert float(penalty) == 0.0
        np.testing.assert_array_equal(tape.gradient(penalty, kernel.value), 0.0)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["growth", "spectral_radius"])
def test_xla_is_refused_before_the_training(name: str) -> None:
    model = compiled(jit_compile=True)
    with pytest.raises(ValueError, match="a model compiled with `jit_compile=False`"):
        JacobianRegularizer(0.0, 1.0, measure=name).prepare(model, PROBE)
