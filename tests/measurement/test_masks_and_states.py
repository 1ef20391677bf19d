"""Steps that are skipped, and the states that a sequence starts from, against the hand-written loop of `helpers`."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    BATCH,
    BY_ID,
    FEATURES,
    QUICK,
    STEPS,
    Case,
    assert_layer,
    build,
    make_model,
    make_probe,
    normal,
    reference_jacobians,
    sequential,
    soak_but,
    variance,
)

from keras_jacmon import JacobianMeter, JacobianMonitor, JacobianRegularizer, measure

L = keras.layers
PROBE = normal(BATCH, STEPS, FEATURES, seed=3)
# Right-padded, left-padded, a hole, and a sample with nothing in it.
IDS = np.array([[1, 2, 3, 0, 0], [0, 0, 4, 5, 1], [2, 0, 6, 0, 3], [0, 0, 0, 0, 0]], np.int32)
MASK = IDS != 0


# Inputs ----------------------------------------------------------------------------------------------


class OneHotCell(keras.layers.Layer):
    """Reads its inputs as the numbers of words."""

    state_size = 4

    def build(self, _: Any) -> None:
        self.words = self.add_weight(shape=(2, 4), initializer="normal")
        self.recurrent = self.add_weight(shape=(4, 4), initializer="orthogonal")

    def call(self, inputs: Any, states: Any) -> Any:
        word = keras.ops.one_hot(keras.ops.cast(inputs[:, 0], "int32"), 2)
        h = keras.ops.tanh(word @ self.words + states[0] @ self.recurrent)
        return h, [h]


@pytest.mark.parametrize("dtype", ["int32", "bool"])
@pytest.mark.parametrize("make", [L.LSTM, L.GRU, L.SimpleRNN, lambda _, name: L.RNN(OneHotCell(), name=name)])
def test_inputs_without_a_derivative(make: Any, dtype: str) -> None:
    """They have no sources, and a step that is precomputed needs them all the same."""
    probe = np.random.default_rng(0).integers(0, 2, size=(BATCH, STEPS, FEATURES)).astype(dtype)
    layer = make(4, name="rnn")
    model = build(keras.Sequential([keras.Input((STEPS, FEATURES), dtype=dtype), layer, L.Dense(1)]), probe)
    assert_layer(measure(model, probe, measures=QUICK)["rnn"], layer, probe.astype("float32"), measures=QUICK)
    model.compile("sgd", "mse")
    targets = np.ones(BATCH)
    regularizer = JacobianRegularizer(1.0, 0.1)
    monitor = JacobianMonitor(probe, targets=targets, log_dir=None, regularizer=regularizer, on_error="raise")
    history = model.fit(probe, targets, verbose=0, callbacks=[monitor]).history
    assert np.isfinite(history["jac_penalty"]).all()
    assert (monitor.reports[-1][1]["rnn"]["loss_gradient"] > 0).all()


# Masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case_id", soak_but({"lstm"}, ["lstm", "stacked_lstm_gru"]))
def test_padded_steps_of_an_embedding_are_left_out(case_id: str) -> None:
    embedding, layer = L.Embedding(8, FEATURES, mask_zero=True), BY_ID[case_id].make(go_backwards=case_id == "lstm")
    model = build(keras.Sequential([keras.Input(IDS.shape[1:], dtype="int32"), embedding, layer]), IDS)
    assert_layer(measure(model, IDS, measures=QUICK)[layer.name], layer, embedding(IDS), mask=MASK, measures=QUICK)


@pytest.mark.fast
def test_padded_steps_of_a_masking_layer_are_left_out() -> None:
    probe = np.where(MASK[..., None], normal(*MASK.shape, FEATURES), -1.0).astype(np.float32)
    layer = L.GRU(4, name="gru")
    model = sequential([L.Masking(-1.0), layer], (MASK.shape[1], FEATURES))
    assert_layer(measure(model, probe, measures=QUICK)["gru"], layer, probe, mask=MASK, measures=QUICK)


@pytest.mark.parametrize(
    "case_id", soak_but({"unequal_states", "matrix_state"}, ["conv_lstm_1d", "unequal_states", "matrix_state"])
)
def test_a_mask_given_by_hand(case_id: str) -> None:
    case = BY_ID[case_id]
    probe = make_probe(case, batch=len(MASK), steps=MASK.shape[1])
    layer = case.make()
    inputs, mask = keras.Input(probe.shape[1:]), keras.Input(MASK.shape[1:], dtype="bool")
    model = build(keras.Model([inputs, mask], layer(inputs, mask=mask)), [probe, MASK])
    assert_layer(measure(model, [probe, MASK], measures=QUICK)[layer.name], layer, probe, mask=MASK, measures=QUICK)


# TensorFlow's optimizer takes an empty convolution from one channel to two for one to one channel.
MASKED = {"lstm": BY_ID["lstm"], "conv": Case("conv", lambda **kw: L.ConvLSTM1D(2, 2, padding="same", **kw), (3, 1))}


@pytest.mark.parametrize(
    ("name", "steps"), [("lstm", 5), *(pytest.param("conv", steps, marks=pytest.mark.soak) for steps in (5, 1))]
)
def test_a_mask_that_skips_everything(name: str, steps: int) -> None:
    case = MASKED[name]
    probe = make_probe(case, batch=2, steps=steps)
    mask = np.zeros([2, steps], bool)
    layer = case.make()
    inputs, given = keras.Input(probe.shape[1:]), keras.Input(mask.shape[1:], dtype="bool")
    model = build(keras.Model([inputs, given], layer(inputs, mask=given)), [probe, mask])
    report = measure(model, [probe, mask], measures=[*QUICK, "singular_values"])[layer.name]
    assert len(report["singular_values"]) == len(report.spectra_at) == 0
    assert_layer(report, layer, probe, mask=mask, measures=QUICK)


def test_a_segment_that_is_all_padding() -> None:
    case = MASKED["conv"]
    probe = make_probe(case, batch=2, steps=4)
    mask = np.array([[True, False, False, False], [True, True, False, False]])
    layer = case.make()
    inputs, given = keras.Input(probe.shape[1:]), keras.Input(mask.shape[1:], dtype="bool")
    model = build(keras.Model([inputs, given], layer(inputs, mask=given)), [probe, mask])
    report = measure(model, [probe, mask], measures=["variance"], max_bytes=1)[layer.name]
    assert_layer(report, layer, probe, mask=mask, measures=["variance"])


def test_a_mask_reaches_both_directions() -> None:
    embedding, wrapper = L.Embedding(8, FEATURES, mask_zero=True), L.Bidirectional(L.LSTM(4, name="lstm"), name="both")
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


@pytest.mark.parametrize("case_id", soak_but({"lstm"}, ["lstm", "stacked_lstm_gru", "conv_lstm_1d"]))
def test_a_stateful_layer_starts_from_a_copy_of_its_states(case_id: str) -> None:
    probe = make_probe(BY_ID[case_id])
    model, layer = make_model(BY_ID[case_id], probe, stateful=True)
    meter = JacobianMeter(model, probe, measures=QUICK)
    for moved in range(2):
        model(normal(*probe.shape, seed=20 + moved))
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


@pytest.mark.fast
def test_a_decoder_starts_where_the_encoder_ended() -> None:
    source, target = keras.Input((STEPS, FEATURES)), keras.Input((STEPS, FEATURES))
    encoder, decoder = L.LSTM(4, return_state=True, name="encoder"), L.LSTM(4, return_sequences=True, name="decoder")
    _, h, c = encoder(source)
    model = keras.Model([source, target], decoder(target, initial_state=[h, c]))
    probe = [normal(BATCH, STEPS, FEATURES, seed=seed) for seed in (1, 2)]
    build(model, probe)
    report = measure(model, probe, measures=QUICK)
    assert set(report.layers) == {"encoder", "decoder"}
    assert_layer(report["encoder"], encoder, probe[0], measures=QUICK)
    assert_layer(report["decoder"], decoder, probe[1], states=encoder(probe[0])[1:], measures=QUICK)


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
    wrapper = L.Bidirectional(L.LSTM(4, name="lstm"), name="both")
    sequence, states = keras.Input((STEPS, FEATURES)), [keras.Input((4,)) for _ in range(4)]
    model = keras.Model([sequence, *states], wrapper(sequence, initial_state=states))
    probe = [PROBE, *(normal(BATCH, 4, seed=seed) for seed in range(4))]
    build(model, probe)
    report = measure(model, probe, measures=QUICK)
    assert_layer(report["both/forward_lstm"], wrapper.forward_layer, PROBE, states=probe[1:3], measures=QUICK)
    assert_layer(report["both/backward_lstm"], wrapper.backward_layer, PROBE, states=probe[3:], measures=QUICK)


def test_nan_weights_give_nan_in_the_valid_rows() -> None:
    embedding, layer = L.Embedding(8, FEATURES, mask_zero=True), L.LSTM(4, name="lstm")
    model = build(keras.Sequential([keras.Input(IDS.shape[1:], dtype="int32"), embedding, layer]), IDS)
    layer.cell.recurrent_kernel.assign(np.full((4, 16), np.nan))
    report = measure(model, IDS, measures=QUICK)
    np.testing.assert_array_equal(report["lstm"].mask, MASK.T, strict=True)
    for key, value in report["lstm"].values.items():
        assert np.isnan(value).all(), key
    assert all(np.isnan(scalar) for scalar in report.scalars().values())


@pytest.mark.filterwarnings("ignore:(?s).*does not support masking", "ignore:.*a mask reached the layer below")
def test_a_mask_that_is_not_handed_on_is_noted() -> None:
    # As Keras 3.16 does between any two recurrent layers.
    class Doubles(keras.layers.Layer):
        def call(self, inputs: tf.Tensor) -> tf.Tensor:
            return 2 * inputs

    inputs = keras.Input((STEPS, FEATURES))
    below = keras.layers.SimpleRNN(2, return_sequences=True, name="below")(keras.layers.Masking()(inputs))
    above = keras.layers.SimpleRNN(2, return_sequences=True, name="above")(Doubles()(below))
    top = keras.layers.SimpleRNN(2, name="top")(keras.layers.RepeatVector(STEPS)(above[:, -1]))
    report = measure(keras.Model(inputs, top), normal(BATCH, STEPS, FEATURES), measures=["variance"])
    (note,) = report["above"].notes
    assert note == (
        "a mask reached the layer below and not this one: the layer takes all steps, also the padded ones, and all are "
        "measured"
    )
    assert report["below"].notes == report["top"].notes == ()


@pytest.mark.parametrize(
    ("dtype", "rounding"), [pytest.param("float32", 1e-5, marks=pytest.mark.soak), ("mixed_float16", 1e-3)]
)
def test_a_stateful_layer_that_is_called_twice_goes_on_where_it_stopped(dtype: str, rounding: float) -> None:
    """Its states are tensors of the model then, and still its own."""

    def measured(calls: int, steps: int) -> Any:
        keras.utils.set_random_seed(1)
        inputs = keras.Input((steps, 2), batch_size=3)
        layer = keras.layers.LSTM(3, return_sequences=True, stateful=True, dtype=dtype, name="rnn")
        model = keras.Model(inputs, [layer(inputs) for _ in range(calls)])
        return measure(model, np.ones((3, steps, 2), np.float32), measures="variance")

    twice, once = measured(2, 4), measured(1, 8)
    assert list(twice) == ["rnn", "rnn:1"]
    found = np.concatenate([layer["variance"] for layer in twice.values()])
    np.testing.assert_allclose(found, once["rnn"]["variance"], rtol=rounding, strict=True)
