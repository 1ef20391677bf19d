"""`JacobianMonitor` in `fit`: it changes nothing, measures when it should, and its values reach everybody."""

from __future__ import annotations

import csv
import functools
import io
import random
import re
import resource
import shutil
import sys
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from event_files import by_tag, read_summaries
from helpers import BareStateCell, WeightedCell, normal

from keras_jacmon import JacobianMeter, JacobianMonitor, measure
from keras_jacmon.measures.registry import KEYS, PRESETS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

BATCH, STEPS, FEATURES, SAMPLES = 4, 5, 3, 32
BATCHES = SAMPLES // BATCH
X, Y = normal(SAMPLES, STEPS, FEATURES, seed=1), normal(SAMPLES, 1, seed=2)
PROBE = normal(BATCH, STEPS, FEATURES, seed=3)


def compiled(*layers: Any, optimizer: Any = "adam", **compile_arguments: Any) -> Any:
    model = keras.Sequential([keras.Input(batch_shape=(BATCH, STEPS, FEATURES)), *layers, keras.layers.Dense(1)])
    model.compile(optimizer, "mse", metrics=["mae"], **compile_arguments)
    return model


def gru_model(**compile_arguments: Any) -> Any:
    return compiled(keras.layers.GRU(3, name="gru"), **compile_arguments)


def fit(model: Any, *callbacks: Any, epochs: int = 2, **arguments: Any) -> Any:
    return model.fit(
        X, Y, **({"batch_size": BATCH, "epochs": epochs, "verbose": 0, "callbacks": list(callbacks)} | arguments)
    )


def silent(**arguments: Any) -> JacobianMonitor:
    """A monitor that writes no files, and measures what is traced fastest."""
    return JacobianMonitor(PROBE, **({"log_dir": None, "measures": ["variance"]} | arguments))


def steps_of(monitor: JacobianMonitor) -> list[int]:
    return [step for step, _ in monitor.reports]


class Calls(keras.callbacks.Callback):
    """Calls a function at the end of some batches, counted from 1 over all epochs."""

    def __init__(self, batches: int, function: Callable[[], object]) -> None:
        super().__init__()
        self.batches = batches
        self.function = function
        self.seen = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del batch, logs
        self.seen += 1
        if self.seen == self.batches:
            self.function()


# Observation changes nothing ---------------------------------------------------------------------------------------


def dropout_layers() -> list[Any]:
    return [keras.layers.GRU(3, dropout=0.3, recurrent_dropout=0.3, name="gru"), keras.layers.Dropout(0.3)]


def dropout_stack() -> list[Any]:
    cells = [keras.layers.LSTMCell(3, dropout=0.3, recurrent_dropout=0.3), keras.layers.GRUCell(2, dropout=0.3)]
    return [keras.layers.RNN(cells, name="stack")]


def mixed_layers() -> list[Any]:
    return [keras.layers.LSTM(3, name="lstm", dtype="mixed_float16"), keras.layers.Dense(2, dtype="mixed_float16")]


WORLDS: Mapping[str, tuple[Callable[[], list[Any]], dict[str, Any], dict[str, Any]]] = {
    "plain": (lambda: [keras.layers.LSTM(3)], {}, {}),
    "validation": (lambda: [keras.layers.SimpleRNN(3)], {}, {"validation_split": 0.25}),
    "dropout": (dropout_layers, {}, {}),
    "dropout_stack": (dropout_stack, {}, {}),
    # Of the layers of Keras, the one that keeps its mask until the next call.
    "dropout_simple_rnn": (lambda: [keras.layers.SimpleRNN(3, dropout=0.3, recurrent_dropout=0.3)], {}, {}),
    "stateful": (lambda: [keras.layers.LSTM(3, stateful=True)], {}, {"shuffle": False}),
    "stateful_dropout": (lambda: [keras.layers.GRU(3, stateful=True, recurrent_dropout=0.3)], {}, {"shuffle": False}),
    "batch_normalization": (
        lambda: [keras.layers.BatchNormalization(), keras.layers.GRU(3), keras.layers.BatchNormalization()],
        {},
        {},
    ),
    "bidirectional": (lambda: [keras.layers.Bidirectional(keras.layers.GRU(2, dropout=0.3))], {}, {}),
    "mixed_precision": (mixed_layers, {"optimizer": "sgd"}, {}),
    "run_eagerly": (dropout_layers, {"run_eagerly": True}, {"epochs": 1}),
    "jit_compile": (dropout_layers, {"jit_compile": True}, {}),
    "steps_per_execution": (dropout_layers, {"steps_per_execution": 4}, {}),
}


def train(
    world: str, *callbacks: Any, make: Callable[[], list[Any]] | None = None
) -> tuple[dict[str, NDArray[Any]], Any]:
    """Everything that a training leaves behind, and its history."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(5)
    layers, compile_arguments, fit_arguments = WORLDS[world]
    model = compiled(*(make or layers)(), **compile_arguments)
    history = fit(model, *callbacks, **fit_arguments).history
    rnns = [layer for layer in model._flatten_layers() if getattr(layer, "stateful", False)]
    left = {
        "variables": model.variables,
        "optimizer": model.optimizer.variables,
        "metrics": model.metrics_variables,
        "states": keras.tree.flatten([layer.states for layer in rnns]),
        "history": [values for key, values in sorted(history.items()) if "_jac_" not in key],
        # The generators that everything after `fit` draws from.
        "random": [random.random(), np.random.random(), keras.random.uniform(()), tf.random.uniform(())],  # noqa: NPY002, S311 - the global ones are meant
        # A second `fit` from here sees what was left in caches.
        "again": fit(model, **fit_arguments).history["loss"],
    }
    flat = {
        f"{kind} {i}": value.numpy() if hasattr(value, "numpy") else np.array(value)
        for kind, values in left.items()
        for i, value in enumerate(values)
    }
    return flat, history


@functools.cache
def train_without(world: str) -> tuple[dict[str, NDArray[Any]], Any]:
    return train(world)


def assert_same(with_monitor: Mapping[str, NDArray[Any]], without: Mapping[str, NDArray[Any]]) -> None:
    assert list(with_monitor) == list(without)
    for name, value in without.items():
        np.testing.assert_array_equal(with_monitor[name], value, err_msg=name, strict=True)


@pytest.mark.parametrize("world", WORLDS)
def test_observation_changes_nothing(world: str, tmp_path: Path) -> None:
    without, plain_history = train_without(world)
    # What a measure computes is stateless; that all of them are is seen in the plain world.
    measures = None if world == "plain" else ["variance"]
    monitor = JacobianMonitor(PROBE, log_dir=tmp_path, update_freq="batch", measures=measures)
    with_monitor, history = train(world, monitor)
    assert len(monitor.reports) >= 5
    assert any("_jac_" in key for key in history)
    assert [key for key in history if "_jac_" not in key] == list(plain_history)
    assert_same(with_monitor, without)


def test_the_comparison_sees_a_change() -> None:
    def nudge() -> None:
        keras.random.uniform(())

    without, _ = train_without("dropout")
    with pytest.raises(AssertionError, match="random"):
        assert_same(train("dropout", Calls(3, nudge))[0], without)


def test_observation_changes_nothing_beside_tensorboard(tmp_path: Path) -> None:
    def tensorboard(name: str) -> Any:
        return keras.callbacks.TensorBoard(tmp_path / name, update_freq=5, histogram_freq=1)

    def monitor(name: str) -> Any:
        return silent(log_dir=tmp_path / name, update_freq="batch")

    without, _ = train("dropout", tensorboard("without"))
    assert_same(train("dropout", monitor("first"), tensorboard("first"))[0], without)
    assert_same(train("dropout", tensorboard("last"), monitor("last"))[0], without)


def test_a_dataset_as_probe_changes_nothing() -> None:
    without, _ = train_without("dropout")
    probe = tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH)
    assert_same(train("dropout", JacobianMonitor(probe, log_dir=None, measures=["variance"]))[0], without)


@pytest.mark.filterwarnings("ignore:Measuring the Jacobians failed")
def test_a_measurement_that_fails_changes_nothing() -> None:
    def make() -> list[Any]:
        return [keras.layers.RNN(FailingCell(3), name="rnn"), keras.layers.Dropout(0.3)]

    def break_cell() -> None:
        monitor.model.get_layer("rnn").cell.broken.assign(1)

    def break_nothing() -> None:
        keras_model.append(None)

    keras_model: list[None] = []
    without, _ = train("plain", Calls(3, break_nothing), make=make)
    monitor = silent(update_freq="batch")
    with pytest.warns(UserWarning, match="rnn"):
        with_monitor, _ = train("plain", monitor, Calls(3, break_cell), make=make)
    # The counter that breaks the cell is the one variable that differs.
    broken = {name for name, value in without.items() if not np.array_equal(value, with_monitor[name], equal_nan=True)}
    assert len(broken) == 1
    assert next(iter(broken)).startswith("variables")


# When it measures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("update_freq", "expected"),
    [
        ("epoch", [0, 8, 16]),
        ("batch", list(range(17))),
        (1, list(range(17))),
        (3, [0, 3, 6, 9, 12, 15, 16]),
        (8, [0, 8, 16]),
        (100, [0, 16]),
    ],
)
def test_update_freq(update_freq: int | str, expected: list[int]) -> None:
    monitor = silent(update_freq=update_freq)
    fit(gru_model(), monitor)
    assert steps_of(monitor) == expected
    assert all(type(step) is int for step, _ in monitor.reports)


@pytest.mark.parametrize(
    ("update_freq", "expected"),
    [
        ("epoch", [0, 8, 16]),
        ("batch", [0, 4, 8, 12, 16]),
        (4, [0, 4, 8, 12, 16]),
        (8, [0, 8, 16]),
        (100, [0, 16]),
    ],
)
def test_update_freq_with_steps_per_execution(update_freq: int | str, expected: list[int]) -> None:
    monitor = silent(update_freq=update_freq)
    fit(gru_model(steps_per_execution=4), monitor)
    assert steps_of(monitor) == expected


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_a_dataset_of_unknown_length() -> None:
    def batches() -> Any:
        for start in range(0, SAMPLES, BATCH):
            yield X[start : start + BATCH], Y[start : start + BATCH]

    signature = (tf.TensorSpec((BATCH, STEPS, FEATURES)), tf.TensorSpec((BATCH, 1)))
    data = tf.data.Dataset.from_generator(batches, output_signature=signature)
    ends = []

    class Ends(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            del epoch, logs
            ends.append(int(self.model.optimizer.iterations.numpy()))

    monitor = silent()
    gru_model().fit(data, epochs=2, verbose=0, shuffle=False, callbacks=[monitor, Ends()])
    # Not 8 and 16: the batch that finds no more data is counted by the optimizer.
    assert steps_of(monitor) == [0, *ends]
    assert len(ends) == 2


def test_reports_are_those_of_their_moment() -> None:
    """Each report equals what `measure` says of the weights that the model had then."""
    monitor = silent(update_freq=4)
    model = gru_model()
    expected = [measure(model, PROBE, measures=["variance"]).scalars()]

    class Measure(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            del logs
            if batch % 4 == 3:
                expected.append(measure(model, PROBE, measures=["variance"]).scalars())

    fit(model, monitor, Measure(), epochs=1)
    assert steps_of(monitor) == [0, 4, 8]
    assert len({values["gru_jac_variance"] for values in expected}) == 3
    for (_, report), values in zip(monitor.reports, expected, strict=True):
        assert report.scalars() == pytest.approx(values, rel=1e-6)


def test_nothing_is_measured_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    measured = JacobianMeter.__call__

    def counting(meter: JacobianMeter, *, slow: bool) -> Any:
        calls.append(meter)
        return measured(meter, slow=slow)

    monkeypatch.setattr(JacobianMeter, "__call__", counting)
    monitor = silent(update_freq=4)
    fit(gru_model(), monitor)
    assert steps_of(monitor) == [0, 4, 8, 12, 16]
    assert len(calls) == 5
    assert len(set(map(id, calls))) == 1


def test_slow_measures_have_a_rhythm_of_their_own() -> None:
    monitor = silent(measures=["variance", "lyapunov"], update_freq="batch", slow_freq=3)
    history = fit(gru_model(), monitor, epochs=1).history
    assert steps_of(monitor) == [*range(9)]
    assert [step for step, report in monitor.reports if report["gru"].sequences] == [0, 3, 6, 8]
    assert all("variance" in report["gru"].values for _, report in monitor.reports)
    newest = monitor.reports[6][1].scalars()["gru_jac_lyapunov_1"]
    assert history["gru_jac_lyapunov_1"] == [newest]
    by_epoch = silent(measures=["variance", "lyapunov"])
    fit(gru_model(), by_epoch, epochs=3)
    assert [bool(report["gru"].sequences) for _, report in by_epoch.reports] == [True, False, False, True]
    # Also if nobody knew that the training would end there.
    stopped = silent(measures=["variance", "lyapunov"])
    fit(gru_model(), Calls(12, lambda: setattr(stopped.model, "stop_training", True)), stopped, epochs=5)
    assert [(step, bool(report["gru"].sequences)) for step, report in stopped.reports] == [
        (0, True), (8, False), (12, True),
    ]  # fmt: skip


class CountingCell(WeightedCell):
    """Counts how often Python runs it, that is: how often it is traced."""

    traced = 0

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        self.traced += 1
        new_h = tf.tanh(self.preactivation(inputs, states[0]))
        return new_h, [new_h]


def test_a_second_fit_uses_the_same_trace() -> None:
    cell = CountingCell(3)
    model = compiled(keras.layers.RNN(cell, name="rnn"))
    monitor = silent(update_freq="batch")
    fit(model, monitor, epochs=1)
    traced = cell.traced
    fit(model, monitor, epochs=2)
    assert cell.traced == traced
    assert steps_of(monitor) == [*range(9), *range(8, 25)]


def test_another_model_is_traced_anew() -> None:
    monitor = silent()
    fit(gru_model(), monitor, epochs=1)
    fit(compiled(keras.layers.LSTM(2, name="lstm")), monitor, epochs=1)
    assert [set(report.layers) for _, report in monitor.reports] == [{"gru"}, {"gru"}, {"lstm"}, {"lstm"}]


def test_evaluate_and_predict_do_not_measure() -> None:
    model = gru_model()
    monitor = silent()
    model.evaluate(X, Y, batch_size=BATCH, verbose=0, callbacks=[monitor])
    model.predict(X, batch_size=BATCH, verbose=0, callbacks=[monitor])
    assert monitor.reports == []


# Whom the values reach ---------------------------------------------------------------------------------------------


def test_history_has_the_values_of_each_epoch() -> None:
    monitor = silent(measures=None)
    history = fit(compiled(keras.layers.LSTM(3, name="lstm")), monitor, epochs=3).history
    keys = {
        f"lstm_jac_{view}{name}"
        for view in ("", "joint_")
        for name in ("variance", "rms_singular_value", "spectral_norm")
    }
    keys |= {"lstm_jac_joint_growth", "lstm_jac_joint_horizon"}
    assert {key for key in history if "_jac_" in key} == keys == set(monitor.reports[0][1].scalars())
    for key in keys:
        assert history[key] == [report.scalars()[key] for _, report in monitor.reports[1:]]
        assert all(type(value) is float for value in history[key])


def test_logs_hold_the_newest_report_when_measuring_is_rarer_than_an_epoch() -> None:
    monitor = silent(update_freq=12)
    history = fit(gru_model(), monitor, epochs=3).history
    assert steps_of(monitor) == [0, 12, 24]
    values = [report.scalars()["gru_jac_variance"] for _, report in monitor.reports]
    assert history["gru_jac_variance"] == [values[0], values[1], values[2]]


def test_csv_logger(tmp_path: Path) -> None:
    monitor = silent()
    fit(gru_model(), monitor, keras.callbacks.CSVLogger(tmp_path / "log.csv"))
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    written = [float(row["gru_jac_variance"]) for row in rows]
    assert written == [report.scalars()["gru_jac_variance"] for _, report in monitor.reports[1:]]


def test_early_stopping() -> None:
    stopping = keras.callbacks.EarlyStopping(monitor="gru_jac_variance", mode="max", patience=2)
    model = gru_model(optimizer=keras.optimizers.SGD(0.0))
    history = fit(model, silent(), stopping, epochs=9).history
    assert len(history["loss"]) == 3


def test_model_checkpoint(tmp_path: Path) -> None:
    monitor = silent()
    checkpoint = keras.callbacks.ModelCheckpoint(
        str(tmp_path / "{epoch}-{gru_jac_variance:.6f}.keras"), monitor="gru_jac_variance", mode="max"
    )
    fit(gru_model(), monitor, checkpoint)
    values = [report.scalars()["gru_jac_variance"] for _, report in monitor.reports[1:]]
    expected = {f"{epoch}-{value:.6f}.keras" for epoch, value in enumerate(values, 1)}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_saved_model_does_not_know_the_monitor(tmp_path: Path) -> None:
    model = gru_model()
    fit(model, silent())
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(PROBE, verbose=0), model.predict(PROBE, verbose=0))


def test_progress_line(capsys: pytest.CaptureFixture[str]) -> None:
    fit(gru_model(), silent(), verbose=2)
    assert len(re.findall(r"gru_jac_variance: \d", capsys.readouterr().out)) == 2


def test_a_report_that_cannot_be_printed_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal may not know `±`, and the reader of a pipe may be gone."""

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(text[:0])

    monitor = silent(verbose=1)
    monkeypatch.setattr(sys, "stdout", Broken())
    with pytest.warns(UserWarning, match="^Printing the report at step 0 failed. BrokenPipeError"):
        fit(gru_model(), monitor)
    assert steps_of(monitor) == [0, 8, 16]


def test_so_many_reports_are_kept() -> None:
    """As the README says, without being asked to."""
    monitor, model = silent(), gru_model()
    report = measure(model, PROBE, measures=["variance"])
    monitor.reports.extend((step - 1000, report) for step in range(1000))
    fit(model, monitor)
    assert 500 <= len(monitor.reports) <= 1000
    assert steps_of(monitor)[-3:] == [0, 8, 16]


# Models that are not built -------------------------------------------------------------------------------------------


def test_a_model_is_built_for_any_number_of_samples() -> None:
    """Its shape is saved with it; without the monitor it would be that of the first batch."""
    model = keras.Sequential([keras.layers.LSTM(3), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    fit(model, silent(), batch_size=2 * BATCH)
    assert model.input_shape == (None, STEPS, FEATURES)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_model_that_has_seen_another_batch(loaded: bool, tmp_path: Path) -> None:  # noqa: FBT001 - pytest passes it by name
    model = keras.Sequential([keras.layers.GRU(3, name="gru"), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    fit(model, batch_size=2 * BATCH)
    assert model.input_shape == (2 * BATCH, STEPS, FEATURES)
    if loaded:
        model.save(tmp_path / "model.keras")
        model = keras.saving.load_model(tmp_path / "model.keras")
    for probe in (PROBE[:1], PROBE[:, :3]):
        report = measure(model, probe, measures=["variance"])
        assert report["gru"]["variance"].shape == probe.shape[1::-1]
    monitor = silent()
    fit(model, monitor)
    assert steps_of(monitor)[-1] > 0
    with pytest.raises(ValueError, match=r"Expected shape \(None, None, 3\)"):
        measure(model, PROBE[..., :2])


def test_a_stateful_model_must_be_built_before() -> None:
    model = keras.Sequential([keras.layers.GRU(3, stateful=True), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    sentence = (
        f"The model `{model.name}` is not built, and cannot be built from the probe: it has stateful layers, whose "
        "states are made for one size of batch. Build it before, by calling it on a batch of the training."
    )
    assert_refused(model, f"^{re.escape(sentence)}$")
    model(PROBE)
    fit(model, silent())


def test_reading_a_dataset_draws_no_random_numbers() -> None:
    class Noisy(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            return PROBE + np.random.normal(size=PROBE.shape) + random.random()  # noqa: NPY002, S311 - as users do

    model = gru_model()
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    measure(model, Noisy(), measures=["variance"])
    found = np.random.normal(), random.random()  # noqa: NPY002, S311
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    assert found == (np.random.normal(), random.random())  # noqa: NPY002, S311


# Resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["backup_first", "backup_last"])
def test_a_resumed_training_goes_on_where_it_stopped(order: str, tmp_path: Path) -> None:
    def resumable(*others: Any) -> JacobianMonitor:
        keras.utils.set_random_seed(5)
        monitor = silent(log_dir=tmp_path / "logs")
        callbacks = [monitor, keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)]
        fit(gru_model(), *(callbacks if order == "backup_last" else callbacks[::-1]), *others)
        return monitor

    def crash() -> None:
        raise RuntimeError("crash")

    crashed = []
    with pytest.raises(RuntimeError, match="crash"):
        crashed.append(resumable(Calls(11, crash)))
    resumed = resumable()
    assert steps_of(resumed) == [8, 16]
    written = [summary for summary in read_summaries(tmp_path / "logs") if summary.tag == "gru/variance"]
    assert sorted(summary.step for summary in written) == [0, 8, 8, 16]
    # The first report of the second run is about the restored weights.
    at_8 = [float(summary.value) for summary in written if summary.step == 8]
    assert at_8[0] == pytest.approx(at_8[1], rel=1e-6)


def test_a_resumed_rhythm_goes_on_where_it_stopped() -> None:
    model, monitor = gru_model(), silent(update_freq=3)
    fit(model, monitor, epochs=1)
    assert steps_of(monitor) == [0, 3, 6, 8]
    fit(model, monitor, epochs=1)
    assert steps_of(monitor)[4:] == [8, 9, 12, 15, 16]


def test_the_options_reach_the_measurement() -> None:
    model = compiled(keras.layers.RNN(BareStateCell(3), name="rnn"))
    options: dict[str, Any] = {"seed": 3, "tolerance": 0.5, "max_entries": 1, "max_bytes": 10_000}
    options["measures"] = ["variance"]
    monitor = silent(**options)
    fit(model, Calls(100, list), monitor, epochs=1)
    expected = measure(model, PROBE, **options)["rnn"]
    last = monitor.reports[-1][1]["rnn"]
    assert last.estimated == expected.estimated != frozenset()
    for key, values in expected.values.items():
        np.testing.assert_array_equal(last[key], values, strict=True)
    for option, other in (("seed", 4), ("max_entries", 10_000)):
        different = measure(model, PROBE, **(options | {option: other}))["rnn"]
        assert np.any(different["variance"] != expected["variance"]), option


# Probes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "probe",
    [
        PROBE,
        tf.constant(PROBE),
        PROBE.astype("float64"),
        tf.data.Dataset.from_tensor_slices(PROBE).batch(BATCH),
        tf.data.Dataset.from_tensor_slices((PROBE, Y[:BATCH])).batch(BATCH).repeat(),
        tf.data.Dataset.from_tensor_slices((PROBE, Y[:BATCH], Y[:BATCH, 0])).batch(BATCH),
    ],
    ids=["array", "tensor", "float64", "dataset", "dataset_of_pairs", "dataset_of_triples"],
)
def test_forms_of_a_probe(probe: Any) -> None:
    model = gru_model()
    expected = measure(model, PROBE, measures=["variance"])
    monitor = JacobianMonitor(probe, log_dir=None, measures=["variance"])
    model.fit(X[:BATCH], Y[:BATCH], verbose=0, callbacks=[monitor])
    assert monitor.reports[0][1].scalars() == pytest.approx(expected.scalars(), rel=1e-6)


@pytest.mark.parametrize("structure", ["list", "dict"])
def test_several_inputs(structure: str) -> None:
    inputs = {"a": keras.Input((STEPS, FEATURES), name="a"), "b": keras.Input((2,), name="b")}
    joined = keras.layers.Concatenate()([keras.layers.GRU(3, name="gru")(inputs["a"]), inputs["b"]])
    outputs = keras.layers.Dense(1)(joined)
    model = keras.Model(inputs if structure == "dict" else list(inputs.values()), outputs)
    model.compile("sgd", "mse")

    def pack(a: Any, b: Any) -> Any:
        return {"a": a, "b": b} if structure == "dict" else [a, b]

    monitor = JacobianMonitor(pack(PROBE, normal(BATCH, 2)), log_dir=None, measures=["variance"])
    model.fit(pack(X, normal(SAMPLES, 2)), Y, verbose=0, callbacks=[monitor])
    assert set(monitor.reports[0][1].layers) == {"gru"}


# Bad input ---------------------------------------------------------------------------------------------------------


def invalid(argument: str, sentence: str) -> str:
    return f"^{re.escape(f'Invalid value for argument `{argument}`. {sentence}')}$"


UPDATE_FREQ = "Expected 'epoch', 'batch' or a positive integer. Received: update_freq="
NAMES = [key for key in KEYS if key != "loss_gradient"]
MEASURES = f"Expected names out of {list(PRESETS)}, or of {NAMES}. Received: "
TOLERANCE = "Expected a relative tolerance from 0 up to, not including, 1. Received: tolerance="


@pytest.mark.parametrize(
    ("argument", "value", "sentence"),
    [
        ("update_freq", 0, f"{UPDATE_FREQ}0"),
        ("update_freq", -3, f"{UPDATE_FREQ}-3"),
        ("update_freq", 2.5, f"{UPDATE_FREQ}2.5"),
        ("update_freq", True, f"{UPDATE_FREQ}True"),
        ("update_freq", "often", f"{UPDATE_FREQ}'often'"),
        ("update_freq", None, f"{UPDATE_FREQ}None"),
        ("slow_freq", 0, "Expected an integer of at least 1. Received: slow_freq=0"),
        ("thin_after", 0, "Expected an integer of at least 1. Received: thin_after=0"),
        ("max_reports", 1, "Expected an integer of at least 2. Received: max_reports=1"),
        ("max_reports", None, "Expected an integer of at least 2. Received: max_reports=None"),
        ("on_error", "ignore", "Expected 'warn' or 'raise'. Received: on_error='ignore'"),
        ("measures", ["variance", "norm"], f"{MEASURES}['variance', 'norm']"),
        ("measures", "norm", f"{MEASURES}['norm']"),
        ("measures", [], f"{MEASURES}[]"),
        ("tolerance", -0.1, f"{TOLERANCE}-0.1"),
        ("tolerance", 1, f"{TOLERANCE}1"),
        ("tolerance", float("nan"), f"{TOLERANCE}nan"),
        ("seed", 0.5, "Expected an integer. Received: seed=0.5"),
        ("max_bytes", 0, "Expected an integer of at least 1. Received: max_bytes=0"),
        ("max_rows", 0, "Expected a positive integer, or None for all. Received: max_rows=0"),
        ("exact_flow", 1, "Expected True or False. Received: exact_flow=1"),
        ("max_entries", -1, "Expected an integer of at least 0. Received: max_entries=-1"),
    ],
)
def test_a_bad_argument_is_refused_without_a_model(argument: str, value: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=invalid(argument, sentence)):
        JacobianMonitor(PROBE, **{argument: value})


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError, match=r"JacobianMonitor\(\) got an unexpected keyword argument 'tolerence'"):
        JacobianMonitor(PROBE, tolerence=0.1)


def with_nan() -> Any:
    probe = PROBE.copy()
    probe[1, 2, 0], probe[3, 0, 1] = np.nan, np.inf
    return probe


SHUFFLED = (
    "Expected a dataset that does not shuffle (reading one that does changes the order that training sees); pass a "
    "batch instead, e.g. `x[:32]`, or build the probe before `shuffle()`. Received: a dataset with `shuffle()`"
)
ITERATOR = (
    "Expected an array, tensor, dict, list or dataset: a batch taken from an iterator would be missing in the training"
    ". Received: "
)


@pytest.mark.parametrize(
    ("make_probe", "sentence"),
    [
        (lambda: PROBE[:0], "Expected at least one sample and one step. Received: an array of shape (0, 5, 3)"),
        (lambda: PROBE[:, :0], "Expected at least one sample and one step. Received: an array of shape (4, 0, 3)"),
        (lambda: np.float32(1.0), "Expected at least one sample and one step. Received: an array of shape ()"),
        (list, "Expected a batch of model inputs. Received: []"),
        (dict, "Expected a batch of model inputs. Received: {}"),
        (with_nan, "Expected finite numbers. Received: an array of shape (4, 5, 3) with 2 NaN or Inf"),
        (lambda: np.array([None]), "Expected numbers. Received: an array of dtype object"),
        (lambda: None, "Expected numbers. Received: an array of dtype object"),
        (
            lambda: tf.ragged.constant([[1.0], [1.0, 2.0]]),
            "Expected dense arrays; pad them and mask the padding. Received: RaggedTensor",
        ),
        (
            lambda: [PROBE, PROBE[:2]],
            "Expected the same number of samples in each input. Received: batch sizes [2, 4]",
        ),
        (lambda: tf.data.Dataset.from_tensor_slices(X).shuffle(8).batch(4), SHUFFLED),
        (lambda: tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(8).batch(4).map(lambda x, _: x).take(1), SHUFFLED),
        (
            lambda: tf.data.Dataset.from_tensor_slices(X).batch(4).take(0),
            "Expected a dataset with at least one batch. Received: an empty dataset",
        ),
        (lambda: iter([PROBE]), f"{ITERATOR}list_iterator"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_bad_probe_is_refused_without_a_model(make_probe: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=invalid("probe", sentence)):
        JacobianMonitor(make_probe())


class Begun(keras.callbacks.Callback):
    begun = False

    def on_train_begin(self, logs: Any = None) -> None:
        del logs
        self.begun = True


def assert_refused(model: Any, pattern: str, probe: Any = PROBE, **arguments: Any) -> None:
    """`fit` raises the sentence before any callback's `on_train_begin` and before the first batch."""
    monitor = JacobianMonitor(probe, **({"log_dir": None} | arguments))
    begun = Begun()
    before = model.get_weights()
    with pytest.raises(ValueError, match=pattern):
        fit(model, begun, monitor)
    assert not begun.begun
    assert monitor.reports == []
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then, strict=True)


def test_no_recurrent_layer() -> None:
    model = keras.Sequential([keras.Input((STEPS, FEATURES)), keras.layers.Dense(1)], name="flat")
    model.compile("sgd", "mse")
    sentence = (
        "Expected a model with at least one recurrent layer (`keras.layers.RNN` or a subclass). "
        "Received: model=flat (Sequential) with the layers ['Dense', 'InputLayer']"
    )
    assert_refused(model, invalid("model", sentence))


@pytest.mark.parametrize(
    ("layers", "received"),
    [
        (["lstm"], "'lstm'"),
        ("lstm", "'lstm'"),
        (["gru", "dense"], "'dense'"),
        (keras.layers.LSTM(2, name="foreign"), "foreign (a layer)"),
    ],
    ids=str,
)
def test_unknown_layer(layers: Any, received: str) -> None:
    sentence = f"Expected recurrent layers of the model: ['gru']. Received: {received}"
    assert_refused(gru_model(), invalid("layers", sentence), layers=layers)


def test_no_layer_wanted() -> None:
    sentence = "Expected at least one layer, or None for every recurrent layer. Received: layers=[]"
    assert_refused(gru_model(), invalid("layers", sentence), layers=[])


@pytest.mark.parametrize(
    ("probe", "sentence"),
    [
        (PROBE[..., :2], "Expected shape (None, 5, 3) for input `x`. Received: an array of shape (4, 5, 2)"),
        (PROBE[:, :4], "Expected shape (None, 5, 3) for input `x`. Received: an array of shape (4, 4, 3)"),
        (PROBE[0], "Expected shape (None, 5, 3) for input `x`. Received: an array of shape (5, 3)"),
        ([PROBE, PROBE], "Expected 1 input(s), as the model takes them. Received: 2 array(s)"),
        ({"y": PROBE}, "Expected a dict with the model's inputs ['x']. Received: a dict with ['y']"),
        (
            np.full((4, 5, 3), "word"),
            "Expected dtype float32 for input `x`. Received: an array of dtype <U4",
        ),
    ],
    ids=["features", "steps", "rank", "number", "names", "dtype"],
)
def test_a_probe_that_does_not_fit(probe: Any, sentence: str) -> None:
    model = keras.Sequential([keras.Input((STEPS, FEATURES), name="x"), keras.layers.GRU(3), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    assert_refused(model, invalid("probe", sentence), probe)


def test_fractions_for_whole_numbers() -> None:
    model = keras.Sequential(
        [keras.Input((STEPS,), dtype="int32", name="ids"), keras.layers.Embedding(9, 2), keras.layers.GRU(3)]
    )
    model.compile("sgd", "mse")
    sentence = "Expected whole numbers (dtype int32) for input `ids`. Received: fractions of dtype float32"
    assert_refused(model, invalid("probe", sentence), PROBE[..., 0])


def test_a_batch_that_a_stateful_layer_does_not_accept() -> None:
    model = compiled(keras.layers.LSTM(3, stateful=True, name="lstm"))
    sentence = f"Expected shape (4, 5, 3) for input `{model.inputs[0].name}`. Received: an array of shape (3, 5, 3)"
    assert_refused(model, invalid("probe", sentence), PROBE[:3])


def test_a_batch_that_a_stateful_layer_in_a_subclassed_model_does_not_accept() -> None:
    class Subclassed(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = keras.layers.LSTM(3, stateful=True, name="lstm")

        def call(self, inputs: Any) -> Any:
            return self.lstm(inputs)

    model = Subclassed()
    model(PROBE)
    model.compile("sgd", "mse")
    sentence = (
        "Invalid value for argument `probe`. Expected a batch of 4 samples, as the stateful layer `lstm` was built for"
        ". Received: shapes [(3, 5, 3)], for which the model raised "
    )
    assert_refused(model, f"^{re.escape(sentence)}", PROBE[:3])


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_a_log_dir_that_cannot_be_written(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    log_dir = tmp_path / below
    sentence = (
        "Invalid value for argument `log_dir`. Expected a directory that can be written to, or None to write no event "
        f"files. Received: log_dir={str(log_dir)!r} ("
    )
    assert_refused(gru_model(), f"^{re.escape(sentence)}", log_dir=log_dir)


# Later trouble -----------------------------------------------------------------------------------------------------


class FailingCell(WeightedCell):
    """Computes in training, and in inference too until `broken` is set: then its graph fails."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        super().build(input_shape)
        self.broken = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name="broken")

    def call(self, inputs: Any, states: Any, training: bool = False) -> tuple[Any, list[Any]]:  # noqa: FBT001, FBT002 - Keras' signature
        new_h = tf.tanh(self.preactivation(inputs, states[0]))
        if not training:
            with tf.control_dependencies([tf.debugging.assert_equal(self.broken, 0, "the cell is broken")]):
                new_h = tf.identity(new_h)
        return new_h, [new_h]


def fit_until_broken(monitor: JacobianMonitor, *callbacks: Any) -> Any:
    """A training of two epochs in which measuring fails from the third batch on."""
    model = compiled(keras.layers.RNN(FailingCell(3), name="rnn"))
    broken = model.get_layer("rnn").cell.broken
    return fit(model, Calls(3, lambda: broken.assign(1)), monitor, *callbacks)


def user_warnings(caught: Any) -> list[str]:
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


def assert_warned_once(caught: Any, monitor: JacobianMonitor, what: str, times: int, error: str) -> None:
    """One warning names the step and the error; what failed later is kept."""
    (warning,) = user_warnings(caught)
    rest = "\nTraining goes on. Further failures are not warned of, but kept in `JacobianMonitor.failures`."
    assert re.fullmatch(f"{what} at step 3 failed\\. {error}{re.escape(rest)}", warning), warning
    assert len(monitor.failures) == times
    assert monitor.failures[0] == warning.removesuffix(rest)
    assert all(failure.startswith(f"{what} at step ") for failure in monitor.failures)


# TensorFlow's own message goes on for dozens of lines.
FAILED = r"Measuring layer `rnn` failed: assertion failed: \[the cell is broken\].*(\n.*){,2}"


def test_a_failing_measurement_warns_once_and_training_goes_on() -> None:
    monitor = silent(update_freq="batch")
    with pytest.warns(UserWarning, match="failed") as caught:
        history = fit_until_broken(monitor).history
    assert_warned_once(caught, monitor, "Measuring the Jacobians", 14, f"RuntimeError: {FAILED}")
    assert steps_of(monitor) == [0, 1, 2]
    assert len(history["loss"]) == 2
    # Not the values of step 2: nothing is known of the weights at the end of the epoch.
    assert np.isnan(history["rnn_jac_variance"]).all()


def test_a_failing_measurement_raises_if_told_so() -> None:
    monitor = silent(update_freq="batch", on_error="raise")
    with pytest.raises(RuntimeError, match=f"^{FAILED}"):
        fit_until_broken(monitor)
    assert steps_of(monitor) == [0, 1, 2]


def test_a_failure_names_the_layer_that_it_is_in() -> None:
    model = compiled(
        keras.layers.GRU(3, return_sequences=True, name="fine"),
        keras.layers.RNN(FailingCell(3), name="rnn"),
    )
    meter = JacobianMeter(model, PROBE, measures=["variance"], layers=["rnn"])
    model.get_layer("rnn").cell.broken.assign(1)
    # Whether the model's own pass or the measurement fails first is up to TensorFlow's scheduler.
    for _ in range(5):
        with pytest.raises(RuntimeError, match=f"^{FAILED}$"):
            meter()


def test_a_failure_outside_of_the_recurrent_layers_says_so() -> None:
    class Broken(keras.layers.Layer):
        broken = tf.Variable(initial_value=False)

        def call(self, x: Any) -> Any:
            with tf.control_dependencies([tf.debugging.assert_equal(self.broken, False, "out of order")]):  # noqa: FBT003
                return tf.identity(x)

    broken = Broken()
    meter = JacobianMeter(compiled(broken, keras.layers.GRU(3)), PROBE, measures=["variance"])
    broken.broken.assign(True)  # noqa: FBT003 - the only way
    with pytest.raises(
        RuntimeError, match=r"^Measuring the model, outside of its recurrent layers, failed: .*out of order"
    ):
        meter()


def test_a_training_after_a_failure_warns_again() -> None:
    model = compiled(keras.layers.RNN(FailingCell(3), name="rnn"))
    monitor = silent(update_freq=100)
    fit(model, monitor, epochs=1)
    model.get_layer("rnn").cell.broken.assign(1)
    for _ in range(2):
        with pytest.warns(UserWarning, match="failed") as caught:
            fit(model, monitor, epochs=1)
        (warning,) = user_warnings(caught)
        assert re.search(FAILED, warning)
    assert len(monitor.failures) == 4


def full_disk() -> None:
    """No file may grow beyond a size that the event file has already reached."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def _disk_is_emptied() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("_disk_is_emptied")
def test_a_full_disk_warns_once_and_training_goes_on(tmp_path: Path) -> None:
    monitor = silent(update_freq="batch", log_dir=tmp_path)
    with pytest.warns(UserWarning, match="failed") as caught:
        history = fit(gru_model(), Calls(3, full_disk), monitor, epochs=1).history
    assert_warned_once(caught, monitor, "Writing the event file", 6, r"OSError: .*File too large.*(\n.*)*")
    assert not tf.summary.should_record_summaries()
    assert steps_of(monitor) == list(range(9))
    assert np.isfinite(history["gru_jac_variance"]).all()


@pytest.mark.parametrize("what", ["directory", "directory, and made again", "file"])
def test_a_log_directory_that_is_removed_warns_once(tmp_path: Path, what: str) -> None:
    monitor, directory = silent(update_freq="batch", log_dir=tmp_path), tmp_path / "jacobian"

    def remove() -> None:
        if what == "file":
            (file,) = directory.iterdir()
            file.unlink()
            return
        shutil.rmtree(directory)
        if what != "directory":
            directory.mkdir()

    with pytest.warns(UserWarning, match="Writing the event file") as caught:
        fit(gru_model(), Calls(3, remove), monitor)
    lost = f"FileNotFoundError: the event file in {directory} was removed, and the events in it are lost"
    assert_warned_once(caught, monitor, "Writing the event file", 1, re.escape(lost))
    # From the next report on there is a new file.
    assert steps_of(monitor) == list(range(17))
    assert [summary.step for summary in by_tag(read_summaries(tmp_path), "gru/variance")] == list(range(4, 17))


@pytest.mark.usefixtures("_disk_is_emptied")
def test_a_full_disk_raises_if_told_so(tmp_path: Path) -> None:
    monitor = silent(update_freq="batch", log_dir=tmp_path, on_error="raise")
    # Keras takes an `OutOfRangeError`, which is what TensorFlow makes of this one, for the end of the data.
    with pytest.raises((RuntimeError, OSError), match="File too large"):
        fit(gru_model(), Calls(3, full_disk), monitor)


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_an_interrupt_is_not_swallowed(on_error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: JacobianMeter, *, slow: bool) -> Any:  # noqa: ARG001 - as the meter's own
        raise KeyboardInterrupt

    monitor = silent(on_error=on_error)
    model = gru_model()
    monkeypatch.setattr(JacobianMeter, "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(model, monitor)


def test_nan_is_logged_as_nan_and_named() -> None:
    model = compiled(keras.layers.GRU(3, return_sequences=True, name="fine"), keras.layers.GRU(3, name="exploded"))
    weights = model.get_layer("exploded").trainable_weights

    def explode() -> None:
        for weight in weights:
            weight.assign(np.full(weight.shape, np.nan))

    monitor = silent(measures=None)
    with pytest.warns(UserWarning, match="exploded") as caught:
        history = fit(model, Calls(8, explode), monitor, epochs=1).history
    [message] = user_warnings(caught)
    assert message == (
        "Layer `exploded` has NaN or Inf in its Jacobians at step 8: 20 of `variance`, 20 of `rms_singular_value`, "
        "20 of `spectral_norm`. They are logged as they are; later ones of this layer are not warned of."
    )
    assert np.isnan(history["exploded_jac_variance"]).all()
    assert np.isfinite(history["fine_jac_variance"]).all()
    assert steps_of(monitor) == [0, 8]


def test_nan_warns_once() -> None:
    model = gru_model()
    model.set_weights([np.full_like(weight, np.nan) for weight in model.get_weights()])
    with pytest.warns(UserWarning, match="Layer `gru` has NaN") as caught:
        fit(model, silent(update_freq="batch"))
    assert len(user_warnings(caught)) == 1


def test_infinite_values_do_not_raise_even_if_errors_do() -> None:
    model = gru_model()
    model.set_weights([np.full_like(weight, np.inf) for weight in model.get_weights()])
    with pytest.warns(UserWarning, match="gru"):
        history = fit(model, silent(on_error="raise"), epochs=1).history
    assert not np.isfinite(history["gru_jac_variance"]).any()
