"""`python -m keras_jacmon`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
from helpers import WeightedCell, normal

from keras_jacmon import Report, measure
from keras_jacmon.__main__ import _parser, main
from keras_jacmon.options import Options

if TYPE_CHECKING:
    from pathlib import Path

PROBE = normal(2, 5, 3)


@pytest.fixture
def model(tmp_path: Path) -> Any:
    made = keras.Sequential(
        [keras.Input((5, 3)), keras.layers.GRU(4, return_sequences=True, name="gru"), keras.layers.LSTM(2, name="lstm")]
    )
    made.save(tmp_path / "model.keras")
    np.save(tmp_path / "probe.npy", PROBE)
    return made


def run(directory: Path, *arguments: str, probe: str = "probe.npy") -> int:
    return main([str(directory / "model.keras"), str(directory / probe), *arguments])


def test_it_prints_the_report(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 0
    assert capsys.readouterr().out == f"{measure(model, PROBE)}\n"


def test_measures_layers_json_and_save(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "report.npz"
    assert run(tmp_path, "--measures", "variance", "flow", "--layers", "gru", "--json", "--save", str(saved)) == 0
    expected = measure(model, PROBE, measures=["variance", "flow"], layers=["gru"])
    assert json.loads(capsys.readouterr().out) == expected.to_dict() == Report.load(saved).to_dict()


def test_every_option_is_an_argument(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--measures", "joint/lyapunov", "joint/flow", "--exponents", "2", "--warmup", "1", "--exact-flow"]
    assert run(tmp_path, *arguments, "--max-rows", "none", "--json") == 0
    options = {"exponents": 2, "warmup": 1, "exact_flow": True, "max_rows": None}
    expected = measure(model, PROBE, measures=["joint/lyapunov", "joint/flow"], **options)
    assert json.loads(capsys.readouterr().out) == expected.to_dict()
    helped = _parser().format_help()
    assert all(f"--{option.name.replace('_', '-')}" in helped for option in dataclasses.fields(Options))


def test_several_inputs_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = keras.Input((5, 3), name="a"), keras.Input((5, 2), name="b")
    made = keras.Model({"a": a, "b": b}, keras.layers.GRU(2, name="gru")(keras.layers.concatenate([a, b])))
    made.save(tmp_path / "model.keras")
    np.savez(tmp_path / "probe.npz", a=PROBE, b=normal(2, 5, 2))
    assert run(tmp_path, "--measures", "fast", probe="probe.npz") == 0
    assert "gru: GRUCell, 2 units, 5 steps x 2 samples" in capsys.readouterr().out


@keras.saving.register_keras_serializable("tests")
class RegisteredCell(WeightedCell):
    """Known to Keras here, and nowhere else."""


@pytest.mark.usefixtures("model")
def test_what_is_wrong_is_said_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error_of(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main([*arguments])
        assert caught.value.code == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in error
        return str(error)

    here = str(tmp_path)
    model, probe = f"{here}/model.keras", f"{here}/probe.npy"
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "narrow.npy", normal(2, 5, 2))
    np.save(tmp_path / "infinite.npy", np.full((2, 5, 3), np.inf))
    (tmp_path / "text.keras").write_text("no model")
    (tmp_path / "empty.npy").touch()
    np.savez(tmp_path / "whole.npz", PROBE)
    (tmp_path / "half.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-80])
    assert "there is no file" in error_of(f"{here}/none.keras", probe)
    assert "there is no file" in error_of(model, f"{here}/none.npy")
    assert "allow_pickle=False" in error_of(model, f"{here}/objects.npy")
    assert "empty.npy is no array that can be read" in error_of(model, f"{here}/empty.npy")
    assert "half.npz is no array that can be read" in error_of(model, f"{here}/half.npz")
    assert "Invalid value for argument `probe`" in error_of(model, f"{here}/infinite.npy")
    assert "text.keras" in error_of(f"{here}/text.keras", probe)
    whole = bytearray((tmp_path / "model.keras").read_bytes())
    whole[len(whole) // 2] ^= 255
    (tmp_path / "damaged.keras").write_bytes(whole)
    with zipfile.ZipFile(tmp_path / "without.keras", "w") as file:
        file.writestr("metadata.json", "{}")
    for name in ("damaged.keras", "without.keras"):
        assert f"{name} is no model that can be read" in error_of(f"{here}/{name}", probe)
    damaged = bytearray((tmp_path / "whole.npz").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (tmp_path / "damaged.npz").write_bytes(damaged)
    assert "damaged.npz is no array that can be read" in error_of(model, f"{here}/damaged.npz")
    assert "Invalid value for argument `probe`" in error_of(model, f"{here}/narrow.npy")
    assert "Invalid value for argument `layers`" in error_of(model, probe, "--layers", "nonsense")
    assert "Invalid value for argument `measures`" in error_of(model, probe, "--measures", "nonsense")
    assert "error" in error_of(model, probe, "--save", f"{here}/no/such/directory")


def test_code_out_of_a_model_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = keras.Sequential([keras.Input((5, 3)), keras.layers.Lambda(lambda x: x), keras.layers.GRU(2)])
    made.save(tmp_path / "model.keras")
    np.save(tmp_path / "probe.npy", PROBE)
    with pytest.raises(SystemExit):
        run(tmp_path)
    assert "lambda" in capsys.readouterr().err.lower()


@pytest.mark.usefixtures("model")
def test_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "keras_jacmon", "model.keras", "probe.npy", "--measures", "variance", "--json"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)  # noqa: S603 - our own words
    assert set(json.loads(out.stdout)["layers"]) == {"gru", "lstm"}


@pytest.mark.fast
def test_help_does_not_wait_for_tensorflow() -> None:
    script = "import sys, keras_jacmon.__main__ as m; m._parser().format_help(); print('tensorflow' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)  # noqa: S603
    assert out.stdout.strip() == "False"
