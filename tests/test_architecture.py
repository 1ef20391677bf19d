"""Data flows one way, and asking for the package costs nothing."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import keras_jacmon

pytestmark = pytest.mark.fast

PACKAGE = Path(__file__).parent.parent / "keras_jacmon"

# Data flows from the left to the right: a room may import from itself and from those to its left.
ROOMS = (
    "errors",
    "tensors",
    "options",
    "standard_output",
    "graphs",
    "dashboard",
    "report",
    "events",
    "model",
    "cell",
    "structure",
    "operators",
    "jacobians",
    "measures",
    "measurement",
    "regularization",
    "meter",
    "explanation",
    "stabilization",
    "watching",
    "monitor",
    "commands",
    "__main__",
)
# What is computed of a Jacobian knows nothing of how it is taken.
FORBIDDEN = {("measures", "jacobians"), ("measures", "structure"), ("measures", "model"), ("model", "report")}


def imports(path: Path) -> set[str]:
    """The rooms of this package that a file imports from."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("keras_jacmon."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("keras_jacmon") for alias in node.names), "import from, as elsewhere"
    return rooms


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_those_before_it(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in ROOMS
    for imported in imports(path):
        assert ROOMS.index(imported) <= ROOMS.index(room), f"{path.name} imports from {imported}"
        assert (room, imported) not in FORBIDDEN, f"{path.name} imports from {imported}"


def test_the_report_is_plain_numpy() -> None:
    for path in (PACKAGE / "report").glob("*.py"):
        source = path.read_text()
        modules = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
        assert not modules & {"tensorflow", "keras"}
        assert "import tensorflow" not in source
        assert "import keras\n" not in source


def test_importing_the_package_loads_neither_tensorflow_nor_keras() -> None:
    script = "import sys, keras_jacmon; print(sorted({'tensorflow', 'keras', 'numpy'} & set(sys.modules)))"
    command = [sys.executable, "-c", script]
    out = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own words
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_another_backend_is_refused_in_a_sentence(backend: str, tmp_path: Path) -> None:
    script = "from keras_jacmon import Report\ntry: from keras_jacmon import JacobianMonitor\n"
    script += "except ImportError as error: print(error)"
    out = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"KERAS_BACKEND": backend, "KERAS_HOME": str(tmp_path)},
    )
    (sentence,) = out.stdout.splitlines()
    assert sentence == (
        f"keras_jacmon supports the backend `tensorflow` of Keras alone, and Keras is set to `{backend}`. Set the "
        "environment variable KERAS_BACKEND to tensorflow before Keras is imported."
    )


def test_the_tab_of_tensorboard_loads_neither_tensorflow_nor_keras() -> None:
    script = """
        import sys
        from keras_jacmon.dashboard.plugin import Loader
        print(sorted({'tensorflow', 'keras', 'keras_jacmon.report.report'} & set(sys.modules)))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own words
    assert out.stdout.strip() == "[]"


def test_public_names_are_all_there() -> None:
    for name in keras_jacmon.__all__:
        assert getattr(keras_jacmon, name).__doc__
        assert name in dir(keras_jacmon)
    with pytest.raises(AttributeError, match="module 'keras_jacmon' has no attribute 'nonsense'"):
        _ = keras_jacmon.nonsense
