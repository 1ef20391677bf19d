"""What stands in the event files, read back."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import dashboards
import keras
import numpy as np
import pytest
import tensorflow as tf
from dashboards import make_layer, write
from event_files import by_tag, names, read_summaries
from helpers import KEYS, WeightedCell, normal
from tensorboard.plugins.custom_scalar import layout_pb2
from trainings import BATCH, FEATURES, PROBE, STEPS, X, Y, usual

from keras_jacmon import JacobianMonitor, Report
from keras_jacmon.events.writer import EventWriter

if TYPE_CHECKING:
    from pathlib import Path

MEASURES = ("variance", "rms_singular_value", "spectral_norm")


def make_model(*layers: Any) -> Any:
    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((STEPS, FEATURES)), *layers, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def fit(model: Any, *callbacks: Any, epochs: int = 2) -> Any:
    return model.fit(X[:16], Y[:16], batch_size=4, epochs=epochs, verbose=0, shuffle=False, callbacks=list(callbacks))


def expected_tags(*measured: str, over_time: tuple[str, ...] = ()) -> set[tuple[str, str]]:
    """The tags promised for each `<layer>/<measure>`, and for the `<layer>/` with the prefix of the joint view."""
    scalars = [*measured, *(f"{tag}{name}" for tag in over_time for name in ("growth", "horizon"))]
    found = {("jacobian", tag) for tag in scalars}
    found |= {(f"jacobian/{run}", tag) for tag in measured for run in ("min", "max")}
    for layer in {re.sub(r"/(joint/)?\w+$", "", tag) for tag in measured}:
        own = sorted((tag for tag in measured if tag.startswith(f"{layer}/")), key=lambda tag: "/joint/" not in tag)
        room = 10 - sum(tag.startswith(f"{layer}/") for tag in scalars)
        margins = own[: room // 2]
        found |= {("jacobian", f"{tag}/{part}") for tag in margins for part in ("least", "greatest")}
        histograms = own[: min(2, room - 2 * len(margins))]
        found |= {("jacobian", f"{tag}/histogram") for tag in histograms} | {("jacobian", f"{layer}/packed")}
    return found | {("jacobian", "custom_scalars__config__")}


def all_measures(layer: str, *views: str) -> list[str]:
    return [f"{layer}/{view}{measure}" for view in views for measure in MEASURES]


@pytest.fixture(scope="module")
def of_an_rnn(tmp_path_factory: pytest.TempPathFactory) -> tuple[JacobianMonitor, Path]:
    """A monitor of the default measures after a training, and what it wrote to."""
    directory = tmp_path_factory.mktemp("logs")
    monitor = JacobianMonitor(PROBE, log_dir=directory)
    fit(make_model(keras.layers.SimpleRNN(3, name="rnn")), monitor)
    return monitor, directory


def test_tags_of_a_one_state_cell(of_an_rnn: tuple[JacobianMonitor, Path]) -> None:
    expected = expected_tags(*all_measures("rnn", ""), over_time=("rnn/",))
    assert names(read_summaries(of_an_rnn[1])) == expected


def test_tags_of_nested_layers(tmp_path: Path) -> None:
    layers = [
        keras.layers.Bidirectional(keras.layers.SimpleRNN(3, return_sequences=True, name="rnn"), name="both"),
        keras.layers.LSTM(2, name="lstm"),
    ]
    fit(make_model(*layers), JacobianMonitor(PROBE, measures=KEYS, log_dir=tmp_path))
    assert names(read_summaries(tmp_path)) == expected_tags(
        *all_measures("both/forward_rnn", ""),
        *all_measures("both/backward_rnn", ""),
        *all_measures("lstm", "", "joint/"),
    )


def test_the_layout_groups_layers_in_the_order_of_the_model(tmp_path: Path) -> None:
    layers = {name: make_layer() for name in ("z", "a")}
    write(tmp_path, [(step, Report(layers)) for step in (0, 1)])
    summaries = read_summaries(tmp_path)
    (written,) = by_tag(summaries, "custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(written.value.item())
    assert [category.title for category in layout.category] == ["z", "a"]
    charts = layout.category[0].chart
    assert [chart.title for chart in charts] == [*dashboards.KEYS, "joint/growth", "joint/horizon"]
    assert [chart.WhichOneof("content") for chart in charts] == ["multiline", "margin", "margin", *["multiline"] * 3]
    assert charts[0].multiline.tag == ["^z/variance$"]
    ours = names([summary for summary in summaries if summary.directory == "jacobian"])
    assert len({tag for _, tag in ours if tag.startswith("z/") and tag != "z/packed"}) == 10
    values = layers["z"]["joint/variance"].mean(axis=1)
    (series,) = charts[1].margin.series
    for tag, value in ((series.lower, values.min()), (series.value, values.mean()), (series.upper, values.max())):
        np.testing.assert_allclose([float(one.value) for one in by_tag(summaries, tag)], [value] * 2, rtol=1e-6)


def test_each_chart_has_a_description(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path)
    for step in (0, 1):
        writer.write(
            Report({"lstm": make_layer(keys=("variance",))}), step, {"penalty": 1.0}, ["lstm stable -> vanishing"]
        )
    writer.close()
    tabs = ("scalars", "histograms", "text")
    main = [one for one in read_summaries(tmp_path) if one.plugin in tabs and one.directory == "jacobian"]
    assert {one.plugin for one in main} == set(tabs)
    assert [one.tag for one in main if not one.description] == []


@pytest.mark.fast
def test_only_the_named_layers_and_measures(tmp_path: Path) -> None:
    model = make_model(
        keras.layers.LSTM(3, return_sequences=True, name="first"), keras.layers.SimpleRNN(3, name="second")
    )
    fit(model, JacobianMonitor(PROBE, layers=["first"], measures=["variance"], log_dir=tmp_path))
    assert names(read_summaries(tmp_path)) == expected_tags("first/variance")


def test_tags_and_values_of_a_two_state_cell(tmp_path: Path) -> None:
    monitor = JacobianMonitor(PROBE, log_dir=str(tmp_path), update_freq=3)
    fit(make_model(keras.layers.LSTM(3, name="lstm")), monitor)
    summaries = read_summaries(tmp_path)
    expected = expected_tags(*all_measures("lstm", "", "joint/"), over_time=("lstm/joint/",))
    assert names(summaries) == expected
    for key in (f"{view}{measure}" for view in ("", "joint/") for measure in MEASURES):
        reduce: dict[str, Any] = {"": np.mean, "min": np.min, "max": np.max}
        for run, over_time in reduce.items():
            written = by_tag(summaries, f"lstm/{key}", run)
            assert {summary.plugin for summary in written} == {"scalars"}
            assert [summary.step for summary in written] == [step for step, _ in monitor.reports] == [0, 3, 6, 8]
            values = [over_time(report["lstm"][key].mean(axis=1)) for _, report in monitor.reports]
            np.testing.assert_allclose([float(summary.value) for summary in written], values, rtol=1e-6)


def test_what_is_measured_over_time_and_spectra(tmp_path: Path) -> None:
    keys = ["joint/flow", "joint/growth", "joint/lyapunov", "eigenvalues"]
    monitor = JacobianMonitor(PROBE, measures=keys, exponents=2, log_dir=tmp_path)
    fit(make_model(keras.layers.LSTM(3, name="lstm")), monitor)
    summaries = read_summaries(tmp_path)
    # No histogram of what is no set of like numbers: exponents, and spans of a flow.
    tags = {"lstm/eigenvalues/histogram", "lstm/joint/growth", "lstm/joint/lyapunov_1", "lstm/packed"}
    assert {tag for _, tag in names(summaries)} == tags | {"custom_scalars__config__"}
    reports = [report["lstm"] for _, report in monitor.reports]
    for tag, values in (
        ("growth", [report["joint/growth"].mean() for report in reports]),
        ("lyapunov_1", [report["joint/lyapunov"][0].mean() for report in reports if report.spectra]),
    ):
        written = by_tag(summaries, f"lstm/joint/{tag}")
        np.testing.assert_allclose([float(summary.value) for summary in written], values, rtol=1e-6)
    moduli = by_tag(summaries, "lstm/eigenvalues/histogram")[0].value
    np.testing.assert_allclose(moduli[-1, 1], np.abs(reports[0]["eigenvalues"]).max(), rtol=1e-6)


def test_steps_are_those_of_keras_if_they_are_epochs(tmp_path: Path) -> None:
    monitor = JacobianMonitor(PROBE, measures=["variance"], log_dir=tmp_path, step="epoch")
    fit(usual(), keras.callbacks.TensorBoard(tmp_path), monitor)
    summaries = read_summaries(tmp_path)
    assert [summary.step for summary in by_tag(summaries, "epoch_loss")] == [0, 1]
    assert [summary.step for summary in by_tag(summaries, "rnn/variance")] == [-1, 0, 1]
    assert [step for step, _ in monitor.reports] == [0, 4, 8]
    wrong: list[dict[str, Any]] = [{"update_freq": "batch", "step": "epoch"}, {"step": "hour"}]
    for arguments in wrong:
        with pytest.raises(ValueError, match="Invalid value for argument `step`"):
            JacobianMonitor(PROBE, **arguments)


def test_histogram_is_over_steps_and_samples(of_an_rnn: tuple[JacobianMonitor, Path]) -> None:
    monitor, directory = of_an_rnn
    written = by_tag(read_summaries(directory), "rnn/variance/histogram")
    assert {summary.plugin for summary in written} == {"histograms"}
    assert [summary.step for summary in written] == [0, 4, 8]
    for summary, (_, report) in zip(written, monitor.reports, strict=True):
        left, right, count = summary.value.T
        values = report["rnn"]["variance"]
        assert count.sum() == BATCH * STEPS
        np.testing.assert_allclose([left[0], right[-1]], [values.min(), values.max()], rtol=1e-6)


def test_masked_steps_are_left_out(tmp_path: Path) -> None:
    probe = PROBE.copy()
    probe[:, 3:] = 0.0
    probe[0, 1:] = 0.0
    model = make_model(keras.layers.Masking(), keras.layers.SimpleRNN(3, name="rnn"))
    monitor = JacobianMonitor(probe, measures=["variance"], log_dir=tmp_path)
    fit(model, monitor)
    summaries = read_summaries(tmp_path)
    assert [summary.value[:, 2].sum() for summary in by_tag(summaries, "rnn/variance/histogram")] == [10.0] * 3
    values = monitor.reports[0][1]["rnn"]["variance"]
    assert np.isfinite(values).sum() == 10
    over_time = np.nanmean(values[:3], axis=1)
    for run, expected in (("", np.nanmean(values)), ("min", over_time.min()), ("max", over_time.max())):
        first = by_tag(summaries, "rnn/variance", run)[0]
        np.testing.assert_allclose(first.value, expected, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:`TensorBoard` stands after")
@pytest.mark.parametrize("tensorboard_freq", [5, pytest.param("epoch", marks=pytest.mark.soak)])
def test_another_tensorboard_callback_swallows_nothing(tmp_path: Path, tensorboard_freq: int | str) -> None:
    def tensorboard(directory: str) -> Any:
        return keras.callbacks.TensorBoard(tmp_path / directory, update_freq=tensorboard_freq)

    fit(usual(), tensorboard("alone"))
    alone = names(read_summaries(tmp_path / "alone"))
    for directory in ("first", "last"):
        model = usual()
        monitor = JacobianMonitor(PROBE, log_dir=tmp_path / directory, update_freq="batch", measures=["variance"])
        callbacks = [monitor, tensorboard(directory)]
        fit(model, *(callbacks if directory == "last" else callbacks[::-1]))
        summaries = read_summaries(tmp_path / directory)
        ours = [summary for summary in summaries if summary.directory.startswith("jacobian")]
        assert names(ours) == expected_tags("rnn/variance")
        for _, tag in names(ours) - {("jacobian", "custom_scalars__config__")}:
            assert [summary.step for summary in by_tag(ours, tag)] == list(range(9))
        # TensorBoard writes what `logs` hold when its turn comes, unless it swallows the logs of an epoch itself.
        ours_too = directory == "last" and ("train", "epoch_loss") in alone
        from_logs = {("train", "epoch_rnn_jac_variance")} if ours_too else set()
        assert {name for name in names(summaries) if not name[0].startswith("jacobian")} == alone | from_logs


def test_nothing_else_is_written(of_an_rnn: tuple[JacobianMonitor, Path]) -> None:
    assert [path.name for path in of_an_rnn[1].iterdir()] == ["jacobian"]
    inside = {path.name for path in (of_an_rnn[1] / "jacobian").iterdir()}
    assert {"min", "max"} < inside
    assert len(inside) == 3


def test_a_horizon_beyond_the_sequence_is_drawn_at_its_length(of_an_rnn: tuple[JacobianMonitor, Path]) -> None:
    monitor, directory = of_an_rnn
    expected = [min(report["rnn"].scalars()["horizon"], STEPS) for _, report in monitor.reports]
    assert np.isinf(monitor.reports[0][1]["rnn"].scalars()["horizon"])
    assert [float(summary.value) for summary in by_tag(read_summaries(directory), "rnn/horizon")] == expected


@pytest.mark.fast
def test_the_default_log_dir_and_a_second_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = usual()
    silent, monitor = (
        JacobianMonitor(PROBE, measures=["variance"], log_dir=None),
        JacobianMonitor(PROBE, measures=["variance"]),
    )
    fit(model, silent)
    assert len(silent.reports) == 3
    assert list(tmp_path.iterdir()) == []
    fit(model, monitor)
    fit(model, monitor, epochs=1)
    summaries = read_summaries(tmp_path / "logs")
    assert names(summaries) == expected_tags("rnn/variance")
    assert [step for step, _ in monitor.reports] == [8, 12, 16, 16, 20]
    assert sorted(summary.step for summary in by_tag(summaries, "rnn/variance")) == [8, 12, 16, 16, 20]
    # No default writer is left behind.
    assert not tf.summary.should_record_summaries()
    assert tf.summary.experimental.get_step() is None


def test_a_fit_that_fails_leaves_what_was_measured(tmp_path: Path) -> None:
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            del logs
            if batch == 2:
                raise RuntimeError("stop")

    monitor = JacobianMonitor(PROBE, measures=["variance"], log_dir=tmp_path, update_freq="batch")
    with pytest.raises(RuntimeError, match="stop"):
        fit(usual(), monitor, Stop())
    assert [summary.step for summary in by_tag(read_summaries(tmp_path), "rnn/variance")] == [0, 1, 2, 3]


class SquaringCell(WeightedCell):
    """Its state overflows after a few steps: the first Jacobians are finite, the last are not."""

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        new_h = tf.square(100.0 + self.preactivation(inputs, states[0]))
        return tf.zeros_like(new_h), [new_h]


def test_partly_infinite_values(tmp_path: Path) -> None:
    monitor = JacobianMonitor(normal(BATCH, 8, FEATURES, seed=4), measures=KEYS, log_dir=tmp_path)
    model = keras.Sequential(
        [keras.Input((None, FEATURES)), keras.layers.RNN(SquaringCell(3), name="rnn"), keras.layers.Dense(1)]
    )
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="rnn"):
        fit(model, monitor)
    finite = np.isfinite(monitor.reports[0][1]["rnn"]["rms_singular_value"])
    assert finite[0].all()
    assert not finite[-1].any()
    summaries = read_summaries(tmp_path)
    assert names(summaries) == expected_tags(*all_measures("rnn", ""))
    assert not np.isfinite(by_tag(summaries, "rnn/rms_singular_value")[0].value)
    finite = np.isfinite(monitor.reports[0][1]["rnn"]["variance"])
    assert by_tag(summaries, "rnn/variance/histogram")[0].value[:, 2].sum() == finite.sum()


def test_nan_everywhere(tmp_path: Path) -> None:
    model = usual()
    model.set_weights([np.full_like(weight, np.nan) for weight in model.get_weights()])
    with pytest.warns(UserWarning, match="rnn"):
        fit(model, JacobianMonitor(PROBE, measures=MEASURES, log_dir=tmp_path))
    summaries = read_summaries(tmp_path)
    for tag in all_measures("rnn", ""):
        for run in ("", "min", "max"):
            assert [summary.step for summary in by_tag(summaries, tag, run)] == [0, 4, 8]
            assert all(np.isnan(summary.value) for summary in by_tag(summaries, tag, run))


# Names that were not made for it -------------------------------------------------------------------------------------


class Holder(keras.Model):
    """Holds layers under any names, where a functional model would refuse two of the same."""

    def __init__(self, *layers: Any) -> None:
        super().__init__(name="holder")
        self.held = list(layers)
        self.dense = keras.layers.Dense(1)

    def call(self, x: Any) -> Any:
        for layer in self.held:
            x = layer(x)
        return self.dense(x[:, -1])


def after_an_epoch(model: Any, monitor: JacobianMonitor) -> dict[str, Any]:
    """What the monitor logs after an epoch; Keras would trace the training of each layer."""
    logs: dict[str, Any] = {}
    monitor.set_model(model)
    monitor.on_train_begin()
    monitor.on_epoch_end(0, logs)
    monitor.on_train_end()
    return logs


def rnn(name: str) -> Any:
    return keras.layers.SimpleRNN(3, return_sequences=True, name=name)


# All that TensorFlow allows in the name of a layer.
ODD_NAMES = ["..", "a>b", "1-2_3.4", "Layer-", "x" * 1000, "x" * 999, "a", "a_1", "A"]


def test_names_of_any_kind_keep_tags_keys_and_reports_apart(tmp_path: Path) -> None:
    held = [rnn(name) for name in ODD_NAMES]
    # The first one twice.
    model = Holder(*held, held[0])
    model.compile("sgd", "mse")
    monitor = JacobianMonitor(PROBE, measures=["variance"], log_dir=tmp_path, on_error="raise")
    logs = after_an_epoch(model, monitor)
    report = monitor.reports[-1][1]
    assert len(report) == len(ODD_NAMES) + 1
    assert {name for name in report if name in ODD_NAMES} == set(ODD_NAMES)
    values = {f"{name}/variance": layer.mean("variance") for name, layer in report.layers.items()}
    assert len(set(values.values())) == len(values)
    summaries = read_summaries(tmp_path)
    assert {tag for _, tag in names(summaries) if tag.endswith("/variance")} == set(values)
    for tag, value in values.items():
        assert float(by_tag(summaries, tag)[-1].value) == np.float32(value)
    assert sorted(value for key, value in logs.items() if key.endswith("_jac_variance")) == sorted(values.values())
    report.save(tmp_path / "report.npz")
    loaded = Report.load(tmp_path / "report.npz")
    assert list(loaded) == list(report)
    assert loaded.scalars() == report.scalars()


def test_paths_that_collide_keep_tags_and_keys_apart(tmp_path: Path) -> None:
    """`a/joint` is a layer and a view of another one, and in `logs` both `a/b` and `a_b` are `a_b`."""
    model = Holder(
        keras.layers.LSTM(2, return_sequences=True, name="a"),
        keras.Sequential([rnn("joint"), rnn("joint_1"), rnn("b")], name="a"),
        rnn("a_b"),
    )
    model.compile("sgd", "mse")
    keys = ["variance", "joint/variance"]
    monitor = JacobianMonitor(PROBE, measures=keys, log_dir=tmp_path, on_error="raise", logs="all")
    logs = after_an_epoch(model, monitor)
    report = monitor.reports[-1][1]
    assert list(report) == ["a", "a/joint", "a/joint_1", "a/b", "a_b"]
    summaries = read_summaries(tmp_path)
    for tag, name, key in [
        ("a/variance", "a", "variance"),
        ("a/joint/variance", "a", "joint/variance"),
        ("a/joint_2/variance", "a/joint", "variance"),
        ("a/joint_1/variance", "a/joint_1", "variance"),
        ("a/b/variance", "a/b", "variance"),
        ("a_b/variance", "a_b", "variance"),
    ]:
        assert [float(summary.value) for summary in by_tag(summaries, tag)] == [
            np.float32(before[name].mean(key)) for _, before in monitor.reports
        ]
    logged = sorted(value for key, value in logs.items() if "_jac_" in key)
    assert logged == sorted(report.scalars().values())
    assert len(set(logged)) == 6
