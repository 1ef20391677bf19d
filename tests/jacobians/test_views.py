"""Views of chosen states: blocks of the joint Jacobian."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from helpers import normal, randomize, reference_jacobians

from keras_jacmon import JacobianRegularizer, state_jacobian


class Spiking(keras.layers.Layer):
    """A cell with a voltage v, an adaptation a and a spike z, which resets the voltage."""

    def __init__(self) -> None:
        super().__init__()
        self.state_size = [{"v": 3, "a": 3, "z": 3}]

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        v, a, z = (states[0][name] for name in "vaz")
        new_v = 0.9 * v * (1 - z) - a + inputs
        spike = keras.ops.sigmoid(new_v)
        return spike, [{"v": new_v, "a": 0.8 * a + v * z, "z": spike}]


def test_chosen_states_by_name_and_position_are_a_block_of_the_joint_view() -> None:
    cell, inputs = Spiking(), normal(2, 3, seed=1)
    states = [{name: normal(2, 3, seed=seed) for seed, name in enumerate("vaz")}]
    joint = state_jacobian(cell, inputs, states, view="joint").to_dense().numpy()
    # The states of a dict are in the order of their names: a, v, z.
    places = [3, 4, 5, 0, 1, 2]
    for view in (("v", "a"), (1, 0)):
        found = state_jacobian(cell, inputs, states, view=view).to_dense()
        np.testing.assert_allclose(found, joint[:, places][:, :, places], rtol=1e-6)
    refusals: list[tuple[Any, str]] = [
        (("v", "w"), "'w'"),
        ((0, 0), "0, 0"),
        ((), "()"),
        ((3,), "3"),
    ]
    for chosen, received in refusals:
        message = r"different floating-point states out of \[0, 1, 2\], or by name out of \['a', 'v', 'z'\]"
        with pytest.raises(ValueError, match=message) as caught:
            state_jacobian(cell, inputs, states, view=chosen)
        assert received in str(caught.value)


def test_the_radius_of_chosen_states_is_held_in_a_training() -> None:
    keras.utils.set_random_seed(1)
    lstm = keras.layers.LSTM(3, name="lstm")
    model, probe = keras.Sequential([keras.Input((4, 2)), lstm]), normal(3, 4, 2, seed=1)
    randomize(model)

    def penalty(view: Any) -> float:
        with JacobianRegularizer(1.0, 1.0, measure="spectral_radius", view=view).attached(model, probe) as held:
            return float(held.penalty())

    # The order of the states does not matter to eigenvalues.
    radius = np.abs(np.linalg.eigvals(reference_jacobians(lstm, probe)["joint"])).max(axis=-1)
    np.testing.assert_allclose(penalty((1, 0)), np.mean((radius - 1.0) ** 2), rtol=1e-4)
    with pytest.raises(ValueError, match=r"different floating-point states out of \[0, 1\]. Received: view=\(2,\)"):
        penalty((2,))
