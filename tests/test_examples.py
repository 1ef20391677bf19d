"""The examples are scripts that assert their own claims."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, cwd: Path) -> str:
    """Runs an example as a user does, somewhere else than in the source tree, and returns what it prints."""
    finished = subprocess.run(  # noqa: S603 - our own script
        [sys.executable, str(EXAMPLES / script)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"quickstart.py", "seed_check.py"}


def test_quickstart(tmp_path: Path) -> None:
    printed = run("quickstart.py", tmp_path)
    for line in ("Before training (step 0):", "After training (step 705):", "tensorboard --logdir logs"):
        assert line in printed
    assert (tmp_path / "logs" / "jacobian").is_dir()


def test_seed_check(tmp_path: Path) -> None:
    printed = run("seed_check.py", tmp_path)
    assert [line.split()[0] for line in printed.splitlines() if " mean " in line] == ["relu", "linear"]
