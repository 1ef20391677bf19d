"""Measures of many points, a bounded number of them at a time."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from helpers import normal

from keras_jacmon.measurement.chunks import PointSource, measure_points
from keras_jacmon.measures.context import MeasureContext
from keras_jacmon.measures.selection import KEYS
from keras_jacmon.options import Options

pytestmark = pytest.mark.fast

POINTS = 6
OPTIONS = MeasureContext(Options(max_entries=0), num_points=POINTS)


def source_of(matrices: tf.Tensor, valid: tf.Tensor | None = None) -> PointSource:
    return PointSource(
        POINTS,
        lambda start, stop: {"hidden": tf.linalg.LinearOperatorFullMatrix(matrices[start:stop])},
        lambda chosen: {"hidden": tf.linalg.LinearOperatorFullMatrix(tf.gather(matrices, chosen))},
        valid,
    )


@pytest.mark.parametrize("chunk", [1, 2, 4, 6, 100])
def test_each_point_has_random_vectors_of_its_own(chunk: int) -> None:
    matrices = tf.repeat(tf.constant(normal(1, 8, 8)), POINTS, axis=0)
    (measured,) = measure_points(source_of(matrices), (KEYS["variance"],), OPTIONS, chunk)
    assert len(np.unique(measured.value)) == POINTS


@pytest.mark.parametrize("chunk", [1, 2, 4, 6, 100])
def test_points_to_leave_out_are_nan(chunk: int) -> None:
    matrices = tf.constant(normal(POINTS, 8, 8))
    norm = (KEYS["spectral_norm"],)
    (measured,) = measure_points(source_of(matrices, tf.constant([0, 3, 4])), norm, OPTIONS, chunk)
    expected = np.linalg.norm(matrices, ord=2, axis=(1, 2))
    expected[[1, 2, 5]] = np.nan
    np.testing.assert_allclose(measured.value, expected, rtol=1e-2)
