"""Flossing between epochs: what changes, what stays, and what happens when an episode fails."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from trainings import PROBE, assert_equal, compiled, fit, values_of

from keras_jacmon import FlossingEpisodes


def test_episodes_change_the_recurrent_weights_and_nothing_else() -> None:
    model = compiled()
    variables, before, after = [*model.variables, *model.optimizer.variables], list[Any](), list[Any]()

    def keep(kept: list[Any]) -> Any:
        return keras.callbacks.LambdaCallback(on_epoch_begin=lambda _epoch, _logs: kept.append(values_of(variables)))

    episodes = FlossingEpisodes(PROBE, epochs=[1], updates=10, exponents=2, learning_rate=0.01)
    callbacks = [keep(before), episodes, keep(after)]
    fit(model, *callbacks, epochs=2)
    recurrent = [any(v is w for w in model.get_layer("rnn").trainable_weights) for v in model.variables]
    assert_equal(after[0], before[0])
    changed = [not np.array_equal(old, new) for old, new in zip(before[1], after[1], strict=True)]
    assert changed == recurrent + [False] * len(model.optimizer.variables)
    [(epoch, result)] = episodes.results
    assert epoch == 1
    assert result.history["updates"] == [0, 10]
    assert result.history["loss"][1] < result.history["loss"][0]
    # From the same weights it finds the same ones.
    for variable, value in zip(variables, before[1], strict=True):
        variable.assign(value)
    fit(model, *callbacks, initial_epoch=1, epochs=2)
    assert_equal(after[2], after[1])


def test_an_episode_that_fails_ends_no_training() -> None:
    model = compiled()

    def freeze(_epoch: int, _logs: Any) -> None:
        model.get_layer("rnn").trainable = False

    episodes = FlossingEpisodes(PROBE, epochs=[1], updates=10)
    with pytest.warns(UserWarning, match=r"The flossing before epoch 1 failed: [\s\S]*Training goes on\.") as caught:
        history = fit(model, keras.callbacks.LambdaCallback(on_epoch_begin=freeze), episodes, epochs=3)
    assert len(caught) == 1
    assert len(history.epoch) == 3
    assert episodes.results == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"epochs": ()}, "`epochs`. Expected whole numbers of at least 0"),
        ({"epochs": 2.5}, "`epochs`. Expected whole numbers of at least 0"),
        ({"updates": 0}, "`updates`. Expected an integer of at least 1"),
        ({"exponents": 0}, "`exponents`. Expected an integer of at least 1"),
        ({"learning_rate": 0}, "`learning_rate`. Expected a number above 0"),
        ({"seed": -1}, "`seed`. Expected an integer from 0 to"),
    ],
)
def test_invalid_arguments_are_refused(arguments: Any, expected: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the sentence is below
        FlossingEpisodes(PROBE, **arguments)
    assert expected in str(raised.value)


def test_what_does_not_fit_the_model_is_refused_before_the_training() -> None:
    with pytest.raises(ValueError, match="nothing_like_it"):
        fit(compiled(), FlossingEpisodes(PROBE, layers="nothing_like_it"))
    with pytest.raises(ValueError, match="probe"):
        fit(compiled(), FlossingEpisodes(PROBE[..., :2]))
