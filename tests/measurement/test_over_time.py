"""Measures over the whole sequence, in the report: against products of dense Jacobians, made by a tape loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
from helpers import BATCH, BY_ID, FEATURES, build, make_model, normal, reference_jacobians

from keras_jacmon import JacobianMeter, Report, measure
from keras_jacmon.graphs.calls import function_graph
from keras_jacmon.measures.registry import MEASURES

if TYPE_CHECKING:
    from numpy.typing import NDArray

L = keras.layers
STEPS = 9
PROBE = normal(BATCH, STEPS, FEATURES)
OVER_TIME = ["joint/flow", "joint/growth", "joint/horizon", "joint/lyapunov", "joint/kaplan_yorke"]


def masked_model(layer: Any) -> Any:
    inputs = keras.Input((STEPS, FEATURES))
    return build(keras.Model(inputs, layer(L.Masking()(inputs))), PROBE)


def products(J: NDArray[Any], *, backwards: bool) -> NDArray[np.float64]:
    """`P_k` of the last 1, 2, ... steps that a sample takes, `(spans, n, n)`; J is by position in the input."""
    J = J[~np.isnan(J).any(axis=(1, 2))].astype(np.float64)
    J = J[::-1] if backwards else J
    found = [J[-1]]
    for step in J[-2::-1]:
        found.append(found[-1] @ step)
    return np.stack(found)


@pytest.mark.parametrize(
    ("case_id", "go_backwards", "max_bytes"),
    [
        ("partly_mixing", True, 3000),
        # Steps one after the other, and in segments of known points.
        ("partly_mixing", False, 60_000),
        *(
            pytest.param(*other, marks=pytest.mark.soak)
            for other in (("lstm", False, 2**30), ("gru_reset_before", False, 3000), ("bare_state", True, 2**30))
        ),
    ],
)
def test_the_flow_is_that_of_the_products(case_id: str, go_backwards: bool, max_bytes: int) -> None:  # noqa: FBT001 - pytest passes it by name
    layer = BY_ID[case_id].make(go_backwards=go_backwards)
    model = masked_model(layer)
    lengths = np.array([STEPS, 6, 2])
    mask = np.arange(STEPS)[None] < lengths[:, None]
    probe = PROBE * mask[..., None]
    report = measure(model, probe, measures=OVER_TIME, exact_flow=True, exponents=100, warmup=0, max_bytes=max_bytes)
    (found,) = report.layers.values()
    dense = reference_jacobians(layer, probe, mask=mask)
    J = dense.get("joint", dense["hidden"])
    prefix = "joint/" if "joint" in dense else ""
    rows = found.units if "joint" in dense else J.shape[-1]
    assert set(found.sequences) == {f"{prefix}{key.removeprefix('joint/')}" for key in OVER_TIME}
    for sample, length in enumerate(lengths):
        P = products(J[:, sample], backwards=go_backwards)
        # The flow begins in the output, here the first state.
        expected = np.log(np.linalg.norm(P[:, :rows], 2, axis=(1, 2)))
        flow = found[f"{prefix}flow"][:, sample]
        np.testing.assert_allclose(flow[:length], expected, atol=2e-4)
        assert np.isnan(flow[length:]).all()
        slope = np.polyfit(np.arange(length + 1), [0, *expected], 1)[0]
        np.testing.assert_allclose(found[f"{prefix}growth"][sample], slope, atol=1e-3)
        # The exponents of all directions add up to the growth of volumes, whatever vectors they began with.
        total = np.linalg.slogdet(P[-1])[1] / length
        if np.isfinite(total) and total > -10:
            np.testing.assert_allclose(found[f"{prefix}lyapunov"][:, sample].sum(), total, atol=2e-2)


def loops_in(graph: Any) -> int:
    """The loops of a graph, and those in their bodies."""
    names = [operation.get_attr("body").name for operation in graph.get_operations() if "While" in operation.type]
    return len(names) + sum(loops_in(function_graph(graph, name)) for name in names)


@pytest.mark.parametrize(("masked", "bytes_for_all"), [(True, 2**21), (False, 400_000)])
def test_points_that_are_known_are_not_found_again(masked: bool, bytes_for_all: int) -> None:  # noqa: FBT001 - pytest passes it by name
    """The states of a whole sequence take less memory than the derivatives at all of its points.

    Without a mask the derivatives have been evaluated for the measures of single steps, and serve again.
    """
    layer = L.LSTM(12, go_backwards=masked, name="lstm")
    model = masked_model(layer) if masked else build(keras.Sequential([keras.Input((STEPS, FEATURES)), layer]), PROBE)
    mask = np.arange(STEPS)[None] < (np.array([STEPS, 6, 2]) if masked else np.full(BATCH, STEPS))[:, None]
    found: dict[int, Any] = {}
    for max_bytes in (2**13, 300_000, bytes_for_all):
        meter = JacobianMeter(
            model, PROBE * mask[..., None], measures=OVER_TIME, exact_flow=True, exponents=100, max_bytes=max_bytes
        )
        found[loops_in(meter.graphs[0])] = meter(suggestions=False)["lstm"]
    # At once: the steps, the flow and the exponents. Of known points one loop over the segments for each of the two. Of
    # others also one for the measures of single steps, each with a loop over the steps in it.
    assert list(found) == [8, 5, 3]
    of_flow = JacobianMeter(model, PROBE * mask[..., None], measures=["joint/flow"], max_bytes=300_000)
    assert loops_in(of_flow.graphs[0]) == 3
    for key in OVER_TIME:
        np.testing.assert_allclose(found[5][key], found[3][key], rtol=1e-4, atol=1e-4, err_msg=key)
        np.testing.assert_allclose(found[8][key], found[3][key], rtol=1e-4, atol=1e-4, err_msg=key)


@pytest.mark.fast
def test_random_vectors_tell_the_flow_with_its_standard_error() -> None:
    layer = L.LSTM(12, name="lstm")
    model = masked_model(layer)
    J = reference_jacobians(layer, PROBE)["joint"]
    report = measure(model, PROBE, measures=["joint/flow"], flow_vectors=8)["lstm"]
    error = report.uncertainties["joint/flow"]
    for sample in range(BATCH):
        P = products(J[:, sample], backwards=False)
        expected = np.log(np.linalg.norm(P[:, :12], axis=(1, 2)) / np.sqrt(12))
        z = (report["joint/flow"][:, sample] - expected) / error[:, sample]
        assert np.abs(z).max() < 5
    assert 0 < error.max() < 0.4
    assert report.estimated == {"joint/flow"}


class CarryingCell(keras.layers.Layer):
    """A state that vanishes fast beside a counter that nothing reads, and the counter is the first state."""

    state_size = (1, 4)

    def build(self, _: Any) -> None:
        self.kernel = self.add_weight(shape=(4, 4), initializer="orthogonal")

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        count, h = states
        new_h = 0.05 * keras.ops.tanh(h @ self.kernel + inputs[:, :1])
        return new_h, [count + 1, new_h]


@pytest.mark.filterwarnings("ignore:.*carried on and never felt")
def test_the_verdict_leaves_out_a_state_that_is_carried_and_never_felt(tmp_path: Any) -> None:
    model = build(keras.Sequential([keras.Input((STEPS, FEATURES)), L.RNN(CarryingCell(), name="rnn")]), PROBE)
    report = measure(model, PROBE, measures=["joint/growth", "joint/horizon"])
    layer, verdict = report["rnn"], report.verdict["rnn"]
    assert set(layer.sequences) == {"joint/flow", "joint/flow_of_all", "joint/growth", "joint/horizon"}
    # A state of 0.05 tanh loses a factor of 20 and more in each step; the counter keeps its fifth of all directions.
    assert (verdict.state, verdict.horizon) == ("vanishing", 2)
    assert verdict.growth < np.log(0.05)
    error = np.abs(layer["joint/flow_of_all"][-1] - np.log(1 / 5) / 2)
    assert np.all(error < 3 * layer.uncertainties["joint/flow_of_all"][-1])
    assert verdict.growth_of_all == pytest.approx(0, abs=0.1)
    assert f"; of all states, felt or not: {verdict.growth_of_all:+.3g} nats per step" in str(verdict)
    assert layer.notes[-1].startswith("old state 0 is carried on and never felt by the output (no gradient")
    assert report.scalars()["rnn_jac_joint_growth"] == verdict.growth
    report.save(tmp_path / "report.npz")
    assert Report.load(tmp_path / "report.npz").verdict == report.verdict


def test_log_and_verdict_have_the_same_growth_and_horizon_on_a_padded_probe() -> None:
    model = masked_model(L.SimpleRNN(6, name="rnn"))
    mask = np.arange(STEPS)[None] < np.array([STEPS, 6, 2])[:, None]
    report = measure(model, PROBE * mask[..., None], measures="standard")
    verdict, scalars = report.verdict["rnn"], report.scalars()
    assert (scalars["rnn_jac_growth"], scalars["rnn_jac_horizon"]) == (verdict.growth, verdict.horizon)
    assert verdict.growth == report["rnn"].mean("growth")
    (line,) = [line for line in str(report).splitlines() if line.startswith("  growth")]
    assert line.split()[1] == f"{verdict.growth:.4g}"


def test_neither_five_hundred_steps_of_gain_five_nor_of_a_fifth_are_too_many() -> None:
    """The product of them all is beyond the largest number of double precision, or below the smallest one."""
    layer, spans = L.SimpleRNN(2, activation="linear", name="rnn"), np.arange(1, 501)
    probe = np.zeros((1, len(spans), 1), np.float32)
    model = build(keras.Sequential([keras.Input(probe.shape[1:]), layer]), probe)
    meter = JacobianMeter(model, probe, measures=["flow", "growth", "horizon", "lyapunov"])
    for gain in (5.0, 0.2):
        layer.cell.recurrent_kernel.assign(gain * np.eye(2))
        report = meter(suggestions=False)
        np.testing.assert_allclose(report["rnn"]["flow"][:, 0], spans * np.log(gain), rtol=1e-5)
        np.testing.assert_allclose(report["rnn"]["growth"], np.log(gain), rtol=1e-5)
        np.testing.assert_allclose(report["rnn"]["horizon"], 3)
        np.testing.assert_allclose(report["rnn"]["lyapunov"], np.log(gain), rtol=1e-5)
        assert report.verdict["rnn"].state == ("exploding" if gain > 1 else "vanishing")
        np.testing.assert_allclose(report.verdict["rnn"].growth, np.log(gain), rtol=1e-5)


def test_slow_measures_can_be_left_out() -> None:
    model = masked_model(L.SimpleRNN(4, name="rnn"))
    assert {name for name, measure in MEASURES.items() if measure.cost == "full"} == {
        *("lyapunov", "kaplan_yorke", "spectral_radius", "condition_number", "singular_values", "eigenvalues"),
        *("sensitivity", "relative_sensitivity", "state_norm"),
    }
    slow = {"lyapunov", "condition_number", "singular_values"}
    meter = JacobianMeter(model, PROBE, measures=["variance", "flow", *slow])
    assert meter.has_slow_measures
    full, quick = meter(), meter(slow=False)

    def keys(report: Any) -> set[str]:
        return {*report["rnn"].values, *report["rnn"].sequences, *report["rnn"].spectra}

    assert keys(full) - keys(quick) == slow
    for key in quick["rnn"].values:
        np.testing.assert_array_equal(quick["rnn"][key], full["rnn"][key])
    assert meter.trace_count == 2
    assert not JacobianMeter(model, PROBE, measures=["variance"]).has_slow_measures
    # Who asks for nothing else gets it each time.
    only = JacobianMeter(model, PROBE, measures=["lyapunov"])
    assert set(only(slow=False)["rnn"].sequences) == {"lyapunov"}


@pytest.mark.parametrize(
    ("case_id", "go_backwards", "max_bytes"),
    [("lstm", True, 3000), pytest.param("bare_state", True, 2**30, marks=pytest.mark.soak)],
)
def test_spectra_are_those_of_the_dense_jacobians(case_id: str, go_backwards: bool, max_bytes: int) -> None:  # noqa: FBT001 - pytest passes it by name
    layer = BY_ID[case_id].make(go_backwards=go_backwards)
    model = masked_model(layer)
    mask = np.arange(STEPS)[None] < np.array([[STEPS], [6], [2]])
    probe = PROBE * mask[..., None]
    keys = ["eigenvalues", "singular_values", "spectral_radius", "condition_number"]
    report = measure(model, probe, measures=keys, spectra=7, max_bytes=max_bytes)
    (found,) = report.layers.values()
    J = reference_jacobians(layer, probe, mask=mask)["hidden"]
    assert found.spectra_at.shape == (7, 2)
    assert mask.T[tuple(found.spectra_at.T)].all()
    assert len(np.unique(found.spectra_at, axis=0)) == 7
    here = J[tuple(found.spectra_at.T)]
    np.testing.assert_allclose(found["singular_values"], np.linalg.svd(here, compute_uv=False), atol=1e-5)
    moduli = np.sort(np.abs(np.linalg.eigvals(here)), axis=1)[:, ::-1]
    np.testing.assert_allclose(np.abs(found["eigenvalues"]), moduli, atol=1e-4)
    radius = np.abs(np.linalg.eigvals(J[mask.T])).max(axis=1)
    np.testing.assert_allclose(found["spectral_radius"][mask.T], radius, rtol=1e-3)
    condition = np.linalg.cond(J[mask.T].astype(np.float64))
    known = condition < 1e3
    assert known.any() or case_id == "bare_state"
    np.testing.assert_allclose(found["condition_number"][mask.T][known], condition[known], rtol=1e-2)


@pytest.mark.parametrize(
    "case_id",
    [
        *("seed_cell", "unequal_states", "bare_state"),
        *(pytest.param(c, marks=pytest.mark.soak) for c in ("lstm", "gru_reset_before", "stacked_lstm_gru")),
    ],
)
@pytest.mark.filterwarnings("ignore:.*no gradient connects the new state with the inputs")
def test_the_inputs_view(case_id: str) -> None:
    model, layer = make_model(BY_ID[case_id], PROBE)
    names = ["variance", "rms_singular_value", "spectral_norm", "condition_number"]
    meter = JacobianMeter(model, PROBE, measures=[f"inputs/{name}" for name in names])
    ((name, found),) = meter().layers.items()
    J = reference_jacobians(layer, PROBE, by_inputs=True).get("inputs")
    assert J is not None
    if not np.abs(J).max():
        assert found.values == {}
        assert "no gradient connects the new state with the inputs" in found.notes[0]
        return
    J = J.astype(np.float64)
    np.testing.assert_allclose(found["inputs/variance"], J.shape[-1] * J.var(axis=(2, 3)), rtol=1e-4)
    rms = np.sqrt((J**2).sum(axis=(2, 3)) / J.shape[-1])
    np.testing.assert_allclose(found["inputs/rms_singular_value"], rms, rtol=1e-4)
    np.testing.assert_allclose(found["inputs/spectral_norm"], np.linalg.norm(J, 2, axis=(2, 3)), rtol=1e-2)
    np.testing.assert_allclose(found["inputs/condition_number"], np.linalg.cond(J), rtol=1e-2)
    structured = case_id != "bare_state"
    assert (meter.choices[name]["inputs"][0].how == "structure") == structured
    assert (found.certificate is not None) == structured
