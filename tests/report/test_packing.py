"""The curves over the position that are packed."""

from __future__ import annotations

import numpy as np
import pytest
from dashboards import make_layer

from keras_jacmon.dashboard.packed import bounds
from keras_jacmon.report.packing import curve_of, packed

pytestmark = pytest.mark.fast


def test_a_curve_has_the_numbers_of_the_report() -> None:
    layer = make_layer()
    curve = packed("lstm", layer).curves["joint/variance"]
    values = layer["joint/variance"]
    np.testing.assert_allclose(curve.mean, layer.over_time("joint/variance"), rtol=1e-6)
    np.testing.assert_allclose(curve.low, np.quantile(values, 0.1, axis=1), rtol=1e-6)
    np.testing.assert_allclose(curve.high, np.quantile(values, 0.9, axis=1), rtol=1e-6)
    np.testing.assert_array_equal(curve.least, curve.mean)


def test_a_bin_has_the_least_and_the_greatest_of_its_positions() -> None:
    values = np.ones((1000, 3), np.float32)
    values[537] = 50.0
    values[801, 1] = -2.0
    curve = curve_of(values, np.ones((1000, 3), bool), 10)
    np.testing.assert_array_equal(bounds(1000, 10), np.arange(0, 1001, 100))
    np.testing.assert_allclose(curve.greatest, [1, 1, 1, 1, 1, 50, 1, 1, 1, 1])
    np.testing.assert_allclose(curve.least, [1] * 8 + [0.0, 1.0])
    np.testing.assert_allclose(curve.mean[5], 1.49)
    np.testing.assert_allclose(curve.low, 1.0)
