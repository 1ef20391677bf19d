"""A bar while a measurement takes its time, and nothing else."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from keras_jacmon.watching.progress import MeasurementProgress

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.fast

TICK = 0.05


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def show(progress: MeasurementProgress, seconds: float, *, visible: bool = True) -> str:
        with progress.shown(slow=False, visible=visible):
            time.sleep(seconds)
        return capsys.readouterr().out

    return show


def test_a_bar_of_the_seconds_that_the_measurement_before_took(shown: Callable[..., str]) -> None:
    progress = MeasurementProgress(TICK)
    assert "Unknown" in shown(progress, 5 * TICK)
    again = shown(progress, 5 * TICK)
    assert "2/" in again
    assert "Unknown" not in again
    assert again.endswith("\n")


def test_no_bar_for_what_is_quick_or_quiet(shown: Callable[..., str]) -> None:
    assert shown(MeasurementProgress(10.0), 0.0) == ""
    assert shown(MeasurementProgress(TICK), 3 * TICK, visible=False) == ""


def test_a_closed_output_and_an_error_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def write(self, text: str) -> Any:
            raise BrokenPipeError(text[:0])

    monkeypatch.setattr(sys, "stdout", Broken())

    def interrupted() -> None:
        with MeasurementProgress(TICK).shown(slow=True, visible=True):
            time.sleep(3 * TICK)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
