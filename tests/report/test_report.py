"""The report: what it says of arrays that are given, in NumPy alone."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest

from keras_jacmon import LayerReport, Report

pytestmark = pytest.mark.fast


def layer(**changes: Any) -> LayerReport:
    given: dict[str, Any] = {
        "cell": "LSTMCell",
        "units": 4,
        "values": {
            "variance": np.array([[0.1, 0.3], [0.5, np.nan], [0.6, 0.8]]),
            "joint/spectral_norm": np.array([[1.0, 2.0], [3.0, np.nan], [5.0, 6.0]]),
        },
        "mask": np.array([[True, True], [True, False], [True, True]]),
        "uncertainties": {
            "variance": np.array([[0.03, 0.04], [0.12, np.nan], [0.0, 0.0]]),
            "joint/spectral_norm": np.full((3, 2), 0.01),
        },
        "estimated": frozenset({"variance"}),
        "notes": ("old state 1 has no influence on the new states (no gradient connects them)",),
    }
    return LayerReport(**(given | changes))


def test_the_table_word_for_word() -> None:
    lines = [
        "lstm: no verdict: `flow`, on which it rests, was not measured",
        "",
        "lstm: LSTMCell, 4 units, 3 steps x 2 samples (1 masked)",
        "                       mean  least step  greatest step",
        "  variance             0.46         0.2            0.7  estimate, ± 0.026",
        "  joint/spectral_norm   3.4         1.5            5.5",
        "  note: old state 1 has no influence on the new states (no gradient connects them)",
    ]
    assert [line.rstrip() for line in str(Report({"lstm": layer()})).splitlines()] == [line.rstrip() for line in lines]


def test_two_tables_have_a_line_between_them() -> None:
    text = str(Report({"a": layer(), "b": layer(mask=np.ones((3, 2), bool))}))
    assert text.count("\n\n") == 2
    assert "\n\nb: LSTMCell, 4 units, 3 steps x 2 samples\n" in text


def test_means_and_extremes() -> None:
    report = layer()
    assert report.mean("variance") == pytest.approx(0.46)
    np.testing.assert_allclose(report.over_time("variance"), [0.2, 0.5, 0.7])
    assert report.extremes("variance") == pytest.approx((0.2, 0.7))
    assert report.nonfinite() == {}
    assert layer(mask=np.ones((3, 2), bool)).nonfinite() == {"variance": 1, "joint/spectral_norm": 1}


def test_the_standard_error_of_the_mean_is_that_of_independent_rows() -> None:
    # sqrt(0.03² + 0.04² + 0.12²) / 5
    assert layer().standard_error("variance") == pytest.approx(0.026)
    # A residual bounds a value and is no standard error.
    assert layer().standard_error("joint/spectral_norm") == 0.0


def test_scalars_have_names_that_logs_can_have() -> None:
    report = Report({"a/b": layer(), "a_b": layer(), "a:1": layer()})
    assert list(report.scalars()) == [
        f"{name}_jac_{key}" for name in ("a_b", "a_b_1", "a_1") for key in ("variance", "joint_spectral_norm")
    ]


@pytest.mark.parametrize(
    ("read", "sentence"),
    [
        (lambda report: report["gru"], "No layer 'gru' in this report. Measured: ['lstm']"),
        (
            lambda report: report["lstm"]["norm"],
            "No measure 'norm' in this report. Measured: ['variance', 'joint/spectral_norm']",
        ),
    ],
)
def test_what_is_not_there(read: Any, sentence: str) -> None:
    with pytest.raises(KeyError) as caught:
        read(Report({"lstm": layer()}))
    assert caught.value.args == (sentence,)


def test_reports_are_mappings() -> None:
    one = layer(sequences={"joint/flow": np.zeros((3, 2))}, spectra={"eigenvalues": np.zeros((0, 4))})
    keys = ["variance", "joint/spectral_norm", "joint/flow", "eigenvalues"]
    assert list(one) == list(one.keys()) == keys
    assert len(one) == 4
    assert "variance" in one
    assert "norm" not in one
    assert [id(array) for _, array in one.items()] == [id(one[key]) for key in keys]
    assert list(dict(one)) == keys
    with pytest.raises(KeyError, match=r"Measured: \[.*\]. Did you mean 'variance'\?"):
        _ = one["varianz"]
    report = Report({"lstm": one})
    assert list(report) == list(report.keys()) == ["lstm"]
    assert len(report) == 1
    assert "lstm" in report
    assert "gru" not in report
    assert list(report.items()) == [("lstm", one)]
    assert report.get("gru") is None
    again = Report({"lstm": copy.deepcopy(one)})
    assert report == again
    for changes in ({"mask": ~one.mask}, {"values": {"variance": one["variance"]}}, {"weight_size": 1.0}):
        assert report != Report({"lstm": dataclasses.replace(one, **changes)})
    assert one != "lstm"
    with pytest.raises(KeyError, match=r"Measured: \['lstm'\]. Did you mean 'lstm'\?"):
        _ = report["lstm_1"]


def test_a_short_description() -> None:
    assert repr(layer()) == "<LayerReport: LSTMCell, 4 units, 3 steps x 2 samples, 2 measures>"
    assert repr(Report({})) == "<Report: no layers>"
    assert repr(Report({"a": layer(), "b": layer(cell="Own")})) == "<Report: a (LSTMCell), b (Own)>"
    many = Report({str(number): layer() for number in range(8)})
    assert repr(many).endswith("3 (LSTMCell), 4 (LSTMCell), 3 more>")


SEQUENCES = {
    "flow": np.log([[0.5, 0.5], [0.4, 0.4], [0.3, np.nan]]),
    "growth": np.array([-0.3, np.nan]),
    "horizon": np.array([2.0, np.inf]),
    "lyapunov": np.array([[0.1, 0.3], [-1.0, -1.0]]),
}
REDUCTIONS = {"growth": "growth", "horizon": "horizon", "lyapunov": "first"}


def test_measures_of_sequences_are_reduced_as_the_report_says() -> None:
    report = layer(
        values={}, uncertainties={}, estimated=frozenset(), sequences=SEQUENCES, reductions=REDUCTIONS, notes=()
    )
    slope = np.polyfit([0, 1, 2, 3], np.log([1, 0.5, 0.4, 0.3]), 1)[0]
    assert report.scalars() == pytest.approx({"growth": slope, "horizon": np.inf, "lyapunov_1": 0.2})
    lines = [
        "                    mean  least step  greatest step",
        "                    least sample  greatest sample",
        f"  growth  {slope:.4g}          -0.3             -0.3  of the mean flow",
        "  horizon      inf             2              inf  of the mean flow",
        "  lyapunov_1   0.2           0.1              0.3",
    ]
    table = str(Report({"lstm": report})).split("lstm: LSTMCell")[1].splitlines()[1:]
    assert [line.split() for line in table] == [line.split() for line in lines]


def test_reductions_of_whole_sequences_give_the_right_value_or_a_sentence() -> None:
    # A padded probe: a mask of steps has nothing to do with spans, or with samples.
    report = layer(sequences=SEQUENCES, reductions=REDUCTIONS)
    assert report.mean("growth") == report.scalars()["growth"]
    assert report.mean("horizon") == np.inf
    np.testing.assert_array_equal(report.valid("growth"), [-0.3])
    assert report.extremes("horizon") == (2.0, np.inf)
    ask: Any
    for ask in (report.mean, report.valid, report.extremes, report.over_time, report.measured, report.standard_error):
        for key in ("flow", "lyapunov"):
            with pytest.raises(
                ValueError, match=rf"single steps, of \['variance', .*key='{key}', with an array \(value"
            ):
                ask(key)
        with pytest.raises(KeyError, match="No measure 'norm'"):
            ask("norm")
    for ask in (report.over_time, report.measured, report.standard_error):
        with pytest.raises(ValueError, match=r"key='growth', with an array \(batch,\) of shape \(2,\)"):
            ask("growth")


def test_a_verdict_that_is_missing_says_why() -> None:
    nan = np.full((3, 2), np.nan)
    report = Report(
        {
            "fast": layer(joint="joint/"),
            "nan": layer(sequences={"flow": nan}),
            "masked": layer(sequences={"flow": nan}, mask=np.zeros((3, 2), bool)),
        }
    )
    reasons = {
        "fast": "`joint/flow`, on which it rests, was not measured",
        "nan": "`flow` is NaN, because weights, states or Jacobians are not finite",
        "masked": "all steps of the probe are masked",
    }
    assert report.verdict == {}
    assert str(report).splitlines()[:3] == [f"{name}: no verdict: {reason}" for name, reason in reasons.items()]
    for name, reason in reasons.items():
        with pytest.raises(KeyError) as caught:
            report.verdict[name]
        assert caught.value.args == (f"No verdict on layer '{name}': {reason}",)
    with pytest.raises(KeyError, match=r"No layer 'lstm' in this report. Measured: \['fast', 'nan', 'masked'\]"):
        report.verdict["lstm"]


def test_inf_is_reported_unless_a_measure_may_be_infinite() -> None:
    infinite = np.where(layer().mask, np.inf, np.nan)
    values = {"condition_number": infinite, "variance": infinite}
    report = layer(values=values, may_be_infinite=frozenset({"condition_number"}))
    assert report.nonfinite() == {"variance": 5}
