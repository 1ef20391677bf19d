"""Layers with a loop of their own, measured by the recurrence that is registered for them."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from event_files import read_summaries
from helpers import MEASURES, QUICK, RTOL, WeightedCell, assert_layer, normal, randomize
from recurrences import LOOPS, ConvolutionSSM, MinGRU, ScanRNN, jacobians_by_hand, of_min_gru, of_scan_rnn

from keras_jacmon import JacobianMeter, JacobianRegularizer, Recurrence, explain, measure, register_recurrence
from keras_jacmon.cell.outputs import OutputDifferences
from keras_jacmon.dashboard.metadata import TAG
from keras_jacmon.events.writer import EventWriter
from keras_jacmon.model.layers import find_recurrent_layers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

L = keras.layers
BATCH, STEPS, FEATURES, UNITS = 3, 5, 2, 3
PROBE = normal(BATCH, STEPS, FEATURES, seed=3)
TIMED = {"x": PROBE, "spans": np.abs(normal(BATCH, STEPS, 1, seed=4)), "context": normal(BATCH, UNITS, seed=5)}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    types = {loop.make: loop.adapter for loop in LOOPS}
    for layer, adapter in types.items():
        register_recurrence(layer, adapter)
    yield
    for layer in types:
        register_recurrence(layer, None)


def sequential(*layers: Any) -> Any:
    keras.utils.set_random_seed(4)
    model = keras.Sequential([keras.Input((STEPS, FEATURES)), *layers])
    randomize(model)
    return model


def all_loops() -> tuple[Any, list[Any]]:
    """A model with each loop, side by side, and its layers."""
    keras.utils.set_random_seed(4)
    inputs = {name: keras.Input(array.shape[1:], name=name) for name, array in TIMED.items()}
    layers = [loop.make(UNITS, name=loop.id) for loop in LOOPS]
    outputs = [layer(inputs if layer.name == "timed_rnn" else inputs["x"]) for layer in layers]
    model = keras.Model(inputs, [keras.tree.flatten(output)[0] for output in outputs])
    randomize(model)
    return model, layers


def test_each_recurrence_is_measured_as_a_cell_is() -> None:
    model, layers = all_loops()
    keys = ["variance", "joint/variance"]
    meter = JacobianMeter(model, TIMED, measures=keys)
    report = meter()
    assert set(report.layers) == {loop.id for loop in LOOPS}
    for loop, layer in zip(LOOPS, layers, strict=True):
        inputs = TIMED if loop.id == "timed_rnn" else PROBE
        recurrence = loop.adapter(layer, keras.tree.map_structure(tf.constant, inputs))
        found = report[loop.id]
        J = jacobians_by_hand(recurrence)
        n = found.units
        views = {"": J[:, :, :n, :n]} | ({"joint/": J} if found.joint else {})
        assert set(found.values) == {f"{view}variance" for view in views}
        for key, values in found.values.items():
            view, _, name = key.rpartition("/")
            expected = MEASURES[name](views[f"{view}/" if view else ""])
            np.testing.assert_allclose(values, expected, rtol=RTOL[name], atol=1e-6, err_msg=f"{loop.id} {key}")
        assert found.cell == type(layer).__name__
    methods = {choice.how.value for views in meter.choices.values() for choice in views["hidden"]}
    assert methods == {"structure"}
    # A diagonal costs as much as a forward pass.
    for name in ("min_gru", "convolution_ssm"):
        assert [choice.why for choice in meter.choices[name]["hidden"]] == ["a diagonal"]


@pytest.mark.parametrize("go_backwards", [False, True])
def test_the_gradient_of_the_loss_by_the_states_is_that_of_a_loop(go_backwards: bool) -> None:  # noqa: FBT001 - a parameter of the test
    layer = Directed(UNITS, go_backwards=go_backwards, name="loop")
    register_recurrence(layer, of_directed)
    model = sequential(layer, L.Dense(1))
    model.compile("sgd", "mse")
    targets = normal(BATCH, STEPS, 1, seed=6)
    found = JacobianMeter(model, PROBE, targets=targets, measures="variance")()["loop"]["loss_gradient"]
    with tf.GradientTape() as tape:
        zeros, h, outputs = [tf.zeros((BATCH, UNITS)) for _ in range(STEPS)], tf.zeros((BATCH, UNITS)), []
        tape.watch(zeros)
        order = range(STEPS)[::-1] if go_backwards else range(STEPS)
        for t in order:
            z, c = layer.gates(PROBE[:, t])
            h = (1 - z) * h + z * c + zeros[t]
            outputs.append(h)
        loss = model.compute_loss(PROBE, targets, model.layers[-1](tf.stack(outputs, axis=1)))
    expected = [BATCH * np.linalg.norm(gradient, axis=-1) for gradient in tape.gradient(loss, zeros)]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-4)


@pytest.mark.soak
def test_half_precision_is_measured_in_single_precision() -> None:
    def made(policy: str) -> Any:
        layers = [MinGRU(UNITS, name="gru", dtype=policy), ConvolutionSSM(UNITS, name="ssm", dtype=policy)]
        return measure(sequential(*layers), PROBE, measures="variance")

    half, single = made("mixed_float16"), made("float32")
    for name in ("gru", "ssm"):
        np.testing.assert_allclose(half[name].mean("variance"), single[name].mean("variance"), rtol=1e-3)


class NestedCell(WeightedCell):
    """A cell of `keras.layers.RNN` whose states are nested."""

    def __init__(self) -> None:
        super().__init__(UNITS)
        self.state_size = [UNITS, UNITS]

    def get_initial_state(self, batch_size: int | None = None) -> list[Any]:
        return [{"fast": tf.zeros((batch_size, UNITS))}, [tf.ones((batch_size, UNITS))]]

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        h, m = states[0]["fast"], states[1][0]
        new = tf.tanh(self.preactivation(inputs, h) + m)
        return new, [{"fast": new}, [0.5 * m + h]]


def test_nested_states_of_a_cell() -> None:
    layer = L.RNN(NestedCell(), name="rnn")
    assert_layer(measure(sequential(layer), PROBE, measures=QUICK)["rnn"], layer, PROBE, measures=QUICK)


# What is refused -----------------------------------------------------------------------------------------------------


def wrong_decay(layer: Any, x: Any) -> Recurrence:
    right = of_min_gru(layer, x)

    def step(x: Any, states: Any) -> Any:
        h, _ = right.step(x, [0.5 * states[0]])
        return h, [h]

    return Recurrence(x, right.states, step)


def no_step(_: Any, states: Any) -> Any:
    return states[0], states


BEFORE = "The Jacobians of layer `loop` (MinGRU) cannot be taken; name the other layers in `layers` to leave it out."
REASON = f"{BEFORE} The reason:"
UNUSABLE = "Layer `loop`: the recurrence that is registered for it cannot be used:"
REFUSED = {
    "another_decay": (
        wrong_decay,
        (
            f"{REASON} the outputs of the steps of its registered recurrence are not what the layer returned on the "
            "probe. The first step that differs is step 1, counted from 0, by 0.64 of the largest value there; "
            "expected at most 0.00035"
        ),
    ),
    "other_outputs": (
        lambda layer, x: Recurrence(x, [layer.zeros(x)], lambda x, s: (x, s)),
        (
            f"{REASON} the steps of its registered recurrence have outputs of shape (batch, 2), and the layer returned "
            "a tensor of shape (3, 5, 3). Expected the outputs of all steps side by side, or of the last one"
        ),
    ),
    "another_number_of_states": (
        lambda layer, x: Recurrence(x, [layer.zeros(x)], lambda _, s: (s[0], [*s, *s])),
        f"{REASON} Its step was given 1 state tensors and returned 2. Expected as many new states as old ones",
    ),
    "an_adapter_that_raises": (
        lambda layer, _: layer.missing,
        f"{UNUSABLE} 'MinGRU' object has no attribute 'missing'.",
    ),
    "a_tuple": (
        lambda layer, x: (x, [layer.zeros(x)], no_step),
        f"{UNUSABLE} it returned an object of type tuple, not a `Recurrence`.",
    ),
    "no_states": (
        lambda _, x: Recurrence(x, [], no_step),
        f"{UNUSABLE} the `states` of its recurrence hold no tensor.",
    ),
    "states_of_several_types": (
        lambda layer, x: Recurrence(x, [layer.zeros(x), tf.cast(layer.zeros(x), tf.float64)], no_step),
        f"{UNUSABLE} expected states of one floating-point type, and received float32 and float64: cast them to one.",
    ),
    "inputs_of_one_step": (
        lambda layer, x: Recurrence(x[:, 0, 0], [layer.zeros(x)], no_step),
        (
            f"{UNUSABLE} expected inputs `(batch, time, ...)`, states `(batch, ...)` and a mask `(batch, time)`, and "
            "received inputs of shapes [(3,)], states of shapes [(3, 3)], no mask."
        ),
    ),
}


def test_what_is_no_recurrence_of_the_layer_is_refused() -> None:
    layer = MinGRU(UNITS, name="loop")
    inputs = keras.Input((STEPS, FEATURES))
    model = keras.Model(inputs, layer(inputs), name="model")
    randomize(model)
    refused = {}
    for name, (adapter, _) in REFUSED.items():
        register_recurrence(layer, adapter)
        with pytest.raises(ValueError, match="loop") as caught:
            measure(model, PROBE, measures="variance")
        refused[name] = str(caught.value)
    nothing = "No recurrent layer of the model `model` can be measured. "
    assert {name: sentence.removeprefix(nothing) for name, sentence in refused.items()} == {
        name: sentence for name, (_, sentence) in REFUSED.items()
    }


@pytest.mark.fast
@pytest.mark.parametrize(
    ("relative", "first"),
    [
        ([1e-7, 1e-6, 2e-5, 4e-4, 8e-3], None),
        ([1e-7, 1e-6, 2e-5, 4e-3, 8e-2], 3),
        ([1e-7, float("inf"), 0.0], 1),
        ([0.1], 0),
    ],
)
def test_rounding_may_grow_and_an_error_may_not_appear(relative: list[float], first: int | None) -> None:
    said = OutputDifferences(tf.constant(relative), tf.constant(3.5e-4)).sentence()
    assert said is None if first is None else f"is step {first}, counted from 0" in str(said)


def test_arguments_of_the_registration_are_checked() -> None:
    with pytest.raises(ValueError, match=re.escape("Expected a class of Keras layers, or a layer. Received: layer=3")):
        register_recurrence(3, of_min_gru)
    expected = "Expected a function that returns a `keras_jacmon.Recurrence`, or None. Received: adapter='scan'"
    with pytest.raises(ValueError, match=re.escape(expected)):
        register_recurrence(MinGRU, "scan")  # type: ignore[arg-type]


def test_an_adapter_that_is_wrong_with_later_weights_only_is_noticed_then() -> None:
    def without_bias(layer: Any, x: Any) -> Recurrence:
        def step(x: Any, states: Any) -> Any:
            z = tf.sigmoid(x @ tf.convert_to_tensor(layer.kernel))
            h = (1 - z) * states[0] + z * layer.gates(x)[1]
            return h, [h]

        return Recurrence(x, [layer.zeros(x)], step)

    layer = MinGRU(UNITS, name="loop")
    model = sequential(layer)
    layer.vector.assign(np.zeros(UNITS))
    register_recurrence(layer, without_bias)
    meter = JacobianMeter(model, PROBE, measures="variance")
    assert np.isfinite(meter()["loop"]["variance"]).all()
    layer.vector.assign(np.ones(UNITS))
    with pytest.raises(ValueError, match="The first step that differs is step 0"):
        meter()
    with pytest.raises(ValueError, match=r"`loop` cannot be regularized.*The first step that differs is step 0"):
        JacobianRegularizer(1.0, 1.0).attached(model, PROBE).__enter__()


# Where they are found ------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable()
class Directed(MinGRU):
    """Runs in either direction, as `Bidirectional` asks of its layers."""

    def __init__(self, units: int = 3, *, go_backwards: bool = False, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self.go_backwards, self.return_sequences, self.return_state, self.stateful = go_backwards, True, False, False

    def call(self, x: Any, **_: Any) -> Any:
        return super().call(x[:, ::-1] if self.go_backwards else x)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"units": self.units, "go_backwards": self.go_backwards}


def of_directed(layer: Any, x: Any) -> Recurrence:
    return dataclasses.replace(of_min_gru(layer, x), go_backwards=layer.go_backwards)


def test_they_are_found_in_wrappers_and_nested_models_and_by_their_exact_class() -> None:
    def names() -> set[str]:
        return {item.name for item in find_recurrent_layers(model)}

    inner = keras.Sequential([keras.Input((STEPS, 2 * UNITS)), MinGRU(UNITS, name="deep")], name="inner")
    both = L.Bidirectional(Directed(UNITS, name="gru"), name="both")
    model = sequential(both, inner, Directed(UNITS, name="subclass"))
    assert names() == {"inner/deep"}
    for layer in (both.forward_layer, both.backward_layer):
        register_recurrence(layer, of_directed)
    assert names() == {"both/forward_gru", "both/backward_gru", "inner/deep"}
    report = measure(model, PROBE, measures="variance", layers=["both/forward_gru", "both/backward_gru"])
    for name, layer in (("forward", both.forward_layer), ("backward", both.backward_layer)):
        z, _ = layer.gates(PROBE)
        expected = MEASURES["variance"](tf.linalg.diag(1 - tf.transpose(z, [1, 0, 2])).numpy())
        np.testing.assert_allclose(report[f"both/{name}_gru"]["variance"], expected, rtol=1e-5)
    register_recurrence(both.forward_layer, None)
    register_recurrence(MinGRU, None)
    assert names() == {"both/backward_gru"}


def test_a_mask_of_the_recurrence_skips_steps() -> None:
    layer = ScanRNN(UNITS, name="loop")
    model = sequential(L.Masking(), layer)
    probe = PROBE.copy()
    probe[0, 3:] = 0
    report = measure(model, probe, measures="variance")["loop"]
    mask = np.any(probe != 0, axis=-1)
    np.testing.assert_array_equal(report.mask, mask.T)
    J = jacobians_by_hand(of_scan_rnn(layer, tf.constant(probe), tf.constant(mask)))
    np.testing.assert_allclose(report["variance"], MEASURES["variance"](J), rtol=1e-5)


class Frozen(keras.layers.Layer):
    """Holds a cell of Keras, and steps it where nothing sees it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inner = L.GRUCell(UNITS)

    def build(self, shape: Any) -> None:
        self.inner.build((shape[0], shape[-1]))

    def call(self, x: Any) -> Any:
        return self.inner(x[:, 0], [tf.zeros((tf.shape(x)[0], UNITS))])[0][:, None]


class TinyMamba(keras.layers.Dense):
    """Only its name says that it is recurrent."""


def test_layers_that_look_recurrent_are_named_where_none_is_measured() -> None:
    frozen = Frozen(name="frozen")
    loops = [ScanRNN(UNITS, name="scan"), L.Reshape((1, UNITS)), frozen, TinyMamba(2, name="m")]
    model = sequential(*loops)
    register_recurrence(ScanRNN, None)
    with pytest.raises(ValueError, match="look recurrent") as caught:
        measure(model, PROBE)
    _, _, hint = str(caught.value).partition("'TinyMamba']. ")
    assert hint == (
        "These layers look recurrent: `scan` (ScanRNN, since its code uses `scan`); `frozen` (Frozen, since it holds "
        f"the cell `{frozen.inner.name}`); `m` (TinyMamba, since its name says so). Register the recurrence of a layer "
        "to have it measured:\n\n"
        "    def recurrence(layer, x):  # step(inputs_t, states) -> (output_t, new_states)\n"
        "        return keras_jacmon.Recurrence(inputs=x, states=[initial_state], step=step)\n"
        "    keras_jacmon.register_recurrence(ScanRNN, recurrence)\n"
    )


def test_its_report_goes_where_that_of_a_cell_goes(tmp_path: Path) -> None:
    model = sequential(MinGRU(UNITS, name="gru"))
    report = measure(model, PROBE, measures=["variance", "flow", "growth"])
    writer = EventWriter(tmp_path / "logs")
    writer.write(report, 0)
    writer.close()
    tags = {summary.tag for summary in read_summaries(tmp_path / "logs")}
    assert {"gru/variance", "gru/growth"} <= tags
    assert any(tag.startswith("gru/") and tag.endswith(TAG) for tag in tags)
    report.to_html(tmp_path / "page.html")
    assert "MinGRU" in (tmp_path / "page.html").read_text("utf-8")
    assert report.verdict["gru"].growth == pytest.approx(report["gru"].scalars()["growth"])
    assert "a diagonal" in str(explain(model, PROBE))


# In a training -------------------------------------------------------------------------------------------------------


def test_the_penalty_moves_the_weights_of_the_layer() -> None:
    """The mean of `(n Var(diag(1 - z)) - target)²` by hand, and its gradient."""
    layer = MinGRU(UNITS, name="loop")
    model = sequential(layer)
    model.compile("sgd", "mse")
    with (
        JacobianRegularizer(2.0, 1.0, rows=BATCH * STEPS).attached(model, PROBE),
        tf.GradientTape(persistent=True) as tape,
    ):
        penalty = tf.add_n(model.losses)
        z, _ = layer.gates(tf.constant(PROBE))
        J = tf.linalg.diag(1 - z)
        expected = tf.reduce_mean((UNITS * tf.math.reduce_variance(J, axis=(2, 3)) - 2.0) ** 2)
    np.testing.assert_allclose(penalty, expected, rtol=1e-5)
    for weight in (layer.kernel.value, layer.vector.value):
        np.testing.assert_allclose(
            tape.gradient(penalty, weight), tape.gradient(expected, weight), rtol=1e-4, atol=1e-6
        )
