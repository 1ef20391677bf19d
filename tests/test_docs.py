"""What the documentation shows is run, and what it lists is there."""

from __future__ import annotations

import ast
import inspect
import re
import runpy
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
from pages import ROOT, blocks, codes, page, reader_names, run, table

import keras_jacmon
from keras_jacmon import explain, measure
from keras_jacmon.structure.ops import OPERATIONS, OpKind

if TYPE_CHECKING:
    from pathlib import Path

SUPPORTED = [
    (codes(example)[0], codes(layers))
    for _, example, layers in table(page("docs/supported.md"), "| what | for example | layers in the report |")
]
PROMISES = [codes(test)[0].split("::") for _, test in table(page("docs/promises.md"), "| promise | test |")]


@pytest.fixture(scope="module")
def taken_for_granted() -> dict[str, Any]:
    return reader_names()


@pytest.fixture
def names(taken_for_granted: dict[str, Any]) -> dict[str, Any]:
    """The names of a reader of one page, whose model is that of the other pages, and is traced once."""
    keras.backend.clear_session(free_memory=False)
    return dict(taken_for_granted)


@pytest.fixture(scope="module")
def cells(taken_for_granted: dict[str, Any]) -> dict[str, Any]:
    """The names of a reader, and the cells that the page of what is supported makes."""
    names = dict(taken_for_granted)
    run("docs/supported.md", names)
    return names


@pytest.mark.parametrize(
    "name", [path.name for path in sorted((ROOT / "docs").glob("*.md")) if blocks(path.read_text(), "python")]
)
def test_the_code_of_a_page_runs(
    name: str, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(f"docs/{name}", names)


def test_the_table_of_what_is_supported_is_found() -> None:
    assert len(SUPPORTED) >= 15


@pytest.mark.parametrize(("example", "layers"), SUPPORTED, ids=[example for example, _ in SUPPORTED])
def test_each_supported_row(example: str, layers: list[str], cells: dict[str, Any]) -> None:
    # So that Keras counts the names of layers from the beginning.
    keras.backend.clear_session(free_memory=False)
    x = keras.Input(batch_shape=(2, 4, 4))
    model = keras.Model(x, eval(example, cells | {"x": x}))  # noqa: S307 - the page is ours
    report = measure(model, np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32), measures=["variance"])
    assert set(report.layers) == set(layers)
    for layer in report.layers.values():
        assert layer["variance"].shape == (4, 2)


@pytest.mark.fast
def test_each_promise_has_its_test_in_the_default_tier() -> None:
    assert len(PROMISES) >= 20
    trees = {file: ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")) for file, _ in PROMISES}
    for file, name in PROMISES:
        marks = {
            node.name: [ast.unparse(mark) for mark in node.decorator_list]
            for node in trees[file].body
            if isinstance(node, ast.FunctionDef)
        }
        assert name in marks, f"{file}::{name}"
        assert "pytest.mark.soak" not in marks[name], f"{file}::{name}"


@pytest.mark.fast
def test_the_places_that_the_architecture_names_are_there() -> None:
    package = ROOT / "keras_jacmon"
    places = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", page("docs/architecture.md"))
    assert len(places) > 20
    for file, name in places:
        path = package / file if (package / file).is_file() else ROOT / file
        definitions = (ast.FunctionDef, ast.ClassDef)
        names = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, definitions)]
        assert not name or name in names, f"{file}::{name}"


@pytest.mark.fast
def test_each_kind_of_operation_is_explained_with_examples() -> None:
    described = table(page("docs/architecture.md"), "| kind | what the operation does | examples |")
    assert [codes(kind)[0] for kind, _, _ in described] == [kind.name for kind in OpKind]
    for kind, _, examples in described:
        assert {OPERATIONS[name].kind.name for name in codes(examples)} <= set(codes(kind))


@pytest.mark.fast
def test_the_table_of_measures_is_that_of_the_registry() -> None:
    with_table = runpy.run_path(str(ROOT / "docs" / "write_measures.py"))["with_table"]
    assert with_table(page("docs/measures.md")) == page("docs/measures.md")


@pytest.mark.fast
def test_the_explanation_that_is_shown(names: dict[str, Any]) -> None:
    (shown,) = [text for text in blocks(page("docs/methods.md"), "text") if "d state" in text]
    assert shown == f"{explain(names['model'], names['x'])}\n"


@pytest.mark.parametrize("name", keras_jacmon.__all__)
def test_the_example_of_each_public_name_runs(
    name: str, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    examples = blocks(inspect.getdoc(getattr(keras_jacmon, name)) or "", "python")
    assert len(examples) == 1
    public = {name: getattr(keras_jacmon, name) for name in keras_jacmon.__all__}
    my_cell = type("MyCell", (keras.layers.SimpleRNNCell,), {})
    exec(examples[0], names | public | {"keras_jacmon": keras_jacmon, "MyCell": my_cell})  # noqa: S102 - the docstring is ours
