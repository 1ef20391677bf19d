"""Lyapunov exponents as a loss: the gradient through QR and states, and exponents that it brings to zero."""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import normal
from trainings import Stops, assert_equal, values_of

from keras_jacmon import stabilize
from keras_jacmon.model.layers import find_recurrent_layers
from keras_jacmon.stabilization.flossing import ExponentsObjective

STEPS, UNITS = 12, 4
PROBE = normal(2, STEPS, 2, seed=3)


def test_the_gradient_is_that_of_finite_differences() -> None:
    keras.utils.set_random_seed(3)
    layer = keras.layers.SimpleRNN(UNITS, dtype="float64", return_sequences=True)
    model = keras.Sequential([keras.Input((STEPS, 2), dtype="float64"), layer])
    probe = tf.constant(PROBE, tf.float64)
    loss = ExponentsObjective(model, probe, find_recurrent_layers(model), count=3, target=0.1, seed=0)
    gradients = loss.gradients(layer.weights)
    for weight, gradient in zip(layer.weights, gradients, strict=True):
        direction = np.random.default_rng(5).normal(size=weight.shape)
        start, ends = weight.numpy(), []
        for sign in (1, -1):
            weight.assign(start + sign * 1e-5 * direction)
            ends.append(float(loss.value_and_slopes()[0]))
        weight.assign(start)
        np.testing.assert_allclose(np.sum(gradient * direction), (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-7)


def test_flossing_brings_the_leading_exponents_to_zero() -> None:
    keras.utils.set_random_seed(3)
    rnn = keras.layers.SimpleRNN(UNITS, recurrent_initializer=keras.initializers.Orthogonal(0.4), name="rnn")
    model = keras.Sequential([keras.Input((STEPS, 2)), rnn])
    optimizer, start = keras.optimizers.Adam(0.03), rnn.get_weights()
    result = stabilize(model, PROBE, method="flossing", exponents=3, optimizer=optimizer, verbose=0)
    assert result.converged
    before, after = (np.mean(np.square(report["rnn"]["lyapunov"])) for report in (result.before, result.after))
    assert before > 100 * after
    assert result.after["rnn"]["lyapunov"].shape == (3, 2)
    # By gradient it is the same, also where an interrupt ends it.
    rnn.set_weights(start)
    arguments: dict[str, Any] = {"exponents": 3, "optimizer": optimizer, "steps": 10}
    losses = stabilize(model, PROBE, measure="lyapunov", verbose=0, **arguments).history["loss"]
    assert losses[0] > losses[1] > losses[2]
    found = values_of(rnn.weights)
    rnn.set_weights(start)
    with pytest.raises(KeyboardInterrupt), contextlib.redirect_stdout(Stops("10/10")):
        stabilize(model, PROBE, method="flossing", **arguments)
    assert_equal(values_of(rnn.weights), found)
    with pytest.raises(ValueError, match=r"Expected one of \['lyapunov'\]"):
        stabilize(model, PROBE, measure="variance", method="flossing")


def test_samples_without_a_step_and_directions_that_are_lost_do_not_end_it() -> None:
    keras.utils.set_random_seed(3)
    half = keras.initializers.Orthogonal(0.5)
    rnn = keras.layers.SimpleRNN(UNITS, activation="relu", recurrent_initializer=half, name="rnn")
    model = keras.Sequential([keras.Input((STEPS, 2)), keras.layers.Masking(), rnn])
    probe = np.concatenate([np.where(np.arange(STEPS)[:, None] < 9, PROBE, 0), np.zeros_like(PROBE[:1])])
    result = stabilize(model, probe, method="flossing", exponents=UNITS, steps=30, optimizer="adam", verbose=0)
    exponents = result.before["rnn"]["lyapunov"]
    assert np.isnan(exponents[:, 2]).all()
    assert np.isneginf(exponents[-1, :2]).all()
    losses = result.history["loss"]
    assert np.isfinite(losses).all()
    assert min(losses) < losses[0]
