"""Suggestions that are tried: what they predict comes true, and they change nothing before they are applied."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import keras
import numpy as np
import pytest
from helpers import FunctionCell, normal
from trainings import AtBatch, assert_equal, compiled, fit, quick_monitor, values_of

from keras_jacmon import JacobianMeter, measure, stabilize, suggest
from keras_jacmon.measurement.trials import search
from keras_jacmon.report.suggestion import Suggestion, WeightChange
from keras_jacmon.report.verdict import Verdict, judge

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 60
PROBE = normal(4, STEPS, 3, seed=3)


def test_what_a_suggestion_predicts_comes_true() -> None:
    keras.utils.set_random_seed(4)
    lstm = keras.layers.LSTM(6, return_sequences=True, name="lstm")
    gru = keras.layers.GRU(6, return_sequences=True, name="gru")
    tiny = keras.initializers.Orthogonal(0.05)
    relu = keras.layers.SimpleRNN(6, activation="relu", recurrent_initializer=tiny, return_sequences=True, name="relu")
    rnn = keras.layers.SimpleRNN(6, recurrent_initializer=keras.initializers.Orthogonal(2.0), return_sequences=True)
    # Of its weights one multiplies the states, and it has a name of its own.
    own = keras.layers.RNN(FunctionCell(lambda cell, x, h: keras.ops.relu(x + h @ cell.V), 6), name="own")
    model = keras.Sequential([keras.Input((STEPS, 3)), lstm, gru, relu, rnn, own])
    before = values_of(model.variables)
    meter = JacobianMeter(model, PROBE, measures=["joint/growth"])
    verdicts = meter().verdict
    assert_equal(values_of(model.variables), before)
    changed = {"lstm": "bias", "gru": "bias", "relu": "recurrent_kernel", "own": "second_kernel"}
    for layer, verdict in verdicts.items():
        assert bool(verdict.suggestions) == (verdict.state != "stable")
        for suggestion in verdict.suggestions:
            suggestion.apply(model)
            after = meter(suggestions=False).verdict[layer]
            np.testing.assert_allclose(after.growth, suggestion.predicted, rtol=1e-5)
            assert (after.state, suggestion.growth) == (suggestion.predicted_state, verdict.growth)
            assert f"vanishing -> {after.state}" in str(suggestion).replace("exploding ->", "vanishing ->")
            assert f"  - {suggestion}" in str(verdict)
            for variable, value in zip(model.variables, before, strict=True):
                variable.assign(value)
    found = {layer: verdicts[layer].suggestions[0] for layer in changed}
    assert {layer: suggestion.change.names for layer, suggestion in found.items()} == {
        layer: (name,) for layer, name in changed.items()
    }
    assert {suggestion.predicted_state for suggestion in found.values()} == {"stable"}
    lstm.trainable = False
    with pytest.raises(ValueError, match=r"a model with the weights `.*lstm_cell/bias`, once each and trained"):
        found["lstm"].apply(model)
    report = meter()
    assert report.verdict["lstm"].suggestions == ()
    assert "it has no trained weight that is known to multiply its states" in report["lstm"].notes[-1]


def test_where_copies_do_not_reach_a_cell_the_model_is_changed_outside_of_a_training_alone() -> None:
    keras.utils.set_random_seed(4)
    # The second call receives what the first one makes of the weights.
    small = keras.initializers.Orthogonal(0.1)
    rnn = keras.layers.SimpleRNN(3, activation="relu", recurrent_initializer=small, return_sequences=True, name="rnn")
    inputs = keras.Input((STEPS, 3))
    model = keras.Model(inputs, rnn(rnn(inputs)))
    before = values_of(model.variables)
    meter = JacobianMeter(model, PROBE, measures=["joint/growth"])
    report = meter()
    for name in ("rnn", "rnn:1"):
        assert report.verdict[name].suggestions == ()
        assert report[name].notes[-1].startswith("no change was tried, because its weights act in several calls")
        assert report[name].notes[-1].endswith("`keras_jacmon.suggest` tries on the model itself")
    found = suggest(model, PROBE)
    assert_equal(values_of(model.variables), before)
    assert found == {name: layer.suggestions for name, layer in measure(model, PROBE).items()}
    (suggestion,) = found["rnn:1"]
    suggestion.apply(model)
    np.testing.assert_allclose(meter(suggestions=False).verdict["rnn:1"].growth, suggestion.predicted, rtol=1e-5)


def test_a_training_tries_changes_at_its_end_and_stays_as_it_is() -> None:
    model, alone = compiled(), compiled()
    for one in (model, alone):
        one.layers[0].cell.recurrent_kernel.assign(one.layers[0].cell.recurrent_kernel * 1e-3)
    monitor = quick_monitor(measures=["growth"], on_error="raise")
    # The end is not known when the third epoch ends.
    fit(model, AtBatch(20, lambda: setattr(model, "stop_training", True)), monitor, epochs=5)
    fit(alone, AtBatch(20, lambda: setattr(alone, "stop_training", True)), epochs=5)
    assert_equal(values_of(model.variables), values_of(alone.variables))
    verdicts = [report.verdict["rnn"] for _, report in monitor.reports]
    assert [verdict.state for verdict in verdicts] == ["vanishing"] * 4
    assert [len(verdict.suggestions) for verdict in verdicts] == [0, 0, 0, 1]


@pytest.mark.fast
def test_what_does_not_help_is_not_suggested() -> None:
    def verdict(growth: float) -> Verdict | None:
        return judge(growth * np.arange(1.0, 61)[:, None], np.ones((60, 1), bool))

    def searched(growth_with: Callable[[float], float]) -> tuple[Suggestion, ...]:
        before = verdict(-1.0)
        assert before is not None
        return search(
            "rnn", [WeightChange(("kernel",), 0.0)], before, lambda change: verdict(growth_with(change.amount))
        )

    (suggestion,) = searched(lambda factor: math.log(factor) - 1)
    assert abs(math.log(suggestion.change.amount) - 1) < 1 / 60
    # No factor changes it, each makes it worse, all give NaN, the best one helps little, or turns it around.
    for growth_with in (
        lambda _: -1.0,
        lambda factor: -1 - abs(math.log(factor)),
        lambda _: math.nan,
        lambda factor: -0.8 - (math.log(factor) - 1) ** 2,
        lambda factor: 1.1 if factor > 1 else -1.0,
    ):
        assert searched(growth_with) == ()


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
