"""The benchmark whose program runs in a process of its own runs to its end."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def test_the_table_of_memory_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "cost.py"
    spec = importlib.util.spec_from_file_location("cost", path)
    assert spec is not None
    assert spec.loader is not None
    cost = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cost)
    monkeypatch.setattr(cost, "MEMORY_SIZES", ((4, 3),))
    cost.memory()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 4 |")]
    assert [row.split(" | ")[2] for row in rows] == ["`fast`", "`standard`"]
    assert all(row.count("GiB") == 2 for row in rows)
