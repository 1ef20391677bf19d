"""The page as one file with its data, which needs no server and no network."""

import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keras_jacmon.dashboard.answers import (
    MOST_ROWS,
    SPARKS,
    experiments,
    heat_map,
    layer_line,
    measurement,
    worst_first,
)
from keras_jacmon.dashboard.files import NO_PLOTLY, STATIC_DIRECTORY, plotly_file
from keras_jacmon.dashboard.stack import Moment, stack_of_moments

# In the order in which they need each other; `index.js` is the tab's.
_MODULES = ("source.js", "state.js", "colours.js", "charts.js", "heatmap.js", "strip.js", "page.js")

_COLUMNS = 1000

# Measurements of a layer whose curves are in the file.
_CURVES = 60

# Nothing is loaded from anywhere.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<script type="application/json" id="data">{data}</script>
<script>{plotly}</script>
<script type="module">
{script}
start(new Embedded(JSON.parse(document.getElementById("data").textContent)));
</script>
</body>
</html>
"""


@dataclass(frozen=True)
class Frame:
    """A page that a notebook shows below its cell.

    Attributes:
        content: String, the HTML of the page.
    """

    content: str

    def _repr_html_(self) -> str:
        style = "border:0;width:100%;height:1100px"
        return f'<iframe srcdoc="{html.escape(self.content)}" style="{style}" title="Jacobians"></iframe>'


def page(runs: Mapping[str, Mapping[str, Sequence[Moment]]], title: str = "Jacobians") -> str:
    """Returns the page with the data of some runs.

    Args:
        runs: `Moment`s of each layer of each run, in the order of the steps, at least one for each layer.
        title: String, the title of the page. Defaults to `"Jacobians"`.
    """
    path = plotly_file()
    missing = NO_PLOTLY if path is None else None
    return _PAGE.format(
        policy=_POLICY,
        title=html.escape(title),
        style=(STATIC_DIRECTORY / "page.css").read_text(encoding="utf-8"),
        data=_as_data(_answers(runs, missing)),
        plotly="" if path is None else _as_script(path.read_text(encoding="utf-8")),
        script=_as_script(_script()),
    )


def write_page(path: str | os.PathLike[str], runs: Mapping[str, Mapping[str, Sequence[Moment]]]) -> None:
    """Writes the page with the data of some runs.

    Args:
        path: String or path of the file; one that is there is replaced.
        runs: As for `page`.

    Raises:
        OSError: If the file cannot be written.
    """
    Path(path).write_text(page(runs), encoding="utf-8")


def _answers(runs: Mapping[str, Mapping[str, Sequence[Moment]]], missing: str | None) -> dict[str, Any]:
    """Returns what the server would answer, for all runs, layers and keys."""
    return {
        "runs": {"experiments": experiments(list(runs), list(runs)), "missing": missing},
        "layers": [
            {"run": run, "layers": worst_first([_line(moments) for moments in layers.values()])}
            for run, layers in runs.items()
        ],
        "heatmaps": [
            {"run": run, "layer": layer, **heat_map(stack_of_moments(moments, key, MOST_ROWS), key, _COLUMNS)}
            for run, layers in runs.items()
            for layer, moments in layers.items()
            for key in _keys(moments)
        ],
        "measurements": [
            {"run": run, "layer": layer, **_curves(moments, at)}
            for run, layers in runs.items()
            for layer, moments in layers.items()
            for at in _spread(len(moments), _CURVES)
        ],
    }


def _line(moments: Sequence[Moment]) -> dict[str, Any]:
    headers = [(moments[at].step, moments[at].packed.header) for at in _spread(len(moments), SPARKS)]
    return layer_line(headers) | {"keys": _keys(moments)}


def _curves(moments: Sequence[Moment], at: int) -> dict[str, Any]:
    """Returns the measurement at a place, with the curves of all keys."""
    moment = moments[at]
    earlier = [one for one in moments[:at] if one.packed.spectra][-1:]
    shown = [moment] if moment.packed.spectra else [*earlier, moment]
    answers = [measurement(shown, moment.step, key) for key in moment.packed.curves] or [
        measurement(shown, moment.step, "")
    ]
    own = ("key", "curve", "reference", "unit", "linear", "target")
    common = {name: value for name, value in answers[0].items() if name not in own}
    return common | {"curves": [{name: answer[name] for name in own} for answer in answers]}


def _keys(moments: Sequence[Moment]) -> list[str]:
    return list(dict.fromkeys(key for moment in moments for key in moment.packed.curves))


def _spread(count: int, most: int) -> list[int]:
    """Returns at most `most` places among `count`, evenly spread, with the first and the last one."""
    if count <= most:
        return list(range(count))
    return sorted({round(at * (count - 1) / (most - 1)) for at in range(most)})


def _script() -> str:
    """Returns the modules as one: without imports, since all names are in one place."""
    sources = [(STATIC_DIRECTORY / name).read_text(encoding="utf-8") for name in _MODULES]
    return re.sub(r"^import .*$|^export ", "", "\n".join(sources), flags=re.MULTILINE)


def _as_data(value: Any) -> str:
    """Returns JSON in which no markup can begin."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _as_script(source: str) -> str:
    """Returns a script that does not end before its end."""
    return re.sub("</(?=script)", r"<\\/", source, flags=re.IGNORECASE).replace("<!--", "<\\!--")
