"""Policies of other precisions: the measurement itself is in float32, or float64 where the layer is."""

from __future__ import annotations

import functools
from typing import Any

import keras
import numpy as np
import pytest
from helpers import normal

from keras_jacmon import Report, measure

PROBE = normal(4, 20, 6, seed=3)
MEASURES = ["variance", "rms_singular_value", "spectral_norm", "flow"]
MEASURES += [f"joint/{name}" for name in MEASURES]


def model_of(policy: str, units: int) -> Any:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        keras.utils.set_random_seed(3)
        layers = [
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.LSTM(units, return_sequences=True, name="lstm"),
            keras.layers.GRU(units, return_sequences=True, name="gru"),
            keras.layers.SimpleRNN(units, name="rnn"),
        ]
        return keras.Sequential([keras.Input(PROBE.shape[1:]), *layers])
    finally:
        keras.config.set_dtype_policy(before)


@functools.cache
def single(units: int) -> tuple[Any, Report]:
    model = model_of("float32", units)
    return model.get_weights(), measure(model, PROBE, measures=MEASURES, max_rows=None)


# What the README promises: relative, of the flow in nats. What a layer receives is of the precision of those below.
@pytest.mark.parametrize(
    ("units", "policy", "tolerance"),
    [
        (16, "float64", 1e-3),
        (16, "mixed_float16", 1e-3),
        (16, "mixed_bfloat16", 1e-2),
        (300, "mixed_float16", 1e-3),
        pytest.param(300, "float64", 1e-3, marks=pytest.mark.soak),
        pytest.param(300, "mixed_bfloat16", 1e-2, marks=pytest.mark.soak),
    ],
)
def test_values_are_those_of_single_precision(units: int, policy: str, tolerance: float) -> None:
    """300 units: from 256 on, the variance of half-precision entries comes out as zero."""
    weights, expected = single(units)
    model = model_of(policy, units)
    model.set_weights(weights)
    found = measure(model, PROBE, measures=MEASURES, max_rows=None)
    assert list(found) == list(expected)
    for name, layer in expected.layers.items():
        assert list(found[name].values) == list(layer.values)
        for key, values in layer.values.items():
            assert found[name][key].dtype == (np.float64 if policy == "float64" else np.float32)
            assert (found[name][key] > 0).all()
            # Both spectral norms have a tolerance of their own, of 0.01.
            allowed = 2e-2 if key.endswith("spectral_norm") else tolerance
            np.testing.assert_allclose(found[name][key], values, rtol=allowed, err_msg=f"{name} {key}")
        key = f"{layer.joint}flow"
        np.testing.assert_allclose(found[name][key], layer[key], atol=2 * tolerance, err_msg=name)
