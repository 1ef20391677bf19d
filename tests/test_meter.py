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
    FEATURES,
    KEYS,
    MEASURES,
    MOMENTS,
    QUICK,
    STEPS,
    Case,
    ReadoutFirstCell,
    SeedCell,
    StoppedCell,
    WeightedCell,
    assert_layer,
    build,
    each_case,
    make_model,
    make_probe,
    normal,
    randomize,
    reference_jacobians,
    reference_values,
    sequential,
    soak_but,
    variance,
)
from watched_points import WatchedCell, watched_points

from keras_jacmon import JacobianMeter, JacobianMonitor, Report, measure
from keras_jacmon.options import Options

L = keras.layers
PROBE = normal(BATCH, STEPS, FEATURES, seed=3)
HALF = {"variance": 5e-4, "rms_singular_value": 5e-4, "spectral_norm": 1e-2}


# Every cell ------------------------------------------------------------------------------------------


# The spectral norm rests on the same operator, whose laws hold for every cell (`test_autodiff.py`), and it is slow to
# trace: one cell of each kind.
WITH_SPECTRAL_NORM = {
    "lstm",
    "conv_lstm_1d",
    "stacked_lstm_gru",
    "seed_cell",
}


# Of loops, the operator is held inside of a graph in `test_autodiff.py`.
# Convolutions are held in two dimensions, and stacks by one of them.
@each_case(soak={"while_loop", "map_fn", "conv_lstm_1d", "counter_first", "stacked_seed_cell_simple_rnn"})
def test_every_cell_equals_the_loop(case: Case) -> None:
    probe = make_probe(case)
    model, layer = make_model(case, probe)
    measures = KEYS if case.id in WITH_SPECTRAL_NORM else QUICK if case.id == "map_fn" else MOMENTS
    report = measure(model, probe, measures=measures)
    assert list(report.layers) == [layer.name]
    assert_layer(report[layer.name], layer, probe, measures=measures)


@pytest.mark.parametrize("case_id", ["stacked_lstm_gru", "seed_cell"])
def test_go_backwards_is_indexed_by_input_position(case_id: str) -> None:
    probe = make_probe(BY_ID[case_id])
    model, layer = make_model(BY_ID[case_id], probe, go_backwards=True, return_sequences=True)
    assert_layer(measure(model, probe, measures=QUICK)[layer.name], layer, probe, measures=QUICK)


def test_options_of_the_layer_change_nothing() -> None:
    model, layer = make_model(BY_ID["lstm"], PROBE, unroll=True, return_sequences=True)
    assert_layer(measure(model, PROBE, measures=QUICK)[layer.name], layer, PROBE, measures=QUICK)


@pytest.mark.parametrize(
    "cell",
    [SeedCell(4), L.StackedRNNCells([L.LSTMCell(3), L.GRUCell(4)])],
    ids=["seed_cell", "stacked"],
)
@pytest.mark.filterwarnings("ignore:.*`build..` was called on layer")
def test_a_model_that_was_never_called_gets_its_weights(cell: Any) -> None:
    keras.utils.set_random_seed(1)
    layer = L.RNN(cell, name="rnn")
    model = keras.Sequential([keras.Input((STEPS, FEATURES)), layer])
    report = measure(model, PROBE, measures=QUICK)
    assert_layer(report["rnn"], layer, PROBE, measures=QUICK)


@pytest.mark.filterwarnings("ignore:.*`build..` was called on layer")
def test_a_sequential_model_without_input_is_built_from_the_probe() -> None:
    keras.utils.set_random_seed(1)
    layer = L.GRU(4, name="gru")
    model = keras.Sequential([layer, L.Dense(1)])
    report = measure(model, PROBE, measures=MOMENTS)
    assert_layer(report["gru"], layer, PROBE, measures=MOMENTS)


@pytest.mark.fast
def test_a_single_step() -> None:
    model, layer = make_model(BY_ID["lstm"], PROBE[:, :1])
    report = measure(model, PROBE[:, :1])
    assert report[layer.name]["joint/variance"].shape == (1, BATCH)
    assert_layer(report[layer.name], layer, PROBE[:, :1])


def test_a_batch_of_one() -> None:
    model, layer = make_model(BY_ID["lstm"], PROBE)
    report = measure(model, PROBE[:1], measures=QUICK)
    assert report[layer.name]["joint/variance"].shape == (STEPS, 1)
    assert_layer(report[layer.name], layer, PROBE[:1], measures=QUICK)


def test_a_single_step_of_a_single_sample() -> None:
    model, layer = make_model(BY_ID["partly_mixing"], PROBE[:1, :1])
    report = measure(model, PROBE[:1, :1], measures=MOMENTS)
    assert_layer(report[layer.name], layer, PROBE[:1, :1], measures=MOMENTS)


def test_an_lstm_that_mixes_its_units() -> None:
    layer = L.LSTM(4, activation="softmax", name="lstm")
    model = sequential([layer])
    assert_layer(measure(model, PROBE, measures=QUICK)["lstm"], layer, PROBE, measures=QUICK)


def test_one_unit() -> None:
    layer = L.SimpleRNN(1, name="rnn")
    model = sequential([layer])
    # A difference of two sums that are equal up to rounding.
    np.testing.assert_allclose(measure(model, PROBE, measures=KEYS)["rnn"]["variance"], 0.0, atol=1e-7)
    others = ["rms_singular_value", "spectral_norm"]
    assert_layer(measure(model, PROBE, measures=others)["rnn"], layer, PROBE, measures=others)


def test_a_length_unknown_to_the_model() -> None:
    layer = L.GRU(4, name="gru")
    model = build(keras.Sequential([keras.Input((None, FEATURES)), layer]), PROBE)
    assert_layer(measure(model, PROBE, measures=MOMENTS)["gru"], layer, PROBE, measures=MOMENTS)


def test_layers_can_be_chosen_by_name_and_by_layer() -> None:
    first, second = L.GRU(4, return_sequences=True, name="first"), L.GRU(4, name="second")
    model = sequential([first, second])
    full = measure(model, PROBE, measures=MOMENTS)
    for layers in (["second"], [second]):
        report = measure(model, PROBE, layers=layers, measures=MOMENTS)
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
    ("max_rows", "max_bytes", "go_backwards"),
    [
        (40, 20_000, True),
        *(pytest.param(*case, marks=pytest.mark.soak) for case in ((7, 2**30, True), (1000, 2**30, False))),
    ],
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


def test_the_scalars_are_the_means_and_the_tables_say_what_was_measured() -> None:
    model, layer = make_model(BY_ID["lstm"], PROBE)
    report = measure(model, PROBE, measures=list(KEYS))
    expected = reference_values(reference_jacobians(layer, PROBE))
    scalars = report.scalars()
    assert set(scalars) == {f"{layer.name}_jac_{key.replace('/', '_')}" for key in expected}
    for key, value in expected.items():
        scalar = scalars[f"{layer.name}_jac_{key.replace('/', '_')}"]
        assert type(scalar) is float
        np.testing.assert_allclose(scalar, value.mean(), rtol=1e-2 if "spectral" in key else 1e-5)
    assert all(name in str(report) for name in (layer.name, *MEASURES))


def test_probes_of_every_form_say_the_same() -> None:
    model, layer = make_model(BY_ID["simple_rnn"], PROBE)
    targets = np.zeros(BATCH)
    probes = [
        PROBE,
        tf.convert_to_tensor(PROBE),
        PROBE.astype("float64"),
        tf.data.Dataset.from_tensor_slices(PROBE).batch(BATCH),
        tf.data.Dataset.from_tensor_slices((PROBE, targets)).batch(BATCH).repeat(),
        tf.data.Dataset.from_tensor_slices((PROBE, targets, targets)).batch(BATCH),
    ]
    for probe in probes:
        assert_layer(measure(model, probe, measures=["variance"])[layer.name], layer, PROBE, measures=["variance"])


# Numbers ---------------------------------------------------------------------------------------------


# As `test_precision.py` says of whole models.
@pytest.mark.soak
@pytest.mark.parametrize("make", [L.LSTM, L.GRU], ids=["lstm", "gru"])
def test_half_precision_layers_are_measured_in_single_precision(make: Any) -> None:
    layer, exact = make(4, dtype="mixed_float16", name="half"), make(4, name="single")
    model = sequential([layer])
    sequential([exact])
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
    model = sequential([layer])
    assert_layer(measure(model, PROBE, measures=MOMENTS)["double"], layer, PROBE, measures=MOMENTS)


def test_a_zero_kernel_is_zero_and_not_disconnected() -> None:
    layer = L.LSTM(4, recurrent_initializer="zeros", name="lstm")
    model = keras.Sequential([keras.Input((STEPS, FEATURES)), layer])
    report = measure(model, PROBE, measures=KEYS)
    for key in MEASURES:
        np.testing.assert_array_equal(report["lstm"][key], np.zeros((STEPS, BATCH)))
    assert report["lstm"].notes == ()


@pytest.mark.parametrize("tolerance", [1e-1, 1e-4])
def test_the_spectral_norm_and_its_residual_are_within_the_tolerance(tolerance: float) -> None:
    layer = L.SimpleRNN(33, name="rnn")
    model = sequential([layer])
    report = measure(model, PROBE, measures=["spectral_norm"], tolerance=tolerance)
    expected = MEASURES["spectral_norm"](reference_jacobians(layer, PROBE)["hidden"])
    value, bound = report["rnn"]["spectral_norm"], report["rnn"].uncertainties["spectral_norm"]
    np.testing.assert_allclose(value, expected, rtol=tolerance + 1e-5)
    assert bound.shape == value.shape
    assert np.all(bound >= 0)
    assert np.all(bound <= (tolerance + 1e-5) * value)


# The meter -------------------------------------------------------------------------------------------


@pytest.mark.fast
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
        measure(model, PROBE, measures=MOMENTS)[layer.name],
        JacobianMeter(model, PROBE, measures=MOMENTS)()[layer.name],
    )
    assert set(first.values) == set(second.values)
    for key, value in first.values.items():
        np.testing.assert_array_equal(second[key], value, strict=True)


@pytest.mark.parametrize(
    ("case_id", "max_bytes"),
    [
        ("lstm", 1),
        ("seed_cell", 3000),
        *(pytest.param(*case, marks=pytest.mark.soak) for case in (("while_loop", 1), ("conv_lstm_2d", 10_000))),
    ],
)
def test_chunks_of_rows_give_the_same_values(case_id: str, max_bytes: int) -> None:
    probe = make_probe(BY_ID[case_id])
    model, layer = make_model(BY_ID[case_id], probe)
    measures = KEYS if case_id == "lstm" else MOMENTS
    report = measure(model, probe, measures=measures, max_bytes=max_bytes)[layer.name]
    assert_layer(report, layer, probe, measures=measures)


def test_chunks_that_do_not_divide_the_rows() -> None:
    probe = normal(5, 7, FEATURES)
    model, layer = make_model(BY_ID["gru_reset_after"], probe)
    whole = measure(model, probe, measures=QUICK)[layer.name]["variance"]
    chunked = measure(model, probe, measures=QUICK, max_bytes=2500)[layer.name]["variance"]
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
    meter = JacobianMeter(model, PROBE, measures=QUICK)
    meter()
    meter()
    for variable, old in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), old, strict=True)
    after = [generator.state.numpy() for layer in model._flatten_layers() for generator in seed_generators(layer)]
    np.testing.assert_array_equal(after, seeds, strict=True)


def seed_generators(layer: Any) -> list[Any]:
    return [value for value in vars(layer).values() if isinstance(value, keras.random.SeedGenerator)]


# What cannot be measured -----------------------------------------------------------------------------


def test_a_disconnected_state_is_reported_and_has_no_values() -> None:
    layer = L.RNN(StoppedCell(4), name="stopped")
    other = L.GRU(3, name="gru", return_sequences=True)
    model = sequential([other, layer])
    with pytest.warns(UserWarning, match="stopped") as caught:
        report = measure(model, PROBE, measures=QUICK)
    assert len([warning for warning in caught if issubclass(warning.category, UserWarning)]) == 1
    assert dict(report["stopped"].values) == {}
    assert len(report["stopped"].notes) == 1
    assert "hidden" in report["stopped"].notes[0]
    assert not any(key.startswith("stopped_") for key in report.scalars())
    assert_layer(report["gru"], other, PROBE, measures=QUICK)
    assert "stopped" in str(report)


def test_a_disconnected_view_leaves_the_other_view() -> None:
    layer = L.RNN(ReadoutFirstCell(4), name="readout")
    model = sequential([layer])
    with pytest.warns(UserWarning, match="readout"):
        report = measure(model, PROBE, measures=KEYS)
    joint = reference_jacobians(layer, PROBE)["joint"]
    assert set(report["readout"].values) == {f"joint/{key}" for key in MEASURES}
    np.testing.assert_allclose(report["readout"]["joint/variance"], variance(joint), rtol=1e-5)
    assert any("hidden" in note for note in report["readout"].notes)


def test_a_disconnected_state_is_warned_of_once_per_meter() -> None:
    model = sequential([L.RNN(StoppedCell(4), name="stopped")])
    with pytest.warns(UserWarning, match="stopped"):
        meter = JacobianMeter(model, PROBE, measures=QUICK)
    # Every further warning would be an error here.
    assert len(meter()["stopped"].notes) == 1
    assert len(meter()["stopped"].notes) == 1


def test_a_named_measure_of_a_jacobian_that_is_not_square_is_noted() -> None:
    model = sequential([L.GRU(5, name="rnn")], (4, 3))
    probe = normal(2, 4, 3)
    names = ["variance", "inputs/variance", "inputs/spectral_radius"]
    found = measure(model, probe, measures=names)["rnn"]
    assert set(found) == {"variance", "inputs/variance"}
    note = "`inputs/spectral_radius` is left out: it needs a square Jacobian, and that by the inputs is 5 x 3"
    assert note in found.notes
    # Nobody asks for each of a preset.
    assert not measure(model, probe, measures="full")["rnn"].notes


def test_a_state_without_influence_is_reported() -> None:
    class Forgetful(WeightedCell):
        """Writes a second state that nothing reads."""

        def __init__(self) -> None:
            super().__init__(4)
            self.state_size = [4, 4]

        def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
            new_h = tf.tanh(self.preactivation(inputs, states[0]))
            return new_h, [new_h, tf.sin(new_h)]

    model = sequential([L.RNN(Forgetful(), name="rnn")])
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


@pytest.mark.parametrize("case_id", soak_but({"simple_rnn"}, ["simple_rnn", "bare_state"]))
def test_the_graph_does_not_grow_with_the_steps_or_the_chunks(case_id: str) -> None:
    layer = BY_ID[case_id].make()
    inputs = keras.Input((None, FEATURES))
    model = build(keras.Model(inputs, layer(inputs)), PROBE)

    def size_of(steps: int, max_bytes: int) -> int:
        meter = JacobianMeter(model, normal(BATCH, steps, FEATURES), measures=["variance"], max_bytes=max_bytes)
        return operations(meter.graphs[0])

    assert size_of(5, 2**30) == size_of(50, 2**30)
    assert size_of(50, 5000) == size_of(200, 5000)


def test_max_bytes_bounds_the_points_at_once() -> None:
    probe = normal(8, 32, FEATURES)
    model = sequential([L.RNN(WatchedCell(4))], probe.shape[1:])

    def most_at_once(max_bytes: int) -> int:
        with watched_points() as seen:
            measure(model, probe, measures=["variance"], max_bytes=max_bytes)
        # Beside those of a first step, the example that the operators are planned with.
        return max(len(points) for points in seen if len(points) != len(probe))

    assert most_at_once(2**30) == 8 * 32
    for max_bytes in (2**16, 2**14):
        # A point takes some hundred bytes; chunks are of equal size.
        assert max_bytes / 5_000 < most_at_once(max_bytes) < max_bytes / 500
    assert most_at_once(1) == 1


@pytest.mark.filterwarnings("ignore:.*NaN")
def test_one_segment_at_a_time() -> None:
    """TensorFlow may begin ten iterations of a loop at once, which would need the memory of all of them."""
    model, probe = sequential([keras.layers.LSTM(4, name="lstm")]), normal(BATCH, STEPS, FEATURES)
    meter = JacobianMeter(model, probe, measures=["variance", "joint/flow", "joint/lyapunov"], max_bytes=2**13)
    operations = meter.graphs[0].get_operations()
    # Of the steps, forwards for the exponents, and backwards for the flow; the loops in each segment are not in sight.
    assert [op.get_attr("parallel_iterations") for op in operations if "While" in op.type] == [1, 1, 1]


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
