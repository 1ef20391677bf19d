"""Printed table of one layer's measures."""

from collections.abc import Iterator, Sequence

import numpy as np

from keras_jacmon.report.layer_report import LayerReport
from keras_jacmon.report.reductions import REDUCTIONS

# The key, the three numbers and the remark of a printed line.
Line = tuple[str, ...]


def table(name: str, layer: LayerReport) -> str:
    """Returns the table of a layer: a head, a line for each measure, and the notes.

    Args:
        name: String, the layer's key in the report.
        layer: `LayerReport`.
    """
    lines = [*_steps(layer), *_sequences(layer), *_spectra(layer)]
    return "\n".join([_head(name, layer), *_aligned(lines), *(f"  note: {note}" for note in layer.notes)])


def _head(name: str, layer: LayerReport) -> str:
    time, batch = layer.mask.shape
    masked = layer.mask.size - int(layer.mask.sum())
    head = f"{name}: {layer.cell}, {layer.units} units, {time} steps x {batch} samples"
    return f"{head} ({masked} masked)" if masked else head


def _steps(layer: LayerReport) -> Iterator[Line]:
    unmasked = int(layer.mask.sum())
    yield ("", "mean", "least step", "greatest step", "")
    for key in layer.values:
        measured = layer.measured(key).sum()
        remark = _remark(
            f"estimate, ± {layer.standard_error(key):.2g}" if key in layer.estimated else "",
            _method(layer, key),
            f"at {measured} of {unmasked}" if measured < unmasked else "",
        )
        yield (key, _number(layer.mean(key)), *map(_number, layer.extremes(key)), remark)


def _sequences(layer: LayerReport) -> Iterator[Line]:
    scalars = layer.scalars()
    if layer.reductions:
        yield ("", "", "least sample", "greatest sample", "")
    for key, name in layer.reductions.items():
        reduction = REDUCTIONS[name]
        samples = reduction.samples(layer.sequences[key])
        extremes = (samples.min(), samples.max()) if samples.size else (np.nan, np.nan)
        estimate = reduction.error is not None and key in layer.estimated
        error = f"± {layer.standard_error(key):.2g}" if estimate else ""
        remark = _remark(reduction.remark, error, _method(layer, key))
        key_of_number = key + reduction.suffix
        yield (key_of_number, _number(scalars[key_of_number]), *map(_number, extremes), remark)


def _spectra(layer: LayerReport) -> Iterator[Line]:
    if layer.spectra:
        yield ("", "", "least modulus", "greatest modulus", "")
    for key, spectrum in layer.spectra.items():
        moduli = np.abs(spectrum)[~np.isnan(spectrum)]
        extremes = (moduli.min(), moduli.max()) if moduli.size else (np.nan, np.nan)
        remark = _remark(_method(layer, key), f"at {len(layer.spectra_at)} of {layer.mask.sum()}")
        yield (key, "", *map(_number, extremes), remark)


def _method(layer: LayerReport, key: str) -> str:
    """Returns the method behind the values of a key; nothing if they are exact."""
    method = layer.methods.get(key, "exact")
    return "" if method == "exact" else method


def _remark(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _aligned(lines: Sequence[Line]) -> list[str]:
    """Returns the lines with the keys to the left and the numbers to the right of their columns."""
    key, *numbers = (max(map(len, column)) for column in list(zip(*lines, strict=True))[:4])
    return [
        f"  {line[0]:<{key}}  "
        + "  ".join(f"{text:>{width}}" for text, width in zip(line[1:4], numbers, strict=True))
        + f"  {line[4]}".rstrip()
        for line in lines
    ]
