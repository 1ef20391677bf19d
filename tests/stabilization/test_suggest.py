"""Suggestions that are tried: what they predict comes true, and they change nothing before they are applied."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
from helpers import normal
from trainings import assert_equal, values_of

from keras_jacmon import JacobianMeter, stabilize, suggest
from keras_jacmon.stabilization.secant import Secant

STEPS = 60
PROBE = normal(4, STEPS, 3, seed=3)


def test_what_a_suggestion_predicts_comes_true() -> None:
    keras.utils.set_random_seed(4)
    lstm = keras.layers.LSTM(6, return_sequences=True, name="lstm")
    gru = keras.layers.GRU(6, return_sequences=True, name="gru")
    rnn = keras.layers.SimpleRNN(6, recurrent_initializer=keras.initializers.Orthogonal(2.0))
    model = keras.Sequential([keras.Input((STEPS, 3)), lstm, gru, rnn])
    before = values_of(model.variables)
    found = suggest(model, PROBE)
    assert_equal(values_of(model.variables), before)
    for name in ("lstm", "gru"):
        assert [suggestion.weight for suggestion in found[name]] == ["bias", "recurrent_kernel"]
    meter = JacobianMeter(model, PROBE, measures=["joint/growth"])
    verdicts = meter().verdict
    for layer, suggestions in found.items():
        assert bool(suggestions) == (verdicts[layer].state != "stable")
        for suggestion in suggestions:
            suggestion.apply(model)
            verdict = meter().verdict[layer]
            np.testing.assert_allclose(verdict.growth, suggestion.predicted, rtol=1e-2, atol=1e-4)
            assert verdict.state == suggestion.predicted_state
            assert abs(suggestion.predicted) < abs(verdicts[layer].growth)
            assert f"{verdicts[layer].state} -> {verdict.state}" in str(suggestion)
            for variable, value in zip(model.variables, before, strict=True):
                variable.assign(value)
    assert {found[name][0].predicted_state for name in ("lstm", "gru")} == {"stable"}
    lstm.trainable = False
    with pytest.raises(ValueError, match="a model whose layer `lstm` has a `bias` that is trained"):
        found["lstm"][0].apply(model)


def test_the_secant_turns_back_where_the_number_moves_away() -> None:
    secant, x = Secant(1.0, 1.5), 0.0
    for _ in range(8):
        x += secant.step(x**3 - 2)
    assert abs(x - 2 ** (1 / 3)) < 1e-2
    # It has no zero, and is largest at 1.
    secant, x = Secant(1.0, 1.5), 0.0
    places = []
    for _ in range(12):
        x += secant.step(-1 - (x - 1) ** 2 if x < 5 else math.nan)
        places.append(x)
    assert max(map(abs, places)) < 5
    assert Secant(1.0, 1.5).step(-math.inf) == 1.5
    assert Secant(1.0, 1.5).step(math.nan) == -1.5


def test_rescaling_brings_the_growth_to_zero() -> None:
    keras.utils.set_random_seed(4)
    half = keras.initializers.Orthogonal(0.5)
    rnn = keras.layers.SimpleRNN(6, activation="softplus", recurrent_initializer=half, name="rnn")
    model = keras.Sequential([keras.Input((STEPS, 3)), rnn])
    result = stabilize(model, PROBE, measure="growth", method="rescale", tolerance=0.01, verbose=0)
    assert result.converged
    assert result.before.verdict["rnn"].state == "vanishing"
    assert result.after.verdict["rnn"].state == "stable"
    with pytest.raises(ValueError, match='a target for "time" alone'):
        stabilize(model, PROBE, {"depth": 1.0}, "growth", "rescale")
