"""What the README shows is run."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import keras
import pytest
from pages import ROOT, blocks, page, run

from keras_jacmon.report.verdict import Verdict

if TYPE_CHECKING:
    from pathlib import Path

README = page("README.md")


@pytest.mark.fast
def test_commands() -> None:
    """Two commands, each complete, as they are promised."""
    assert blocks(README, "sh") == [
        "python3 -m venv .venv && .venv/bin/pip install '.[examples]' && .venv/bin/python examples/quickstart.py\n",
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest\n",
    ]


def test_the_code_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # So that Keras names its layers as in a new process.
    keras.backend.clear_session(free_memory=False)
    script = blocks(README, "python")[0]
    assert len([line for line in script.splitlines() if line]) == 10
    run("README.md", {})
    assert re.search(r"^lstm: (vanishing|stable|exploding): ", capsys.readouterr().out, flags=re.MULTILINE)
    assert (tmp_path / "logs" / "jacobian").is_dir()


@pytest.mark.fast
def test_the_verdicts_that_are_shown() -> None:
    before, after = (
        Verdict("vanishing", -0.169, 20, 20, 6.84e-06, 64, None, None, ()),
        Verdict("stable", -0.00528, float("inf"), float("inf"), 0.206, 64, None, None, ()),
    )
    assert f"lstm: {before}\n" in README
    assert f"lstm: {after}\n" in README


@pytest.mark.fast
def test_one_page() -> None:
    assert len(README.encode()) < 7000


@pytest.mark.fast
@pytest.mark.parametrize(
    "name",
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))],
)
def test_links_lead_to_files(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page(name)):
        assert target.startswith("https://") or ((ROOT / name).parent / target).is_file(), target
