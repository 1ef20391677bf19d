"""The page as one file, reports in a notebook, and the commands that make and compare them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dashboards import HOSTILE, make_layer, make_reports, write

from keras_jacmon import Report
from keras_jacmon.__main__ import main

pytestmark = pytest.mark.fast


def data_of(page: str) -> Any:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def test_a_page_has_the_numbers_of_the_report_and_needs_no_network(tmp_path: Path) -> None:
    report = Report({"lstm": make_layer(-0.5)})
    report.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    data = data_of(text)
    (line,) = data["layers"][0]["layers"]
    assert (line["layer"], line["state"], line["keys"]) == ("lstm", "vanishing", list(report["lstm"].values))
    (shown,) = data["measurements"]
    curve = next(one["curve"] for one in shown["curves"] if one["key"] == "joint/variance")
    np.testing.assert_allclose(curve["mean"], report["lstm"].over_time("joint/variance"), rtol=1e-6)
    assert "default-src 'none'" in text
    assert not re.findall(r'(?:src|href)\s*=\s*["\'][^"\']', text.split('<script type="application/json"')[0])


def test_names_end_no_script_and_begin_no_markup(tmp_path: Path) -> None:
    report = Report({HOSTILE: make_layer()})
    report.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert data_of(text)["layers"][0]["layers"][0]["layer"] == HOSTILE
    assert len(re.findall("</script", text, re.IGNORECASE)) == 3
    assert "<img" not in report._repr_html_()
    assert "<script" not in report._repr_html_()


def test_a_report_shows_its_verdict_and_means_in_a_notebook() -> None:
    report = Report({"lstm": make_layer(-0.5), "gru": make_layer(0.0)})
    shown = report._repr_html_()
    assert str(report.verdict["lstm"]).partition("\n")[0] in shown
    assert f"{report['gru'].mean('joint/variance'):.4g}" in shown
    assert shown.count("<tr>") == 3


def test_a_notebook_and_a_comparison_say_why_there_is_no_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = make_layer()
    report = Report({"lstm": dataclasses.replace(layer, sequences={}, reductions={})})
    reason = f"no verdict: {report['lstm'].why_no_verdict()}"
    assert "was not measured" in reason
    assert reason in report._repr_html_()
    Report({"lstm": layer}).save(tmp_path / "a.npz")
    report.save(tmp_path / "b.npz")
    assert main(["compare", str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]) == 0
    assert f"  after   {reason}\n" in capsys.readouterr().out


def test_output_that_fails_changes_no_code_and_leaves_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, growth in (("a", 0.0), ("b", -0.5)):
        Report({"ü": make_layer(growth)}).save(tmp_path / f"{name}.npz")
    compare = ["compare", str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as caught:
            main(compare)
    assert caught.value.code == 2
    full_disk = "standard output cannot be written to: [Errno 28] No space left on device"
    assert capsys.readouterr().err == f"python -m keras_jacmon compare: error: {full_disk}\n"
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        assert main(compare) == 1
    with (tmp_path / "ascii").open("w", encoding="ascii") as ascii_only, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", ascii_only)
        assert main(compare) == 1
    assert "?: WORSE\n" in (tmp_path / "ascii").read_text()


def test_a_flow_that_is_nan_is_worse(tmp_path: Path) -> None:
    layer = make_layer()
    broken = {key: np.full_like(array, np.nan) for key, array in layer.sequences.items()}
    for name, sequences in (("good", layer.sequences), ("nan", broken)):
        Report({"lstm": dataclasses.replace(layer, sequences=sequences)}).save(tmp_path / f"{name}.npz")
    good, nan = (str(tmp_path / f"{name}.npz") for name in ("good", "nan"))
    assert main(["compare", good, nan]) == 1
    assert main(["compare", nan, good]) == main(["compare", nan, nan]) == 0


def test_view_makes_the_page_of_event_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("first", "second"):
        write(tmp_path / "logs" / name, make_reports(lstm=-0.5, gru=0.0))
    page = tmp_path / "page.html"
    assert main(["view", str(tmp_path / "logs"), "--output", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    data = data_of(page.read_text(encoding="utf-8"))
    assert [one["runs"] for one in data["runs"]["experiments"]] == [["first/jacobian"], ["second/jacobian"]]
    assert [line["layer"] for line in data["layers"][1]["layers"]] == ["lstm", "gru"]
    assert {one["step"] for one in data["measurements"]} == {0, 10, 20}


def test_view_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for logs, sentence in ((tmp_path / "none", "there is no directory"), (tmp_path, "there are no event files")):
        with pytest.raises(SystemExit) as caught:
            main(["view", str(logs)])
        assert caught.value.code == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [(0.0, 0.0, 0), (0.0, -0.5, 1), (0.0, 0.5, 1), (-0.5, 0.0, 0), (-0.5, -0.5, 0), (-0.5, -1.0, 1), (-1.0, -0.5, 0)],
)
def test_compare_fails_when_a_verdict_got_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: float, after: float, code: int
) -> None:
    for name, growth in (("a", before), ("b", after)):
        Report({"lstm": make_layer(growth), "only_" + name: make_layer()}).save(tmp_path / f"{name}.npz")
    assert main(["compare", str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]) == code
    out = capsys.readouterr().out
    assert ("lstm: WORSE" in out) == bool(code)
    assert str(make_layer(after).judge()).partition("\n")[0] in out
    assert "not there" in out
