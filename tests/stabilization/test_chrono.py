"""Biases for memories of a given length, against the known values of chrono initialization."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import pytest
from helpers import normal
from trainings import assert_equal, values_of

from keras_jacmon import chrono_biases, measure

UNITS = 1000


def forget_biases(layer: Any) -> Any:
    """The biases of the gates that keep the state: the second gate of an LSTM, the first one of a GRU."""
    bias = np.atleast_2d(layer.cell.bias.numpy()).sum(axis=0)
    first = layer.units if isinstance(layer, keras.layers.LSTM) else 0
    return bias[first : first + layer.units]


@pytest.mark.parametrize(
    "layer",
    [
        keras.layers.LSTM(UNITS, recurrent_initializer="zeros"),
        keras.layers.GRU(UNITS, recurrent_initializer="zeros"),
        keras.layers.GRU(UNITS, recurrent_initializer="zeros", reset_after=False),
    ],
    ids=["lstm", "gru", "gru_reset_before"],
)
def test_the_mean_exponents_of_the_gates_are_the_known_ones(layer: Any) -> None:
    layer.build((None, None, 1))
    kernels = values_of(layer.weights[:2])
    # From `ground_truths.md`.
    for length, expected in ((16, -0.1682), (100, -0.04300), (1000, -0.006534)):
        assert chrono_biases(layer, length) == (layer.name,)
        rates = np.log(1 / (1 + np.exp(-forget_biases(layer))))
        assert abs(rates.mean() - expected) < 4 * rates.std() / math.sqrt(rates.size)
    assert_equal(values_of(layer.weights[:2]), kernels)
    if isinstance(layer, keras.layers.LSTM):
        np.testing.assert_array_equal(layer.cell.bias.numpy()[:UNITS], -forget_biases(layer))


def test_the_leading_exponent_of_an_lstm_with_small_kernels_is_that_of_its_longest_memory() -> None:
    lstm = keras.layers.LSTM(16, kernel_initializer="zeros", recurrent_initializer="zeros", name="lstm")
    model = keras.Sequential([keras.Input((3, 2)), lstm])
    chrono_biases(model, 100, seed=1)
    # All steps have the same Jacobian.
    report = measure(model, normal(2, 3, 2), measures=["joint/spectral_radius"])
    np.testing.assert_allclose(np.log(report["lstm"].mean("joint/spectral_radius")), math.log(99 / 100), atol=2e-3)


def test_what_has_no_such_bias_is_refused() -> None:
    gru, rnn = keras.layers.GRU(2, name="gru", return_sequences=True), keras.layers.SimpleRNN(2, name="rnn")
    model = keras.Sequential([keras.Input((5, 2)), gru, rnn])
    assert chrono_biases(model, 9) == ("gru",)
    for arguments, message in (({"layers": "rnn"}, r"\['rnn'\]"), ({"length": 1}, "at least 2. Received: length=1")):
        with pytest.raises(ValueError, match=message):
            chrono_biases(model, **({"length": 9} | arguments))
    gru.trainable = False
    with pytest.raises(ValueError, match="built LSTMs and GRUs with a bias that is trained"):
        chrono_biases(model, 9)
