"""Policies of other precisions: the measurement itself is in float32, or float64 where the layer is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
from helpers import normal

from keras_jacmon import Report, measure

if TYPE_CHECKING:
    from collections.abc import Sequence

PROBE = normal(4, 20, 6, seed=3)
MEASURES = ["variance", "rms_singular_value", "spectral_norm", "flow"]
MEASURES += [f"joint/{name}" for name in MEASURES]
MEASURES += ["relative_sensitivity"]
KINDS = ["dense", "lstm", "gru", "rnn"]
HALF = ("mixed_float16", "mixed_bfloat16")
FEW = ["joint/variance", "joint/spectral_norm", "joint/flow", "relative_sensitivity"]


def model_of(policy: str, units: int, kinds: Sequence[str]) -> Any:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        keras.utils.set_random_seed(3)
        layers = [
            keras.layers.Dense(8, activation="tanh", name="dense"),
            keras.layers.LSTM(units, return_sequences=True, name="lstm"),
            keras.layers.GRU(units, return_sequences=True, name="gru"),
            keras.layers.SimpleRNN(units, return_sequences=True, name="rnn"),
        ]
        kept = [layer for layer in layers if layer.name in kinds]
        return keras.Sequential([keras.Input(PROBE.shape[1:]), *kept])
    finally:
        keras.config.set_dtype_policy(before)


# What the README promises: relative, of the flow in nats. What a layer receives is of the precision of those below.
TOLERANCES = {"float64": 1e-3, "mixed_float16": 1e-3, "mixed_bfloat16": 1e-2}


@pytest.mark.parametrize(
    ("units", "kinds", "policies", "measures"),
    [
        (16, ["dense", "lstm"], HALF, FEW),
        (300, ["lstm"], ("mixed_float16",), ["variance", "joint/variance"]),
        pytest.param(16, KINDS, HALF, MEASURES, marks=pytest.mark.soak),
        pytest.param(300, KINDS, ("float64", *HALF), MEASURES, marks=pytest.mark.soak),
    ],
    ids=["few", "wide", "all", "all_wide"],
)
def test_values_are_those_of_single_precision(
    units: int, kinds: list[str], policies: Sequence[str], measures: list[str]
) -> None:
    """300 units: from 256 on, the variance of half-precision entries comes out as zero."""
    single = model_of("float32", units, kinds)
    expected = measure(single, PROBE, measures=measures, max_rows=None)
    for policy in policies:
        model = model_of(policy, units, kinds)
        model.set_weights(single.get_weights())
        assert_close(measure(model, PROBE, measures=measures, max_rows=None), expected, policy)


def assert_close(found: Report, expected: Report, policy: str) -> None:
    tolerance = TOLERANCES[policy]
    assert list(found) == list(expected)
    for name, layer in expected.layers.items():
        assert list(found[name].values) == list(layer.values)
        for key, values in layer.values.items():
            assert found[name][key].dtype == (np.float64 if policy == "float64" else np.float32)
            assert (found[name][key] > 0).all()
            # Both spectral norms have a tolerance of their own, of 0.01.
            allowed = 2e-2 if key.endswith("spectral_norm") else tolerance
            np.testing.assert_allclose(found[name][key], values, rtol=allowed, err_msg=f"{name} {key}")
        for key, values in layer.sequences.items():
            # Flows are logarithms.
            relative = 0 if key.endswith("flow") else 2 * tolerance
            absolute = 2 * tolerance if key.endswith("flow") else 0
            np.testing.assert_allclose(
                found[name][key], values, rtol=relative, atol=absolute, err_msg=f"{policy} {name} {key}"
            )
