"""Report as HTML for a notebook: the verdicts and a compact table, without scripts."""

import html
from typing import TYPE_CHECKING

from keras_jacmon.dashboard.stack import Moment
from keras_jacmon.report.packing import packed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from keras_jacmon.report.layer_report import LayerReport


def as_html(layers: "Mapping[str, LayerReport]") -> str:
    """Returns the verdicts and the means of some layers.

    Args:
        layers: Mapping of `LayerReport` by name.
    """
    keys = list(dict.fromkeys(key for layer in layers.values() for key in layer.scalars()))
    lines = []
    for name, layer in layers.items():
        verdict = layer.judge()
        words = str(verdict).partition("\n")[0] if verdict else "not judged"
        advice = "".join(f"<br>{html.escape(sentence)}" for sentence in verdict.advice) if verdict else ""
        scalars = layer.scalars()
        cells = [f"{scalars[key]:.4g}" if key in scalars else "" for key in keys]
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        head = f"<th scope='row'>{html.escape(name)}</th>"
        lines.append(f"<tr>{head}<td style='text-align:left'>{html.escape(words)}{advice}</td>{numbers}</tr>")
    head = "".join(f"<th>{html.escape(key)}</th>" for key in ("layer", "verdict", *keys))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def moments_of(
    reports: "Sequence[tuple[int, Mapping[str, LayerReport]]]", positions: int = 256
) -> dict[str, list[Moment]]:
    """Returns what the page shows of the reports of a training, by layer.

    Args:
        reports: Pairs of step and layers, in the order of the steps.
        positions: Integer, the maximum number of bins of the position. Defaults to 256.
    """
    found: dict[str, list[Moment]] = {}
    for number, (step, layers) in enumerate(reports, 1):
        for order, (name, layer) in enumerate(layers.items()):
            one = packed(name, layer, positions=positions, order=order, number=number)
            found.setdefault(name, []).append(Moment(step, one))
    return found
