"""What is kept of long series."""

from __future__ import annotations

import itertools
import math

import pytest

from keras_jacmon.events.thinning import is_kept, thin


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


def test_every_one_then_every_second_one_then_every_fourth_one() -> None:
    kept = [number for number in range(40) if is_kept(number, 4)]
    assert kept == [0, 1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 28, 36]


@pytest.mark.parametrize("each", [1, 7, 100])
def test_so_many_are_kept(each: int) -> None:
    total = 100_000
    count = sum(is_kept(number, each) for number in range(total))
    assert each * (math.log2(total / each) - 1) <= count <= each * (math.log2(total / each) + 1)
