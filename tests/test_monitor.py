"""`JacobianMonitor` in `fit`: it changes nothing, measures when it should, and its values reach everybody."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import os
import random
import re
import sys
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import trainings
from event_files import by_tag, read_summaries
from helpers import BareStateCell, WeightedCell, soak_but
from recurrences import ScanRNN, of_scan_rnn
from trainings import (
    BATCH,
    FEATURES,
    PROBE,
    SAMPLES,
    STEPS,
    AtBatch,
    AtInference,
    FailingCell,
    X,
    Y,
    assert_refused,
    quick_monitor,
    steps_of,
    usual,
)

from keras_jacmon import JacobianMonitor, measure, register_recurrence

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray


def compiled(*layers: Any, **arguments: Any) -> Any:
    return trainings.compiled(*layers, batch_size=BATCH, metrics=["mae"], **arguments)


def fit(model: Any, *callbacks: Any, **arguments: Any) -> Any:
    return trainings.fit(model, *callbacks, **({"epochs": 2} | arguments))


# Observation changes nothing ---------------------------------------------------------------------------------------


def dropout_layers() -> list[Any]:
    # Of the layers of Keras, the one that keeps its mask until the next call.
    rnn = keras.layers.SimpleRNN(3, dropout=0.3, recurrent_dropout=0.3, name="rnn")
    return [rnn, keras.layers.Dropout(0.3)]


def dropout_stack() -> list[Any]:
    cells = [keras.layers.LSTMCell(3, dropout=0.3, recurrent_dropout=0.3), keras.layers.GRUCell(2, dropout=0.3)]
    return [keras.layers.RNN(cells, name="stack")]


def mixed_layers() -> list[Any]:
    return [
        keras.layers.BatchNormalization(),
        keras.layers.SimpleRNN(3, stateful=True, recurrent_dropout=0.3, return_sequences=True),
        *half_precision_layers(),
    ]


def half_precision_layers() -> list[Any]:
    return [
        keras.layers.LSTM(3, name="lstm", dtype="mixed_float16"),
        keras.layers.Dense(2, dtype="mixed_float16", name="half"),
    ]


def scan_layers() -> list[Any]:
    layer = ScanRNN(3, name="scan")
    register_recurrence(layer, of_scan_rnn)
    return [keras.layers.Dropout(0.3), layer]


WORLDS: Mapping[str, tuple[Callable[[], list[Any]], dict[str, Any], dict[str, Any]]] = {
    "scan": (scan_layers, {}, {}),
    "plain": (lambda: [keras.layers.LSTM(3)], {"optimizer": "adam"}, {}),
    "validation": (lambda: [keras.layers.SimpleRNN(3)], {}, {"validation_split": 0.25}),
    "dropout": (dropout_layers, {}, {}),
    "dropout_stack": (dropout_stack, {}, {}),
    "dropout_gru": (lambda: [keras.layers.GRU(3, dropout=0.3, recurrent_dropout=0.3)], {}, {}),
    "stateful": (lambda: [keras.layers.LSTM(3, stateful=True)], {}, {"shuffle": False}),
    "stateful_dropout": (
        lambda: [keras.layers.SimpleRNN(3, stateful=True, recurrent_dropout=0.3)],
        {},
        {"shuffle": False},
    ),
    "batch_normalization": (
        lambda: [keras.layers.BatchNormalization(), keras.layers.SimpleRNN(3), keras.layers.BatchNormalization()],
        {},
        {},
    ),
    "mixed": (mixed_layers, {}, {"shuffle": False}),
    "bidirectional": (lambda: [keras.layers.Bidirectional(keras.layers.GRU(2, dropout=0.3))], {}, {}),
    "half_precision": (half_precision_layers, {}, {}),
    "run_eagerly": (dropout_layers, {"run_eagerly": True}, {"epochs": 1}),
    "jit_compile": (dropout_layers, {"jit_compile": True}, {}),
    "steps_per_execution": (lambda: [keras.layers.SimpleRNN(3, dropout=0.3)], {"steps_per_execution": 4}, {}),
}


def train(
    world: str, *callbacks: Any, make: Callable[[], list[Any]] | None = None
) -> tuple[dict[str, NDArray[Any]], Any]:
    """Everything that a training leaves behind, and its history."""
    keras.backend.clear_session(free_memory=False)
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


# Those whose layers are in the mixed one too, and others that are alike.
SOAK = {
    "batch_normalization",
    "stateful_dropout",
    "half_precision",
    "validation",
    "dropout",
    "dropout_stack",
    "dropout_gru",
    "stateful",
    "bidirectional",
    "run_eagerly",
    "steps_per_execution",
}


@pytest.mark.parametrize("world", soak_but(WORLDS.keys() - SOAK, WORLDS))
def test_observation_changes_nothing(world: str, tmp_path: Path) -> None:
    without, plain_history = train_without(world)
    # What a measure computes is stateless; that all of them are is seen in the plain world.
    measures = None if world == "plain" else ["variance"]
    probe = tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH) if world == "scan" else PROBE
    monitor = JacobianMonitor(probe, log_dir=tmp_path, update_freq="batch", measures=measures)
    with_monitor, history = train(world, monitor)
    assert len(monitor.reports) >= 5
    assert any("_jac_" in key for key in history)
    assert [key for key in history if "_jac_" not in key] == list(plain_history)
    assert_same(with_monitor, without)


def test_the_comparison_sees_a_change() -> None:
    def nudge() -> None:
        keras.random.uniform(())

    without, _ = train_without("plain")
    with pytest.raises(AssertionError, match="random"):
        assert_same(train("plain", AtBatch(3, nudge))[0], without)


def test_observation_changes_nothing_beside_tensorboard(tmp_path: Path) -> None:
    def tensorboard(name: str) -> Any:
        return keras.callbacks.TensorBoard(tmp_path / name, update_freq=5, histogram_freq=1)

    without, _ = train("dropout", tensorboard("without"))
    assert_same(
        train("dropout", tensorboard("last"), quick_monitor(log_dir=tmp_path / "last", update_freq="batch"))[0], without
    )


@pytest.mark.filterwarnings("ignore:Measuring the Jacobians failed")
def test_a_measurement_that_fails_changes_nothing() -> None:
    def make() -> list[Any]:
        return [keras.layers.RNN(FailingCell(3), name="rnn"), keras.layers.Dropout(0.3)]

    def break_cell() -> None:
        monitor.model.get_layer("rnn").cell.broken.assign(1)

    def break_nothing() -> None:
        keras_model.append(None)

    keras_model: list[None] = []
    without, _ = train("dropout", AtBatch(3, break_nothing), make=make)
    monitor = quick_monitor(update_freq="batch")
    with pytest.warns(UserWarning, match="rnn"):
        with_monitor, _ = train("dropout", monitor, AtBatch(3, break_cell), make=make)
    # The counter that breaks the cell is the one variable that differs.
    broken = {name for name, value in without.items() if not np.array_equal(value, with_monitor[name], equal_nan=True)}
    assert len(broken) == 1
    assert next(iter(broken)).startswith("variables")


# When it measures --------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_update_freq() -> None:
    expected: dict[int | str, list[int]] = {
        "epoch": [0, 8, 16],
        "batch": list(range(17)),
        3: [0, 3, 6, 9, 12, 15, 16],
        100: [0, 16],
    }
    monitors = {frequency: quick_monitor(update_freq=frequency) for frequency in expected}
    fit(usual(), *monitors.values())
    assert {frequency: steps_of(monitor) for frequency, monitor in monitors.items()} == expected
    assert all(type(step) is int for monitor in monitors.values() for step in steps_of(monitor))


def test_update_freq_with_steps_per_execution() -> None:
    expected: dict[int | str, list[int]] = {
        "epoch": [0, 8, 16],
        "batch": [0, 4, 8, 12, 16],
        8: [0, 8, 16],
    }
    monitors = {frequency: quick_monitor(update_freq=frequency) for frequency in expected}
    fit(compiled(steps_per_execution=4), *monitors.values())
    assert {frequency: steps_of(monitor) for frequency, monitor in monitors.items()} == expected


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

    monitor = quick_monitor()
    compiled().fit(data, epochs=2, verbose=0, shuffle=False, callbacks=[monitor, Ends()])
    # Not 8 and 16: the batch that finds no more data is counted by the optimizer.
    assert steps_of(monitor) == [0, *ends]
    assert len(ends) == 2


def test_reports_are_those_of_their_moment() -> None:
    """Each report equals what `measure` says of the weights that the model had then."""
    monitor = quick_monitor(update_freq=4)
    model = usual()
    expected = [measure(model, PROBE, measures=["variance"]).scalars()]

    class Measure(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            del logs
            if batch % 4 == 3:
                expected.append(measure(model, PROBE, measures=["variance"]).scalars())

    fit(model, monitor, Measure(), epochs=1)
    assert steps_of(monitor) == [0, 4, 8]
    assert len({values["rnn_jac_variance"] for values in expected}) == 3
    for (_, report), values in zip(monitor.reports, expected, strict=True):
        assert report.scalars() == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize("measure", ["variance", "growth"])
def test_nothing_is_measured_twice(measure: str) -> None:
    count = itertools.count()
    monitor = quick_monitor(measures=[measure], update_freq=4)
    # Its verdict is not stable, so that changes are tried at the end.
    layer = keras.layers.SimpleRNN(3, activation=lambda x: keras.ops.tanh(x) / 100, name="rnn")
    fit(compiled(AtInference(lambda: next(count)), layer), monitor)
    assert steps_of(monitor) == [0, 4, 8, 12, 16]
    assert next(count) == 5


def test_slow_measures_have_a_rhythm_of_their_own() -> None:
    monitor = quick_monitor(measures=["variance", "lyapunov"], update_freq="batch", slow_freq=3, logs="all")
    history = fit(usual(), monitor, epochs=1).history
    assert steps_of(monitor) == [*range(9)]
    assert [step for step, report in monitor.reports if report["rnn"].sequences] == [0, 3, 6, 8]
    assert all("variance" in report["rnn"].values for _, report in monitor.reports)
    newest = monitor.reports[8][1].scalars()["rnn_jac_lyapunov_1"]
    assert history["rnn_jac_lyapunov_1"] == [newest]
    model, by_epoch = usual(), quick_monitor(measures=["variance", "lyapunov"])
    fit(model, by_epoch, epochs=3)
    assert [bool(report["rnn"].sequences) for _, report in by_epoch.reports] == [True, False, False, True]
    # Also if nobody knew that the training would end there.
    fit(model, AtBatch(12, lambda: setattr(model, "stop_training", True)), by_epoch, epochs=5)
    assert [(step, bool(report["rnn"].sequences)) for step, report in by_epoch.reports[4:]] == [
        (24, True), (32, False), (36, True),
    ]  # fmt: skip


class CountingCell(WeightedCell):
    """Counts how often Python runs it, that is: how often it is traced."""

    traced = 0

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        self.traced += 1
        new_h = tf.tanh(self.preactivation(inputs, states[0]))
        return new_h, [new_h]


def test_a_second_fit_uses_the_same_trace_and_goes_on_in_the_same_rhythm() -> None:
    cell = CountingCell(3)
    model, monitor = compiled(keras.layers.RNN(cell, name="rnn")), quick_monitor(update_freq=3)
    fit(model, monitor, epochs=1)
    assert steps_of(monitor) == [0, 3, 6, 8]
    traced = cell.traced
    fit(model, monitor, epochs=2)
    assert cell.traced == traced
    assert steps_of(monitor)[4:] == [8, 9, 12, 15, 18, 21, 24]


def test_another_model_is_traced_anew() -> None:
    monitor = quick_monitor()
    fit(usual(), monitor, epochs=1)
    fit(compiled(keras.layers.LSTM(2, name="lstm")), monitor, epochs=1)
    assert [set(report.layers) for _, report in monitor.reports] == [{"rnn"}, {"rnn"}, {"lstm"}, {"lstm"}]


def test_evaluate_and_predict_do_not_measure() -> None:
    model = usual()
    monitor = quick_monitor()
    model.evaluate(X, Y, batch_size=BATCH, verbose=0, callbacks=[monitor])
    model.predict(X, batch_size=BATCH, verbose=0, callbacks=[monitor])
    assert monitor.reports == []


# Whom the values reach ---------------------------------------------------------------------------------------------


def test_history_has_the_values_of_each_epoch() -> None:
    monitor = quick_monitor(measures=None)
    history = fit(compiled(keras.layers.LSTM(3, name="lstm")), monitor, epochs=3).history
    keys = {"lstm_jac_variance", "lstm_jac_spectral_norm", "lstm_jac_joint_growth"}
    assert {key for key in history if "_jac_" in key} == keys
    for key in keys:
        assert history[key] == [report.scalars()[key] for _, report in monitor.reports[1:]]
        assert all(type(value) is float for value in history[key])


def test_a_verdict_that_changes_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = compiled(keras.layers.SimpleRNN(3, activation="linear", name="rnn"), optimizer=keras.optimizers.SGD(0.0))
    kernel = model.get_layer("rnn").cell.recurrent_kernel
    kernel.assign(0.1 * np.eye(3))
    told: list[Any] = []

    def tell(step: int, layer: str, old: Any, new: Any) -> None:
        told.append((step, layer, old.state, new.state))
        raise ValueError("the alarm is broken")

    monitor = quick_monitor(
        measures=["flow"], update_freq=2, log_dir=tmp_path, verbose=1, on_verdict_change=tell, logs=["flow"]
    )
    changing = [AtBatch(3, lambda: kernel.assign(np.eye(3))), AtBatch(6, lambda: kernel.assign(20 * np.eye(3)))]
    with pytest.warns(UserWarning, match="Calling `on_verdict_change` at step 4 failed: the alarm is broken"):
        fit(model, *changing, monitor)
    assert told == [(4, "rnn", "vanishing", "stable"), (6, "rnn", "stable", "exploding")]
    lines = [
        "step 4: rnn vanishing -> stable (horizon beyond the sequence)",
        "step 6: rnn stable -> exploding (horizon 2)",
    ]
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("step ")] == lines
    # With the first report, and at the end.
    assert [printed.count(f"  - multiply `recurrent_kernel` by {factor} in") for factor in ("10", "0.05")] == [1, 1]
    written = by_tag(read_summaries(tmp_path), "verdicts")
    assert [(summary.step, summary.value.item()) for summary in written] == [
        (step, f"    {line}".encode()) for step, line in zip((4, 6), lines, strict=True)
    ]


def test_another_model_has_verdicts_of_its_own_and_a_page_of_its_own(tmp_path: Path) -> None:
    told: list[Any] = []
    monitor = quick_monitor(measures=["flow"], log_dir=tmp_path, on_verdict_change=lambda *found: told.append(found))
    for scale, epochs in ((20.0, 2), (0.1, 1)):
        rnn = keras.layers.SimpleRNN(3, activation="linear", name="rnn")
        model = compiled(rnn, optimizer=keras.optimizers.SGD(0.0))
        rnn.cell.recurrent_kernel.assign(scale * np.eye(3))
        fit(model, monitor, epochs=epochs)
    assert not told
    assert not by_tag(read_summaries(tmp_path), "verdicts")
    assert [step for step, _ in monitor.reports] == [0, 8, 16, 0, 8]
    monitor.to_html(tmp_path / "page.html")
    shown = json.loads(re.findall(r'id="data">(.*?)</script>', (tmp_path / "page.html").read_text("utf-8"))[0])
    assert {one["step"]: one["verdict"]["state"] for one in shown["measurements"]} == {0: "vanishing", 8: "vanishing"}


def test_values_of_others_are_not_replaced_in_silence() -> None:
    layers = [keras.layers.GRU(2, name="valid_gru", return_sequences=True), keras.layers.GRU(2, name="gru")]
    monitors = [quick_monitor(measures=["variance"], name=name) for name in (None, "valid")]
    with pytest.warns(UserWarning, match=r"replaced by those of this monitor: \['valid_gru_jac_variance'\]. Give it"):
        fit(compiled(*layers), *monitors)
    # A loop of one's own may hand on one dict at each epoch.
    model, logs = usual(), dict[str, Any]()
    monitor = quick_monitor(measures=["variance"])
    callbacks = keras.callbacks.CallbackList([monitor], model=model)
    callbacks.on_train_begin()
    for epoch in range(2):
        callbacks.on_epoch_begin(epoch)
        callbacks.on_train_batch_begin(0)
        callbacks.on_train_batch_end(0)
        monitor.on_epoch_end(epoch, logs)
    callbacks.on_train_end()
    assert list(logs) == ["rnn_jac_variance"]


def test_a_training_that_changes_its_directory_writes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    monitor = JacobianMonitor(PROBE, measures=["variance"], update_freq=1)
    fit(usual(), AtBatch(2, lambda: os.chdir(tmp_path / "other")), monitor, epochs=1)
    assert not monitor.failures
    assert not list((tmp_path / "other").iterdir())
    written = by_tag(read_summaries(tmp_path / "logs"), "rnn/variance")
    assert sorted(summary.step for summary in written) == list(range(9))


def test_logs_hold_the_newest_report_when_measuring_is_rarer_than_an_epoch() -> None:
    monitor = quick_monitor(update_freq=12)
    history = fit(usual(), monitor, epochs=3).history
    assert steps_of(monitor) == [0, 12, 24]
    values = [report.scalars()["rnn_jac_variance"] for _, report in monitor.reports]
    assert history["rnn_jac_variance"] == [values[0], values[1], values[2]]


@pytest.mark.fast
def test_the_callbacks_of_keras_read_the_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor, model, name = quick_monitor(), usual(), "rnn_jac_variance"
    log, kept = tmp_path / "log.csv", tmp_path / "kept"
    kept.mkdir()
    callbacks = [
        keras.callbacks.CSVLogger(log),
        keras.callbacks.ModelCheckpoint(str(kept / f"{{epoch}}-{{{name}:.6f}}.keras"), monitor=name, mode="max"),
    ]
    fit(model, monitor, *callbacks, verbose=2)
    values = [report.scalars()[name] for _, report in monitor.reports[1:]]
    with log.open() as file:
        assert [float(row[name]) for row in csv.DictReader(file)] == values
    assert {path.name for path in kept.iterdir()} == {f"{epoch}-{v:.6f}.keras" for epoch, v in enumerate(values, 1)}
    assert len(re.findall(rf"{name}: \d", capsys.readouterr().out)) == 2
    # A saved model does not know the monitor.
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(PROBE), model(PROBE))


def test_early_stopping() -> None:
    stopping = keras.callbacks.EarlyStopping(monitor="rnn_jac_variance", mode="max", patience=2)
    model = usual()
    model.optimizer.learning_rate = 0.0
    history = fit(model, quick_monitor(), stopping, epochs=9).history
    assert len(history["loss"]) == 3


def test_a_report_that_cannot_be_printed_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal may not know `±`, and the reader of a pipe may be gone."""

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(text[:0])

    monitor = quick_monitor(verbose=1)
    monkeypatch.setattr(sys, "stdout", Broken())
    with pytest.warns(
        UserWarning, match="^Printing the report at step 0 failed: an error of the class BrokenPipeError"
    ):
        fit(usual(), monitor)
    assert steps_of(monitor) == [0, 8, 16]


def test_so_many_reports_are_kept() -> None:
    """As the README says, without being asked to."""
    monitor, model = quick_monitor(), usual()
    report = measure(model, PROBE, measures=["variance"])
    monitor.reports.extend((step - 1000, report) for step in range(1000))
    fit(model, monitor)
    assert 500 <= len(monitor.reports) <= 1000
    assert steps_of(monitor)[-3:] == [0, 8, 16]


# Models that are not built -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loaded", [pytest.param(False, marks=pytest.mark.soak), True])
def test_a_model_that_has_seen_another_batch(loaded: bool, tmp_path: Path) -> None:  # noqa: FBT001 - pytest passes it by name
    model = keras.Sequential([keras.layers.SimpleRNN(3, name="rnn"), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    fit(model, batch_size=2 * BATCH)
    assert model.input_shape == (2 * BATCH, STEPS, FEATURES)
    if loaded:
        model.save(tmp_path / "model.keras")
        model = keras.saving.load_model(tmp_path / "model.keras")
    for probe in (PROBE[:1], PROBE[:, :3]):
        report = measure(model, probe, measures=["variance"])
        assert report["rnn"]["variance"].shape == probe.shape[1::-1]
    monitor = quick_monitor()
    fit(model, monitor)
    assert steps_of(monitor)[-1] > 0
    with pytest.raises(ValueError, match=r"Expected shape \(None, None, 3\)"):
        measure(model, PROBE[..., :2])


def test_a_stateful_model_must_be_built_before() -> None:
    model = keras.Sequential([keras.layers.SimpleRNN(3, stateful=True), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    sentence = (
        f"The model `{model.name}` is not built, and cannot be built from the probe: it has stateful layers, whose "
        "states are made for one size of batch. Build it before, by calling it on a batch of the training."
    )
    assert_refused(model, f"^{re.escape(sentence)}$")
    model(PROBE)
    fit(model, quick_monitor())


def test_reading_a_dataset_draws_no_random_numbers() -> None:
    class Noisy(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            return PROBE + np.random.normal(size=PROBE.shape) + random.random()  # noqa: NPY002, S311 - as users do

    model = usual()
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    measure(model, Noisy(), measures=["variance"])
    found = np.random.normal(), random.random()  # noqa: NPY002, S311
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    assert found == (np.random.normal(), random.random())  # noqa: NPY002, S311


# Resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", soak_but({"backup_last"}, ["backup_first", "backup_last"]))
def test_a_resumed_training_goes_on_where_it_stopped(order: str, tmp_path: Path) -> None:
    def resumable(*others: Any) -> JacobianMonitor:
        monitor = quick_monitor(log_dir=tmp_path / "logs")
        callbacks = [monitor, keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)]
        fit(compiled(), *(callbacks if order == "backup_last" else callbacks[::-1]), *others)
        return monitor

    def crash() -> None:
        raise RuntimeError("crash")

    crashed = []
    with pytest.raises(RuntimeError, match="crash"):
        crashed.append(resumable(AtBatch(11, crash)))
    resumed = resumable()
    assert steps_of(resumed) == [8, 16]
    written = by_tag(read_summaries(tmp_path / "logs"), "rnn/variance")
    assert sorted(summary.step for summary in written) == [0, 8, 8, 16]
    # The first report of the second run is about the restored weights.
    at_8 = [float(summary.value) for summary in written if summary.step == 8]
    assert at_8[0] == pytest.approx(at_8[1], rel=1e-6)


def test_the_options_reach_the_measurement() -> None:
    model = compiled(keras.layers.RNN(BareStateCell(3), name="rnn"))
    options: dict[str, Any] = {"seed": 3, "tolerance": 0.5, "max_entries": 1, "max_bytes": 10_000}
    options["measures"] = ["variance"]
    monitor = quick_monitor(**options)
    fit(model, AtBatch(100, list), monitor, epochs=1)
    expected = measure(model, PROBE, **options)["rnn"]
    last = monitor.reports[-1][1]["rnn"]
    assert last.estimated == expected.estimated != frozenset()
    for key, values in expected.values.items():
        np.testing.assert_array_equal(last[key], values, strict=True)
    # Of an estimate, which `max_entries` makes it.
    assert np.any(measure(model, PROBE, **(options | {"seed": 4}))["rnn"]["variance"] != expected["variance"])
