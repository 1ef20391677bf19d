"""Weights that start at a chosen size of the Jacobians: what changes, what stays, and what is refused."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import keras
import numpy as np
import pytest
from helpers import WeightedCell, normal, randomize, reference_jacobians
from trainings import Stops, assert_equal, values_of

from keras_jacmon import Report, stabilize
from keras_jacmon.stabilization.best_weights import BestWeights
from keras_jacmon.stabilization.goals import Standing

STEPS, FEATURES, UNITS = 5, 3, 4
PROBE = normal(4, STEPS, FEATURES, seed=3)
ADAM = {"class_name": "Adam", "config": {"learning_rate": 0.03}}


def quick(model: Any, optimizer: Any = ADAM, **arguments: Any) -> Any:
    """Stabilize by gradient, with steps that are large enough for few units."""
    return stabilize(model, PROBE, **({"optimizer": optimizer, "verbose": 0} | arguments))


def stack(*layers: Any) -> Any:
    keras.utils.set_random_seed(4)
    model = keras.Sequential([keras.Input((STEPS, FEATURES)), *layers])
    randomize(model)
    return model


def simple(name: str = "rnn", **arguments: Any) -> Any:
    return keras.layers.SimpleRNN(UNITS, return_sequences=True, name=name, **arguments)


def random_state() -> Any:
    """NumPy's global state, which users of Keras draw from."""
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - theirs
    return state["state"]["key"]


def mean_radius(layer: Any) -> float:
    J = reference_jacobians(layer, PROBE)["hidden"]
    return float(np.mean(np.abs(np.linalg.eigvals(J)).max(axis=-1)))


def test_gradient_reaches_the_target_and_changes_nothing_else(capsys: Any) -> None:
    frozen = keras.layers.GRU(UNITS, return_sequences=True, name="gru", trainable=False)
    lstm = keras.layers.LSTM(UNITS, return_sequences=True, stateful=True, recurrent_dropout=0.5, name="lstm")
    others = [keras.layers.Dropout(0.5), keras.layers.BatchNormalization(), frozen, keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input(batch_shape=PROBE.shape), lstm, *others])
    randomize(model)
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    # Random numbers, states and averages that are not those of a new model.
    model(PROBE, training=True)
    held = [
        v for v in (*model.variables, *model.optimizer.variables) if all(v is not w for w in lstm.trainable_weights)
    ]
    held_before, random_before = values_of(held), random_state()
    capsys.readouterr()
    with pytest.warns(UserWarning, match=r"The layers \['gru'\] have no weight that is trained, and stay as they are"):
        result = quick(model, verbose=1)
    assert_equal(values_of(held), held_before)
    np.testing.assert_array_equal(random_state(), random_before)
    assert result.converged
    # By default three checks in a row end it.
    radii = np.array(result.history["lstm/joint/spectral_radius"])
    assert (np.abs(radii - 1) <= 0.08)[-4:].tolist() == [False, True, True, True]
    before, after = (report["lstm"].mean("joint/spectral_radius") for report in (result.before, result.after))
    assert abs(before - 1) > 0.08 >= abs(after - 1)

    assert list(result.history) == ["updates", "loss", "lstm/joint/spectral_radius"]
    assert result.history["updates"][:3] == [0, 5, 10]
    assert result.history["lstm/joint/spectral_radius"][0] == before
    assert set(result.after) == {"lstm", "gru"}
    assert f"lstm/joint/spectral_radius: {before:.3g} -> {after:.3g}, target 1 (time)" in str(result)
    assert "loss" in capsys.readouterr().out


def test_time_and_depth_have_targets_of_their_own() -> None:
    target = {"time": 0.7, "depth": 0.5}
    model = stack(simple("below"), simple("above"))
    result = quick(model, target=target, steps=200)
    assert result.converged
    assert [(goal.name, goal.direction) for goal in result.goals] == [
        ("below/spectral_radius", "time"),
        ("above/spectral_radius", "time"),
        ("above/inputs/spectral_radius", "depth"),
    ]
    below, above = model.layers
    assert abs(mean_radius(below) - 0.7) < 0.08
    by_inputs = reference_jacobians(above, np.asarray(below(PROBE)), by_inputs=True)["inputs"]
    assert abs(np.mean(np.abs(np.linalg.eigvals(by_inputs)).max(axis=-1)) - 0.5) < 0.08
    # What is reached already stays as it is.
    reached = values_of(model.variables)
    assert quick(model, target=target).history["updates"] == [0]
    assert_equal(values_of(model.variables), reached)


@pytest.mark.parametrize("measure", ["variance", "spectral_radius"])
def test_rescale_multiplies_the_recurrent_kernels_and_nothing_else(measure: Any) -> None:
    layer = simple(activation="tanh")
    model = stack(layer)
    kernel, recurrent, bias = values_of(layer.weights)
    arguments: dict[str, Any] = {"measure": measure, "method": "rescale"}
    stabilize(model, PROBE, 1.0, steps=1, verbose=0, **arguments)
    once = values_of(layer.weights)
    layer.set_weights([kernel, recurrent, bias])
    with pytest.raises(KeyboardInterrupt), contextlib.redirect_stdout(Stops("1/20")):
        stabilize(model, PROBE, 1.0, **arguments)
    assert_equal(values_of(layer.weights), once)
    layer.set_weights([kernel, recurrent, bias])
    result = stabilize(model, PROBE, 1.0, measure, "rescale", verbose=0)
    assert result.converged
    assert result.history["updates"][-1] < 10
    assert_equal(values_of(layer.weights)[::2], [kernel, bias])
    ratio = layer.weights[1].numpy() / recurrent
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)
    assert abs(result.after["rnn"].mean(measure) - 1) < 0.08
    if measure == "spectral_radius":
        np.testing.assert_allclose(mean_radius(layer), result.after["rnn"].mean(measure), rtol=1e-4)


def test_rescale_multiplies_each_gate_by_a_number_of_its_own() -> None:
    layer = keras.layers.GRU(UNITS, name="rnn")
    model = stack(layer)
    kernel, recurrent, bias = values_of(layer.weights)
    result = stabilize(model, PROBE, 0.9, method="rescale", tolerance=0.02, verbose=0)
    assert result.converged
    assert_equal(values_of(layer.weights)[::2], [kernel, bias])
    ratios = np.split(layer.weights[1].numpy() / recurrent, 3, axis=1)
    for ratio in ratios:
        np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)
    gains = [float(ratio[0, 0]) for ratio in ratios]
    assert min(abs(np.diff(gains))) > 1e-3
    np.testing.assert_allclose(mean_radius(layer), result.after["rnn"].mean("spectral_radius"), rtol=1e-4)
    # The gate that keeps the state does so without a kernel too.
    layer.cell.recurrent_kernel.constraint = keras.constraints.MaxNorm(2.5)
    assert len(stabilize(model, PROBE, 1.5, method="rescale", steps=2, verbose=0).history["loss"]) == 3
    assert np.linalg.norm(layer.weights[1], axis=0).max() == pytest.approx(2.5)
    reached = values_of(model.variables)
    with pytest.warns(UserWarning, match=r"^`rnn` stays as it is: with a `recurrent_kernel` of zeros its spectral_ra"):
        result = stabilize(model, PROBE, 0.2, method="rescale", verbose=0)
    assert_equal(values_of(model.variables), reached)
    assert (result.converged, result.history["updates"]) == (False, [0])
    (note,) = result.notes
    assert str(result).startswith("not every layer is within the tolerance")
    assert str(result).endswith(note)


def test_a_padded_probe_in_half_precision_is_the_probe_without_the_padding() -> None:
    found = []
    for steps in (STEPS, 2 * STEPS):
        keras.utils.set_random_seed(4)
        layer = simple(dtype="mixed_float16")
        model = keras.Sequential([keras.Input((None, FEATURES)), keras.layers.Masking(), layer])
        randomize(model)
        padded = np.pad(PROBE, [(0, 0), (0, steps - STEPS), (0, 0)])
        assert stabilize(model, padded, method="rescale", verbose=0).converged
        assert layer.weights[1].dtype == "float32"
        found.append(layer.weights[1].numpy())
    np.testing.assert_allclose(found[0], found[1], rtol=1e-2)
    with pytest.raises(ValueError, match=r"steps that are not masked. Received: .* masked throughout .* \['rnn'\]"):
        stabilize(model, 0 * padded, verbose=0)


@pytest.mark.parametrize("dtype", ["mixed_float16", pytest.param("mixed_bfloat16", marks=pytest.mark.soak)])
def test_gradient_in_half_precision_reaches_the_target_of_single_precision(dtype: str) -> None:
    layer, single = simple(dtype=dtype), simple()
    model = stack(layer)
    # As Keras gives it to a model that is compiled.
    result = quick(model, keras.optimizers.LossScaleOptimizer(keras.optimizers.get(ADAM)))
    assert result.converged
    before, after = (report["rnn"].mean("spectral_radius") for report in (result.before, result.after))
    assert abs(before - 1) > 0.08
    assert {weight.dtype for weight in layer.weights} == {"float32"}
    stack(single)
    single.set_weights(layer.get_weights())
    np.testing.assert_allclose(mean_radius(single), after, rtol=0.02)


@pytest.mark.parametrize(("measure", "view"), [("rms_singular_value", "hidden"), ("spectral_norm", "joint")])
def test_the_singular_values_of_the_chosen_view_are_brought_to_a_target(measure: str, view: str) -> None:
    layer = keras.layers.LSTM(UNITS, return_sequences=True, name="rnn")
    model = stack(layer)
    result = quick(model, target=0.7, measure=measure, view=view, tolerance=0.03, patience=1)
    assert result.converged
    values = np.linalg.svd(reference_jacobians(layer, PROBE)[view], compute_uv=False)
    sizes = values.max(axis=-1) if measure == "spectral_norm" else np.sqrt(np.mean(values**2, axis=-1))
    np.testing.assert_allclose(
        result.after["rnn"].mean(f"{view}/{measure}".removeprefix("hidden/")), np.mean(sizes), rtol=0.01
    )
    assert abs(np.mean(sizes) - 0.7) < 0.035


def test_the_growth_is_brought_to_its_target_by_gradient() -> None:
    result = quick(stack(simple()), optimizer=None, measure="growth", target=-0.1, tolerance=0.03, patience=1)
    assert result.converged
    before, after = (report["rnn"].mean("growth") for report in (result.before, result.after))
    assert abs(before + 0.1) > 0.03 >= abs(after + 0.1)


def test_an_interrupted_run_leaves_the_best_weights() -> None:
    model = stack(simple())
    before = values_of(model.variables)
    result = quick(model, steps=10, optimizer=keras.optimizers.SGD(0.01))
    best = values_of(model.variables)
    assert 0 < result.history["loss"][1] < result.history["loss"][0]
    for weight, value in zip(model.variables, before, strict=True):
        weight.assign(value)
    # After ten updates the weights become worse by far.
    rates = keras.optimizers.schedules.PiecewiseConstantDecay([9], [0.01, 100.0])
    with pytest.raises(KeyboardInterrupt), contextlib.redirect_stdout(Stops("15/15")):
        quick(model, steps=15, optimizer=keras.optimizers.SGD(rates), verbose=1)
    # The same seed has found the same weights.
    assert_equal(values_of(model.variables), best)
    # After weights that are no numbers no update follows.
    result = quick(model, steps=100, optimizer=keras.optimizers.SGD(math.inf))
    assert result.history["updates"] == [0, 5]
    assert result.notes == ("It ended there, since a weight was no finite number after 5 updates.",)
    assert_equal(values_of(model.variables), best)


class PressedOnce(keras.Variable):
    """Is where the user presses Ctrl+C, while its value is assigned for the first time."""

    presses = 0

    def assign(self, value: Any) -> Any:
        self.presses += 1
        if self.presses == 2:
            raise KeyboardInterrupt
        return super().assign(value)


@pytest.mark.fast
def test_an_interrupt_while_the_best_weights_are_put_back_leaves_none_behind() -> None:
    weights = [keras.Variable([1.0]), PressedOnce([2.0]), keras.Variable([3.0])]
    best = BestWeights(weights, Standing(1.0, {}, is_within=False, report=Report({})))
    for weight in weights:
        weight.assign([9.0])
    with pytest.raises(KeyboardInterrupt):
        best.put_back()
    assert [float(weight[0]) for weight in weights] == [1.0, 2.0, 3.0]


def test_the_best_weights_are_never_worse_than_the_first_ones() -> None:
    def standing(loss: float, *, is_within: bool = False) -> Standing:
        return Standing(loss, {}, is_within, Report({}))

    weight = keras.Variable([0.0])
    best = BestWeights([weight], standing(1.0))
    offers = [standing(0.5), standing(0.9, is_within=True), standing(0.2), standing(1.1, is_within=True)]
    for number, offer in enumerate([standing(math.inf), *offers]):
        weight.assign([number])
        best.offer(offer)
    best.put_back()
    assert weight.numpy() == 2
    assert best.standing.loss == 0.9


class OneKernel(WeightedCell):
    """A cell whose kernels have other names than those of Keras."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.kernel = self.add_weight(shape=(input_shape[-1], self.units), name="V")
        self.recurrent_kernel = self.add_weight(shape=(self.units, self.units), name="U")

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        new = keras.ops.tanh(self.preactivation(inputs, states[0]))
        return new, [new]


def test_what_cannot_be_done_is_said() -> None:
    model = stack(keras.layers.RNN(OneKernel(UNITS), name="own"))
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"target": "one"}, 'a finite number, or a dict of numbers for "time", "depth" or both. Received: target='),
        ({"target": {"height": 1.0}}, "Received: target={'height': 1.0}"),
        ({"target": -1}, "a number of at least 0, as the measure `spectral_radius` has. Received: target=-1"),
        ({"measure": "loss"}, "Expected one of ['spectral_radius', 'variance', 'rms_singular_value', 'spectral_norm',"),
        ({"method": "magic"}, "Expected one of ['gradient', 'rescale', 'flossing']"),
        *(({"view": view}, "one of ['hidden', 'joint'], or chosen st") for view in ("inputs", 5, (), ["hidden"])),
        ({"verbose": "auto"}, "Expected 0 or 1. Received: verbose='auto'"),
        ({"optimizer": "adamant"}, "Expected a Keras optimizer, or its name or configuration. Received: 'adamant'"),
        ({"optimizer": "adam", "method": "rescale"}, 'Expected None for the method "rescale", which needs none'),
        ({"tolerance": 0}, "Expected a number above 0"),
        ({"steps": -1}, "Expected an integer of at least 0"),
        ({"target": {"depth": 1.0}}, "a layer needs as many inputs as it has units. Received: 'depth'"),
        ({"method": "rescale"}, "that is named `recurrent_kernel`. Received: 'rescale' for `own`"),
    ]
    for arguments, message in refusals:
        with pytest.raises(ValueError, match="Invalid value for argument") as caught:
            stabilize(model, PROBE, **({"verbose": 0} | arguments))
        assert message in str(caught.value)
    weight = model.layers[0].cell.kernel
    value = weight.numpy()
    weight.assign(np.nan * value)
    with pytest.raises(ValueError, match=r"finite weights. Received: NaN or Inf in the layers \['own'\]"):
        stabilize(model, PROBE, verbose=0)
    weight.assign(value)
    model.trainable = False
    with pytest.raises(ValueError, match=r"a weight that is trained. Received: \['own'\]"):
        stabilize(model, PROBE, verbose=0)
