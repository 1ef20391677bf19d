"""The facts about measures that the dashboard knows without TensorFlow."""

from __future__ import annotations

import pytest

from keras_jacmon.dashboard.measure_facts import MEASURE_FACTS
from keras_jacmon.measures import registry

pytestmark = pytest.mark.fast


def test_the_measures_are_those_of_the_registry() -> None:
    assert list(MEASURE_FACTS) == list(registry.MEASURES)
    for name, measure in registry.MEASURES.items():
        expected = float(measure.reference) if measure.reference else None
        assert MEASURE_FACTS[name].reference == expected
        assert MEASURE_FACTS[name].unit in (measure.unit, "")
        assert MEASURE_FACTS[name].unit or measure.unit == "dimensionless"
