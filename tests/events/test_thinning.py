"""What is kept of long series."""

from __future__ import annotations

import itertools

import pytest

from keras_jacmon.events.thinning import thin


@pytest.mark.parametrize("most", [2, 3, 10, 1000])
def test_a_list_stays_bounded_with_its_ends(most: int) -> None:
    series: list[int] = []
    for number in range(5000):
        series.append(number)
        thin(series, most)
        assert len(series) <= most
        assert series[0] == 0
        assert series[-1] == number
    gaps = [after - before for before, after in itertools.pairwise(series)]
    # The older the sparser, but for the newest, which may have lost a neighbour.
    assert gaps[:-2] == sorted(gaps[:-2], reverse=True)


def test_a_list_that_is_short_enough_stays_as_it_is() -> None:
    series = list(range(10))
    thin(series, 10)
    assert series == list(range(10))
