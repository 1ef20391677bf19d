"""What `measure` and `JacobianMeter` report, against the hand-written loop of `helpers`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    BATCH,
    BY_ID,
    CASES,
    FEATURES,
    KEYS,
    MEASURES,
    MOMENTS,
    STEPS,
    BareStateCell,
    Case,
    ReadoutFirstCell,
    SeedCell,
    StoppedCell,
    UserLSTM,
    WeightedCell,
    assert_layer,
    build,
    make_model,
    make_probe,
    normal,
    randomize,
    reference_jacobians,
    reference_values,
    variance,
)

from keras_jacmon import JacobianMeter, JacobianMonitor, Report, measure
from keras_jacmon.measurement import per_step as points
from keras_jacmon.measures import rows as rows_module
from keras_jacmon.options import Options

L = keras.layers
PROBE = normal(BATCH, STEPS, FEATURES, seed=3)
# Right-padded, left-padded, a hole, and a sample with nothing in it.
IDS = np.array([[1, 2, 3, 0, 0], [0, 0, 4, 5, 1], [2, 0, 6, 0, 3], [0, 0, 0, 0, 0]], np.int32)
MASK = IDS != 0
# Where a test is about what is measured and not about the measures, one of them will do.
QUICK = ("variance", "joint/variance")
HALF = {"variance": 5e-4, "rms_singular_value": 5e-4, "spectral_norm": 1e-2}


def functional(layers: list[Any], features: tuple[int, ...] = (STEPS, FEATURES)) -> Any:
    return build(keras.Sequential([keras.Input(features), *layers]), np.zeros((BATCH, *features), np.float32))


# Every cell ------------------------------------------------------------------------------------------


# The spectral norm rests on the same operator, whose laws hold for every cell (`test_autodiff.py`), and it is slow to
# trace: one cell of each kind.
WITH_SPECTRAL_NORM = {
    "simple_rnn",
    "lstm",
    "gru_reset_after",
    "conv_lstm_1d",
    "stacked_lstm_gru",
    "seed_cell",
    "map_fn",
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_cell_equals_the_loop(case: Case) -> None:
    probe = make_probe(case)
    model, layer = make_model(case, probe)
    measures = KEYS if case.id in WITH_SPECTRAL_NORM else MOMENTS
    report = measure(model, probe, measures=measures)
    assert list(report.layers) == [layer.name]
    assert_layer(report[layer.name], layer, probe, measures=measures)


@pytest.mark.parametrize("case_id", ["simple_rnn", "gru_reset_after", "stacked_lstm_gru", "seed_cell"])
def test_go_backwards_is_indexed_by_input_position(case_id: str) -> None:
    probe = make_probe(BY_ID[case_id])
    model, layer = make_model(BY_ID[case_id], probe, go_backwards=True, return_sequences=True)
    assert_layer(measure(model, probe, measures=KEYS)[layer.name], layer, probe)


@pytest.mark.parametrize("kwargs", [{"unroll": True}, {"return_sequences": True, "return_state": False}], ids=str)
def test_options_of_the_layer_change_nothing(kwargs: dict[str, bool]) -> None:
    model, layer = make_model(BY_ID["lstm"], PROBE, **kwargs)
    assert_layer(measure(model, PROBE, measures=KEYS)[layer.name], layer, PROBE)


@pytest.mark.parametrize(
    "cell",
    [SeedCell(4), L.SimpleRNNCell(4), L.StackedRNNCells([L.LSTMCell(3), L.GRUCell(2)])],
    ids=["seed_cell", "simple_rnn_cell", "stacked"],
)
@pytest.mark.filterwarnings("ignore:.*`build..` was called on layer")
def test_a_model_that_was_never_called_gets_its_weights(cell: Any) -> None:
    keras.utils.set_random_seed(1)
    layer = L.RNN(cell, name="rnn")
    model = keras.Sequential([keras.Input((STEPS, FEATURES)), layer])
    report = measure(model, PROBE, measures=KEYS)
    assert_layer(report["rnn"], layer, PROBE)


@pytest.mark.filterwarnings("ignore:.*`build..` was called on layer")
def test_a_sequential_model_without_input_is_built_from_the_probe() -> None:
    keras.utils.set_random_seed(1)
    layer = L.GRU(4, name="gru")
    model = keras.Sequential([layer, L.Dense(1)])
    report = measure(model, PROBE, measures=KEYS)
    assert_layer(report["gru"], layer, PROBE)


def test_a_single_step() -> None:
    model, layer = make_model(BY_ID["lstm"], PROBE[:, :1])
    report = measure(model, PROBE[:, :1])
    assert report[layer.name]["joint/variance"].shape == (1, BATCH)
    assert_layer(report[layer.name], layer, PROBE[:, :1])


def test_a_batch_of_one() -> None:
    model, layer = make_model(BY_ID["lstm"], PROBE)
    report = measure(model, PROBE[:1])
    assert report[layer.name]["joint/variance"].shape == (STEPS, 1)
    assert_layer(report[layer.name], layer, PROBE[:1])


@pytest.mark.parametrize("case_id", ["gru_reset_before", "partly_mixing", "while_loop"])
def test_a_single_step_of_a_single_sample(case_id: str) -> None:
    model, layer = make_model(BY_ID[case_id], PROBE[:1, :1])
    report = measure(model, PROBE[:1, :1], measures=MOMENTS)
    assert_layer(report[layer.name], layer, PROBE[:1, :1], measures=MOMENTS)


def test_an_lstm_that_mixes_its_units() -> None:
    layer = L.LSTM(4, activation="softmax", name="lstm")
    model = functional([layer])
    assert_layer(measure(model, PROBE, measures=KEYS)["lstm"], layer, PROBE)


def test_one_unit() -> None:
    layer = L.SimpleRNN(1, name="rnn")
    model = functional([layer])
    # A difference of two sums that are equal up to rounding.
    np.testing.assert_allclose(measure(model, PROBE, measures=KEYS)["rnn"]["variance"], 0.0, atol=1e-7)
    others = ["rms_singular_value", "spectral_norm"]
    assert_layer(measure(model, PROBE, measures=others)["rnn"], layer, PROBE, measures=others)


def test_a_length_unknown_to_the_model() -> None:
    layer = L.GRU(4, name="gru")
    model = build(keras.Sequential([keras.Input((None, FEATURES)), layer]), PROBE)
    assert_layer(measure(model, PROBE, measures=KEYS)["gru"], layer, PROBE)


# Masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case_id", ["simple_rnn", "lstm", "gru_reset_after", "stacked_lstm_gru", "seed_cell"])
def test_padded_steps_of_an_embedding_are_left_out(case_id: str) -> None:
    go_backwards = case_id in ("simple_rnn", "lstm")
    keras.utils.set_random_seed(1)
    embedding, layer = L.Embedding(8, FEATURES, mask_zero=True), BY_ID[case_id].make(go_backwards=go_backwards)
    inputs = keras.Input(IDS.shape[1:], dtype="int32")
    if case_id == "seed_cell":
        with pytest.warns(UserWarning, match="`build"):
            model = keras.Model(inputs, layer(embedding(inputs)))
    else:
        model = keras.Model(inputs, layer(embedding(inputs)))
    build(model, IDS)
    assert_layer(measure(model, IDS, measures=QUICK)[layer.name], layer, embedding(IDS), mask=MASK, measures=QUICK)


def test_padded_steps_of_a_masking_layer_are_left_out() -> None:
    probe = np.where(MASK[..., None], normal(*MASK.shape, FEATURES), -1.0).astype(np.float32)
    layer = L.GRU(4, name="gru")
    model = functional([L.Masking(-1.0), layer], (MASK.shape[1], FEATURES))
    assert_layer(measure(model, probe, measures=QUICK)["gru"], layer, probe, mask=MASK, measures=QUICK)


@pytest.mark.parametrize("case_id", ["lstm", "conv_lstm_1d", "unequal_states", "matrix_state"])
def test_a_mask_given_by_hand(case_id: str) -> None:
    case = BY_ID[case_id]
    probe = make_probe(case, batch=len(MASK), steps=MASK.shape[1])
    layer = case.make()
    inputs, mask = keras.Input(probe.shape[1:]), keras.Input(MASK.shape[1:], dtype="bool")
    model = build(keras.Model([inputs, mask], layer(inputs, mask=mask)), [probe, MASK])
    assert_layer(measure(model, [probe, MASK], measures=QUICK)[layer.name], layer, probe, mask=MASK, measures=QUICK)


# TensorFlow's optimizer takes an empty convolution from one channel to two for one to one channel.
MASKED = {"lstm": BY_ID["lstm"], "conv": Case("conv", lambda **kw: L.ConvLSTM1D(2, 2, padding="same", **kw), (3, 1))}


@pytest.mark.parametrize("case", MASKED.values(), ids=MASKED)
@pytest.mark.parametrize("steps", [1, 5])
def test_a_mask_that_skips_everything(case: Case, steps: int) -> None:
    probe = make_probe(case, batch=2, steps=steps)
    mask = np.zeros([2, steps], bool)
    layer = case.make()
    inputs, given = keras.Input(probe.shape[1:]), keras.Input(mask.shape[1:], dtype="bool")
    model = build(keras.Model([inputs, given], layer(inputs, mask=given)), [probe, mask])
    report = measure(model, [probe, mask], measures=[*QUICK, "singular_values"])[layer.name]
    assert len(report["singular_values"]) == len(report.spectra_at) == 0
    report = measure(model, [probe, mask], measures=QUICK)[layer.name]
    assert_layer(report, layer, probe, mask=mask, measures=QUICK)


def test_a_segment_that_is_all_padding() -> None:
    case = MASKED["conv"]
    probe = make_probe(case, batch=2, steps=4)
    mask = np.array([[True, False, False, False], [True, True, False, False]])
    layer = case.make()
    inputs, given = keras.Input(probe.shape[1:]), keras.Input(mask.shape[1:], dtype="bool")
    model = build(keras.Model([inputs, given], layer(inputs, mask=given)), [probe, mask])
    report = measure(model, [probe, mask], measures=QUICK, max_bytes=1)[layer.name]
    assert_layer(report, layer, probe, mask=mask, measures=QUICK)


def test_a_mask_reaches_both_directions() -> None:
    embedding, wrapper = L.Embedding(8, FEATURES, mask_zero=True), L.Bidirectional(L.LSTM(3, name="lstm"), name="both")
    model = keras.Sequential([keras.Input(IDS.shape[1:], dtype="int32"), embedding, wrapper])
    build(model, IDS)
    report = measure(model, IDS, measures=QUICK)
    assert_layer(report["both/forward_lstm"], wrapper.forward_layer, embedding(IDS), mask=MASK, measures=QUICK)
    assert_layer(report["both/backward_lstm"], wrapper.backward_layer, embedding(IDS), mask=MASK, measures=QUICK)


def test_aggregates_leave_masked_steps_out() -> None:
    embedding, layer = L.Embedding(8, FEATURES, mask_zero=True), L.SimpleRNN(4, name="rnn")
    model = build(keras.Sequential([keras.Input(IDS.shape[1:], dtype="int32"), embedding, layer]), IDS)
    report = measure(model, IDS, measures=QUICK)
    values = variance(reference_jacobians(layer, embedding(IDS), mask=MASK)["hidden"])
    np.testing.assert_allclose(report["rnn"].mean("variance"), np.nanmean(values), rtol=1e-5)
    np.testing.assert_allclose(report["rnn"].over_time("variance"), np.nanmean(values, axis=1), rtol=1e-5)
    np.testing.assert_allclose(report.scalars()["rnn_jac_variance"], np.nanmean(values), rtol=1e-5)


def test_a_step_that_is_masked_in_every_sample_has_no_mean() -> None:
    ids = np.where(np.arange(5) == 2, 0, np.abs(IDS) + 1).astype(np.int32)
    layer = L.SimpleRNN(4, name="rnn")
    embedding = L.Embedding(9, FEATURES, mask_zero=True)
    model = build(keras.Sequential([keras.Input(ids.shape[1:], dtype="int32"), embedding, layer]), ids)
    over_time = measure(model, ids, measures=QUICK)["rnn"].over_time("variance")
    np.testing.assert_array_equal(np.isnan(over_time), np.arange(5) == 2, strict=True)


# Initial states --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case_id", ["simple_rnn", "lstm", "gru_reset_after", "stacked_lstm_gru", "conv_lstm_1d"])
def test_a_stateful_layer_starts_from_a_copy_of_its_states(case_id: str) -> None:
    probe = make_probe(BY_ID[case_id])
    model, layer = make_model(BY_ID[case_id], probe, stateful=True)
    meter = JacobianMeter(model, probe, measures=QUICK)
    for moved in range(2):
        model.predict(normal(*probe.shape, seed=20 + moved), verbose=0, batch_size=BATCH)
        before = [state.numpy() for state in tf.nest.flatten(layer.states)]
        assert any(np.any(state) for state in before)
        assert_layer(
            meter()[layer.name],
            layer,
            probe,
            states=tf.nest.map_structure(tf.identity, list(layer.states)),
            measures=QUICK,
        )
        for state, old in zip(tf.nest.flatten(layer.states), before, strict=True):
            np.testing.assert_array_equal(state.numpy(), old, strict=True)


def test_a_decoder_starts_where_the_encoder_ended() -> None:
    source, target = keras.Input((5, FEATURES)), keras.Input((STEPS, 3))
    encoder, decoder = L.LSTM(4, return_state=True, name="encoder"), L.LSTM(4, return_sequences=True, name="decoder")
    _, h, c = encoder(source)
    model = keras.Model([source, target], decoder(target, initial_state=[h, c]))
    probe = [normal(BATCH, 5, FEATURES, seed=1), normal(BATCH, STEPS, 3, seed=2)]
    build(model, probe)
    report = measure(model, probe, measures=KEYS)
    assert set(report.layers) == {"encoder", "decoder"}
    assert_layer(report["encoder"], encoder, probe[0])
    assert_layer(report["decoder"], decoder, probe[1], states=encoder(probe[0])[1:])


def test_initial_states_that_are_inputs_of_the_model() -> None:
    layer = L.GRU(4, name="gru")
    sequence, state = keras.Input((STEPS, FEATURES), name="sequence"), keras.Input((4,), name="state")
    model = keras.Model({"sequence": sequence, "state": state}, layer(sequence, initial_state=state))
    probe = {"sequence": PROBE, "state": normal(BATCH, 4, seed=9)}
    build(model, probe)
    assert_layer(measure(model, probe, measures=QUICK)["gru"], layer, PROBE, states=[probe["state"]], measures=QUICK)


def test_one_tensor_for_both_initial_states() -> None:
    # The tape must not add up the derivatives with respect to both.
    layer = L.LSTM(4, name="lstm")
    sequence, state = keras.Input((STEPS, FEATURES)), keras.Input((4,))
    model = keras.Model([sequence, state], layer(sequence, initial_state=[state, state]))
    probe = [PROBE, normal(BATCH, 4, seed=9)]
    build(model, probe)
    assert_layer(
        measure(model, probe, measures=QUICK)["lstm"], layer, PROBE, states=[probe[1], probe[1]], measures=QUICK
    )


def test_bidirectional_with_initial_states() -> None:
    wrapper = L.Bidirectional(L.LSTM(3, name="lstm"), name="both")
    sequence, states = keras.Input((STEPS, FEATURES)), [keras.Input((3,)) for _ in range(4)]
    model = keras.Model([sequence, *states], wrapper(sequence, initial_state=states))
    probe = [PROBE, *(normal(BATCH, 3, seed=seed) for seed in range(4))]
    build(model, probe)
    report = measure(model, probe, measures=QUICK)
    assert_layer(report["both/forward_lstm"], wrapper.forward_layer, PROBE, states=probe[1:3], measures=QUICK)
    assert_layer(report["both/backward_lstm"], wrapper.backward_layer, PROBE, states=probe[3:], measures=QUICK)


# Models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [L.SimpleRNN, L.LSTM, L.GRU], ids=["simple_rnn", "lstm", "gru"])
def test_both_directions_are_layers_of_their_own(make: Any) -> None:
    wrapper = L.Bidirectional(make(3, return_sequences=True, name="rnn"), name="both")
    model = functional([wrapper])
    report = measure(model, PROBE, measures=QUICK)
    assert set(report.layers) == {"both/forward_rnn", "both/backward_rnn"}
    assert_layer(report["both/forward_rnn"], wrapper.forward_layer, PROBE, measures=QUICK)
    assert_layer(report["both/backward_rnn"], wrapper.backward_layer, PROBE, measures=QUICK)


def test_a_layer_called_twice_has_two_entries() -> None:
    layer = L.LSTM(4, return_sequences=True, name="shared")
    report = assert_called_twice(layer, layer, "shared")
    assert {"shared_jac_variance", "shared_1_jac_variance"} <= set(report.scalars())


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


def test_nested_models() -> None:
    first, second, third = (L.GRU(4, return_sequences=True, name=name) for name in ("first", "second", "third"))
    inputs = keras.Input((STEPS, 4))
    deep = keras.Model(inputs, second(inputs), name="deep")
    inner = keras.Sequential([keras.Input((STEPS, FEATURES)), first, deep], name="inner")
    model = functional([inner, third])
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
    model = functional([layer])
    assert_layer(measure(model, PROBE, measures=QUICK)["user"], layer, 2.0 * PROBE, measures=QUICK)


def test_time_distributed_has_one_entry_per_call() -> None:
    layer = L.SimpleRNN(4, name="rnn")
    probe = normal(BATCH, 2, STEPS, FEATURES)
    model = functional([L.TimeDistributed(layer, name="each")], probe.shape[1:])
    report = measure(model, probe, measures=QUICK)
    assert list(report.layers) == ["each/rnn", "each/rnn:1"]
    for index, actual in enumerate(report.layers.values()):
        assert_layer(actual, layer, probe[:, index], measures=QUICK)


def test_layers_can_be_chosen_by_name_and_by_layer() -> None:
    first, second = L.GRU(3, return_sequences=True, name="first"), L.GRU(3, name="second")
    model = functional([first, second])
    full = measure(model, PROBE, measures=QUICK)
    for layers in (["second"], [second]):
        report = measure(model, PROBE, layers=layers, measures=QUICK)
        assert list(report.layers) == ["second"]
        np.testing.assert_allclose(report["second"]["variance"], full["second"]["variance"], rtol=1e-6, strict=True)


@pytest.mark.parametrize("keys", [["rms_singular_value"], ["joint/variance"], ["joint/spectral_norm", "variance"]])
def test_measures_and_views_can_be_chosen(keys: list[str]) -> None:
    model, layer = make_model(BY_ID["lstm"], PROBE)
    report = measure(model, PROBE, measures=keys)
    assert_layer(report[layer.name], layer, PROBE, measures=keys)
    assert set(report.scalars()) == {f"{layer.name}_jac_{key.replace('/', '_')}" for key in keys}


def test_the_joint_view_of_one_state_is_the_hidden_one() -> None:
    model, layer = make_model(BY_ID["simple_rnn"], PROBE)
    report = measure(model, PROBE, measures=["joint/variance"])
    assert_layer(report[layer.name], layer, PROBE, measures=["variance"])


@pytest.mark.parametrize(
    ("max_rows", "max_bytes", "go_backwards"), [(7, 2**30, True), (40, 20_000, False), (1000, 2**30, False)]
)
def test_expensive_measures_at_some_rows(max_rows: int, max_bytes: int, go_backwards: bool) -> None:  # noqa: FBT001 - pytest passes it by name
    steps = 30
    probe = normal(BATCH, steps, FEATURES)
    mask = np.arange(steps)[None] < np.array([[30], [20], [3]], np.int64)
    layer = L.LSTM(5, name="lstm", go_backwards=go_backwards)
    inputs = keras.Input((steps, FEATURES))
    model = build(keras.Model(inputs, layer(L.Masking()(inputs))), probe)
    keys = ["variance", "spectral_norm"]
    masked = probe * mask[..., None]
    report = measure(model, masked, measures=keys, max_rows=max_rows, max_bytes=max_bytes)["lstm"]
    expected = reference_values(reference_jacobians(layer, masked, mask=mask), keys)
    np.testing.assert_allclose(report["variance"], expected["variance"], rtol=1e-5)
    measured = np.isfinite(report["spectral_norm"])
    np.testing.assert_array_equal(measured, report.measured("spectral_norm"))
    np.testing.assert_array_equal(report.measured("variance"), mask.T)
    assert measured.sum() == min(max_rows, mask.sum())
    assert not np.any(measured & ~mask.T)
    np.testing.assert_allclose(report["spectral_norm"][measured], expected["spectral_norm"][measured], rtol=1e-2)
    # Evenly: in the order of time, each part of the rows has its share.
    shares = [part.sum() for part in np.array_split(measured[mask.T], 4)]
    assert max(shares) - min(shares) <= 2
    np.testing.assert_allclose(report.mean("spectral_norm"), np.mean(expected["spectral_norm"][measured]), rtol=1e-2)
    assert report.nonfinite() == {}
    assert (f"at {max_rows} of {mask.sum()}" in str(Report({"lstm": report}))) == (max_rows < mask.sum())


def test_the_scalars_are_the_means() -> None:
    model, layer = make_model(BY_ID["lstm"], PROBE)
    report = measure(model, PROBE, measures=list(KEYS))
    expected = reference_values(reference_jacobians(layer, PROBE))
    scalars = report.scalars()
    assert set(scalars) == {f"{layer.name}_jac_{key.replace('/', '_')}" for key in expected}
    for key, value in expected.items():
        scalar = scalars[f"{layer.name}_jac_{key.replace('/', '_')}"]
        assert type(scalar) is float
        np.testing.assert_allclose(scalar, value.mean(), rtol=1e-2 if "spectral" in key else 1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        tf.convert_to_tensor,
        lambda x: tf.data.Dataset.from_tensor_slices(x).batch(BATCH),
        lambda x: tf.data.Dataset.from_tensor_slices((x, np.zeros(len(x)))).batch(BATCH),
    ],
    ids=["array", "tensor", "dataset", "dataset_with_targets"],
)
def test_probes_of_every_form_say_the_same(wrap: Any) -> None:
    model, layer = make_model(BY_ID["gru_reset_after"], PROBE)
    assert_layer(measure(model, wrap(PROBE), measures=QUICK)[layer.name], layer, PROBE, measures=QUICK)


# Numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [L.LSTM, L.GRU], ids=["lstm", "gru"])
def test_half_precision_layers_are_measured_in_single_precision(make: Any) -> None:
    layer, exact = make(4, dtype="mixed_float16", name="half"), make(4, name="single")
    model = functional([layer])
    functional([exact])
    exact.set_weights(layer.get_weights())
    report = measure(model, PROBE, measures=KEYS)
    assert all(value.dtype == np.float32 for value in report["half"].values.values())
    assert_layer(report["half"], exact, PROBE, rtol=HALF)


def test_half_precision_does_not_overflow_in_the_variance() -> None:
    # tf.math.reduce_variance in float16 is 0.0 from n = 256 on: n² > 65504.
    layer = L.SimpleRNN(288, dtype="mixed_float16", name="half")
    model = keras.Sequential([keras.Input((1, FEATURES)), layer])
    report = measure(model, np.zeros((1, 1, FEATURES), np.float32), measures=["variance"])
    # x = h = 0 and an orthogonal kernel: ‖J‖²/n = 1.
    np.testing.assert_allclose(report["half"]["variance"], [[1.0]], rtol=2e-2)


def test_double_precision_layers() -> None:
    layer = L.GRU(4, dtype="float64", name="double")
    model = functional([layer])
    assert_layer(measure(model, PROBE, measures=KEYS)["double"], layer, PROBE)


def test_a_zero_kernel_is_zero_and_not_disconnected() -> None:
    layer = L.LSTM(4, recurrent_initializer="zeros", name="lstm")
    model = keras.Sequential([keras.Input((STEPS, FEATURES)), layer])
    report = measure(model, PROBE, measures=KEYS)
    for key in MEASURES:
        np.testing.assert_array_equal(report["lstm"][key], np.zeros((STEPS, BATCH)))
    assert report["lstm"].notes == ()


@pytest.mark.parametrize("tolerance", [1e-1, 1e-4])
def test_the_spectral_norm_and_its_residual_are_within_the_tolerance(tolerance: float) -> None:
    layer = L.SimpleRNN(32, name="rnn")
    model = functional([layer])
    report = measure(model, PROBE, measures=["spectral_norm"], tolerance=tolerance)
    expected = MEASURES["spectral_norm"](reference_jacobians(layer, PROBE)["hidden"])
    value, bound = report["rnn"]["spectral_norm"], report["rnn"].uncertainties["spectral_norm"]
    np.testing.assert_allclose(value, expected, rtol=tolerance + 1e-5)
    assert bound.shape == value.shape
    assert np.all(bound >= 0)
    assert np.all(bound <= (tolerance + 1e-5) * value)


# The meter -------------------------------------------------------------------------------------------


def test_one_trace_and_the_weights_of_the_moment() -> None:
    model, layer = make_model(BY_ID["lstm"], PROBE)
    meter = JacobianMeter(model, PROBE, measures=KEYS)
    assert meter.layers == (layer.name,)
    for seed in range(3):
        randomize(model, seed=100 * seed)
        assert_layer(meter()[layer.name], layer, PROBE)
        assert meter.trace_count == 1


def test_the_meter_and_measure_agree() -> None:
    model, layer = make_model(BY_ID["gru_reset_after"], PROBE)
    first, second = (
        measure(model, PROBE, measures=KEYS)[layer.name],
        JacobianMeter(model, PROBE, measures=KEYS)()[layer.name],
    )
    assert set(first.values) == set(second.values)
    for key, value in first.values.items():
        np.testing.assert_array_equal(second[key], value, strict=True)


@pytest.mark.parametrize(
    ("case_id", "max_bytes"), [("lstm", 1), ("seed_cell", 3000), ("while_loop", 1), ("conv_lstm_2d", 10_000)]
)
def test_chunks_of_rows_give_the_same_values(case_id: str, max_bytes: int) -> None:
    probe = make_probe(BY_ID[case_id])
    model, layer = make_model(BY_ID[case_id], probe)
    assert_layer(measure(model, probe, max_bytes=max_bytes)[layer.name], layer, probe)


def test_chunks_that_do_not_divide_the_rows() -> None:
    probe = normal(5, 7, FEATURES)
    model, layer = make_model(BY_ID["gru_reset_after"], probe)
    whole = measure(model, probe, measures=QUICK)[layer.name]["variance"]
    for max_bytes in (1000, 2500):
        chunked = measure(model, probe, measures=QUICK, max_bytes=max_bytes)[layer.name]["variance"]
        np.testing.assert_allclose(chunked, whole, rtol=1e-5, strict=True)


def test_observation_changes_nothing() -> None:
    model = keras.Sequential(
        [
            keras.Input(batch_shape=PROBE.shape),
            L.BatchNormalization(),
            L.LSTM(4, dropout=0.3, recurrent_dropout=0.3, stateful=True, return_sequences=True),
            L.Dropout(0.5),
            L.GRU(3, recurrent_dropout=0.3),
        ]
    )
    model.predict(PROBE, verbose=0, batch_size=BATCH)
    before = [variable.numpy() for variable in model.variables]
    seeds = [generator.state.numpy() for layer in model._flatten_layers() for generator in seed_generators(layer)]
    assert seeds
    meter = JacobianMeter(model, PROBE, measures=KEYS)
    meter()
    meter()
    for variable, old in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), old, strict=True)
    after = [generator.state.numpy() for layer in model._flatten_layers() for generator in seed_generators(layer)]
    np.testing.assert_array_equal(after, seeds, strict=True)


def seed_generators(layer: Any) -> list[Any]:
    return [value for value in vars(layer).values() if isinstance(value, keras.random.SeedGenerator)]


# Estimates, of cells without a structure -------------------------------------------------------------


def test_moments_are_exact_up_to_max_entries() -> None:
    model, layer = make_model(BY_ID["bare_state"], PROBE)
    entries = STEPS * BATCH * 4 * 4
    exact = measure(model, PROBE, max_entries=entries)[layer.name]
    assert exact.estimated == {"flow"}
    assert_layer(exact, layer, PROBE)
    estimate = measure(model, PROBE, max_entries=entries - 1)[layer.name]
    assert estimate.estimated == {"variance", "rms_singular_value", "flow"}
    np.testing.assert_allclose(
        estimate["spectral_norm"], MEASURES["spectral_norm"](reference_jacobians(layer, PROBE)["hidden"]), rtol=1e-2
    )


def test_each_view_is_estimated_for_itself() -> None:
    model, layer = make_model(BY_ID["partly_mixing"], PROBE)
    report = measure(model, PROBE, max_entries=STEPS * BATCH * 4 * 4)[layer.name]
    # Of the joint view, the blocks that mix units lie side by side and are twice as many entries as the hidden one.
    assert report.estimated == {"joint/variance", "joint/rms_singular_value", "joint/flow"}


def test_an_estimate_is_unbiased_and_knows_its_error() -> None:
    probe, layer = normal(4, 5, FEATURES), L.RNN(BareStateCell(16), name="rnn")
    model = functional([layer], (5, FEATURES))
    exact = variance(reference_jacobians(layer, probe)["hidden"])
    runs = [measure(model, probe, measures=["variance"], max_entries=1, seed=seed)["rnn"] for seed in range(8)]
    errors = np.stack([run["variance"] - exact for run in runs])
    standard_errors = np.stack([run.uncertainties["variance"] for run in runs])
    assert standard_errors.shape == errors.shape
    assert np.all(standard_errors > 0)
    # PointBatch of one run may share their random vectors, runs do not.
    means = errors.mean(axis=(1, 2))
    assert abs(means.mean()) < 4 * means.std(ddof=1) / np.sqrt(len(runs))
    assert 0.5 < np.sqrt(np.mean(np.square(errors / standard_errors))) < 2.0
    # The rows have random vectors of their own, also where each is measured by itself.
    for max_bytes in (2**30, 1):
        means = [
            measure(model, probe, measures=["variance"], max_entries=1, seed=seed, max_bytes=max_bytes)["rnn"]
            for seed in range(8)
        ]
        claimed = np.mean([run.standard_error("variance") for run in means])
        spread = np.std([run.mean("variance") for run in means], ddof=1)
        # The spread of eight draws is within these bounds but for 2 in 1000 times; without own vectors it is 4 times.
        assert 0.3 < spread / claimed < 1.9


def test_the_same_seed_gives_the_same_estimate() -> None:
    model, layer = make_model(BY_ID["bare_state"], PROBE)
    key = layer.name

    def run(seed: int) -> Any:
        return measure(model, PROBE, measures=["variance"], max_entries=1, seed=seed)[key]["variance"]

    np.testing.assert_array_equal(run(1), run(1), strict=True)
    assert np.any(run(1) != run(2))
    meter = JacobianMeter(model, PROBE, max_entries=1, seed=1)
    np.testing.assert_array_equal(meter()[key]["variance"], meter()[key]["variance"], strict=True)


def test_an_estimate_does_not_depend_on_the_chunks() -> None:
    model, layer = make_model(BY_ID["bare_state"], PROBE)
    whole = measure(model, PROBE, max_entries=1)[layer.name]
    chunked = measure(model, PROBE, max_entries=1, max_bytes=200)[layer.name]
    assert chunked.estimated == whole.estimated
    for key in ("variance", "rms_singular_value"):
        error = np.hypot(whole.uncertainties[key], chunked.uncertainties[key])
        assert np.all(np.abs(chunked[key] - whole[key]) <= 5 * error)


def test_the_tables_say_what_was_measured() -> None:
    model, layer = make_model(BY_ID["lstm"], PROBE)
    text = str(measure(model, PROBE, measures=KEYS))
    assert layer.name in text
    for measure_name in MEASURES:
        assert measure_name in text


# What cannot be measured -----------------------------------------------------------------------------


def test_a_disconnected_state_is_reported_and_has_no_values() -> None:
    layer = L.RNN(StoppedCell(4), name="stopped")
    other = L.GRU(3, name="gru", return_sequences=True)
    model = functional([other, layer])
    with pytest.warns(UserWarning, match="stopped") as caught:
        report = measure(model, PROBE, measures=KEYS)
    assert len([warning for warning in caught if issubclass(warning.category, UserWarning)]) == 1
    assert dict(report["stopped"].values) == {}
    assert len(report["stopped"].notes) == 1
    assert "hidden" in report["stopped"].notes[0]
    assert not any(key.startswith("stopped_") for key in report.scalars())
    assert_layer(report["gru"], other, PROBE)
    assert "stopped" in str(report)


def test_a_disconnected_view_leaves_the_other_view() -> None:
    layer = L.RNN(ReadoutFirstCell(4), name="readout")
    model = functional([layer])
    with pytest.warns(UserWarning, match="readout"):
        report = measure(model, PROBE, measures=KEYS)
    joint = reference_jacobians(layer, PROBE)["joint"]
    assert set(report["readout"].values) == {f"joint/{key}" for key in MEASURES}
    np.testing.assert_allclose(report["readout"]["joint/variance"], variance(joint), rtol=1e-5)
    assert any("hidden" in note for note in report["readout"].notes)


def test_a_disconnected_state_is_warned_of_once_per_meter() -> None:
    model = functional([L.RNN(StoppedCell(4), name="stopped")])
    with pytest.warns(UserWarning, match="stopped"):
        meter = JacobianMeter(model, PROBE, measures=KEYS)
    # Every further warning would be an error here.
    assert len(meter()["stopped"].notes) == 1
    assert len(meter()["stopped"].notes) == 1


def test_a_state_without_influence_is_reported() -> None:
    class Forgetful(WeightedCell):
        """Writes a second state that nothing reads."""

        def __init__(self) -> None:
            super().__init__(4)
            self.state_size = [4, 4]

        def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
            new_h = tf.tanh(self.preactivation(inputs, states[0]))
            return new_h, [new_h, tf.sin(new_h)]

    model = functional([L.RNN(Forgetful(), name="rnn")])
    note = "old state 1 has no influence on the new states (no gradient connects them)"
    with pytest.warns(UserWarning, match=f"^Layer `rnn`: {re.escape(note)}$"):
        report = measure(model, PROBE, measures=QUICK)
    assert report["rnn"].notes == (note,)
    assert set(report["rnn"].values) == {"variance", "joint/variance"}


def operations(graph: Any) -> int:
    """How many operations a graph has, with those of the functions that it calls."""
    return sum(
        1
        + sum(
            operations(graph._get_function(operation.get_attr(attribute.name).name).graph)
            for attribute in operation.op_def.attr
            if attribute.type == "func"
        )
        for operation in graph.get_operations()
    )


@pytest.mark.parametrize("case_id", ["lstm", "bare_state"])
def test_the_graph_does_not_grow_with_the_steps_or_the_chunks(case_id: str) -> None:
    layer = BY_ID[case_id].make()
    inputs = keras.Input((None, FEATURES))
    model = build(keras.Model(inputs, layer(inputs)), PROBE)

    def size_of(steps: int, max_bytes: int) -> int:
        meter = JacobianMeter(model, normal(BATCH, steps, FEATURES), measures=["variance"], max_bytes=max_bytes)
        return operations(meter._traced[True].graph.graph)

    assert size_of(5, 2**30) == size_of(50, 2**30)
    assert size_of(50, 5000) == size_of(200, 5000)


def test_max_bytes_bounds_the_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = rows_module.measure_rows

    def spy(source: Any, measures: Any, options: Any, chunk: int) -> Any:
        seen.append(chunk)
        return original(source, measures, options, chunk)

    monkeypatch.setattr(points, "measure_rows", spy)
    model, _ = make_model(BY_ID["bare_state"], PROBE)
    for max_bytes in (2**30, 2**20, 2**16, 1):
        JacobianMeter(model, PROBE, measures=["variance"], max_bytes=max_bytes)
    # A row takes some hundred bytes.
    assert seen[0] == 2**14
    assert 2**20 / 50_000 < seen[1] < 2**20 / 500
    assert abs(seen[2] - seen[1] / 16) <= 1
    assert seen[3] == 1


@pytest.mark.filterwarnings("ignore:.*NaN")
def test_one_segment_at_a_time() -> None:
    """TensorFlow may begin ten iterations of a loop at once, which would need the memory of all of them."""
    model, probe = functional([keras.layers.LSTM(4, name="lstm")]), normal(BATCH, STEPS, FEATURES)
    meter = JacobianMeter(model, probe, measures=["variance", "joint/flow", "joint/lyapunov"], max_bytes=2**13)
    operations = meter._traced[True].graph.graph.get_operations()
    # Of the steps, forwards for the exponents, and backwards for the flow; the loops in each segment are not in sight.
    assert [op.get_attr("parallel_iterations") for op in operations if "While" in op.type] == [1, 1, 1]


def test_nan_weights_give_nan_in_the_valid_rows() -> None:
    embedding, layer = L.Embedding(8, FEATURES, mask_zero=True), L.LSTM(4, name="lstm")
    model = build(keras.Sequential([keras.Input(IDS.shape[1:], dtype="int32"), embedding, layer]), IDS)
    layer.cell.recurrent_kernel.assign(np.full((4, 16), np.nan))
    report = measure(model, IDS, measures=KEYS)
    np.testing.assert_array_equal(report["lstm"].mask, MASK.T, strict=True)
    for key, value in report["lstm"].values.items():
        assert np.isnan(value).all(), key
    assert all(np.isnan(scalar) for scalar in report.scalars().values())


@pytest.mark.filterwarnings("ignore:.*NaN")
def test_a_sample_with_nan_does_not_disturb_the_others() -> None:
    embedding, layer = L.Embedding(9, FEATURES), L.LSTM(4, name="lstm")
    ids = np.array([[1, 2, 3, 4], [1, 2, 8, 4], [5, 6, 7, 1]], np.int32)
    model = build(keras.Sequential([keras.Input(ids.shape[1:], dtype="int32"), embedding, layer]), ids)
    table = embedding.get_weights()[0]
    table[8] = np.nan
    embedding.set_weights([table])
    report = measure(model, ids, measures=KEYS)
    assert np.isnan(report["lstm"]["joint/spectral_norm"][2:, 1]).all()
    assert_layer(report["lstm"], layer, embedding(ids))


class CountingCell(keras.layers.Layer):
    """Counts its calls in a variable that Keras knows nothing of, and makes its weights at the first call."""

    state_size = 3

    def __init__(self) -> None:
        super().__init__()
        self.calls = tf.Variable(0.0)
        self.dense = keras.layers.Dense(3)

    def build(self, input_shape: Any) -> None:
        """Builds nothing, on purpose."""

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        self.calls.assign_add(1.0)
        new = self.dense(states[0]) + 0.0 * inputs[:, :1]
        return new, [new]


def test_a_variable_that_a_cell_writes_to_is_put_back() -> None:
    cell = CountingCell()
    model = keras.Sequential([keras.Input((4, 2)), keras.layers.RNN(cell)])
    cell.calls.assign(7.0)
    meter = JacobianMeter(model, normal(2, 4, 2), measures="variance")
    assert cell.calls.numpy() == 7.0
    meter()
    assert cell.calls.numpy() == 7.0


@pytest.mark.parametrize("callable_", [JacobianMeter, JacobianMonitor, measure])
def test_the_signature_shows_each_option_with_its_default(callable_: Any) -> None:
    shown = inspect.signature(callable_).parameters
    for option in dataclasses.fields(Options):
        assert shown[option.name].default == option.default
        assert shown[option.name].kind is inspect.Parameter.KEYWORD_ONLY
    assert "options" not in shown
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'tolerence'"):
        callable_(*[PROBE] * (1 if callable_ is JacobianMonitor else 2), tolerence=0.1)
