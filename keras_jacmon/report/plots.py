"""Figures of reports, drawn by Matplotlib in a size that fits a column of a paper."""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_jacmon.errors import did_you_mean, invalid_argument
from keras_jacmon.report.arrays import FloatArray
from keras_jacmon.report.curve import FALL
from keras_jacmon.report.layer_report import LayerReport

# Inches: a column of most journals with two columns has 3.3 to 3.5.
_SIZE = (3.4, 2.3)
_STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.0,
    "legend.fontsize": 7,
    "legend.frameon": False,
}

# Of Okabe and Ito's colours, which the colour-blind can tell apart.
_BLUE, _RED, _GREY = "#0072B2", "#D55E00", "0.5"

# From this ratio of the greatest to the least value on an axis is logarithmic.
_WIDE = 10.0

# The part of the samples below the band of a curve, and above it.
_TAIL = 0.1


@dataclass(frozen=True)
class Measurement:
    """A layer at one moment of a training.

    Attributes:
        step: Integer, the iteration count of the optimizer; None if there is only one moment.
        layer: `LayerReport`.
    """

    step: int | None
    layer: LayerReport


def plot(
    reports: Sequence[tuple[int | None, Mapping[str, LayerReport]]],
    *,
    kind: str,
    layer: str | None,
    measure: str | None,
    ax: Any,
) -> Any:
    """Draws a layer's measure.

    Args:
        reports: Sequence of at least one pair of an iteration count, or None, and the layer reports by key. All kinds
            but the heat map show the last one.
        kind: String, one of `KINDS`.
        layer: String, the key of a layer in the last report; None for its first one.
        measure: String, the key of a measure of the kind; None for the first one, of the joint view if it is there.
        ax: `matplotlib.axes.Axes` to draw into; None for a new figure.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        ImportError: If Matplotlib is not installed.
        ValueError: If the kind, the layer or the measure is unknown.
    """
    if kind not in KINDS:
        raise invalid_argument("kind", f"one of {list(KINDS)}", f"kind={kind!r}{did_you_mean(kind, KINDS)}")
    newest = reports[-1][1]
    name = next(iter(newest), "none") if layer is None else layer
    if name not in newest:
        raise invalid_argument("layer", f"one of {list(newest)}", f"layer={name!r}{did_you_mean(name, newest)}")
    chosen = _measure(newest[name], kind, measure)
    measurements = [Measurement(step, layers[name]) for step, layers in reports if name in layers]
    try:
        matplotlib = importlib.import_module("matplotlib")
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError("`plot` needs Matplotlib: pip install 'keras-jacmon[plot]'") from error
    with matplotlib.rc_context(_STYLE):
        axes = figures.Figure(figsize=_SIZE, layout="constrained").subplots() if ax is None else ax
        KINDS[kind].draw(axes, measurements, chosen)
        # A name is text, also with a dollar sign.
        axes.set_title(name, parse_math=False)
    return axes.figure


def _measure(layer: LayerReport, kind: str, measure: str | None) -> str:
    known = KINDS[kind].measures(layer)
    if not known:
        raise invalid_argument("kind", f"a kind that shows what was measured: {list(layer.keys())}", f"kind={kind!r}")
    preferred = [f"{layer.joint}variance", *known]
    chosen = next(key for key in preferred if key in known) if measure is None else measure
    if chosen not in known:
        raise invalid_argument("measure", f"one of {known}", f"measure={chosen!r}{did_you_mean(chosen, known)}")
    return chosen


def _draw_heatmap(axes: Any, measurements: Sequence[Measurement], measure: str) -> None:
    """Draws the mean over samples by training step and position; for one moment the samples stand for the steps."""
    newest = measurements[-1]
    if newest.step is None:
        values = np.where(newest.layer.measured(measure), newest.layer.values[measure], np.nan).T
        columns, label = np.arange(len(values)), "sample"
    else:
        shown = [one for one in measurements if _has_same_shape(one.layer, newest.layer, measure)]
        values = np.stack([one.layer.over_time(measure) for one in shown])
        columns, label = np.array([one.step for one in shown]), "training step"
        if (np.diff(columns) <= 0).any():
            # Of several trainings, each of which begins anew.
            columns, label = np.arange(len(columns)), "measurement"
    # Positions at which nothing is measured would be gaps; where all are masked there is nothing but gaps.
    kept = np.flatnonzero(newest.layer.measured(measure).any(axis=1))
    kept = kept if kept.size else np.arange(len(newest.layer.mask))
    scale = "log" if _is_wide(values) else "linear"
    mesh = axes.pcolormesh(
        _edges(columns), _edges(kept), np.ma.masked_invalid(values[:, kept].T), norm=scale, cmap="cividis"
    )
    axes.set_facecolor("0.85")
    axes.set_xlabel(label)
    axes.set_ylabel("position in the input")
    axes.figure.colorbar(mesh, ax=axes, label=measure)


def _has_same_shape(one: LayerReport, other: LayerReport, measure: str) -> bool:
    return measure in one.values and len(one.mask) == len(other.mask)


def _edges(centres: npt.NDArray[Any]) -> FloatArray:
    """Returns the edges of cells around their centres, halfway between two of them."""
    between = (centres[1:] + centres[:-1]) / 2
    first, last = (between[0], between[-1]) if between.size else (centres[0] + 0.5, centres[0] - 0.5)
    return np.concatenate([[2 * centres[0] - first], between, [2 * centres[-1] - last]])


def _draw_curve(axes: Any, measurements: Sequence[Measurement], measure: str) -> None:
    """Draws the mean over samples by position, in a band of 80 % of the samples."""
    layer = measurements[-1].layer
    at = np.flatnonzero(layer.measured(measure).any(axis=1))
    mean = layer.over_time(measure)[at]
    known = [layer.values[measure][step][layer.measured(measure)[step]] for step in at]
    # Of inf and -inf there is no quantile between them.
    with np.errstate(invalid="ignore"):
        low, high = (np.array([np.quantile(values, part) for values in known]) for part in (_TAIL, 1 - _TAIL))
    axes.fill_between(at, low, high, color=_BLUE, alpha=0.25, linewidth=0, label="80 % of the samples")
    axes.plot(at, mean, color=_BLUE, marker="." if len(at) < len(layer.mask) else None, markersize=3, label="mean")
    target = layer.targets.get(measure)
    if target is not None:
        axes.axhline(target, color=_RED, linestyle="--", label="target of the regularizer")
    if _is_wide(np.concatenate([mean, low, high])):
        axes.set_yscale("log")
    axes.set_xlabel("position in the input")
    axes.set_ylabel(measure)
    axes.legend()


def _draw_flow(axes: Any, measurements: Sequence[Measurement], measure: str) -> None:
    """Draws the gain of a gradient by the number of steps that it goes back, on a logarithmic scale."""
    layer = measurements[-1].layer
    flow = layer.sequences[measure]
    spans = np.flatnonzero(~np.isnan(flow).all(axis=1)) + 1
    # Logarithms to the base of ten: the gain itself may be too large or too small for a float.
    curve = np.array([np.mean(row[~np.isnan(row)], dtype=np.float64) for row in flow[spans - 1]]) / math.log(10)
    finite = np.isfinite(curve)
    axes.plot(spans[finite], curve[finite], color=_BLUE)
    axes.axhline(math.log10(FALL), color=_GREY, linestyle="--", linewidth=0.7, label=f"{FALL:.0%}")
    verdict = layer.judge()
    if verdict is not None and math.isfinite(verdict.horizon):
        label = f"horizon: {verdict.horizon:.0f} steps"
        axes.axvline(verdict.horizon, color=_RED, linestyle=":", linewidth=0.9, label=label)
    axes.set_xlabel("steps back $k$")
    axes.set_ylabel(r"$\log_{10}\,\Vert \partial s_T / \partial s_{T-k} \Vert$")
    axes.legend()


def _draw_spectrum(axes: Any, measurements: Sequence[Measurement], measure: str) -> None:
    """Draws eigenvalues in the complex plane with the unit circle, and singular values as curves, one a point."""
    values = measurements[-1].layer.spectra[measure]
    if not np.iscomplexobj(values):
        axes.plot(np.arange(1, values.shape[1] + 1), values.T, color=_BLUE, alpha=0.4, linewidth=0.7)
        axes.axhline(1.0, color=_GREY, linestyle="--", linewidth=0.7)
        axes.set_xlabel("number of the value")
        axes.set_ylabel("singular value")
        return
    circle = np.exp(2j * np.pi * np.linspace(0, 1, 181))
    axes.plot(circle.real, circle.imag, color=_GREY, linestyle="--", linewidth=0.7)
    finite = values[np.isfinite(values)]
    axes.plot(finite.real, finite.imag, ".", color=_BLUE, alpha=0.5, markersize=3, markeredgewidth=0)
    axes.set_aspect("equal")
    axes.set_xlabel("real part")
    axes.set_ylabel("imaginary part")


def _is_wide(values: FloatArray) -> bool:
    """Returns True if values are better shown on a logarithmic scale."""
    finite = values[np.isfinite(values)]
    return bool(finite.size) and finite.min() > 0 and finite.max() > _WIDE * finite.min()


@dataclass(frozen=True)
class FigureKind:
    """A kind of figure.

    Attributes:
        draw: Function that draws the last of some measurements, or all of them, into axes.
        measures: Function from a layer's report to the keys that can be drawn.
    """

    draw: Callable[[Any, Sequence[Measurement], str], None]
    measures: Callable[[LayerReport], list[str]]


KINDS = {
    "heatmap": FigureKind(_draw_heatmap, lambda layer: list(layer.values)),
    "curve": FigureKind(_draw_curve, lambda layer: list(layer.values)),
    "flow": FigureKind(_draw_flow, lambda layer: [key for key in (f"{layer.joint}flow",) if key in layer.sequences]),
    "spectrum": FigureKind(_draw_spectrum, lambda layer: list(layer.spectra)),
}
