"""The recurrent layers that are found in models of all kinds, each measured as if it stood alone."""

from __future__ import annotations

from typing import Any

import keras
import pytest
from helpers import BATCH, FEATURES, QUICK, STEPS, UserLSTM, assert_layer, build, normal, sequential

from keras_jacmon import Report, measure

L = keras.layers
PROBE = normal(BATCH, STEPS, FEATURES, seed=3)


@pytest.mark.parametrize(
    "make", [L.LSTM, *(pytest.param(make, marks=pytest.mark.soak) for make in (L.SimpleRNN, L.GRU))]
)
def test_both_directions_are_layers_of_their_own(make: Any) -> None:
    wrapper = L.Bidirectional(make(3, return_sequences=True, name="rnn"), name="both")
    model = sequential([wrapper])
    report = measure(model, PROBE, measures=QUICK)
    assert set(report.layers) == {"both/forward_rnn", "both/backward_rnn"}
    assert_layer(report["both/forward_rnn"], wrapper.forward_layer, PROBE, measures=QUICK)
    assert_layer(report["both/backward_rnn"], wrapper.backward_layer, PROBE, measures=QUICK)


@pytest.mark.fast
def test_a_layer_called_twice_has_two_entries() -> None:
    layer = L.LSTM(4, return_sequences=True, name="shared")
    report = assert_called_twice(layer, layer, "shared")
    assert {"shared_jac_variance", "shared_1_jac_variance"} <= set(report.scalars())


class Forecast(keras.Model):
    """Warms up on the sequence, and then feeds its own output to the cell."""

    def __init__(self, *, steps: int) -> None:
        super().__init__()
        self.cell = L.GRUCell(FEATURES)
        self.rnn = L.RNN(self.cell, return_state=True, name="rnn")
        self.steps = steps

    def call(self, inputs: Any) -> Any:
        output, state = self.rnn(inputs)
        for _ in range(self.steps):
            output, (state,) = self.cell(output, [state])
        return output


@pytest.mark.fast
def test_steps_by_hand_beside_a_layer_are_said_to_be_left_out() -> None:
    note = "the model also calls its cell outside of the layer; these steps are not measured"
    model = Forecast(steps=2)
    with pytest.warns(UserWarning, match=f"Layer `rnn`: {note}"):
        report = measure(model, PROBE, measures="variance")
    assert report["rnn"].notes == (note,)
    assert "call" not in vars(model.cell)
    assert measure(Forecast(steps=0), PROBE, measures="variance")["rnn"].notes == ()


def test_a_model_called_twice_has_its_layers_twice() -> None:
    layer = L.GRU(4, return_sequences=True, name="gru")
    inner = keras.Sequential([keras.Input((STEPS, 4)), layer], name="inner")
    assert_called_twice(inner, layer, "inner/gru")


def assert_called_twice(inner: Any, layer: Any, name: str) -> Report:
    """Of `inner(inner(x))`, where `layer` is what is recurrent in it, both calls are in the report."""
    inputs = keras.Input((STEPS, 4))
    model = keras.Model(inputs, inner(inner(inputs)))
    probe = normal(BATCH, STEPS, 4)
    build(model, probe)
    report = measure(model, probe, measures=QUICK)
    assert list(report.layers) == [name, f"{name}:1"]
    assert_layer(report[name], layer, probe, measures=QUICK)
    assert_layer(report[f"{name}:1"], layer, layer(probe), measures=QUICK)
    return report


@pytest.mark.fast
def test_nested_models() -> None:
    first, second, third = (L.GRU(4, return_sequences=True, name=name) for name in ("first", "second", "third"))
    inputs = keras.Input((STEPS, 4))
    deep = keras.Model(inputs, second(inputs), name="deep")
    inner = keras.Sequential([keras.Input((STEPS, FEATURES)), first, deep], name="inner")
    model = sequential([inner, third])
    report = measure(model, PROBE, measures=QUICK)
    # A functional model is built before it is nested, so Keras' paths of its layers do not name it.
    assert set(report.layers) == {"inner/first", "second", "third"}
    assert_layer(report["inner/first"], first, PROBE, measures=QUICK)
    assert_layer(report["second"], second, first(PROBE), measures=QUICK)
    assert_layer(report["third"], third, second(first(PROBE)), measures=QUICK)


class Block(keras.layers.Layer):
    """A custom layer that holds recurrent layers, one in an attribute and two in a list."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.first = L.LSTM(3, return_sequences=True, name="first")
        self.rest = [L.GRU(3, return_sequences=True, name=f"rest_{index}") for index in range(2)]

    def build(self, input_shape: Any) -> None:
        self.first.build(input_shape)
        for layer in self.rest:
            layer.build((*input_shape[:-1], 3))

    def call(self, inputs: Any) -> Any:
        x = self.first(inputs)
        for layer in self.rest:
            x = layer(x)
        return x


class Subclassed(keras.Model):
    """A model with a custom layer, a list, a dict, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__(name="subclassed")
        self.block = Block(name="block")
        self.listed = [L.SimpleRNN(3, return_sequences=True, name="listed")]
        self.keyed = {"last": L.LSTM(2, name="keyed")}
        self.unused = L.LSTM(2, name="unused")

    def build(self, input_shape: Any) -> None:
        self.block.build(input_shape)
        self.listed[0].build((*input_shape[:-1], 3))
        self.keyed["last"].build((*input_shape[:-1], 3))
        self.unused.build(input_shape)

    def call(self, inputs: Any) -> Any:
        return self.keyed["last"](self.listed[0](self.block(inputs)))


def test_subclassed_models_custom_layers_lists_and_dicts() -> None:
    model = build(Subclassed(), PROBE)
    with pytest.warns(UserWarning, match="`unused`"):
        report = measure(model, PROBE, measures=QUICK)
    assert {key.split("/")[-1] for key in report.layers} == {"first", "rest_0", "rest_1", "listed", "keyed"}
    x = PROBE
    for layer in [model.block.first, *model.block.rest, model.listed[0], model.keyed["last"]]:
        key = next(key for key in report.layers if key.split("/")[-1] == layer.name)
        assert not key.startswith("subclassed/")
        assert_layer(report[key], layer, x, measures=QUICK)
        x = layer(x)


def test_two_layers_of_the_same_name_are_both_there() -> None:
    class Twins(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.twins = [L.GRU(4, return_sequences=True, name="twin"), L.GRU(4, name="twin")]

        def call(self, inputs: Any) -> Any:
            return self.twins[1](self.twins[0](inputs))

    model = build(Twins(), PROBE)
    reports = list(measure(model, PROBE, measures=QUICK).layers.values())
    assert len(reports) == 2
    assert_layer(reports[0], model.twins[0], PROBE, measures=QUICK)
    assert_layer(reports[1], model.twins[1], model.twins[0](PROBE), measures=QUICK)


def test_a_subclass_of_a_layer_that_changes_its_inputs() -> None:
    layer = UserLSTM(4, name="user")
    model = sequential([layer])
    assert_layer(measure(model, PROBE, measures=QUICK)["user"], layer, 2.0 * PROBE, measures=QUICK)


def test_time_distributed_has_one_entry_per_call() -> None:
    layer = L.SimpleRNN(4, name="rnn")
    probe = normal(BATCH, 2, STEPS, FEATURES)
    model = sequential([L.TimeDistributed(layer, name="each")], probe.shape[1:])
    report = measure(model, probe, measures=QUICK)
    assert list(report.layers) == ["each/rnn", "each/rnn:1"]
    for index, actual in enumerate(report.layers.values()):
        assert_layer(actual, layer, probe[:, index], measures=QUICK)
