"""The script that holds everything names tests that are there."""

from __future__ import annotations

import ast
import re
import subprocess

import pytest
from pages import ROOT, page

SCRIPT = page(".ci/run")


def nodes() -> list[str]:
    """The files and tests that the script hands to pytest, after bash has expanded the braces."""
    words = " ".join(re.findall(r"(?<![\w/])tests/[\w/{},.:]+", SCRIPT))
    echo = ["bash", "-c", f"echo {words}"]
    return subprocess.run(echo, capture_output=True, text=True, check=True).stdout.split()  # noqa: S603 - our own script


@pytest.mark.fast
def test_the_tests_that_the_script_names_are_there() -> None:
    assert len(nodes()) > 10
    for node in nodes():
        file, _, name = node.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert not name or name in names, node


@pytest.mark.fast
def test_the_script_is_strict_and_well_formed() -> None:
    assert "\nset -euo pipefail\n" in SCRIPT
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)  # noqa: S603, S607 - our own script


@pytest.mark.fast
def test_the_oldest_tensorboard_has_what_it_imports() -> None:
    """TensorBoard before 2.21 imports `pkg_resources`, which setuptools 82 has no more."""
    bounds = dict(re.findall(r'"(tensorflow|tensorboard)>=2\.(\d+)', page("pyproject.toml")))
    assert min(map(int, bounds.values())) >= 21 or '"setuptools<82"' in page("pyproject.toml")
    # The section with the lower bounds starts with the newest setuptools, and starts the server.
    oldest = SCRIPT.partition('section "tests with the lower bounds')[2]
    assert "install --quiet --upgrade setuptools" in oldest
    assert "threads" in oldest
