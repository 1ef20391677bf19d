"""Random draws for tests, the same ones each time: one part of them in each run, all of them with `-m soak`."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Any

import hypothesis
import keras
import pytest
from helpers import soak_but
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable

# The number of drawn models; each test takes a share of it.
DRAWS = int(os.environ.get("JACMON_DRAWS", "100"))
PARTS = 25


def each_part_but(default: int) -> Any:
    """The mark of a test that draws each part of the draws, one of them by default."""
    return pytest.mark.parametrize("part", soak_but({default}, range(PARTS)))


each_part = each_part_but(0)


def for_each_draw(part: int, draws: int, check: Callable[..., None], *strategies: Any) -> None:
    """Check one part of the draws. Nothing that is drawn may be refused."""
    seen: set[str] = set()
    drawn_before = False

    # Tracing takes seconds, so nothing is shrunk. Of many draws a fifth has been there before.
    number = -(-draws // PARTS)

    @hypothesis.seed(part)
    @hypothesis.settings(
        max_examples=2 * number + 1,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.tuples(*strategies))
    def draw(drawn: tuple[Any, ...]) -> None:
        nonlocal drawn_before
        # The first one is the simplest there is, in each part.
        if (not drawn_before and part > 0) or repr(drawn) in seen or len(seen) == number:
            drawn_before = True
            return
        seen.add(repr(drawn))
        keras.backend.clear_session(free_memory=False)
        # Looking at all objects takes a while.
        if len(seen) % 8 == 0:
            gc.collect()
        check(*drawn)

    draw()
    assert len(seen) == number
