"""TensorBoard's own charts of a layer: which there are, their words, and the layout that groups them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from tensorboard.compat.proto import summary_pb2
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from keras_jacmon.dashboard.measure_facts import facts_of
from keras_jacmon.report.layer_report import LayerReport
from keras_jacmon.report.reductions import REDUCTIONS, Reduction

LAYOUT_TAG = metadata.CONFIG_SUMMARY_TAG

# The last parts of the tags of a margin chart. It takes all its tags from one run, so `min` and `max` do not serve.
LEAST, GREATEST = "least", "greatest"

# Charts of a layer, beyond which there are no margins and no histograms.
_CHARTS = 10

# A histogram takes as many bytes as ten scalars, and the Jacobian tab has the quantiles.
_HISTOGRAMS = 2


@dataclass(frozen=True)
class Charts:
    """The charts of a layer.

    Attributes:
        scalars: Dict of floats by key, as drawn: a horizon beyond the sequence is the sequence's length.
        margins: Dict of pairs by key: the least and the greatest step, for the keys with a margin chart.
        histograms: Tuple of the keys with a histogram.
    """

    scalars: dict[str, float]
    margins: dict[str, tuple[float, float]]
    histograms: tuple[str, ...]


def charts_of(layer: LayerReport) -> Charts:
    """Returns the charts of a layer: all scalars; margins and then histograms while there are fewer than ten charts.

    Args:
        layer: `LayerReport`.
    """
    scalars = {
        key: float(len(layer.mask)) if key.endswith("horizon") and np.isposinf(value) else value
        for key, value in layer.scalars().items()
    }
    # The joint view is the true step.
    keys = sorted([*layer.values, *layer.spectra], key=lambda key: not key.startswith(layer.joint))
    room = max(0, _CHARTS - len(scalars))
    margins = [key for key in keys if key in layer.values][: room // 2]
    histograms = keys[: min(_HISTOGRAMS, room - 2 * len(margins))]
    return Charts(scalars, {key: layer.extremes(key) for key in margins}, tuple(histograms))


def description(key: str, layer: LayerReport) -> str:
    """Returns the words beside the chart of a key.

    Args:
        key: String, a key of the scalars.
        layer: `LayerReport`.
    """
    if key.endswith("horizon"):
        return f"Steps until a gradient has vanished or exploded; at {len(layer.mask)} or beyond the sequence: never."
    measured, reduction = _source(key, layer)
    facts = facts_of(measured)
    unit = f" In {facts.unit}." if facts.unit else ""
    keeps = "" if facts.reference is None else f" A layer that keeps its gradient has {facts.reference:g}."
    spread = " The runs `min` and `max` are the least and greatest step." if key in layer.values else ""
    how = reduction.remark or "mean over the probe"
    return f"{key} of {layer.cell} with {layer.units} units, {how}.{unit}{keeps}{spread}"


def _source(key: str, layer: LayerReport) -> tuple[str, Reduction]:
    """Returns the measure behind a key of the scalars and its reduction, such as `lyapunov` behind `lyapunov_1`."""
    for measured, name in layer.reductions.items():
        if measured + REDUCTIONS[name].suffix == key:
            return measured, REDUCTIONS[name]
    return key, REDUCTIONS["mean"]


def layout(layers: Mapping[str, Charts]) -> bytes:
    """Returns the layout of the tab *Custom Scalars*: a group for each layer, in the order of the model.

    Args:
        layers: `Charts` by the beginning of the layer's tags.
    """
    categories = []
    for name, charts in layers.items():
        category = layout_pb2.Category(title=name)
        for key in charts.scalars:
            tag = f"{name}/{key}"
            if key in charts.margins:
                series = layout_pb2.MarginChartContent.Series(
                    value=tag, lower=f"{tag}/{LEAST}", upper=f"{tag}/{GREATEST}"
                )
                category.chart.add(title=key, margin=layout_pb2.MarginChartContent(series=[series]))
            else:
                pattern = f"^{re.escape(tag)}$"
                category.chart.add(title=key, multiline=layout_pb2.MultilineChartContent(tag=[pattern]))
        categories.append(category)
    return bytes(layout_pb2.Layout(category=categories).SerializeToString())


def layout_metadata() -> summary_pb2.SummaryMetadata:
    """Returns the metadata of a layout; without a data class the Rust data server drops it."""
    found = metadata.create_summary_metadata()
    found.data_class = summary_pb2.DATA_CLASS_TENSOR
    return found
