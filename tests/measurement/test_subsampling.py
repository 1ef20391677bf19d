"""The points that are chosen for expensive measures."""

from __future__ import annotations

import numpy as np
import pytest

from keras_jacmon.measurement.subsampling import spread_evenly

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(("total", "count"), [(0, 5), (1, 5), (5, 5), (53, 40), (64, 16), (1000, 7)])
def test_numbers_spread_evenly_are_different_and_one_in_each_part(total: int, count: int) -> None:
    places = spread_evenly(total, count).numpy()
    expected = min(total, count)
    assert places.shape == (expected,)
    assert all(
        index * total // expected <= place < (index + 1) * total // expected for index, place in enumerate(places)
    )


def test_numbers_spread_evenly_do_not_meet_the_same_sample_each_time() -> None:
    samples = spread_evenly(4096, 64).numpy() % 64
    assert len(np.unique(samples)) > 32
