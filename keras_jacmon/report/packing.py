"""Packing of layer reports for the dashboard: curves over the position and the span, spectra, the verdict."""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_jacmon.dashboard.course import last_course
from keras_jacmon.dashboard.packed import Curve, Packed, bounds
from keras_jacmon.dashboard.stack import Moment
from keras_jacmon.report.arrays import FloatArray
from keras_jacmon.report.layer_report import LayerReport

# The quantiles of the band.
_LOW, _HIGH = 0.1, 0.9

# Maximum number of eigenvalues, and of singular values, of a view that are kept of one measurement.
_MOST_VALUES = 512


def moments_of(
    reports: Sequence[tuple[int, Mapping[str, LayerReport]]], positions: int = 256
) -> dict[str, list[Moment]]:
    """Returns what the page shows of the reports of a training, by layer; of several trainings, of the last one.

    Args:
        reports: Pairs of step and layers, in the order in which they were measured.
        positions: Integer, the maximum number of bins of the position. Defaults to 256.
    """
    found: dict[str, list[Moment]] = {}
    for number, (step, layers) in enumerate(last_course(reports, operator.itemgetter(0)), 1):
        for order, (name, layer) in enumerate(layers.items()):
            one = packed(name, layer, positions=positions, order=order, number=number)
            found.setdefault(name, []).append(Moment(step, one))
    return found


def packed(name: str, layer: LayerReport, *, positions: int = 256, order: int = 0, number: int = 1) -> Packed:
    """Returns what the dashboard shows of a layer.

    Args:
        name: String, the layer's key in the report.
        layer: `LayerReport`.
        positions: Integer, the maximum number of bins of the position. Defaults to 256.
        order: Integer, the layer's place in the model. Defaults to 0.
        number: Integer, the number of measurements so far. Defaults to 1.
    """
    verdict = layer.judge()
    time, samples = layer.mask.shape
    header = {
        "layer": name,
        "cell": layer.cell,
        "units": layer.units,
        "time": time,
        "samples": samples,
        "order": order,
        "number": number,
        "verdict": None if verdict is None else dataclasses.asdict(verdict) | {"suggestions": list(verdict.advice)},
        "why_no_verdict": layer.why_no_verdict() if verdict is None else "",
        "notes": list(layer.notes),
        "targets": layer.targets,
    }
    curves = {key: curve_of(values, layer.measured(key), positions) for key, values in layer.values.items()}
    # A sample's flow has as many spans as the sample has steps.
    spans = np.arange(time)[:, None] < layer.mask.sum(axis=0)
    flows = {
        key: curve_of(array, spans, positions)
        for key, array in layer.sequences.items()
        if key.rpartition("/")[2] == "flow"
    }
    return Packed(header, curves, flows, {key: _thinned(array) for key, array in layer.spectra.items()})


def curve_of(values: FloatArray, measured: npt.NDArray[np.bool_], positions: int) -> Curve:
    """Returns a measure in bins of the position.

    Args:
        values: Float array `(time, batch)`.
        measured: Boolean array `(time, batch)`, False at the values that do not count.
        positions: Integer, the maximum number of bins.
    """
    time = len(values)
    bins = min(time, positions)
    first = bounds(time, bins)
    width = int(np.diff(first).max()) if bins else 0
    at = first[:-1, None] + np.arange(width)
    inside = at < first[1:, None]
    at = np.where(inside, at, 0)
    # (bin, position in the bin, sample)
    valid = measured[at] & inside[:, :, None]
    parts = np.where(valid, values[at].astype(np.float64), 0.0)
    found = values[measured]
    with np.errstate(all="ignore"):
        counts = valid.sum(axis=2)
        by_position = parts.sum(axis=2) / counts
        mean = parts.sum(axis=(1, 2)) / counts.sum(axis=1)
        low, high = _quantiles(parts.reshape(bins, -1), valid.reshape(bins, -1))
        # Where there is none, 0 / 0 is NaN, which these ignore.
        least, greatest = np.fmin.reduce(by_position, axis=1), np.fmax.reduce(by_position, axis=1)
        mean, low, high, least, greatest = (part.astype(np.float32) for part in (mean, low, high, least, greatest))
    return Curve(
        mean=mean,
        low=low,
        high=high,
        least=least,
        greatest=greatest,
        present=counts.any(axis=1),
        length=time,
        nan=int(np.isnan(found).sum()),
        inf=int(np.isinf(found).sum()),
    )


def _quantiles(values: npt.NDArray[np.float64], valid: npt.NDArray[np.bool_]) -> tuple[Any, Any]:
    """Returns the two quantiles of the valid values in each line; NaN if one is NaN, or if there is none."""
    ordered = np.sort(np.where(valid, values, np.inf), axis=1)
    last = valid.sum(axis=1) - 1
    lines = np.arange(len(values))
    broken = (np.isnan(values) & valid).any(axis=1) | (last < 0)

    def quantile(part: float) -> npt.NDArray[np.float64]:
        place = part * np.maximum(last, 0)
        below = np.floor(place).astype(int)
        lower, upper = ordered[lines, below], ordered[lines, np.minimum(below + 1, np.maximum(last, 0))]
        # No inf - inf, nor 0 * inf.
        between = np.where(lower == upper, lower, lower + (place - below) * (upper - lower))
        return np.where(broken, np.nan, np.where(place == below, lower, between))

    return quantile(_LOW), quantile(_HIGH)


def _thinned(spectrum: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Returns the spectra of some points, evenly spread, and of long spectra the largest values."""
    kept = spectrum[:, :_MOST_VALUES]
    points = max(1, _MOST_VALUES // max(1, kept.shape[1]))
    return kept[:: max(1, -(-len(kept) // points))]
