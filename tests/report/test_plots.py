"""Figures show the numbers of the report."""

from __future__ import annotations

import dataclasses
import io
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from keras_jacmon import JacobianMonitor, LayerReport, Report

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
figures = pytest.importorskip("matplotlib.figure")

pytestmark = pytest.mark.fast

MASK = np.array([[True, True], [True, True], [True, False], [False, False]])
VARIANCE = np.array([[0.1, 0.3], [4.0, np.inf], [9.0, np.nan], [np.nan, np.nan]])
# After 1, 2 and 3 steps.
GAINS = [[0.1, 0.1], [0.01, 0.001], [1e-6, np.nan], [np.nan, np.nan]]


def report(factor: float = 1.0) -> Report:
    layer = LayerReport(
        "C",
        2,
        {"variance": VARIANCE, "joint/variance": VARIANCE * factor},
        MASK,
        sequences={"joint/flow": np.log(GAINS), "joint/growth": np.zeros(2)},
        spectra={"eigenvalues": np.array([[1 + 2j, np.nan]]), "singular_values": np.array([[3.0, 2.0]])},
        spectra_at=np.array([[0, 1]]),
        joint="joint/",
        targets={"variance": 0.5},
    )
    return Report({"$a_{b$": layer})


@pytest.fixture(autouse=True)
def _drawn() -> Iterator[None]:
    """What is drawn leaves no figure behind that others would see."""
    yield
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def axes_of(figure: Any) -> Any:
    """The axes of a figure that is the size of a column and can be drawn; Matplotlib warns of much when it draws."""
    assert figure.get_size_inches()[0] == pytest.approx(3.4)
    figure.savefig(io.BytesIO(), format="pdf")
    assert figure.axes[0].get_title() == "$a_{b$"
    return figure.axes[0]


def points(line: Any) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def test_a_curve() -> None:
    axes = axes_of(report().plot(measure="variance"))
    np.testing.assert_allclose(points(axes.lines[0]), [(0, 0.2), (1, np.inf), (2, 9.0)])
    assert axes.get_ylabel() == "variance"
    assert set(axes.lines[1].get_ydata()) == {0.5}
    assert axes_of(report().plot()).get_ylabel() == "joint/variance"


def test_a_flow() -> None:
    axes = axes_of(report().plot("flow"))
    np.testing.assert_allclose(points(axes.lines[0]), [(1, -1.0), (2, -2.5), (3, -6.0)])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["1%", "horizon: 2 steps"]


def test_spectra() -> None:
    axes = axes_of(report().plot("spectrum"))
    assert points(axes.lines[1]) == [(1.0, 2.0)]
    assert np.hypot(*axes.lines[0].get_data()) == pytest.approx(1.0)
    axes = axes_of(report().plot("spectrum", measure="singular_values"))
    assert points(axes.lines[0]) == [(1.0, 3.0), (2.0, 2.0)]


def test_heat_maps() -> None:
    of_samples = axes_of(report().plot("heatmap", measure="variance")).collections[0].get_array()
    np.testing.assert_array_equal(of_samples.filled(np.nan), [[0.1, 0.3], [4.0, np.nan], [9.0, np.nan]])
    monitor = JacobianMonitor(np.ones((1, 1, 1)))
    with pytest.raises(RuntimeError, match="`reports` is empty"):
        monitor.plot()
    monitor.reports = [(0, report()), (10, report(2.0)), (40, report(3.0))]
    axes = axes_of(monitor.plot())
    mesh = axes.collections[0]
    np.testing.assert_allclose(mesh.get_array().filled(np.nan), [[0.2, 0.4, 0.6], [np.nan] * 3, [9.0, 18.0, 27.0]])
    assert mesh.get_coordinates()[0, :, 0].tolist() == [-5.0, 5.0, 25.0, 55.0]
    assert mesh.norm.__class__.__name__ == "LogNorm"
    assert axes.get_xlabel() == "training step"
    masked = dataclasses.replace(report()["$a_{b$"], mask=np.zeros_like(MASK))
    nothing = axes_of(Report({"$a_{b$": masked}).plot("heatmap", measure="variance")).collections[0].get_array()
    assert nothing.mask.all()
    # One of several trainings begins anew.
    monitor.reports += [(0, report())]
    assert axes_of(monitor.plot()).get_xlabel() == "measurement"
    assert points(axes_of(monitor.plot("curve")).lines[0])[0] == pytest.approx((0, 0.2))


def test_axes_that_are_given() -> None:
    figure = figures.Figure()
    left, right = figure.subplots(1, 2)
    assert report().plot("flow", ax=right) is figure
    assert not left.lines
    assert right.lines


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kind": "curves"}, r"`kind`. Expected one of \['heatmap', .*kind='curves'. Did you mean 'curve'\?"),
        ({"layer": "c"}, r"`layer`. Expected one of \['\$a_{b\$'\]. Received: layer='c'"),
        ({"measure": "varience"}, r"`measure`. .*Did you mean 'variance'\?"),
        ({"measure": "joint/flow"}, r"`measure`. Expected one of \['variance', 'joint/variance'\]"),
    ],
)
def test_what_cannot_be_drawn(arguments: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^Invalid value for argument {sentence}"):
        report().plot(**arguments)


def test_what_was_not_measured() -> None:
    layer = LayerReport("C", 2, {"variance": VARIANCE}, MASK)
    with pytest.raises(ValueError, match=r"a kind that shows what was measured: \['variance'\]. Received: kind='flow'"):
        Report({"a": layer}).plot("flow")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'keras-jacmon\[plot\]'"):
        report().plot()
