"""`python -m keras_jacmon`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import processes
import pytest
from helpers import WeightedCell, normal

import keras_jacmon
from keras_jacmon import Report, measure
from keras_jacmon.__main__ import _parsed, _parser, main
from keras_jacmon.options import Options
from keras_jacmon.standard_output import write_line

PROBE = normal(2, 5, 3)


@pytest.fixture
def model(tmp_path: Path) -> Any:
    made = keras.Sequential(
        [
            keras.Input((5, 3)),
            keras.layers.SimpleRNN(4, return_sequences=True, name="rnn"),
            keras.layers.LSTM(2, name="lstm"),
        ]
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
    assert run(tmp_path, "--measures", "variance", "flow", "--layers", "rnn", "--json", "--save", str(saved)) == 0
    expected = measure(model, PROBE, measures=["variance", "flow"], layers=["rnn"])
    assert json.loads(capsys.readouterr().out) == expected.to_dict() == Report.load(saved).to_dict()


def test_every_option_is_an_argument(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--measures", "joint/lyapunov", "joint/flow", "--exponents", "2", "--warmup", "1", "--exact-flow"]
    assert run(tmp_path, *arguments, "--max-rows", "none", "--layers", "lstm", "--json") == 0
    options = {"exponents": 2, "warmup": 1, "exact_flow": True, "max_rows": None}
    expected = measure(model, PROBE, measures=["joint/lyapunov", "joint/flow"], layers=["lstm"], **options)
    assert json.loads(capsys.readouterr().out) == expected.to_dict()
    helped = _parser().format_help()
    assert all(f"--{option.name.replace('_', '-')}" in helped for option in dataclasses.fields(Options))


@pytest.mark.fast
@pytest.mark.parametrize(
    "words",
    [
        "m.keras p.npy --measures fast variance --layers gru",
        "--layers gru --measures fast variance m.keras p.npy",
        "--measures fast variance m.keras --layers gru p.npy",
        "--measures fast variance m.keras --layers gru --json p.npy",
        "m.keras --measures fast variance --layers gru p.npy --save r.npz",
        "m.keras --save r.npz --measures fast variance p.npy --layers gru",
    ],
)
def test_lists_of_names_do_not_swallow_the_paths(words: str) -> None:
    options = _parsed(_parser(), words.split())
    assert (options.model, options.probe) == ("m.keras", "p.npy")
    assert (options.measures, options.layers) == (["fast", "variance"], ["gru"])


@pytest.mark.fast
def test_odd_arguments_end_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    # A path may stand behind the sign of equality.
    options = _parsed(_parser(), ["p.npy", "--layers=m.keras"])
    assert {options.model, options.probe} == {"m.keras", "p.npy"}
    for words, sentence in (
        (["m.keras", "--layers", "x" * 300], "expected a model and a probe, received: m.keras"),
        (["m.keras", "p.npy", "--max-rows", "abc"], "expected a whole number or none, received 'abc'"),
    ):
        with pytest.raises(SystemExit) as caught:
            _parsed(_parser(), words)
        assert caught.value.code == 2
        assert sentence in capsys.readouterr().err


def test_the_name_of_a_single_array_and_the_cells_of_a_module(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_cells.py").write_text(
        "import keras\n\n\n@keras.saving.register_keras_serializable('own')\nclass Own(keras.layers.GRU):\n    pass\n"
    )
    (tmp_path / "no_cells.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_cells").Own
    keras.Sequential([keras.Input((5, 3)), own(2, name="own")]).save(tmp_path / "model.keras")
    np.savez(tmp_path / "probe.npz", anything=PROBE)
    del sys.modules["own_cells"], keras.saving.get_custom_objects()["own>Own"]
    given = ["--measures", "variance", str(tmp_path / "model.keras"), str(tmp_path / "probe.npz")]
    assert main(["--import", "own_cells", *given]) == 0
    assert "own: GRUCell, 2 units, 5 steps x 2 samples" in capsys.readouterr().out
    for module, reason in (("no_cells", "division by zero"), ("none_such", "No module named 'none_such'")):
        with pytest.raises(SystemExit):
            main(["--import", module, *given])
        assert f"the module {module} cannot be imported: {reason}" in capsys.readouterr().err


@pytest.mark.fast
def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"keras_jacmon {keras_jacmon.__version__}\n"


@pytest.mark.usefixtures("model")
def test_an_output_that_cannot_be_written_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--measures", "variance", "--layers", "lstm")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        assert run(tmp_path, *arguments) == 1
    assert capsys.readouterr().err == ""
    wrong = "python -m keras_jacmon: error: standard output cannot be written to: "
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit):
            run(tmp_path, *arguments)
    assert capsys.readouterr().err == f"{wrong}[Errno 28] No space left on device\n"


@pytest.mark.fast
def test_outputs_that_are_closed_or_know_few_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "ascii").open("w", encoding="ascii") as ascii_only:
        monkeypatch.setattr(sys, "stdout", ascii_only)
        assert write_line("0.5 ± 0.1", argparse.ArgumentParser())
    assert (tmp_path / "ascii").read_text() == "0.5 ? 0.1\n"
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as caught:
        write_line("0.5", argparse.ArgumentParser(prog="command"))
    assert caught.value.code == 2
    wrong = "command: error: standard output cannot be written to: it is closed\n"
    assert capsys.readouterr().err == wrong


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
    saved = f"{here}/no/such/report.npz"
    assert error_of(model, probe, "--save", saved).endswith(f"No such file or directory: '{saved}'\n")
    assert "expected a model and a probe, received: neither" in error_of("--measures", "fast")
    assert f"expected a model and a probe, received: {model}" in error_of("--measures", "fast", model)


def test_code_out_of_a_model_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = keras.Sequential([keras.Input((5, 3)), keras.layers.Lambda(lambda x: x), keras.layers.GRU(2)])
    made.save(tmp_path / "model.keras")
    np.save(tmp_path / "probe.npy", PROBE)
    with pytest.raises(SystemExit):
        run(tmp_path)
    assert "lambda" in capsys.readouterr().err.lower()


@pytest.mark.usefixtures("model")
def test_as_a_command(tmp_path: Path) -> None:
    script = "import os, runpy, sys; os.chdir(sys.argv.pop(1)); runpy.run_module('keras_jacmon', run_name='__main__')"
    out = processes.run(script, str(tmp_path), "model.keras", "probe.npy", "--measures", "variance", "--json")
    assert out.returncode == 0, out.stderr
    assert set(json.loads(out.stdout)["layers"]) == {"rnn", "lstm"}


@pytest.mark.fast
def test_help_does_not_wait_for_tensorflow() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "keras_jacmon", "--help"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own words
    assert out.stdout.startswith("usage: python -m keras_jacmon ")
    assert re.search(r"\| +keras_jacmon\.errors$", out.stderr, flags=re.MULTILINE)
    assert "tensorflow" not in out.stderr
