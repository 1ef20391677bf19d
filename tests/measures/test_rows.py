"""Measures of many rows, some of them at a time."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from helpers import normal

from keras_jacmon.measures.options import Options
from keras_jacmon.measures.registry import MEASURES
from keras_jacmon.measures.rows import RowSource, measure_rows

ROWS = 6
OPTIONS = Options(max_entries=0, rows=ROWS)


def source_of(matrices: tf.Tensor, valid: tf.Tensor | None = None) -> RowSource:
    return RowSource(
        ROWS,
        lambda start, stop: {"hidden": tf.linalg.LinearOperatorFullMatrix(matrices[start:stop])},
        lambda rows: {"hidden": tf.linalg.LinearOperatorFullMatrix(tf.gather(matrices, rows))},
        valid,
    )


@pytest.mark.parametrize("chunk", [1, 2, 4, 6, 100])
def test_each_row_has_random_vectors_of_its_own(chunk: int) -> None:
    matrices = tf.repeat(tf.constant(normal(1, 8, 8)), ROWS, axis=0)
    (measured,) = measure_rows(source_of(matrices), ["hidden"], [MEASURES["variance"]], OPTIONS, chunk).values()
    assert len(np.unique(measured.value)) == ROWS


@pytest.mark.parametrize("chunk", [1, 2, 4, 6, 100])
def test_rows_to_leave_out_are_nan(chunk: int) -> None:
    matrices = tf.constant(normal(ROWS, 8, 8))
    norm = [MEASURES["spectral_norm"]]
    measured = measure_rows(source_of(matrices, tf.constant([0, 3, 4])), ["hidden"], norm, OPTIONS, chunk)
    expected = np.linalg.norm(matrices, ord=2, axis=(1, 2))
    expected[[1, 2, 5]] = np.nan
    np.testing.assert_allclose(measured["hidden/spectral_norm"].value, expected, rtol=1e-2)
