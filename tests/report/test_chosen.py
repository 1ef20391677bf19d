"""The numbers that go into the logs, and the verdicts that change."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from keras_jacmon import LayerReport, Report
from keras_jacmon.report.changes import VerdictHistory
from keras_jacmon.report.chosen import default_names, names_in_logs
from keras_jacmon.report.verdict import Verdict

pytestmark = pytest.mark.fast


def layer(*keys: str, joint: str = "joint/", sequences: tuple[str, ...] = ("growth", "lyapunov")) -> LayerReport:
    arrays: Any = {f"{joint}{key}": np.ones((2, 1)) for key in sequences}
    reductions = {key: "first" if key.endswith("lyapunov") else "mean" for key in arrays}
    values: Any = {key: np.zeros((2, 1)) for key in keys}
    return LayerReport("C", 1, values, np.ones((2, 1), bool), sequences=arrays, reductions=reductions, joint=joint)


LSTM = ("variance", "spectral_norm", "rms_singular_value", "joint/variance", "joint/spectral_norm")
GRU = ("variance", "spectral_norm", "rms_singular_value")


def chosen(report: Report, names: Any = None) -> list[str]:
    return list(report.scalars(default_names(report) if names is None else names))


def test_the_default() -> None:
    few = Report({"a": layer(*LSTM), "b": layer(*GRU, joint="")})
    assert chosen(few) == [
        "a_jac_variance", "a_jac_spectral_norm", "a_jac_joint_growth", "b_jac_variance", "b_jac_spectral_norm",
        "b_jac_growth",
    ]  # fmt: skip
    many = Report({name: layer(*LSTM) for name in "abcd"})
    assert chosen(many) == [f"{name}_jac_joint_growth" for name in "abcd"]
    assert chosen(Report({name: layer(*LSTM, sequences=()) for name in "abcd"})) == [
        f"{n}_jac_variance" for n in "abcd"
    ]
    # Nothing of the default was measured.
    assert chosen(Report({"a": layer("rms_singular_value", sequences=("lyapunov",))})) == [
        "a_jac_rms_singular_value", "a_jac_joint_lyapunov_1",
    ]  # fmt: skip


def test_names_stand_for_what_a_layer_has() -> None:
    report = Report({"a": layer(*LSTM), "b": layer(*GRU, joint="")})
    assert chosen(report, ["joint/variance"]) == ["a_jac_joint_variance", "b_jac_variance"]
    assert chosen(report, ["lyapunov", "growth"]) == [
        "a_jac_joint_growth", "a_jac_joint_lyapunov_1", "b_jac_growth", "b_jac_lyapunov_1",
    ]  # fmt: skip
    assert chosen(report, ["inputs/variance"]) == []
    assert len(report.scalars()) == 12
    assert names_in_logs("all", report) is None
    assert report.scalars(names_in_logs(None, report)) == {}
    assert names_in_logs(("growth",), report) == ("growth",)


def verdict(state: Any, horizon: float = math.inf) -> Verdict:
    return Verdict(state, 0.0, horizon, horizon, 1.0, 10, None, None, ())


def test_changes_of_verdicts() -> None:
    history = VerdictHistory()
    assert history.update({"a": verdict("stable"), "b": verdict("vanishing", 3)}) == []
    assert history.update({"a": verdict("stable")}) == []
    (change,) = history.update({"a": verdict("vanishing", 41.0), "b": verdict("vanishing", 9)})
    assert change.sentence(1200) == "step 1,200: a stable -> vanishing (horizon 41)"
    assert (change.layer, change.old.state, change.new.horizon) == ("a", "stable", 41.0)
    # A layer that had no verdict in between is compared with the one before.
    assert history.update({"a": verdict("vanishing", 40)}) == []
    (change,) = history.update({"b": verdict("stable")})
    assert change.sentence(7) == "step 7: b vanishing -> stable (horizon beyond the sequence)"
