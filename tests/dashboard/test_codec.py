"""What is packed comes back, to the precision that is promised."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dashboards import make_layer

from keras_jacmon import LayerReport
from keras_jacmon.dashboard.codec import pack, read_header, unpack
from keras_jacmon.report.packing import packed

pytestmark = pytest.mark.fast

PARTS = ("mean", "low", "high", "least", "greatest")


@pytest.mark.parametrize("positions", [256, 7])
def test_what_is_packed_comes_back(positions: int) -> None:
    before = packed("lstm", make_layer(), positions=positions, order=3, number=17)
    after = unpack(pack(before))
    assert after.header == {**before.header, "verdict": {**before.header["verdict"], "remarks": []}}
    assert (after.header["layer"], after.header["order"], after.header["number"]) == ("lstm", 3, 17)
    for curves, found in ((before.curves, after.curves), (before.flows, after.flows)):
        assert list(found) == list(curves)
        for key, curve in curves.items():
            assert curve.mean.shape == (min(positions, 20),)
            for part in PARTS:
                precise = 2.0**-16 if part == "mean" or (not curve.is_binned and part in PARTS[3:]) else 2.0**-8
                np.testing.assert_allclose(getattr(found[key], part), getattr(curve, part), rtol=precise)
    for key, spectrum in before.spectra.items():
        np.testing.assert_allclose(after.spectra[key], spectrum, rtol=2.0**-7, atol=1e-6)
    only = unpack(pack(before), ["joint/variance"])
    assert (list(only.curves), only.flows, only.spectra) == (["joint/variance"], {}, {})
    np.testing.assert_array_equal(only.curves["joint/variance"].mean, after.curves["joint/variance"].mean)
    assert read_header(pack(before))["layer"] == "lstm"


def test_what_is_not_measured_is_told_from_nan_and_inf() -> None:
    values = np.ones((6, 2), np.float32)
    values[1], values[2, 0], values[3] = np.nan, np.nan, [np.inf, 1.0]
    measured = np.ones((6, 2), bool)
    measured[1] = measured[5] = False
    layer = LayerReport("Cell", 2, {"variance": values}, measured)
    curve = unpack(pack(packed("rnn", layer))).curves["variance"]
    assert curve.present.tolist() == [True, False, True, True, True, False]
    np.testing.assert_array_equal(curve.mean, [1, np.nan, np.nan, np.inf, 1, np.nan])
    assert (curve.nan, curve.inf) == (1, 1)


@pytest.mark.parametrize(
    "extreme", [0.0, -0.0, 3.4028235e38, -3.4028235e38, 1e-45, math.inf, -math.inf, math.nan, 1.0 - 2**-24]
)
def test_extreme_numbers_stay_what_they_are(extreme: float) -> None:
    layer = LayerReport("Cell", 2, {"variance": np.full((3, 2), extreme, np.float32)}, np.ones((3, 2), bool))
    curve = unpack(pack(packed("rnn", layer))).curves["variance"]
    for part in PARTS:
        np.testing.assert_allclose(getattr(curve, part), np.float32(extreme), rtol=2.0**-8, atol=1e-40)
        assert np.isfinite(getattr(curve, part)).all() == math.isfinite(extreme)


@pytest.mark.parametrize("damage", [slice(0, 0), slice(1, None), slice(None, 30), slice(None, -9)])
def test_damaged_bytes_are_refused(damage: slice) -> None:
    content = pack(packed("lstm", make_layer()))
    with pytest.raises(ValueError, match="packed summary"):
        unpack(content[damage])
