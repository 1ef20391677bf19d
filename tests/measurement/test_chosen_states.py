"""Measures of chosen states: named in reports, refused where no layer has them, and brought to a target."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from helpers import normal

from keras_jacmon import JacobianMeter, stabilize, state_jacobian

STEPS, UNITS = 3, 2
PROBE = normal(2, STEPS, UNITS, seed=1)


class Spiking(keras.layers.Layer):
    """A cell with a voltage v, an adaptation a and a spike z, which resets the voltage."""

    def __init__(self) -> None:
        super().__init__()
        self.state_size = [{"v": UNITS, "a": UNITS, "z": UNITS}]
        self.output_size = UNITS

    def build(self, _: tuple[int, ...]) -> None:
        self.W = self.add_weight(shape=(UNITS, UNITS), initializer=keras.initializers.Orthogonal(0.3, seed=1), name="W")

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        v, a, z = (states[0][name] for name in "vaz")
        new_v = 0.9 * v * (1 - z) - a + z @ self.W + inputs
        spike = keras.ops.sigmoid(new_v)
        return spike, [{"v": new_v, "a": 0.8 * a + keras.ops.tanh(v @ self.W), "z": spike}]

    def get_initial_state(self, batch_size: int) -> list[Any]:
        return [{name: keras.ops.zeros((batch_size, UNITS)) for name in "vaz"}]


def test_chosen_states_are_measured_and_brought_to_a_target() -> None:
    cell = Spiking()
    model = keras.Sequential([keras.Input((STEPS, UNITS)), keras.layers.RNN(cell, name="spiking")])
    layer = JacobianMeter(model, PROBE, measures=["v+a/spectral_radius", "1+0/variance"])()["spiking"]
    assert {"v+a/spectral_radius", "1+0/variance"} <= set(layer)
    states = cell.get_initial_state(len(PROBE))
    for t in range(STEPS):
        J = state_jacobian(cell, PROBE[:, t], states, view=("v", "a")).to_dense().numpy()
        radius = np.abs(np.linalg.eigvals(J)).max(axis=-1)
        np.testing.assert_allclose(layer["v+a/spectral_radius"][t], radius, rtol=1e-4)
        np.testing.assert_allclose(layer["1+0/variance"][t], J.var(axis=(1, 2)) * 2 * UNITS, rtol=1e-4)
        _, states = cell(PROBE[:, t], states)
    result = stabilize(model, PROBE, 0.6, view=("v", "a"), steps=5, verbose=0)
    assert [goal.name for goal in result.goals] == ["spiking/v+a/spectral_radius"]
    assert result.history["loss"][1] < result.history["loss"][0]
    with pytest.raises(ValueError, match=r"out of \['a', 'v', 'z'\]$") as caught:
        JacobianMeter(model, PROBE, measures=["v+w/variance"])
    assert "Expected chosen states that a recurrent layer has. Received: in layer `spiking` the view `v+w`" in str(
        caught.value
    )
    with pytest.raises(ValueError, match=r"chosen states such as `\(0, 1\)` for a measure of one step"):
        stabilize(model, PROBE, measure="growth", view=("v", "a"))
