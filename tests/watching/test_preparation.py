"""The line that says what is being prepared."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest

from keras_jacmon import JacobianMonitor, JacobianRegularizer
from keras_jacmon.watching.preparation import PreparationLine

if TYPE_CHECKING:
    from collections.abc import Callable

HEAD = "JacobianMonitor prepares its measurement of "


@pytest.mark.fast
def test_it_is_shown_when_the_user_has_waited(capsys: pytest.CaptureFixture[str]) -> None:
    line = PreparationLine(patience=0.05)
    with line.shown(at_once=False):
        line.begin("`lstm`")
    assert capsys.readouterr().out == ""
    with line.shown(at_once=False):
        line.begin("`lstm`")
        line.begin("`lstm_1`")
        _wait_for(lambda: line._printed == 2)
        line.begin("`gru`")
    assert capsys.readouterr().out == f"{HEAD}`lstm`, `lstm_1`, `gru`.\n"


def _wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_with_verbose_it_names_each_layer_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = np.ones((4, 3, 2)), np.ones((4, 1))
    layers: list[Any] = [keras.layers.SimpleRNN(2, name="first", return_sequences=True)]
    layers += [keras.layers.SimpleRNN(2, name="second"), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((3, 2)), *layers])
    model.compile("sgd", "mse")
    arguments: dict[str, Any] = {"log_dir": None, "measures": ["variance"], "on_error": "raise"}
    held = JacobianRegularizer(1.0, 0.1)
    # The second one says nothing.
    monitors = [JacobianMonitor(x, verbose=1, regularizer=held, **arguments), JacobianMonitor(x, **arguments)]
    model.fit(x, y, verbose=0, callbacks=monitors)
    out = capsys.readouterr().out
    assert out.startswith(f"{HEAD}`first`, `second`, the penalty.\n")
    assert out.count(HEAD) == 1
