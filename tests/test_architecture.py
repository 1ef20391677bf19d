"""Data flows one way, and asking for the package costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import keras_jacmon

PACKAGE = Path(__file__).parent.parent / "keras_jacmon"

# A stage may import from itself and from the stages before it.
STAGES = (
    "probe",
    "jacobians",
    "measures",
    "verdict",
    "archive",
    "report",
    "events",
    "places",
    "points",
    "sequences",
    "facts",
    "measurement",
    "option_checks",
    "meter",
    "explanation",
    "call_penalty",
    "penalty",
    "attachment",
    "regularizer",
    "thinning",
    "monitor",
    "__main__",
)
FORBIDDEN_PAIRS = {
    ("measures", "jacobians"),
    ("measures", "probe"),
    ("report", "probe"),
    ("report", "jacobians"),
    ("report", "measures"),
    ("events", "meter"),
    ("facts", "events"),
    ("measurement", "events"),
    ("meter", "events"),
    ("explanation", "events"),
    ("monitor", "explanation"),
}


def imports(path: Path) -> set[str]:
    """The stages of this package that a file imports from."""
    stages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("keras_jacmon."):
            stages.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("keras_jacmon") for alias in node.names), "import from, as elsewhere"
    return stages


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_stage_imports_only_from_those_before_it(path: Path) -> None:
    stage = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert stage in STAGES
    for imported in imports(path):
        assert STAGES.index(imported) <= STAGES.index(stage), f"{path.name} imports from {imported}"
        assert (stage, imported) not in FORBIDDEN_PAIRS, f"{path.name} imports from {imported}"


def test_the_report_is_plain_numpy() -> None:
    source = (PACKAGE / "report.py").read_text()
    assert "tensorflow" not in {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert "import tensorflow" not in source
    assert "import keras" not in source


def test_importing_the_package_loads_neither_tensorflow_nor_keras() -> None:
    script = "import sys, keras_jacmon; print(sorted({'tensorflow', 'keras', 'numpy'} & set(sys.modules)))"
    command = [sys.executable, "-c", script]
    out = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own words
    assert out.stdout.strip() == "[]"


def test_public_names_are_all_there() -> None:
    for name in keras_jacmon.__all__:
        assert getattr(keras_jacmon, name).__doc__
        assert name in dir(keras_jacmon)
    with pytest.raises(AttributeError, match="module 'keras_jacmon' has no attribute 'nonsense'"):
        _ = keras_jacmon.nonsense
