"""The secant method, on numbers whose zeros are known."""

from __future__ import annotations

import math

import pytest

from keras_jacmon.measurement.secant import Secant


@pytest.mark.fast
def test_the_secant_turns_back_where_the_number_moves_away() -> None:
    secant, x = Secant(1.0, 1.5), 0.0
    for _ in range(8):
        x += secant.step(x**3 - 2)
    assert abs(x - 2 ** (1 / 3)) < 1e-2
    # It has no zero, and is largest at 1.
    secant, x = Secant(1.0, 1.5), 0.0
    places = []
    for _ in range(12):
        x += secant.step(-1 - (x - 1) ** 2 if x < 5 else math.nan)
        places.append(x)
    assert max(map(abs, places)) < 5
    assert Secant(1.0, 1.5).step(-math.inf) == 1.5
    assert Secant(1.0, 1.5).step(math.nan) == -1.5
