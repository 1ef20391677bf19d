"""What becomes of a gradient, said in words: flows made by hand, and layers whose fate is known."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import pytest
from helpers import normal

from keras_jacmon import JacobianMeter
from keras_jacmon.report.verdict import judge

L = keras.layers


def flow(*gains: float, spans: int = 10) -> Any:
    """The log gains of samples each of whose steps has one gain, `(spans, samples)`."""
    return np.arange(1, spans + 1)[:, None] * np.log(np.array(gains))[None]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("gain", "state", "horizon"),
    [(1.0, "stable", math.inf), (0.5, "vanishing", 7), (0.62, "stable", math.inf), (2.0, "exploding", 7)],
)
def test_the_state_is_the_threshold_that_is_met(gain: float, state: str, horizon: float) -> None:
    verdict = judge(flow(gain, gain, spans=9), np.ones((9, 2), bool))
    assert verdict is not None
    assert verdict.state == state
    assert verdict.horizon == horizon
    np.testing.assert_allclose([verdict.growth, verdict.gain], [np.log(gain), gain**9], atol=1e-12)
    # All steps are alike.
    assert (verdict.worst_step, verdict.worst_gain) == (None, None)
    assert verdict.suggestions == ()


@pytest.mark.fast
def test_the_thresholds_are_arguments() -> None:
    log_gain, mask = flow(0.62, spans=9), np.ones((9, 1), bool)
    verdict = judge(log_gain, mask, fall=0.1)
    assert verdict is not None
    assert (verdict.state, verdict.horizon) == ("vanishing", 5)
    for fall, rise in ((0, 2), (1, 2), (0.1, 1), (2, 3)):
        with pytest.raises(ValueError, match="Expected 0 < fall < 1 < rise"):
            judge(log_gain, mask, fall=fall, rise=rise)


@pytest.mark.fast
def test_samples_count_by_their_real_length() -> None:
    log_gain = flow(0.5, 0.5)
    log_gain[3:, 1] = np.nan
    mask = np.ones((10, 2), bool)
    mask[3:, 1] = False
    verdict = judge(log_gain, mask)
    assert verdict is not None
    np.testing.assert_allclose(np.log(verdict.gain), np.log(0.5) * (10 + 3) / 2)
    assert verdict.length == 6.5
    # A sample that ends does not bend the curve.
    np.testing.assert_allclose(verdict.growth, np.log(0.5))
    slow = flow(0.5, 0.9)
    slow[3:, 1] = np.nan
    verdict = judge(slow, mask)
    assert verdict is not None
    curve = np.cumsum(np.log([0.45] * 3 + [0.25] * 7)) / 2
    assert verdict.growth == pytest.approx(np.polyfit(np.arange(11), [0, *curve], 1)[0])
    assert verdict.horizon == 1 + np.flatnonzero(curve <= np.log(0.01))[0]


@pytest.mark.fast
def test_a_threshold_soon_beyond_the_probe_is_told() -> None:
    def text(gain: float, spans: int) -> str:
        return str(judge(flow(gain, spans=spans), np.ones((spans, 1), bool)))

    # 0.62^9.6 = 0.01: on a probe of 6 steps "stable" means "not yet".
    assert text(0.62, 6) == (
        "stable: -0.478 nats per step, gain 0.0568 over 6 steps, horizon beyond the sequence: at this growth 10 steps"
    )
    assert text(1.2, 6).endswith("gain 2.99 over 6 steps, horizon beyond the sequence: at this growth 26 steps")
    # Not within five times the probe, or never.
    assert text(0.93, 6).endswith("gain 0.647 over 6 steps, horizon beyond the sequence")
    assert text(1.0, 6).endswith("gain 1 over 6 steps, horizon beyond the sequence")
    assert text(0.62, 20) == "vanishing: -0.478 nats per step, gain 7.04e-05 over 20 steps, horizon 10 steps"


@pytest.mark.fast
def test_a_step_is_the_worst_only_if_it_stands_out() -> None:
    rng = np.random.default_rng(0)

    def worst(local: Any) -> int | None:
        verdict = judge(np.cumsum(local)[:, None], np.ones((len(local), 1), bool))
        assert verdict is not None
        assert ("worst at step" in str(verdict)) == (verdict.worst_step is not None)
        return verdict.worst_step

    noise = -0.1 + 0.05 * rng.standard_normal(60)
    assert worst(noise) is None
    # The first span is the loss of the random vectors, which turn into the directions that survive.
    assert worst([-3.0, *noise]) is None
    assert worst([-3.0, *noise, -0.8, -0.1]) == 1
    # What lets nothing pass stands out anywhere.
    assert worst([-math.inf, 0.0, 0.0]) == 2


@pytest.mark.parametrize("go_backwards", [False, True])
def test_the_worst_step_is_a_position_in_the_input(go_backwards: bool) -> None:  # noqa: FBT001 - pytest passes it by name
    # By the order in which the layer runs, the last step but two loses most; one step of the input is masked.
    local = np.log(np.array([0.9, 0.9, 0.1, 0.9, 0.9, 0.9, 0.9]))
    mask = np.ones((8, 1), bool)
    mask[6] = False
    log_gain = np.concatenate([np.cumsum(local), [np.nan]])[:, None]
    verdict = judge(log_gain, mask, go_backwards=go_backwards)
    assert verdict is not None
    assert verdict.worst_step == (2 if go_backwards else 4)
    assert verdict.worst_gain == pytest.approx(0.1)


@pytest.mark.fast
def test_a_vanishing_layer_is_told_what_rescued_trainings() -> None:
    def remarks(gain: float, cell: str) -> tuple[str, ...]:
        verdict = judge(flow(gain), np.ones((10, 1), bool), cell=cell)
        assert verdict is not None
        return verdict.remarks

    for cell in ("LSTMCell", "GRUCell"):
        [remark] = remarks(0.5, cell)
        assert remark.startswith("this speaks of the gradient with the present weights: a training can learn to open")
        assert remarks(1.0, cell) == remarks(2.0, cell) == ()
    [remark] = remarks(0.5, "SimpleRNNCell")
    assert remark.endswith("`examples/temporal_order.py --cure suggestion+omega`")
    assert remarks(0.5, "CellOfOnesOwn") == ()


def test_a_flow_that_ends_at_zero_has_vanished() -> None:
    log_gain = np.array([[-1.0], [-math.inf], [-math.inf]])
    verdict = judge(log_gain, np.ones((3, 1), bool))
    assert verdict is not None
    assert (verdict.state, verdict.growth, verdict.horizon, verdict.gain, verdict.worst_step) == (
        "vanishing", -math.inf, 2, 0.0, 1,
    )  # fmt: skip


def test_no_verdict_without_a_flow() -> None:
    assert judge(np.full((3, 2), np.nan), np.zeros((3, 2), bool)) is None
    # NaN weights: there are steps, and nothing is known.
    assert judge(np.full((3, 2), np.nan), np.ones((3, 2), bool)) is None


# Layers whose fate is known --------------------------------------------------------------------------


def meter_of(layer: Any, steps: int = 40, **options: Any) -> JacobianMeter:
    """A meter of a layer with the weights that Keras gives it."""
    probe = normal(4, steps, 3)
    model = keras.Sequential([keras.Input((steps, 3)), layer])
    return JacobianMeter(model, probe, **options)


def test_the_forget_bias_turns_the_verdict_to_which_the_hidden_view_is_blind() -> None:
    layer = L.LSTM(64, name="lstm")
    report = meter_of(layer, 60)
    before = report()
    bias = layer.cell.bias.numpy()
    bias[64:128] = 4.0
    layer.cell.bias.assign(bias)
    after = report()
    assert abs(after["lstm"].mean("variance") / before["lstm"].mean("variance") - 1) < 0.3
    assert before.verdict["lstm"].state == "vanishing"
    assert after.verdict["lstm"].state == "stable"
    assert before.verdict["lstm"].gain < 1e-2 < after.verdict["lstm"].gain


def test_print_leads_with_the_verdict() -> None:
    report = meter_of(L.SimpleRNN(4, name="rnn"))
    found = report()
    assert str(found).startswith(f"rnn: {found.verdict['rnn'].state}: ")
    assert "horizon" in str(found).splitlines()[0]
    bare = meter_of(L.SimpleRNN(4, name="rnn"), measures="fast")()
    assert str(bare).startswith("rnn: no verdict: `flow`, on which it rests, was not measured\n\nrnn: SimpleRNNCell")
    assert bare.verdict == {}


def test_the_hidden_flow_of_a_cell_with_several_states_is_no_verdict() -> None:
    report = meter_of(L.LSTM(4, name="lstm"), measures=["flow"])
    assert set(report()["lstm"].sequences) == {"flow"}
    assert report().verdict == {}
