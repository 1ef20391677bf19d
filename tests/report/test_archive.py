"""Reports as files, as JSON and as data frames."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from helpers import normal

from keras_jacmon import JacobianMonitor, LayerReport, Report, measure
from keras_jacmon.report import archive
from keras_jacmon.report.records import to_record
from keras_jacmon.report.suggestion import Suggestion, WeightChange


def odd_report() -> Report:
    """A report with everything in it that a file may stumble over."""
    values = np.array([[1.0, np.nan], [np.inf, -np.inf], [5e-324, -0.0]])
    layer = LayerReport(
        "Zelle",
        3,
        {"variance": values, "joint/spectral_norm": values.astype(np.float32)},
        ~np.isnan(values),
        {"joint/spectral_norm": values},
        frozenset({"joint/spectral_norm", "joint/flow"}),
        {"joint/spectral_norm": np.array([[True, False]] * 3)},
        None,
        {"joint/flow": values, "joint/growth": np.array([0.5, np.nan])},
        {"eigenvalues": np.array([[1 + 2j, np.nan]], np.complex64)},
        np.array([[2, 1]]),
        "joint/",
        (Suggestion("lstm", WeightChange(("a/b", "a/c"), 0.1), -np.inf, -0.1, "vanishing", "stable"),),
        0.5,
        go_backwards=True,
        notes=("a note", 'with "quotes" and ünïcode'),
        reductions={"joint/growth": "growth"},
        may_be_infinite=frozenset({"variance"}),
        targets={"variance": 0.1},
    )
    return Report({"both/forward_lstm:1": layer, "名前": LayerReport("C", 1, {}, np.zeros((0, 0), bool))})


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()
        assert one.shape == other.shape
    else:
        assert one == other


def assert_same_report(one: Report, other: Report) -> None:
    assert list(one.layers) == list(other.layers)
    for name in one:
        for field in dataclasses.fields(LayerReport):
            assert_same(getattr(one[name], field.name), getattr(other[name], field.name))


@pytest.mark.fast
def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    report = odd_report()
    path = tmp_path / "a report.with dots"
    full = tmp_path / "a report.with dots.npz"
    assert report.save(path) == str(full)
    assert_same_report(Report.load(path), report)
    assert report.save(full) == str(full)
    # Written in one step: nothing else is left in the directory, and the file is like others.
    assert list(tmp_path.iterdir()) == [full]
    (tmp_path / "other").write_text("")
    assert full.stat().st_mode == (tmp_path / "other").stat().st_mode
    # A file that is there is the one that is meant, whatever its name.
    assert report.save(tmp_path / "other") == str(tmp_path / "other")
    assert_same_report(Report.load(tmp_path / "other"), report)


@pytest.mark.fast
def test_arrays_have_names_that_say_what_they_are(tmp_path: Path) -> None:
    odd_report().save(tmp_path / "r.npz")
    with np.load(tmp_path / "r.npz") as file:
        assert "both/forward_lstm:1/values/joint/spectral_norm" in file.files
        assert "both/forward_lstm:1/sequences/joint/flow" in file.files
        assert "名前/mask" in file.files
        np.testing.assert_array_equal(file["both/forward_lstm:1/spectra_at"], [[2, 1]])
    values = {"x": np.zeros((1, 1)), "values/x": np.ones((1, 1)), "a\\b\0c": np.full((1, 1), 2.0)}
    layers = {
        name: LayerReport("C", 1, dict(values), np.ones((1, 1), bool)) for name in ("a", "a/values", "a\nb", "a_b")
    }
    Report(layers).save(tmp_path / "r.npz")
    assert_same_report(Report.load(tmp_path / "r.npz"), Report(layers))


def test_a_file_of_before_is_read(tmp_path: Path) -> None:
    """The names of the arrays stand in the file, so those of earlier ones are as good."""
    odd_report().save(tmp_path / "new.npz")
    with np.load(tmp_path / "new.npz") as file:
        arrays, rest = dict(file), str(file["report"])
    del arrays["report"]
    before = {}
    for number, (name, array) in enumerate(arrays.items()):
        before[f"array_{number}"] = array
        rest = rest.replace(json.dumps(name), f'"array_{number}"', 1)
    np.savez(tmp_path / "old.npz", report=np.array(rest), allow_pickle=False, **before)
    assert_same_report(Report.load(tmp_path / "old.npz"), odd_report())


@pytest.mark.fast
def test_what_is_there_is_written_through(tmp_path: Path) -> None:
    """A link stays one, a private file stays private, and a device or a pipe stays what it is."""
    report = Report({"lstm": next(iter(odd_report().layers.values()))})
    private, link = tmp_path / "private.npz", tmp_path / "link.npz"
    private.touch(mode=0o600)
    link.symlink_to("private.npz")
    report.save(link)
    assert link.is_symlink()
    assert private.stat().st_mode & 0o777 == 0o600
    assert_same_report(Report.load(private), report)
    (tmp_path / "dangling.npz").symlink_to("later.npz")
    report.save(tmp_path / "dangling.npz")
    assert_same_report(Report.load(tmp_path / "later.npz"), report)
    (tmp_path / "other name.npz").hardlink_to(private)
    Report({}).save(private)
    assert_same_report(Report.load(tmp_path / "other name.npz"), Report({}))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    report.save(pipe)
    reader.join()
    assert pipe.is_fifo()
    (tmp_path / "received.npz").write_bytes(received[0])
    assert_same_report(Report.load(tmp_path / "received.npz"), report)
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        report.save("/dev/full")
    assert Path("/dev/full").is_char_device()
    with pytest.raises(OSError, match=rf"No such file or directory: '{tmp_path}/no/r.npz'"):
        report.save(tmp_path / "no" / "r")


def test_a_measured_report_comes_back(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((6, 2)), keras.layers.LSTM(3, name="lstm", go_backwards=True)])
    report = measure(model, normal(2, 6, 2), measures="full")
    report.save(tmp_path / "report.npz")
    again = Report.load(str(tmp_path / "report.npz"))
    assert_same_report(again, report)
    assert str(again) == str(report)
    assert again.verdict == report.verdict
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()


class Trap:
    """Says so if it is unpickled."""

    def __reduce__(self) -> Any:
        return (sys.exit, ("unpickled",))


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.npz"
    odd_report().save(good)
    wrong: dict[str, Any] = {"half": good.read_bytes()[:-200], "empty": b"", "text": b"no report at all"}
    wrong["pickle"] = pickle.dumps(Trap())
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "others.npz", x=np.ones(3))
    np.savez(tmp_path / "objects.npz", report=np.array([Trap()], object))
    np.savez(tmp_path / "later.npz", report=np.array(json.dumps({"format": 99, "records": {}})))
    np.savez(tmp_path / "list.npz", report=np.array("[]"))
    np.savez(tmp_path / "deep.npz", report=np.array("[" * 100_000 + "]" * 100_000))
    np.save(tmp_path / "array.npy", np.ones(3))
    for name in (*wrong, "others.npz", "objects.npz", "later.npz", "list.npz", "deep.npz", "array.npy"):
        with pytest.raises(ValueError, match=r"Expected a file that `Report.save` of this version has written"):
            Report.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Report.load(tmp_path / "none")
    archive.write(tmp_path / "other fields", {"lstm": {"cells": "LSTM"}})
    with pytest.raises(ValueError, match="Expected a report of this version"):
        Report.load(tmp_path / "other fields")


@pytest.mark.parametrize(
    "wrong",
    [
        {"values": ()},
        {"values": {"variance": 3.0}},
        {"values": {"variance": np.array([["a", "b"]] * 3)}},
        {"values": {"variance": np.ones((3, 1))}},
        {"mask": np.ones((3, 2))},
        {"mask": np.ones(3, bool)},
        {"sampled": {"joint/spectral_norm": np.ones((1, 2), bool)}},
        {"uncertainties": {"joint/spectral_norm": np.ones((3, 3))}},
        {"sequences": {"joint/growth": np.ones(3)}},
        {"sequences": {"joint/growth": np.ones((1, 3, 2))}},
        {"sequences": {"joint/flow": np.ones((2, 2))}},
        {"sequences": {"joint/flow": np.ones(2)}},
        {"sequences": {"joint/lyapunov": np.ones((0, 2))}},
        {"uncertainties": {"joint/spectral_norm": np.ones((2, 2))}},
        {"uncertainties": {"joint/growth": np.ones(2)}},
        {"spectra": {"eigenvalues": np.ones((2, 2))}},
        {"spectra_at": np.array([[0.5, 1.0]])},
        {"uncertainties": {}},
        {"notes": (3,)},
        {"suggestions": ({"layer": "lstm"},)},
        {"suggestions": ("lstm",)},
        {"weight_size": "much"},
        {"targets": {"variance": "much"}},
        {"reductions": {"joint/growth": "sum"}},
        {"reductions": {"growth": "mean"}},
        {"sequences": {"joint/growth": np.ones(2)}, "reductions": {"joint/growth": "growth"}},
    ],
    ids="-".join,
)
def test_what_does_not_fit_together_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    layer = next(iter(odd_report().layers.values()))
    record = to_record(layer) | wrong
    archive.write(tmp_path / "report", {"lstm": record})
    with pytest.raises(ValueError, match="Expected a report of this version"):
        Report.load(tmp_path / "report")


def test_another_file_is_refused_with_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "array.npy", np.ones(3))
    np.savez(tmp_path / "arrays.npz", a=np.ones(3))
    for name, reason in (("text.npz", "it is no .npz file"), ("array.npy", "it is no .npz file")):
        with pytest.raises(ValueError, match=rf"has written. Received: path=.* \({reason}\)$"):
            Report.load(tmp_path / name)
    with pytest.raises(ValueError, match=r"\(it holds no report\)$"):
        Report.load(tmp_path / "arrays.npz")


def test_names_as_long_as_can_be_and_loops_of_links(tmp_path: Path) -> None:
    longest = f"{'y' * 251}.npz"
    assert odd_report().save(tmp_path / longest) == str(tmp_path / longest)
    assert [path.name for path in tmp_path.iterdir()] == [longest]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="symbolic links"):
        odd_report().save(tmp_path / "loop")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Bytes that changed make ZIP, zlib, NumPy's headers and json fail, each in ways of its own."""
    odd_report().save(tmp_path / "good.npz")
    good = (tmp_path / "good.npz").read_bytes()
    rng = np.random.default_rng(0)
    refused: list[str] = []
    for _ in range(400):
        damaged = np.frombuffer(good, np.uint8).copy()
        places = rng.integers(0, damaged.size, rng.integers(1, 9))
        damaged[places] = rng.integers(0, 256, places.size)
        (tmp_path / "damaged").write_bytes(damaged.tobytes())
        try:
            str(Report.load(tmp_path / "damaged"))
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert all(sentence.startswith("Invalid value for argument `path`. Expected a ") for sentence in refused)


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.npz"
    odd_report().save(path)
    before = path.read_bytes()

    def full_disk(file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(OSError, match="No space left"):
        Report({}).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.fast
def test_json_knows_what_is_not_finite() -> None:
    found = json.loads(json.dumps(odd_report().to_dict(), allow_nan=False))["layers"]["both/forward_lstm:1"]
    assert found["values"]["variance"] == [[1.0, "nan"], ["inf", "-inf"], [5e-324, -0.0]]
    assert found["estimated"] == ["joint/flow", "joint/spectral_norm"]
    assert found["spectra"]["eigenvalues"] == [[[1.0, 2.0], ["nan", 0.0]]]
    assert found["certificate"] is None


def test_a_data_frame_has_what_was_measured() -> None:
    frame = odd_report().to_dataframe()
    columns = ["layer", "measure", "step", "sample", "index", "value", "imaginary", "uncertainty"]
    assert list(frame.columns) == columns
    of_variance = frame[frame["measure"] == "variance"]
    assert [*zip(of_variance["step"], of_variance["sample"], of_variance["value"], strict=True)] == [
        (0, 0, 1.0), (1, 0, np.inf), (1, 1, -np.inf), (2, 0, 5e-324), (2, 1, -0.0),
    ]  # fmt: skip
    assert of_variance["uncertainty"].isna().all()
    norm = frame[frame["measure"] == "joint/spectral_norm"]
    assert list(norm["step"]) == [0, 1, 2]
    assert list(norm["uncertainty"]) == [1.0, np.inf, 5e-324]
    assert set(frame["layer"]) == {"both/forward_lstm:1"}
    monitor = JacobianMonitor(np.ones((1, 1, 1)))
    assert list(monitor.to_dataframe().columns) == ["iteration", *columns]
    monitor.reports = [(0, odd_report()), (8, odd_report())]
    of_all = monitor.to_dataframe()
    assert list(of_all["iteration"]) == [0] * len(frame) + [8] * len(frame)
    assert of_all[of_all["iteration"] == 8][columns].reset_index(drop=True).equals(frame)


def test_a_data_frame_has_measures_of_sequences_and_spectra() -> None:
    flow = np.log([[0.5, 0.25], [0.4, 0.2], [0.3, np.nan]])
    layer = LayerReport(
        "C",
        1,
        {},
        ~np.isnan(flow),
        {"flow": flow / 10},
        sequences={"flow": flow, "growth": np.array([-0.4, np.nan])},
        spectra={"eigenvalues": np.array([[1 + 2j, 3], [4j, np.nan]]), "singular_values": np.array([[5.0, 4.0]] * 2)},
        spectra_at=np.array([[0, 1], [2, 0]]),
    )
    frame = Report({"c": layer}).to_dataframe()
    lines = frame.astype(object).where(frame.notna(), None)
    of_flow = lines[lines["measure"] == "flow"]
    assert of_flow[["step", "sample", "index"]].to_numpy().tolist() == [
        [None, 0, 1], [None, 1, 1], [None, 0, 2], [None, 1, 2], [None, 0, 3],
    ]  # fmt: skip
    np.testing.assert_array_equal(of_flow["value"].to_numpy(float), flow.ravel()[:5])
    np.testing.assert_array_equal(of_flow["uncertainty"].to_numpy(float), flow.ravel()[:5] / 10)
    growth = lines[lines["measure"] == "growth"]
    assert growth[["step", "sample", "index", "value"]].to_numpy().tolist() == [
        [None, 0, None, -0.4], [None, 1, None, None],
    ]  # fmt: skip
    eigenvalues = lines[lines["measure"] == "eigenvalues"]
    assert eigenvalues[["step", "sample", "index", "value", "imaginary"]].to_numpy().tolist() == [
        [0, 1, 1, 1.0, 2.0], [0, 1, 2, 3.0, 0.0], [2, 0, 1, 0.0, 4.0],
    ]  # fmt: skip
    assert (lines["measure"] == "singular_values").sum() == 4


def test_without_pandas_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'keras-jacmon\[dataframe\]'"):
        odd_report().to_dataframe()
