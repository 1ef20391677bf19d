"""Reports as files, as JSON and as data frames."""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
from helpers import normal

from keras_jacmon import LayerReport, Report, measure
from keras_jacmon.report import archive

if TYPE_CHECKING:
    from pathlib import Path


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
        {"variance": float("inf"), "kernel_gain": 0.1},
        go_backwards=True,
        notes=("a note", 'with "quotes" and ünïcode'),
        reductions={"joint/growth": "mean"},
        may_be_infinite=frozenset({"variance"}),
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
    report.save(path)
    assert_same_report(Report.load(path), report)
    # Written in one step: nothing else is left in the directory, and the file is like others.
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "other").write_text("")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


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
    good = tmp_path / "good"
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
        {"spectra": {"eigenvalues": np.ones((2, 2))}},
        {"spectra_at": np.array([[0.5, 1.0]])},
        {"uncertainties": {}},
        {"notes": (3,)},
        {"suggestion_inputs": {"variance": "much"}},
        {"reductions": {"joint/growth": "sum"}},
        {"reductions": {"growth": "mean"}},
    ],
    ids="-".join,
)
def test_what_does_not_fit_together_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    layer = next(iter(odd_report().layers.values()))
    record = {field.name: getattr(layer, field.name) for field in dataclasses.fields(LayerReport)} | wrong
    archive.write(tmp_path / "report", {"lstm": record})
    with pytest.raises(ValueError, match="Expected a report of this version"):
        Report.load(tmp_path / "report")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Bytes that changed make ZIP, zlib, NumPy's headers and json fail, each in ways of its own."""
    odd_report().save(tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
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
    assert list(frame.columns) == ["layer", "measure", "step", "sample", "value", "uncertainty"]
    of_variance = frame[frame["measure"] == "variance"]
    assert [*zip(of_variance["step"], of_variance["sample"], of_variance["value"], strict=True)] == [
        (0, 0, 1.0), (1, 0, np.inf), (1, 1, -np.inf), (2, 0, 5e-324), (2, 1, -0.0),
    ]  # fmt: skip
    assert of_variance["uncertainty"].isna().all()
    norm = frame[frame["measure"] == "joint/spectral_norm"]
    assert list(norm["step"]) == [0, 1, 2]
    assert list(norm["uncertainty"]) == [1.0, np.inf, 5e-324]
    assert set(frame["layer"]) == {"both/forward_lstm:1"}


def test_without_pandas_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'keras-jacmon\[dataframe\]'"):
        odd_report().to_dataframe()
