"""Kernels that are multiplied: shared ones, those of cells of different kinds, and those without influence."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from helpers import normal, reference_jacobians
from trainings import assert_equal, values_of

from keras_jacmon import stabilize

L = keras.layers
STEPS, UNITS = 6, 4
PROBE = normal(4, STEPS, UNITS, seed=3)


def of(*layers: Any) -> Any:
    keras.utils.set_random_seed(4)
    return keras.Sequential([keras.Input((STEPS, UNITS)), *layers])


def factor_of(weight: Any, before: Any) -> float:
    """The number that a kernel was multiplied by as a whole."""
    ratio = weight.numpy() / before
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)
    return float(ratio[0, 0])


@pytest.mark.parametrize(("kind", "target"), [(L.SimpleRNNCell, 0.5), (L.GRUCell, 1.0)])
def test_a_cell_that_two_layers_share_is_brought_to_the_target_of_both(kind: Any, target: float) -> None:
    cell = kind(UNITS)
    below, above = L.RNN(cell, return_sequences=True, name="below"), L.RNN(cell, return_sequences=True, name="above")
    model = of(below, above)
    kernel, recurrent, *bias = values_of(cell.weights)
    result = stabilize(model, PROBE, target, method="rescale", verbose=0)
    assert result.converged
    assert 0 < result.history["updates"][-1] < 10
    assert_equal([value for k, value in enumerate(values_of(cell.weights)) if k != 1], [kernel, *bias])
    assert np.abs(cell.weights[1].numpy() - recurrent).max() > 1e-3
    inputs: Any = PROBE
    for layer in (below, above):
        radii = np.abs(np.linalg.eigvals(reference_jacobians(layer, inputs)["hidden"])).max(axis=-1)
        np.testing.assert_allclose(result.after[layer.name].mean("spectral_radius"), np.mean(radii), rtol=1e-4)
        assert np.mean(radii) == pytest.approx(target, abs=0.08)
        inputs = layer(inputs).numpy()


@pytest.mark.filterwarnings("ignore:Layer `rnn.*`. the model also calls its cell")
def test_cells_that_a_stack_shares_with_single_layers_are_multiplied_by_one_number() -> None:
    first, second = L.SimpleRNNCell(UNITS), L.SimpleRNNCell(UNITS)
    layers = [L.RNN(cells, return_sequences=True) for cells in (first, second, [first, second])]
    model = of(*layers)
    kernels = [cell.recurrent_kernel for cell in (first, second)]
    before = values_of(kernels)
    result = stabilize(model, PROBE, 0.4, method="rescale", verbose=0)
    assert min(result.history["loss"]) < result.history["loss"][0]
    gains = [factor_of(*pair) for pair in zip(kernels, before, strict=True)]
    assert gains[0] == pytest.approx(gains[1], rel=1e-5)
    assert gains[0] < 0.95


@pytest.mark.parametrize("cells", [(L.LSTMCell, 4, L.GRUCell, 3), (L.LSTMCell, 4, L.GRUCell, 4)])
def test_kernels_of_cells_of_different_kinds_are_multiplied_as_a_whole(cells: Any) -> None:
    first, units, second, others = cells
    layer = L.RNN([first(units), second(others)], name="rnn")
    model = of(layer)
    kernels = [weight for weight in layer.weights if weight.name == "recurrent_kernel"]
    before = values_of(kernels)
    result = stabilize(model, PROBE, 1.2, method="rescale", verbose=0)
    assert min(result.history["loss"]) < result.history["loss"][0]
    gains = [factor_of(*pair) for pair in zip(kernels, before, strict=True)]
    assert gains[0] == pytest.approx(gains[1], rel=1e-5)
    assert abs(gains[0] - 1) > 0.05


def dead() -> Any:
    """A layer whose units are all zero at all steps, and so are its Jacobians."""
    model = of(L.SimpleRNN(UNITS, "relu", return_sequences=True, name="rnn"))
    model.layers[0].cell.bias.assign([-100.0] * UNITS)
    return model


def test_a_kernel_without_influence_is_left_as_it_is() -> None:
    model = dead()
    before = values_of(model.variables)
    with pytest.warns(UserWarning, match="^`rnn` stays as it is: the spectral_radius of its Jacobians is 0, which no "):
        result = stabilize(model, PROBE, method="rescale", verbose=0)
    assert (result.converged, result.history["updates"], len(result.notes)) == (False, [0], 1)
    assert_equal(values_of(model.variables), before)


def test_a_measure_without_derivative_ends_the_descent() -> None:
    model = dead()
    before = values_of(model.variables)
    with pytest.warns(
        UserWarning, match="^It ended there, since no weight had an influence on the measure in 3 rounds"
    ):
        result = stabilize(model, PROBE, verbose=0)
    assert not result.converged
    assert result.history["updates"][-1] < 20
    assert len(result.notes) == 1
    assert_equal(values_of(model.variables), before)
