"""What the README shows is run."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path
from typing import Any

import keras
import pytest
from helpers import normal

from keras_jacmon import JacobianMonitor, explain, measure
from keras_jacmon.measures.registry import markdown_table

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BATCH, STEPS, FEATURES = 2, 4, 4


def section(title: str) -> str:
    """The text below a heading, up to the next one."""
    _, _, rest = README.partition(f"\n## {title}\n")
    assert rest, title
    return rest.partition("\n## ")[0]


def code_block(text: str) -> str:
    found = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(found) == 1
    return str(found[0])


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of the table with this header."""
    _, _, table = text.partition(f"\n{header}\n")
    assert table, header
    lines = table.partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


SUPPORTED = [
    (codes(example)[0], codes(layers))
    for _, example, layers in rows(section("What is supported"), "| what | for example | layers in the report |")
]


@pytest.fixture
def names() -> dict[str, Any]:
    """What the README's code may use."""
    keras.backend.clear_session()
    found: dict[str, Any] = {"keras": keras, "ops": keras.ops, "Sequential": keras.Sequential}
    found |= {name: getattr(keras.layers, name) for name in dir(keras.layers) if name[0].isupper()}
    exec(code_block(section("What is supported")), found)  # noqa: S102 - the README is ours
    return found


def test_the_table_is_found() -> None:
    assert len(SUPPORTED) >= 15


@pytest.mark.parametrize(("example", "layers"), SUPPORTED, ids=[example for example, _ in SUPPORTED])
def test_each_supported_row(example: str, layers: list[str], names: dict[str, Any]) -> None:
    x = keras.Input(batch_shape=(BATCH, STEPS, FEATURES))
    names["x"] = x
    model = keras.Model(x, eval(example, names))  # noqa: S307 - the README is ours
    report = measure(model, normal(BATCH, STEPS, FEATURES), measures=["variance"])
    assert set(report.layers) == set(layers)
    for layer in report.layers.values():
        assert layer["variance"].shape == (STEPS, BATCH)


PROMISES = [codes(test)[0].split("::") for _, test in rows(section("What you can rely on"), "| promise | test |")]


def test_each_promise_has_its_test() -> None:
    assert len(PROMISES) >= 20
    for file, name in PROMISES:
        tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
        assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], f"{file}::{name}"


def test_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    model = keras.Sequential([keras.Input((STEPS, FEATURES)), keras.layers.LSTM(3, name="lstm"), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x, y = normal(8, STEPS, FEATURES), normal(8, 1)
    usage = code_block(README.partition("\n## ")[0])
    assert len([line for line in usage.splitlines() if line]) == 4
    exec(usage, {"model": model, "x": x, "y": y, "x_test": x})  # noqa: S102 - the README is ours
    assert "joint/spectral_norm" in capsys.readouterr().out
    assert (tmp_path / "logs" / "jacobian").is_dir()


def test_measures() -> None:
    assert markdown_table() in README


def test_commands() -> None:
    """Two commands, each complete, as they are promised."""
    assert re.findall(r"```sh\n(.*?)\n```", README, flags=re.DOTALL) == [
        "python3 -m venv .venv && .venv/bin/pip install '.[examples]' && .venv/bin/python examples/quickstart.py",
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest",
    ]


def test_early_stopping_after_and_before_the_monitor(names: dict[str, Any]) -> None:
    """The first limit: what reads `logs` comes after the monitor."""

    def train(*callbacks: Any) -> list[str]:
        model = keras.Sequential([keras.Input((STEPS, FEATURES)), names["GRU"](2, name="gru"), names["Dense"](1)])
        model.compile("sgd", "mse")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(normal(4, STEPS, FEATURES), normal(4, 1), verbose=0, callbacks=list(callbacks))
        return [str(warning.message) for warning in caught if "gru_jac_variance" in str(warning.message)]

    monitor = JacobianMonitor(normal(BATCH, STEPS, FEATURES), log_dir=None, measures=["variance"])
    stopping = keras.callbacks.EarlyStopping(monitor="gru_jac_variance", mode="min")
    assert train(monitor, stopping) == []
    assert len(train(stopping, monitor)) == 1


def test_the_explanation_that_is_shown() -> None:
    x = keras.Input((STEPS, 3))
    shown = re.findall(r"```\n(lstm:\n.*?)```", README, flags=re.DOTALL)
    assert shown == [f"{explain(keras.Model(x, keras.layers.LSTM(4, name='lstm')(x)), normal(2, STEPS, 3))}\n"]
