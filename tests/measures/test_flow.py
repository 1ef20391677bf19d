"""The gain of products of Jacobians, against dense products and known values."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import normal, reference_jacobians
from sequences import built, in_graph, of_cell, of_matrices, pieces, rotations
from structure_laws import double_precision

from keras_jacmon.measures.flow import (
    FlowCarry,
    FlowPlan,
    exact_flow_segment,
    flow_segment,
    start_exact_flow,
    start_flow,
)
from keras_jacmon.measures.gains import Gains, by_span, gains_by_span
from keras_jacmon.report.curve import growth, horizon

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from keras_jacmon.measures.steps import Steps

pytestmark = pytest.mark.fast

NAN, INF = math.nan, math.inf
both = pytest.mark.parametrize("structured", [True, False], ids=["structure", "autodiff"])


def plan_of(steps: Steps, vectors: int) -> FlowPlan:
    return FlowPlan.of((steps.size,), (True,), vectors, cheap=False)


def estimated(make: Callable[[], Steps], vectors: int = 3, seed: int = 0) -> Gains:
    """The gains of the steps that a function makes in a graph."""
    made: list[Steps] = []

    def numbers() -> Any:
        steps = make()
        made.append(steps)
        plan = plan_of(steps, vectors)
        found, _ = flow_segment(steps, start_flow(steps.samples, plan, (seed, 1), steps.dtype), plan)
        return found, steps.mask

    found, mask = in_graph(numbers)
    return gains_by_span(found, mask, plan_of(made[0], vectors))


def exact(make: Callable[[], Steps]) -> NDArray[np.floating]:
    """The logarithms of the spectral norms, (spans, samples)."""

    def norms() -> Any:
        steps = make()
        logs, _ = exact_flow_segment(steps, start_exact_flow(steps.samples, plan_of(steps, 1), steps.dtype))
        return logs, steps.mask

    logs, mask = in_graph(norms)
    return by_span(logs[:, 0], mask)


def run(J: Any, mask: NDArray[np.bool_] | None = None, **kwargs: Any) -> Gains:
    return estimated(lambda: of_matrices(J, mask), **kwargs)


def run_exact(J: Any, mask: NDArray[np.bool_] | None = None) -> NDArray[np.floating]:
    return exact(lambda: of_matrices(J, mask))


def products(J: NDArray[Any]) -> NDArray[np.float64]:
    """`d s_T / d s_{T-k}` for k = 1..T: (spans, samples, n, n)."""
    P, found = np.eye(J.shape[-1]), []
    for step in J[::-1].astype(np.float64):
        P = P @ step
        found.append(P)
    return np.stack(found)


def log_rms(J: NDArray[Any]) -> NDArray[np.float64]:
    P = products(J)
    return np.asarray(np.log(np.linalg.norm(P, axis=(-2, -1)) / np.sqrt(J.shape[-1])))


def log_norm(J: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(np.log(np.linalg.norm(products(J), ord=2, axis=(-2, -1))))


# Equal to dense products -----------------------------------------------------------------------------------------


def test_all_directions_give_the_frobenius_norm() -> None:
    J = normal(6, 5, 7, 7, scale=0.5)
    flow = run(J, vectors=7)
    np.testing.assert_allclose(flow.log_gain, log_rms(J), atol=1e-5, strict=True)
    np.testing.assert_array_equal(flow.standard_error, np.zeros((6, 5)), strict=True)


@pytest.mark.parametrize("kind", ["full rank", "rank one", "two large directions"])
@pytest.mark.parametrize("vectors", [2, 3, 6])
def test_few_vectors_have_no_bias_and_an_honest_error(kind: str, vectors: int) -> None:
    n, draws = 32, 800
    J = normal(16, n, n, scale=n**-0.5, seed=1)
    if kind == "rank one":
        J = np.full((3, n, n), 1 / n, np.float32)
    if kind == "two large directions":
        J = np.diag([3.0, 2.0, *[0.3] * (n - 2)]).astype(np.float32)[None].repeat(3, axis=0)
    expected = log_rms(J[:, None])
    flow = estimated(lambda: dataclasses.replace(of_matrices(J[:, None]), samples=draws), vectors=vectors)
    found = flow.log_gain - expected
    # A direction that stands out a little shows itself in few vectors only now and then.
    noise = found.std(axis=1) / np.sqrt(draws)
    assert np.all(np.abs(found.mean(axis=1)) < 4 * noise + 0.02)
    held = [(np.abs(found) <= errors * flow.standard_error).mean(axis=1) for errors in (1, 2, 3)]
    assert np.all(np.array(held) > np.array([[0.66], [0.9], [0.94]]))
    # An error that is too wide is not honest either.
    assert np.all(np.median(flow.standard_error, axis=1) < 2.5 * found.std(axis=1))


def test_a_jacobian_of_rank_one_is_not_lost() -> None:
    # 2 units with constant weights: vectors of ±1 are at right angles to (1, 1) in half of the cases.
    J = np.full((10, 300, 2, 2), 0.5, np.float32)
    flow = run(J)
    np.testing.assert_allclose(flow.log_gain, np.full((10, 300), math.log(0.5) / 2), atol=1e-5, strict=True)
    np.testing.assert_array_equal(flow.standard_error, np.zeros((10, 300)), strict=True)
    J = np.full((10, 300, 8, 8), 1 / 8, np.float32)
    flow = run(J)
    assert np.isfinite(flow.log_gain).all()
    assert flow.standard_error.min() > 0.3
    np.testing.assert_allclose(flow.log_gain.mean(axis=1), np.full(10, math.log(1 / 8) / 2), atol=0.1, strict=True)


def test_all_directions_are_taken_where_they_are_cheap() -> None:
    def plan(size: int, *, cheap: bool) -> FlowPlan:
        return FlowPlan.of((size,), (True,), 3, cheap=cheap)

    assert (plan(8, cheap=True).vectors, plan(8, cheap=True).is_exact) == (8, True)
    assert (plan(9, cheap=True).vectors, plan(9, cheap=True).is_exact) == (3, False)
    assert (plan(8, cheap=False).vectors, plan(2, cheap=False).vectors) == (3, 2)


def test_one_unit_leaves_no_doubt() -> None:
    J = normal(6, 5, 1, 1)
    flow = run(J)
    np.testing.assert_allclose(flow.log_gain, log_rms(J), rtol=1e-5, atol=1e-6, strict=True)
    np.testing.assert_array_equal(flow.standard_error, np.zeros((6, 5)), strict=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_exact_norm_is_that_of_the_product(dtype: Any) -> None:
    J = normal(9, 3, 6, 6).astype(dtype)
    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(run_exact(J), log_norm(J), rtol=tolerance, atol=tolerance, strict=True)


@pytest.mark.parametrize(
    ("make", "structured"), [(keras.layers.GRU, True), (keras.layers.LSTM, False)], ids=["structure", "autodiff"]
)
def test_of_a_cell_it_is_that_of_its_jacobians(make: Any, structured: bool) -> None:  # noqa: FBT001 - a parameter of the test
    layer = make(3)
    probe = normal(2, 5, 2)
    layer(probe)
    for weight in layer.trainable_weights:
        weight.assign(normal(*weight.shape, seed=3))
    J = reference_jacobians(layer, probe)
    dense = J.get("joint", J["hidden"])
    inputs = probe.transpose(1, 0, 2)

    def steps() -> Steps:
        return of_cell(layer.cell, inputs, structured=structured)

    norm, flow = exact(steps), estimated(steps, vectors=6)
    np.testing.assert_allclose(norm, log_norm(dense), rtol=1e-4, atol=1e-4, strict=True)
    np.testing.assert_allclose(flow.log_gain, log_rms(dense), rtol=1e-4, atol=1e-4, strict=True)


# Known values ----------------------------------------------------------------------------------------------------


def test_orthogonal_steps_keep_norms() -> None:
    J = rotations(20, 6).reshape(10, 2, 6, 6)
    flow = run(J)
    np.testing.assert_allclose(flow.log_gain, np.zeros((10, 2)), atol=1e-12, strict=True)
    np.testing.assert_allclose(run_exact(J), np.zeros((10, 2)), atol=1e-12, strict=True)
    assert np.all(horizon(flow.log_gain) == INF)


@pytest.mark.parametrize("gain", [5.0, 0.2])
def test_ten_thousand_steps_neither_overflow_nor_underflow(gain: float) -> None:
    J = tf.constant(gain * rotations(2, 3), tf.float32)

    def long() -> Steps:
        steps = of_matrices(J[None])
        return dataclasses.replace(steps, time=10_000, at=lambda _: steps.at(0))

    log_gain = estimated(long, vectors=2).log_gain
    slope, steps = growth(log_gain), horizon(log_gain)
    expected = np.arange(1, 10_001)[:, None] * np.full((1, 2), math.log(gain))
    np.testing.assert_allclose(log_gain, expected, rtol=1e-6, strict=True)
    np.testing.assert_allclose(slope, np.full(2, math.log(gain)), rtol=1e-6, strict=True)
    np.testing.assert_array_equal(steps, np.full(2, 3.0))


@pytest.mark.parametrize("gain", [5.0, 0.2])
def test_ten_thousand_steps_of_a_cell_neither_overflow_nor_underflow(gain: float) -> None:
    cell = built(keras.layers.SimpleRNNCell(3, activation="linear"), 1)
    cell.recurrent_kernel.assign(gain * rotations(1, 3)[0])
    # From states of zero and without inputs the states stay zero, at any gain.
    inputs = np.zeros((10_000, 2, 1), np.float32)
    flow = estimated(lambda: of_cell(cell, inputs, structured=True), vectors=2)
    expected = np.arange(1, 10_001)[:, None] * np.full((1, 2), math.log(gain))
    np.testing.assert_allclose(flow.log_gain, expected, rtol=1e-6, strict=True)
    np.testing.assert_array_equal(horizon(flow.log_gain), np.full(2, 3.0))


@pytest.mark.parametrize("gain", [1e30, 1e-30])
def test_a_single_step_may_be_as_large_or_small_as_a_float(gain: float) -> None:
    J = (gain * rotations(8, 3)).astype(np.float32).reshape(4, 2, 3, 3)
    expected = np.arange(1, 5)[:, None] * np.full((1, 2), math.log(gain))
    np.testing.assert_allclose(run(J).log_gain, expected, rtol=1e-6)
    np.testing.assert_allclose(run_exact(J), expected, rtol=1e-6)


@pytest.mark.parametrize(("bias", "structured"), [(1.0, True), (5.0, False)], ids=["structure", "autodiff"])
def test_an_lstm_without_kernels_forgets_by_its_forget_gate(bias: float, structured: bool) -> None:  # noqa: FBT001 - a parameter of the test
    cell = built(keras.layers.LSTMCell(3, kernel_initializer="zeros", recurrent_initializer="zeros"), 2)
    cell.bias.assign(np.repeat([0.0, bias, 0.0, 0.0], 3))
    inputs = normal(60, 2, 2)

    def steps() -> Steps:
        return of_cell(cell, inputs, structured=structured)

    found, norm = estimated(steps, vectors=6).log_gain, exact(steps)
    # P_k = f^k [[0, I/2], [0, I]]: its RMS gain is f^k sqrt(1.25 / 2), its norm f^k sqrt(1.25).
    rate = {1.0: -0.313262, 5.0: -0.006715}[bias]
    falls = np.arange(1, 61)[:, None] * np.full((1, 2), rate)
    np.testing.assert_allclose(norm, falls + 0.5 * math.log(1.25), atol=1e-4, strict=True)
    np.testing.assert_allclose(found, falls + 0.5 * math.log(1.25 / 2), atol=1e-4, strict=True)
    np.testing.assert_allclose(np.diff(found, axis=0), np.full((59, 2), rate), atol=1e-5, strict=True)
    np.testing.assert_allclose(growth(found), np.full(2, rate), atol=1e-3, strict=True)


@pytest.mark.parametrize(("rho", "total"), [(1.0, 42_634_215_112_710), (0.5, 1.0)])
def test_a_stack_of_scalar_recurrences_has_binomial_gradients(rho: float, total: float) -> None:
    layers, time = 10, 100
    # h_l,t = ρ h_l,t-1 + ρ h_l-1,t with h_0 = x: sample D has the Jacobian dh/dx, D steps, and the look at the last h.
    lag = np.subtract.outer(np.arange(layers), np.arange(layers))
    step = np.where(lag >= 0, rho ** (lag + 1.0), 0.0)
    first, last = np.zeros((2, layers, layers))
    first[:, 0], last[-1, -1] = rho ** np.arange(1, layers + 1), 1.0
    J = np.stack([first, *[step] * (time - 1), last])
    mask = np.ones((time + 1, time), bool)
    for D in range(time):
        mask[D + 1 : -1, D] = False
    log_gain = run_exact(np.repeat(J[:, None], time, axis=1), mask)
    gradients = np.exp(log_gain[np.arange(time) + 1, np.arange(time)])
    expected = [rho ** (d + layers) * math.comb(d + layers - 1, layers - 1) for d in range(time)]
    np.testing.assert_allclose(gradients, expected, rtol=1e-10)
    np.testing.assert_allclose(gradients.sum(), total, rtol=1e-10)


@both
def test_a_stack_of_cells_with_one_unit_has_binomial_gradients(structured: bool) -> None:  # noqa: FBT001 - a parameter of the test
    layers, time = 10, 100
    # As above, but from `RNN` itself. The gradient of the last layer's output is led back through D steps, which is all
    # that sample D does not skip, and meets dh/dx there.
    with double_precision():
        cells = [keras.layers.SimpleRNNCell(1, activation="linear", use_bias=False) for _ in range(layers)]
        rnn = keras.layers.RNN(cells)
        rnn(np.zeros((1, 1, 1)))
    mask = np.arange(time - 1)[:, None] >= time - 1 - np.arange(time)

    @tf.function(autograph=False)
    def graph() -> FlowCarry:
        steps = of_cell(rnn.cell, np.zeros((time - 1, time, 1)), structured=structured)
        at_the_end = tf.one_hot([[layers - 1]] * time, layers, dtype=tf.float64)
        start = FlowCarry(at_the_end, tf.zeros([time], tf.float64))
        plan = FlowPlan((layers,), (True,), 1)
        return flow_segment(dataclasses.replace(steps, mask=tf.constant(mask)), start, plan)[1]

    for rho, total in ((1.0, 42_634_215_112_710), (0.5, 1.0)):
        for weight in rnn.trainable_weights:
            weight.assign([[rho]])
        vectors, logs = (part.numpy() for part in graph())
        gradients = (np.exp(logs)[:, None, None] * vectors)[:, 0] @ rho ** np.arange(1.0, layers + 1)
        expected = [rho ** (d + layers) * math.comb(d + layers - 1, layers - 1) for d in range(time)]
        np.testing.assert_allclose(gradients, expected, rtol=1e-10)
        np.testing.assert_allclose(gradients.sum(), total, rtol=1e-10)


def test_products_of_gaussian_matrices_grow_as_the_square_of_their_norm() -> None:
    # E ‖P‖_F² / n = s^(2k) for entries of variance s²/n: the mean of the squares, not of the logarithms.
    J = normal(3, 400, 16, 16, scale=1.3 / 4)
    squares = np.exp(2 * run(J, vectors=16).log_gain)
    expected = 1.3 ** (2 * np.arange(1, 4))
    assert np.all(np.abs(squares.mean(axis=1) - expected) < 4 * squares.std(axis=1) / np.sqrt(400))


# Masks, segments, bad values -------------------------------------------------------------------------------------

MASK = np.array(
    [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0]], bool
).T


@pytest.mark.parametrize("how", [run_exact, lambda J, mask=None: run(J, mask).log_gain], ids=["exact", "estimated"])
def test_skipped_steps_do_not_count(how: Any) -> None:
    J = normal(6, 5, 4, 4, scale=0.7)
    J[~MASK] = NAN
    found = how(J, MASK)
    assert found.shape == (6, 5)
    for sample in range(5):
        kept = MASK[:, sample]
        count = kept.sum()
        assert np.isnan(found[count:, sample]).all()
        if count:
            # The random vectors of all samples are those of the whole.
            alone = how(np.where(kept[:, None, None, None], J, 0)[kept])[:, sample]
            np.testing.assert_allclose(found[:count, sample], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
@pytest.mark.parametrize("length", [1, 4, 6])
def test_segments_give_what_the_whole_gives(length: int, mask: Any) -> None:
    steps = of_matrices(normal(6, 5, 4, 4), mask)
    plan = plan_of(steps, 3)
    carry = start_flow(5, plan, (0, 1), tf.float32)
    carry_exact = start_exact_flow(5, plan, tf.float32)
    logs: list[tf.Tensor] = []
    logs_exact: list[tf.Tensor] = []
    for piece in reversed(list(pieces(steps, length))):
        some, carry = flow_segment(piece, carry, plan)
        logs.insert(0, some)
        some, carry_exact = exact_flow_segment(piece, carry_exact)
        logs_exact.insert(0, some)
    whole = estimated(lambda: steps)
    parts = gains_by_span(np.concatenate(logs), mask, plan)
    np.testing.assert_allclose(parts.log_gain, whole.log_gain, rtol=1e-14, strict=True)
    np.testing.assert_allclose(parts.standard_error, whole.standard_error, rtol=1e-12, strict=True)
    parts_exact = by_span(np.concatenate(logs_exact)[:, 0], mask)
    np.testing.assert_allclose(parts_exact, exact(lambda: steps), rtol=1e-14, strict=True)


def test_zero_is_minus_infinity_and_nothing_else_is() -> None:
    J = normal(4, 3, 5, 5)
    clean = run(J)
    J[1, 1] = 0
    flow = run(J)
    np.testing.assert_array_equal(flow.log_gain[2:, 1], [-INF, -INF])
    np.testing.assert_array_equal(flow.standard_error[2:, 1], [0, 0])
    np.testing.assert_array_equal(flow.log_gain[:, [0, 2]], clean.log_gain[:, [0, 2]])
    np.testing.assert_array_equal(flow.log_gain[:2, 1], clean.log_gain[:2, 1])
    np.testing.assert_array_equal(run_exact(J)[2:, 1], [-INF, -INF])
    assert np.isfinite(run_exact(J)[:, [0, 2]]).all()
    np.testing.assert_array_equal(np.isinf(growth(flow.log_gain)), [False, True, False])
    assert horizon(flow.log_gain)[1] == 3


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("how", [run_exact, lambda J: run(J).log_gain], ids=["exact", "estimated"])
def test_a_bad_sample_does_not_disturb_the_others(how: Any, bad: float) -> None:
    J = normal(4, 3, 5, 5)
    clean = how(J)
    J[1, 1, 2, 3] = bad
    found = how(J)
    assert not np.isfinite(found[2:, 1]).any()
    found[2:, 1] = clean[2:, 1]
    np.testing.assert_array_equal(found, clean, strict=True)


def test_nan_beside_zeros_is_not_zero() -> None:
    J = np.zeros((2, 1, 3, 3), np.float32)
    J[:, 0, 1, 1] = NAN
    assert np.isnan(run(J).log_gain).all()
    assert np.isnan(run_exact(J)).all()


def test_the_seed_decides() -> None:
    J = normal(4, 3, 8, 8)
    first, again, other = (run(J, seed=seed).log_gain for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again, strict=True)
    assert np.all(first != other)
    # Each sample has vectors of its own.
    same = run(np.repeat(J[:, :1], 3, axis=1), seed=1).log_gain
    assert len(np.unique(same[0])) == 3


def test_shapes_may_be_unknown() -> None:
    J = normal(6, 5, 4, 4)
    plan = FlowPlan.of((4,), (True,), 3, cheap=False)

    @tf.function(input_signature=[tf.TensorSpec((None, None, 4, 4)), tf.TensorSpec((None, None), tf.bool)])
    def graph(J: Any, mask: Any) -> Any:
        steps = dataclasses.replace(of_matrices(J), mask=mask)
        numbers, _ = flow_segment(steps, start_flow(steps.samples, plan, (0, 1), J.dtype), plan)
        norms, _ = exact_flow_segment(steps, start_exact_flow(steps.samples, plan, J.dtype))
        return numbers, norms

    numbers, norms = (found.numpy() for found in graph(J, MASK))
    np.testing.assert_allclose(gains_by_span(numbers, MASK, plan).log_gain, run(J, MASK).log_gain, rtol=1e-6)
    np.testing.assert_allclose(by_span(norms[:, 0], MASK), run_exact(J, MASK), rtol=1e-6)


# Growth and horizon ----------------------------------------------------------------------------------------------


def test_growth_is_the_slope() -> None:
    spans = np.arange(1.0, 41.0)
    log_gain = np.stack(
        [
            -0.3 * spans,
            0.2 * spans,
            np.where(spans <= 10, -0.5 * spans, NAN),
            np.where(spans <= 1, -0.7, NAN),
            np.full(40, NAN),
            np.where(spans < 30, -spans, -INF),
            np.full(40, -INF),
        ],
        axis=1,
    )
    expected = np.array([-0.3, 0.2, -0.5, -0.7, NAN, -INF, -INF])
    np.testing.assert_allclose(growth(log_gain), expected, rtol=1e-12, strict=True)


def test_growth_is_least_squares() -> None:
    log_gain = normal(30, 4).astype(np.float64)
    spans = np.arange(31)
    expected = np.polyfit(spans, np.concatenate([np.zeros((1, 4)), log_gain]), 1)[0]
    np.testing.assert_allclose(growth(log_gain), expected, rtol=1e-9, strict=True)


def test_what_is_lost_once_is_not_lost_at_each_step() -> None:
    log_gain = -3.0 - 0.1 * np.arange(1.0, 201.0)[:, None]
    np.testing.assert_allclose(growth(log_gain), [-0.1], atol=1e-3)


@pytest.mark.parametrize(
    ("gain", "expected"), [(0.5, 7), (2.0, 7), (0.01, 1), (0.1, 2), (100.0, 1), (1.0, INF), (0.9, INF)]
)
def test_horizon_is_the_first_step_beyond_the_thresholds(gain: float, expected: float) -> None:
    log_gain = np.arange(1, 41)[:, None] * math.log(gain)
    np.testing.assert_array_equal(horizon(log_gain), np.array([expected], float), strict=True)


def test_horizon_of_other_thresholds_of_short_and_of_unknown_flows() -> None:
    log_gain = np.arange(1.0, 11.0)[:, None] * np.array([-1.0, 1.0, -1.0, NAN, -INF])
    log_gain[3:, 2] = NAN
    np.testing.assert_array_equal(horizon(log_gain), [5, 5, INF, NAN, 1])
    np.testing.assert_array_equal(horizon(log_gain, fall=0.05, rise=math.exp(6.5)), [3, 7, 3, NAN, 1])
