"""The words beside TensorBoard's own charts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from keras_jacmon import LayerReport
from keras_jacmon.events.charts import charts_of, description

if TYPE_CHECKING:
    import numpy.typing as npt

pytestmark = pytest.mark.fast

EXTREMES = "The runs `min` and `max` are the least and greatest step."


def make_layer() -> LayerReport:
    """Make a report with a measure of steps, and with sequences of each reduction."""
    reductions = {
        "joint/growth": "growth",
        "joint/lyapunov": "first",
        "joint/kaplan_yorke": "mean",
        "sensitivity": "whole",
        "relative_sensitivity": "relative",
        "state_norm": "root_mean_square",
    }
    by_span: npt.NDArray[Any] = np.ones((6, 2))
    of_spans = dict.fromkeys(("joint/flow", "joint/lyapunov", "sensitivity"), by_span)
    return LayerReport(
        "LSTMCell",
        8,
        {"variance": by_span},
        np.ones((6, 2), bool),
        sequences=dict.fromkeys(reductions, by_span[0]) | of_spans,
        joint="joint/",
        reductions=reductions,
    )


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("variance", f"mean over the probe. A layer that keeps its gradient has 1. {EXTREMES}"),
        ("joint/growth", "of the mean flow. In nats per step. A layer that keeps its gradient has 0."),
        ("joint/lyapunov_1", "mean over the probe. In nats per step. A layer that keeps its gradient has 0."),
        ("joint/kaplan_yorke", "mean over the probe."),
        ("sensitivity", "root mean square. In state per unit of weight."),
        ("relative_sensitivity", "of all samples together. In relative change per unit of weight."),
        ("state_norm", "root mean square. In unit of state."),
    ],
)
def test_a_chart_says_what_its_number_is(key: str, words: str) -> None:
    layer = make_layer()
    assert key in charts_of(layer).scalars
    assert description(key, layer) == f"{key} of LSTMCell with 8 units, {words}"
