"""Answers of the dashboard: plain dicts made of packed summaries, without HTTP and without files."""

import base64
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_jacmon.dashboard.measure_facts import facts_of
from keras_jacmon.dashboard.packed import Curve, bounds
from keras_jacmon.dashboard.stack import Moment, Stack

# Cells of an answer's heat map, so that it stays below 1 MB.
_MOST_CELLS = 48_000

# Rows of a heat map.
MOST_ROWS = 256

# The growth of the strip, in numbers.
SPARKS = 60

_ORDER = {"exploding": 0, "vanishing": 0, "stable": 1}


# The run of a monitor: below the log directory, with the monitor's name if it has one.
_MONITOR = re.compile(r"(?:(?P<experiment>.*)/)?jacobian(?:/[^/]+)?")


def layer_line(headers: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Returns the line of a layer in the strip.

    Args:
        headers: Pairs of step and header, in the order of the steps, at least one.
    """
    step, last = headers[-1]
    verdict = last["verdict"]
    return {
        "layer": last["layer"],
        "cell": last["cell"],
        "units": last["units"],
        "time": last["time"],
        "samples": last["samples"],
        "order": last["order"],
        "step": step,
        "measurements": last["number"],
        "state": verdict["state"] if verdict else "not judged",
        "words": in_words(last),
        "suggestions": list(verdict["suggestions"]) if verdict else [],
        "notes": list(last["notes"]),
        "growth": [
            [at, plain(header["verdict"]["growth"] if header["verdict"] else math.nan)] for at, header in headers
        ],
        "badness": _badness(verdict),
    }


def experiments(runs: Sequence[str], known: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the runs that belong together, since they are in the log directory of one training.

    Args:
        runs: Names of the runs with packed summaries.
        known: Names of all runs.

    Returns:
        List of dicts: `"name"`, the directory; `"runs"`, those with packed summaries; `"others"`, the other runs in it.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        match = _MONITOR.fullmatch(run)
        name = run if match is None else match["experiment"] or ""
        found.setdefault(name, {"runs": [], "others": []})["runs"].append(run)
    for run in sorted(set(known) - set(runs)):
        # A directory may be inside of another one's.
        around = [name for name in found if not name or run.startswith(f"{name}/")]
        if around:
            found[max(around, key=len)]["others"].append(run)
    return [{"name": name, **parts} for name, parts in found.items()]


def in_words(header: Mapping[str, Any]) -> str:
    """Returns the verdict in words, or the reason why there is none.

    Args:
        header: Header of a packed summary.
    """
    verdict = header["verdict"]
    if not verdict:
        # Event files written before there were reasons have none.
        reason = header.get("why_no_verdict")
        return f"no verdict: {reason}" if reason else "no verdict"
    after = ""
    if verdict["state"] != "stable":
        after = f" after {verdict['horizon']:.0f} of {header['time']} steps"
    # Only a step that stands out is named.
    worst = "" if verdict["worst_step"] is None else f", worst at step {verdict['worst_step']}"
    sensitive = ", but sensitive to the recurrent weights" if verdict.get("is_sensitive") else ""
    return f"{verdict['state']}{sensitive}{after}, growth {verdict['growth']:+.2g}{worst}"


def _badness(verdict: Mapping[str, Any] | None) -> list[Any]:
    """Returns numbers whose order puts the worst verdict first."""
    if not verdict:
        return [2, 0.0]
    growth = abs(verdict["growth"])
    rank = _ORDER[verdict["state"]]
    return [rank, plain(-growth if rank else verdict["horizon"])]


def worst_first(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the lines of the strip with the worst verdict first, and equal ones in the order of the model."""

    def key(line: Mapping[str, Any]) -> tuple[float, ...]:
        rank, size = (float(part) for part in line["badness"])
        return rank, math.inf if math.isnan(size) else size, float(line["order"])

    return [{name: value for name, value in line.items() if name != "badness"} for line in sorted(lines, key=key)]


def heat_map(stack: Stack, key: str, columns: int) -> dict[str, Any]:
    """Returns a measure by training step and position.

    It has at most `columns` columns, fewer if the answer would be too large. A cell that stands for several steps
    or positions has their mean, their least and their greatest value.

    Args:
        stack: `Stack` of the measure.
        key: String, a key of the curves.
        columns: Integer, the maximum number of columns.
    """
    measurements, rows = stack.mean.shape
    shown = max(1, min(measurements, columns, _MOST_CELLS // max(1, rows)))
    first = bounds(measurements, shown) if measurements else np.zeros(1, int)
    mean, least, greatest, present = _columns(stack, first[:-1])
    facts = facts_of(key)
    return {
        "key": key,
        "length": stack.length,
        "rows": rows,
        "columns": len(first) - 1,
        "steps": [[int(stack.steps[begin]), int(stack.steps[end - 1])] for begin, end in itertools.pairwise(first)],
        "mean": _text(mean, "<f4"),
        "least": _text(least, "<f4"),
        "greatest": _text(greatest, "<f4"),
        "present": _text(present, "u1"),
        "range": _range(least, greatest),
        "nan": stack.nan,
        "inf": stack.inf,
        "measurements": measurements,
        "reference": plain(facts.reference),
        "unit": facts.unit,
        "linear": facts.linear,
    }


def _columns(stack: Stack, first: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], ...]:
    """Returns the mean, the least, the greatest and the presence of each row, over the measurements of a column."""
    if len(first) == len(stack.steps):
        return stack.mean, stack.least, stack.greatest, stack.present
    count = np.add.reduceat(stack.present, first, axis=0, dtype=np.int64)
    with np.errstate(all="ignore"):
        # A NaN of the network stays NaN; where nothing was measured there is none to add.
        whole = np.add.reduceat(np.where(stack.present, stack.mean, 0.0), first, axis=0, dtype=np.float64) / count
    return (
        whole.astype(np.float32),
        np.fmin.reduceat(stack.least, first, axis=0),
        np.fmax.reduceat(stack.greatest, first, axis=0),
        count > 0,
    )


def _range(least: npt.NDArray[Any], greatest: npt.NDArray[Any]) -> dict[str, Any]:
    """Returns the least, the least positive and the greatest finite value."""
    finite = np.concatenate([least[np.isfinite(least)], greatest[np.isfinite(greatest)]])
    positive = finite[finite > 0]
    return {
        "least": plain(finite.min()) if finite.size else None,
        "positive": plain(positive.min()) if positive.size else None,
        "greatest": plain(finite.max()) if finite.size else None,
    }


def measurement(moments: Sequence[Moment], step: int, key: str) -> dict[str, Any]:
    """Returns the curves of a layer at the measurement that is nearest to a step.

    Args:
        moments: `Moment`s with all keys, in the order of the steps; the spectra may be of an earlier one.
        step: Integer, the training step.
        key: String, a key of the curves.
    """
    moment = min(moments, key=lambda one: abs(one.step - step))
    packed = moment.packed
    facts = facts_of(key)
    spectra = {name: (one.step, array) for one in moments for name, array in one.packed.spectra.items()}
    flow = next(iter(packed.flows.items()), None)
    return {
        "step": moment.step,
        "key": key,
        "reference": plain(facts.reference),
        "unit": facts.unit,
        "linear": facts.linear,
        "words": in_words(packed.header),
        "verdict": _plain_verdict(packed.header["verdict"]),
        "target": packed.header["targets"].get(key),
        "curve": _curve(packed.curves.get(key)),
        "flow": {"key": flow[0], **(_curve(flow[1]) or {})} if flow else None,
        "loss_gradient": _curve(packed.curves.get("loss_gradient")),
        "spectra": {name: _spectrum(at, array) for name, (at, array) in spectra.items()},
    }


def _plain_verdict(verdict: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if verdict is None else {name: plain(value) for name, value in verdict.items()}


def _curve(curve: Curve | None) -> dict[str, Any] | None:
    """Returns a curve as lists; bins in which nothing was measured are left out."""
    if curve is None:
        return None
    first = bounds(curve.length, curve.mean.size)
    return {
        "from": first[:-1][curve.present].tolist(),
        "to": (first[1:][curve.present] - 1).tolist(),
        "length": curve.length,
        **{
            name: plain(getattr(curve, name)[curve.present])
            for name in ("mean", "low", "high", *(("least", "greatest") if curve.is_binned else ()))
        },
        "nan": curve.nan,
        "inf": curve.inf,
    }


def _spectrum(step: int, array: npt.NDArray[Any]) -> dict[str, Any]:
    parts = np.stack([array.real, array.imag], axis=-1) if np.iscomplexobj(array) else array
    return {"step": step, "values": plain(parts)}


def plain(value: Any) -> Any:
    """Returns a number, an array or a tuple in types that JSON has.

    NaN and inf become `"NaN"`, `"Infinity"` and `"-Infinity"`, which the page reads with `Number`. A float32 has the
    digits that tell it from its neighbours.
    """
    if isinstance(value, np.ndarray):
        return [plain(part) for part in value]
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, np.float32) and np.isfinite(value):
        return float(str(value))
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _text(array: npt.NDArray[Any], dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode("ascii")
