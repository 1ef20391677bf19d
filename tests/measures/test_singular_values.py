"""Singular values and the condition number, against LAPACK and exact identities."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import normal
from sequences import built, in_graph, of_cell, rotations

from keras_jacmon.measures.context import MeasureContext
from keras_jacmon.measures.singular_values import condition_number, largest_singular_value, singular_values


def full(J: Any) -> tf.linalg.LinearOperatorFullMatrix:
    return tf.linalg.LinearOperatorFullMatrix(tf.convert_to_tensor(J))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (33, 33), (4, 7), (7, 4)])
def test_singular_values_are_those_of_lapack(shape: tuple[int, int], dtype: Any) -> None:
    J = normal(3, *shape).astype(dtype)
    expected = np.linalg.svd(J.astype(np.float64), compute_uv=False)
    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    found = singular_values(full(J)).numpy()
    np.testing.assert_allclose(found, expected.astype(dtype), rtol=tolerance, atol=tolerance, strict=True)
    np.testing.assert_allclose(largest_singular_value(full(J)), expected[:, 0], rtol=tolerance)
    condition = condition_number(full(J), MeasureContext())
    assert condition.uncertainty is None
    np.testing.assert_allclose(condition.value, expected[:, 0] / expected[:, -1], rtol=100 * tolerance)


def test_all_singular_values_of_an_orthogonal_matrix_are_one() -> None:
    J = rotations(3, 20).astype(np.float32)
    np.testing.assert_allclose(singular_values(full(J)), np.ones((3, 20), np.float32), rtol=1e-5, strict=True)
    np.testing.assert_allclose(condition_number(full(J), MeasureContext()).value, np.ones(3, np.float32), rtol=1e-5)


def test_a_singular_matrix_has_no_condition() -> None:
    J = np.stack([np.zeros((4, 4)), np.diag([1.0, 1, 1, 0]), np.ones((4, 4)), np.diag([4.0, 3, 2, 1])])
    np.testing.assert_array_equal(condition_number(full(J), MeasureContext()).value, [math.inf, math.inf, math.inf, 4])
    np.testing.assert_allclose(singular_values(full(J))[:2], [[0, 0, 0, 0], [1, 1, 1, 0]])


@pytest.mark.parametrize(
    "structured", [True, pytest.param(False, marks=pytest.mark.soak)], ids=["structure", "autodiff"]
)
def test_singular_values_of_a_cell(structured: bool) -> None:  # noqa: FBT001 - a parameter of the test
    cell = built(keras.layers.SimpleRNNCell(6, seed=1), 2)
    found = in_graph(
        lambda: singular_values(of_cell(cell, np.zeros((1, 2, 2), np.float32), structured=structured).at(0))
    )
    np.testing.assert_allclose(found, np.ones((2, 6), np.float32), rtol=1e-5, strict=True)
