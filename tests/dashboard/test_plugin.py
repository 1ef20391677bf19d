"""Answers of the tab's server on real event files."""

from __future__ import annotations

import argparse
import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from dashboards import HOSTILE, KEYS, client, make_layer, make_reports, write
from event_files import read_summaries

from keras_jacmon import LayerReport, Report
from keras_jacmon.dashboard import plugin
from keras_jacmon.dashboard.answers import experiments
from keras_jacmon.dashboard.files import STATIC, STATIC_DIRECTORY
from keras_jacmon.dashboard.metadata import PLUGIN
from keras_jacmon.events import writer
from keras_jacmon.events.writer import EventWriter
from keras_jacmon.report.packing import packed

if TYPE_CHECKING:
    from werkzeug.test import Client

    from keras_jacmon.dashboard.packed import Packed

ROUTES = f"/data/plugin/{PLUGIN}"
REPORTS = make_reports(calm=0.0, worst=-1.0, worse=-0.5)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Client:
    directory = tmp_path_factory.mktemp("logs")
    write(directory / "first", REPORTS)
    write(directory / "second", make_reports(calm=0.1))
    return client(directory)


def get(served: Client, route: str, code: int = 200, **query: Any) -> Any:
    answer = served.get(f"{ROUTES}/{route}", query_string=query)
    assert answer.status_code == code, answer.text
    assert answer.content_type == "application/json"
    assert len(answer.data) < 1_000_000
    return json.loads(answer.text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def floats(text: str, dtype: str = "<f4") -> Any:
    return np.frombuffer(base64.b64decode(text), dtype)


def test_the_runs_of_one_experiment_stand_together(served: Client) -> None:
    found = [
        {"name": name, "runs": [f"{name}/jacobian"], "others": [f"{name}/jacobian/{part}" for part in ("max", "min")]}
        for name in ("first", "second")
    ]
    assert get(served, "runs") == {"experiments": found, "missing": None}
    ours = ["a/jacobian", "a/b/jacobian/val", "a/b/jacobian/train", "odd"]
    known = [*ours, "a/train", "a/b/train", "a/jacobian/min", "a/b/jacobian/val/max", "elsewhere"]
    assert experiments(ours, known) == [
        {"name": "a", "runs": ["a/jacobian"], "others": ["a/jacobian/min", "a/train"]},
        {"name": "a/b", "runs": ours[1:3], "others": ["a/b/jacobian/val/max", "a/b/train"]},
        {"name": "odd", "runs": ["odd"], "others": []},
    ]
    assert experiments(["jacobian"], ["jacobian", "train"]) == [{"name": "", "runs": ["jacobian"], "others": ["train"]}]


def test_the_layers_have_the_worst_first(served: Client) -> None:
    answer = get(served, "layers", run="first/jacobian")
    assert [line["layer"] for line in answer["layers"]] == ["worst", "worse", "calm"]
    verdict = REPORTS[-1][1].verdict["worst"]
    line = answer["layers"][0]
    first = REPORTS[0][1].verdict["worst"].growth, REPORTS[1][1].verdict["worst"].growth
    assert line == {
        "layer": "worst",
        "cell": "LSTMCell",
        "units": 8,
        "time": 20,
        "samples": 4,
        "order": 1,
        "step": 20,
        "measurements": 3,
        "state": "vanishing",
        "words": f"vanishing after {verdict.horizon:.0f} of 20 steps, growth {verdict.growth:+.2g}",
        "suggestions": list(verdict.advice),
        "notes": [],
        "growth": [[0, first[0]], [10, first[1]], [20, verdict.growth]],
        "keys": list(KEYS),
    }


def test_the_heat_map_has_the_numbers_of_the_reports(served: Client) -> None:
    answer = get(served, "heatmap", run="first/jacobian", layer="worst", key="joint/variance")
    values = np.array([report["worst"].over_time("joint/variance") for _, report in REPORTS])
    np.testing.assert_allclose(floats(answer.pop("mean")).reshape(3, 20), values, rtol=2.0**-16)
    for part in ("least", "greatest"):
        np.testing.assert_allclose(floats(answer.pop(part)).reshape(3, 20), values, rtol=2.0**-16)
    assert floats(answer.pop("present"), "u1").tolist() == [1] * 60
    found = answer.pop("range")
    np.testing.assert_allclose([found["least"], found["greatest"]], [values.min(), values.max()], rtol=2.0**-16)
    assert answer == {
        "run": "first/jacobian",
        "layer": "worst",
        "key": "joint/variance",
        "length": 20,
        "rows": 20,
        "columns": 3,
        "steps": [[0, 0], [10, 10], [20, 20]],
        "nan": 0,
        "inf": 0,
        "measurements": 3,
        "reference": 1.0,
        "unit": "",
        "linear": False,
    }


def test_columns_are_binned_and_lose_no_spike(served: Client) -> None:
    answer = get(served, "heatmap", run="first/jacobian", layer="calm", key="variance", columns=1)
    values = np.array([report["calm"].over_time("variance") for _, report in REPORTS])
    assert answer["steps"] == [[0, 20]]
    for part, expected in (("mean", values.mean(0)), ("least", values.min(0)), ("greatest", values.max(0))):
        np.testing.assert_allclose(floats(answer[part]), expected, rtol=2.0**-15)


def test_a_measurement_has_the_numbers_of_the_report(served: Client) -> None:
    answer = get(served, "measurement", run="first/jacobian", layer="worst", key="joint/variance", step=12)
    layer = REPORTS[1][1]["worst"]
    assert (answer["step"], answer["reference"]) == (10, 1.0)
    np.testing.assert_allclose(answer["loss_gradient"]["mean"], layer.over_time("loss_gradient"), rtol=2.0**-16)
    assert answer["target"] == layer.targets["joint/variance"]
    curve, flow = answer["curve"], answer["flow"]
    assert curve["from"] == curve["to"] == list(range(20))
    np.testing.assert_allclose(curve["mean"], layer.over_time("joint/variance"), rtol=2.0**-16)
    np.testing.assert_allclose(curve["high"], np.quantile(layer["joint/variance"], 0.9, axis=1), rtol=2.0**-8)
    np.testing.assert_allclose(flow["mean"], layer["joint/flow"].mean(axis=1), rtol=2.0**-14)
    np.testing.assert_allclose(answer["verdict"]["growth"], REPORTS[1][1].verdict["worst"].growth)
    eigenvalues = np.array(answer["spectra"]["joint/eigenvalues"]["values"])
    np.testing.assert_allclose(np.hypot(*np.moveaxis(eigenvalues, -1, 0)), 0.9, rtol=1e-2)


def test_nan_and_inf_are_data(tmp_path: Path) -> None:
    layer = make_layer()
    layer.values["variance"][3], layer.values["variance"][4] = np.nan, np.inf
    write(tmp_path, [(0, Report({"rnn": layer}))])
    served = client(tmp_path)
    answer = get(served, "measurement", run="jacobian", layer="rnn", key="variance", step=0)
    assert answer["curve"]["mean"][3:5] == ["NaN", "Infinity"]
    assert (answer["curve"]["nan"], answer["curve"]["inf"]) == (4, 4)
    answer = get(served, "heatmap", run="jacobian", layer="rnn", key="variance")
    assert (answer["nan"], answer["inf"]) == (4, 4)
    assert floats(answer["present"], "u1").all()
    np.testing.assert_array_equal(floats(answer["mean"])[3:5], [np.nan, np.inf])


def layers_without_a_verdict() -> dict[str, LayerReport]:
    """Make layers that are not judged, by the reason."""
    not_measured, broken, masked = make_layer(), make_layer(), make_layer()
    del not_measured.sequences["joint/flow"]
    not_measured.reductions.clear()
    for layer in (broken, masked):
        layer.sequences["joint/flow"][:] = np.nan
    masked.mask[:] = False
    return {
        "`joint/flow`, on which it rests, was not measured": not_measured,
        "`joint/flow` is NaN, because weights, states or Jacobians are not finite": broken,
        "all steps of the probe are masked": masked,
    }


def test_a_layer_without_a_verdict_has_the_reason(tmp_path: Path) -> None:
    layers = layers_without_a_verdict()
    write(tmp_path, [(0, Report(layers))])
    served = client(tmp_path)
    for line in get(served, "layers", run="jacobian")["layers"]:
        reason = line["layer"]
        assert layers[reason].why_no_verdict() == reason
        assert (line["state"], line["words"]) == ("not judged", f"no verdict: {reason}")
        answer = get(served, "measurement", run="jacobian", layer=reason, key="variance", step=0)
        assert (answer["verdict"], answer["words"]) == (None, f"no verdict: {reason}")


def test_event_files_from_before_there_were_reasons_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def packed_without_a_reason(*args: Any, **options: Any) -> Packed:
        found = packed(*args, **options)
        return replace(found, header={key: part for key, part in found.header.items() if key != "why_no_verdict"})

    monkeypatch.setattr(writer, "packed", packed_without_a_reason)
    layers = layers_without_a_verdict()
    write(tmp_path, [(0, Report({**layers, "judged": make_layer(-0.5)}))])
    lines = get(client(tmp_path), "layers", run="jacobian")["layers"]
    words = {line["layer"]: line["words"] for line in lines}
    assert words.pop("judged").startswith("vanishing after")
    assert words == dict.fromkeys(layers, "no verdict")


def test_an_earlier_spectrum_is_shown_with_its_step(tmp_path: Path) -> None:
    reports = make_reports(lstm=-0.5)
    for _, report in reports[1:]:
        report["lstm"].spectra.clear()
    write(tmp_path, reports)
    answer = get(client(tmp_path), "measurement", run="jacobian", layer="lstm", key="variance", step=20)
    assert answer["step"] == 20
    assert {spectrum["step"] for spectrum in answer["spectra"].values()} == {0}


def test_names_are_text(tmp_path: Path) -> None:
    write(tmp_path, [(0, Report({HOSTILE: make_layer(), "a": make_layer(), "a/joint": make_layer()}))])
    served = client(tmp_path)
    assert {line["layer"] for line in get(served, "layers", run="jacobian")["layers"]} == {HOSTILE, "a", "a/joint"}
    for layer in (HOSTILE, "a", "a/joint"):
        assert get(served, "heatmap", run="jacobian", layer=layer, key="variance")["layer"] == layer


def test_what_is_not_there_is_refused_in_a_sentence(served: Client) -> None:
    sentence = {"error": "there are no data of this run and layer"}
    assert get(served, "layers", 404, run="../../etc") == sentence
    assert get(served, "heatmap", 404, run="first/jacobian", layer="../calm", key="variance") == sentence
    assert get(served, "heatmap", run="first/jacobian", layer="calm", key="../../etc/passwd")["columns"] == 0
    assert served.post(f"{ROUTES}/runs").status_code == 405
    for name, route in (("step", "measurement"), ("columns", "heatmap")):
        for text in ("abc", str(2**63), ""):
            wrong = get(served, route, 400, run="first/jacobian", layer="calm", key="variance", **{name: text})
            assert wrong == {"error": f"`{name}` should be a whole number of at most 18 digits, and is {text!r}"}


@pytest.mark.parametrize("path", ["../plugin.py", "..%2fplugin.py", "plugin.py", "static/index.js", "/etc/passwd", ""])
def test_no_path_reaches_the_file_system(served: Client, path: str) -> None:
    assert served.get(f"{ROUTES}/{path}").status_code == 404


def test_static_files_come_from_the_list_with_their_types(served: Client) -> None:
    assert set(STATIC) == {path.name for path in STATIC_DIRECTORY.iterdir()}
    for name, kind in {**STATIC, "plotly.min.js": "text/javascript"}.items():
        answer = served.get(f"{ROUTES}/{name}")
        assert (answer.status_code, answer.mimetype) == (200, kind)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_all_urls_of_the_page_are_relative() -> None:
    for path in STATIC_DIRECTORY.iterdir():
        source = path.read_text(encoding="utf-8")
        assert "http" not in source.replace("http://www.w3.org/2000/svg", ""), path.name
        assert "innerHTML" not in source
        assert 'from "./' in source or "import " not in source


def test_more_measurements_are_kept_unless_the_user_says_otherwise() -> None:
    for given, expected in (({}, 1000), ({PLUGIN: 0}, 0), (None, 1000)):
        flags = argparse.Namespace(samples_per_plugin=given)
        plugin.Loader().fix_flags(flags)
        assert flags.samples_per_plugin == {PLUGIN: expected}


def test_every_route_is_documented() -> None:
    text = Path(plugin.__file__).with_name("http_api.md").read_text(encoding="utf-8")
    data = {"/runs", "/layers", "/heatmap", "/measurement", "/plotly.min.js"}
    assert {route for route in data if f"`{route}" in text} == data


def test_positions_make_finer_bins(tmp_path: Path) -> None:
    layer = make_layer(time=600)
    for positions in (256, 600):
        write(tmp_path / str(positions), [(0, Report({"rnn": layer}))], positions=positions)
        summaries = [one for one in read_summaries(tmp_path / str(positions)) if one.plugin == PLUGIN]
        assert [summary.tag for summary in summaries] == ["rnn/packed"]
        served = client(tmp_path / str(positions))
        answer = get(served, "measurement", run="jacobian", layer="rnn", key="variance", step=0)
        assert len(answer["curve"]["mean"]) == positions
        assert ("least" in answer["curve"]) == (positions < 600)


@pytest.mark.parametrize(("views", "before"), [(("", "joint/"), 8989), (("",), 5470)])
def test_a_file_of_a_layer_is_small(tmp_path: Path, views: tuple[str, ...], before: int) -> None:
    """Bytes of a measurement of 512 positions, against those before there was a packed summary."""
    keys = tuple(f"{view}{name}" for view in views for name in ("variance", "rms_singular_value", "spectral_norm"))
    random = np.random.default_rng(0)
    writer = EventWriter(tmp_path)
    for step in range(10):
        layer = make_layer(time=512, batch=32, keys=keys, seed=step)
        layer.spectra.clear()
        for key in keys:
            # Neighbours are alike, as in a trained layer.
            layer.values[key][:] *= np.exp(np.cumsum(random.normal(0, 0.05, (512, 1)), axis=0))
            if key.endswith("norm"):
                # As `max_rows` leaves it.
                at = np.arange(512)[:, None] % 8 == 0
                layer.sampled[key] = at & (np.arange(32) == np.arange(512)[:, None] // 8 % 32)
        writer.write(Report({"lstm": layer}), step)
    writer.close()
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.tfevents.*"))
    assert size / 10 < 1.5 * before
