"""Report as HTML for a notebook: the verdicts and a compact table, without scripts."""

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

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
        advice = "".join(f"<br>{html.escape(sentence)}" for sentence in verdict.advice) if verdict else ""
        words = html.escape(layer.verdict_in_a_line())
        scalars = layer.scalars()
        cells = [f"{scalars[key]:.4g}" if key in scalars else "" for key in keys]
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        head = f"<th scope='row'>{html.escape(name)}</th>"
        lines.append(f"<tr>{head}<td style='text-align:left'>{words}{advice}</td>{numbers}</tr>")
    head = "".join(f"<th>{html.escape(key)}</th>" for key in ("layer", "verdict", *keys))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
