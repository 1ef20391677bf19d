"""The comparison of vectors that the checks rest on."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from keras_jacmon.jacobians.comparison import in_turns, largest, relative_differences


@pytest.mark.fast
@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([], 0.0),
        ([3.0], 3.0),
        ([0.0, 3.0], 0.0),
        ([3.0, 3.0], 3.0),
        ([9.0, *[1.0] * 15], 1.0),
        ([9.0, 8.0, *[1.0] * 14], 8.0),
        ([*[np.inf] * 2, *[1.0] * 398], 1.0),
        ([*[np.inf] * 3, *[1.0] * 397], np.inf),
    ],
)
def test_one_row_in_two_hundred_may_stand_at_a_kink(errors: list[float], expected: float) -> None:
    both = largest(tf.constant([errors, [0.0] * len(errors)], tf.float32))
    np.testing.assert_array_equal(both, [expected, 0.0])


@pytest.mark.fast
def test_parts_are_compared_by_themselves() -> None:
    found, expected = tf.constant([[3.0, 4.0, 1.0], [0.0, 0.0, 2.0]]), tf.constant([[3.0, 4.0, 2.0], [0.0, 5.0, 2.0]])
    differences = relative_differences(found, expected, [2, 1])
    np.testing.assert_allclose(differences, [[0.0, 1.0], [0.5, 0.0]])
    # Errors that are rounding, however small what was expected is.
    np.testing.assert_array_equal(
        relative_differences(found, expected, [2, 1], tf.constant([1.0, 5.0])), np.zeros((2, 2))
    )


@pytest.mark.fast
def test_each_part_has_its_turn_unless_rows_are_few() -> None:
    many, few = (in_turns(tf.ones((rows, 5)), [2, 3], rows).numpy() for rows in (8, 7))
    np.testing.assert_array_equal(many, [[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]] * 4)
    assert few.all()
    np.testing.assert_array_equal(in_turns(tf.ones((16, 2)), [1, 1], 16, every=2)[:5, 0], [1, 1, 0, 0, 1])


@pytest.mark.fast
def test_a_disagreement_about_nan_counts() -> None:
    found, expected = tf.constant([np.nan, 1.0, np.nan, np.inf]), tf.constant([1.0, np.nan, np.nan, np.nan])
    differences = relative_differences(found[:, None], expected[:, None], [1])
    np.testing.assert_array_equal(differences, [[np.inf, np.inf, 0.0, 0.0]])
