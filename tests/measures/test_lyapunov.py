"""Lyapunov exponents, against exact and published values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import normal, randomize, reference_jacobians
from sequences import MapCell, built, in_graph, of_cell, of_matrices, pieces, rotations

from keras_jacmon.measures.lyapunov import (
    kaplan_yorke,
    lyapunov_exponents,
    lyapunov_segment,
    start_lyapunov,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from keras_jacmon.measures.steps import Steps

NAN, INF = math.nan, math.inf
# Some cells are measured by autodiff in the default tier: the exponents do not know where their matrices come from.
both = pytest.mark.parametrize(
    "structured", [True, pytest.param(False, marks=pytest.mark.soak)], ids=["structure", "autodiff"]
)


def exponents(steps: Steps, k: int | None = None, *, warmup: int = 0, qr_every: int = 1, seed: int = 0) -> tf.Tensor:
    carry = start_lyapunov(steps.samples, steps.size, k or steps.size, (seed, 1), steps.dtype)
    return lyapunov_exponents(lyapunov_segment(steps, carry, warmup=warmup, qr_every=qr_every), warmup=warmup)


def run(J: Any, mask: Any = None, **kwargs: Any) -> NDArray[np.float64]:
    found: NDArray[np.float64] = in_graph(lambda: exponents(of_matrices(J, mask), **kwargs))
    return found


def of_map(function: Callable[[Any, Any], Any], start: Any, time: int, *, structured: bool) -> Steps:
    """Steps of a map that has no inputs, from given states `(samples, n)`."""
    return of_cell(MapCell(function, start), np.zeros((time, len(start), 1)), structured=structured)


def repeated(J: Any, time: int) -> NDArray[np.float64]:
    """The same step again and again, in one sample."""
    return np.tile(np.asarray(J, np.float64), (time, 1, 1, 1))


def assert_mean(values: NDArray[np.float64], expected: float, atol: float) -> None:
    """Holds the mean over samples, which its own spread must not leave in doubt."""
    assert 3 * values.std(ddof=1) / math.sqrt(values.size) < atol
    assert abs(values.mean() - expected) < atol


# Exact values ----------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    ("initializer", "structured"), [("identity", True), ("orthogonal", False)], ids=["structure", "autodiff"]
)
def test_a_linear_orthogonal_rnn_has_exponents_zero(initializer: str, structured: bool) -> None:  # noqa: FBT001 - a parameter of the test
    cell = built(keras.layers.SimpleRNNCell(6, activation="linear", recurrent_initializer=initializer), 2)
    found = in_graph(lambda: exponents(of_cell(cell, normal(20, 3, 2), structured=structured)))
    np.testing.assert_allclose(found, np.zeros((6, 3), np.float32), atol=1e-6, strict=True)


@pytest.mark.parametrize(
    ("bias", "expected", "structured"),
    [(1.0, -0.313262, True), (5.0, -0.006715, False)],
    ids=["structure", "autodiff"],
)
def test_a_gru_without_recurrent_kernel_forgets_by_its_update_gate(
    bias: float,
    expected: float,
    structured: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    cell = built(keras.layers.GRUCell(4, recurrent_initializer="zeros", kernel_initializer="zeros"), 2)
    cell.bias.assign(np.repeat([[bias, 0.0, 0.0], [0.0, 0.0, 0.0]], 4, axis=1))
    found = in_graph(lambda: exponents(of_cell(cell, normal(20, 2, 2), structured=structured)))
    np.testing.assert_allclose(found, np.full((4, 2), expected, np.float32), atol=2e-6, strict=True)


@pytest.mark.parametrize(
    ("bias", "expected", "structured"),
    [(1.0, -0.313262, True), (5.0, -0.006715, False)],
    ids=["structure", "autodiff"],
)
def test_an_lstm_without_recurrent_kernel_forgets_by_its_forget_gate(
    bias: float,
    expected: float,
    structured: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    cell = built(keras.layers.LSTMCell(3, recurrent_initializer="zeros", kernel_initializer="zeros"), 2)
    cell.bias.assign(np.repeat([0.0, bias, 0.0, 0.0], 3))
    found = in_graph(lambda: exponents(of_cell(cell, normal(20, 2, 2), structured=structured), warmup=2))
    # Nothing depends on h: three directions are gone for good.
    np.testing.assert_allclose(found, [[expected] * 2] * 3 + [[-INF] * 2] * 3, atol=2e-6)


@both
def test_the_fixed_point_of_a_scalar_map(structured: bool) -> None:  # noqa: FBT001 - a parameter of the test
    # h' = tanh(2 h) -> 0.957504.
    cell = built(keras.layers.SimpleRNNCell(1, recurrent_initializer=keras.initializers.Constant(2.0)), 1)
    cell.kernel.assign([[1.0]])
    inputs = np.zeros((60, 1, 1), np.float32)
    inputs[0] = 1.0
    found = in_graph(lambda: exponents(of_cell(cell, inputs, structured=structured), warmup=30))
    np.testing.assert_allclose(found, [[-1.793529]], atol=1e-5)


@both
def test_the_logistic_map(structured: bool) -> None:  # noqa: FBT001 - a parameter of the test
    start = np.random.default_rng(0).uniform(size=(100, 1))
    found = in_graph(
        lambda: exponents(of_map(lambda _, h: 4 * h * (1 - h), start, 600, structured=structured), warmup=100)
    )
    assert_mean(found, math.log(2), 2e-3)


@pytest.mark.fast
@pytest.mark.parametrize(("qr_every", "structured"), [(1, True), (7, False)], ids=["structure", "autodiff"])
def test_the_cat_map(qr_every: int, structured: bool) -> None:  # noqa: FBT001 - a parameter of the test
    start, A = np.random.default_rng(0).uniform(size=(2, 2)), np.array([[2.0, 1.0], [1.0, 1.0]])

    def cat(_: Any, h: Any) -> Any:
        return tf.math.floormod(h @ A, tf.constant(1.0, h.dtype))

    found = in_graph(lambda: exponents(of_map(cat, start, 200, structured=structured), warmup=20, qr_every=qr_every))
    np.testing.assert_allclose(found, [[0.962424] * 2, [-0.962424] * 2], atol=1e-6)


@both
def test_the_henon_map(structured: bool) -> None:  # noqa: FBT001 - a parameter of the test
    # x' = 1 - 1.4 x² + y, y' = 0.3 x.
    start = np.random.default_rng(0).uniform(-0.1, 0.1, (500, 2))
    of_squares, of_states = np.array([[-1.4, 0.0], [0.0, 0.0]]), np.array([[0.0, 0.3], [1.0, 0.0]])

    def henon(_: Any, h: Any) -> Any:
        return np.array([1.0, 0.0]) + (h * h) @ of_squares + h @ of_states

    found = in_graph(lambda: exponents(of_map(henon, start, 500, structured=structured), warmup=100))
    assert_mean(found[0], 0.4192, 3e-3)
    assert_mean(found[1], -1.6231, 3e-3)
    np.testing.assert_allclose(found.sum(axis=0), np.full(500, math.log(0.3)), rtol=1e-10)


@both
def test_a_diagonal_map(structured: bool) -> None:  # noqa: FBT001 - a parameter of the test
    w = np.array([1.5, -1.1, 0.9, 0.4, -0.2], np.float32)
    cell = built(keras.layers.SimpleRNNCell(5, activation="linear"), 2)
    cell.recurrent_kernel.assign(np.diag(w))
    found = in_graph(lambda: exponents(of_cell(cell, normal(300, 2, 2), structured=structured), warmup=150))
    np.testing.assert_allclose(found, np.log(np.abs(w))[:, None] * np.ones((1, 2)), atol=1e-5)


@pytest.mark.parametrize("qr_every", [1, 3])
def test_all_exponents_together_are_the_mean_log_determinant(qr_every: int) -> None:
    J = normal(40, 3, 6, 6).astype(np.float64)
    found = run(J, qr_every=qr_every).sum(axis=0)
    np.testing.assert_allclose(found, np.linalg.slogdet(J)[1].mean(axis=0), rtol=1e-9, strict=True)


@both
def test_all_exponents_of_a_cell_together_are_the_mean_log_determinant(structured: bool) -> None:  # noqa: FBT001 - a parameter of the test
    layer, probe = keras.layers.GRU(3), normal(2, 12, 2)
    layer(probe)
    randomize(layer)
    J = reference_jacobians(layer, probe)["hidden"]
    found = in_graph(lambda: exponents(of_cell(layer.cell, probe.transpose(1, 0, 2), structured=structured)))
    expected = np.linalg.slogdet(J.astype(np.float64))[1].mean(axis=0)
    np.testing.assert_allclose(found.sum(axis=0), expected, rtol=1e-4)


@both
def test_a_periodic_product_has_the_exponents_of_its_eigenvalues(structured: bool) -> None:  # noqa: FBT001 - a parameter of the test
    # Transposed, the product of one period would be that of the other order, with other eigenvalues.
    A, B, C = normal(3, 4, 4, seed=5).astype(np.float64)
    expected, wrong = (np.sort(np.log(np.abs(np.linalg.eigvals(P))))[::-1] / 3 for P in (C @ B @ A, A @ B @ C))
    assert np.all(np.diff(expected) < -0.05)
    assert np.abs(expected - wrong).max() > 0.1
    # The cell multiplies from the right; its inputs say whose turn it is.
    kernels = [A.T, B.T, C.T]
    cell = MapCell(lambda x, h: tf.add_n([x[:, k : k + 1] * (h @ W) for k, W in enumerate(kernels)]), np.zeros((1, 4)))
    turns = np.tile(np.eye(3), (400, 1))[:, None]
    found = in_graph(lambda: exponents(of_cell(cell, turns, structured=structured), warmup=300))
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-8)


# Random matrices and networks ------------------------------------------------------------------------------------


def newmans_z(means: NDArray[np.float64], s: float, steps: int) -> NDArray[np.float64]:
    """How far the exponents of products of Gaussian matrices, `(n, samples)`, are from Newman's, in their spreads.

    Args:
        means: Of each sample, over some steps.
        s: Entries are of variance s²/n.
        steps: How many.
    """
    n, samples = means.shape
    half = (n - np.arange(n)) / 2
    expected = math.log(s) + 0.5 * (math.log(2 / n) + tf.math.digamma(half).numpy())
    variance = tf.math.polygamma(np.ones(n), half).numpy() / (4 * steps * samples)
    return np.asarray((means.mean(axis=1) - expected) / np.sqrt(variance))


@pytest.mark.parametrize("qr_every", [1, 2])
def test_products_of_gaussian_matrices_obey_newmans_law(qr_every: int) -> None:
    n, s, time, warmup, samples = 16, 1.2, 120, 20, 20
    J = normal(time, samples, n, n, scale=s / math.sqrt(n))
    found = run(J, warmup=warmup, qr_every=qr_every).astype(np.float64)
    assert np.all(np.abs(newmans_z(found, s, time - warmup)) < 4)


@both
def test_a_cell_of_gaussian_kernels_obeys_newmans_law(structured: bool) -> None:  # noqa: FBT001 - a parameter of the test
    # A kernel of its own for each step, chosen by the inputs. Gaussian matrices know no direction: there is no warm-up.
    n, s, time = 16, 1.2, 400
    kernels = normal(n, time * n, scale=s / math.sqrt(n))
    summing = np.tile(np.eye(n, dtype=np.float32), (time, 1))

    def chosen(x: Any, h: Any) -> Any:
        return tf.reshape(x[:, :, None] * tf.reshape(h @ kernels, [-1, time, n]), [-1, time * n]) @ summing

    cell, turns = MapCell(chosen, np.zeros((1, n), np.float32)), np.eye(time, dtype=np.float32)[:, None]
    found = in_graph(lambda: exponents(of_cell(cell, turns, structured=structured)))
    assert np.all(np.abs(newmans_z(found.astype(np.float64), s, time)) < 4)


# By gain and noise: all of the table.
TANH_NETWORKS = {
    (2.0, 0.0): 0.1547,
    (3.0, 0.0): 0.3102,
    (4.0, 0.0): 0.4329,
    (5.0, 0.0): 0.5324,
    (10.0, 0.0): 0.8564,
    (1.0, 1.0): -0.4595,
    (1.5, 1.0): -0.1418,
    (2.0, 1.0): 0.0460,
}


@both
def test_random_tanh_networks_have_the_exponents_of_mean_field_theory(structured: bool) -> None:  # noqa: FBT001 - a parameter of the test
    # One cell: each sample is a network, with a gain, and noise, that it is given at each step.
    n, time, warmup = 512, 400, 100
    gains, noises = np.array(list(TANH_NETWORKS), np.float32).T
    rng = np.random.default_rng(1)
    W = (rng.standard_normal((n, n)) / math.sqrt(n)).astype(np.float32)
    start, noise = (rng.standard_normal((*shape, len(gains), n)).astype(np.float32) for shape in ((), (time,)))
    inputs = np.concatenate([np.tile(gains[:, None], (time, 1, 1)), noises[:, None] * noise], axis=-1)
    cell = MapCell(lambda x, h: x[:, :1] * (tf.tanh(h) @ W) + x[:, 1:], start)
    found = in_graph(lambda: exponents(of_cell(cell, inputs, structured=structured), 1, warmup=warmup))
    np.testing.assert_allclose(found[0], list(TANH_NETWORKS.values()), rtol=0, atol=0.03)


# Rounding and range ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [5.0, 0.2])
def test_ten_thousand_steps_neither_overflow_nor_underflow(gain: float) -> None:
    J = tf.constant(gain * rotations(1, 2), tf.float32)
    template = of_matrices(J[None])
    steps = type(template)(10_000, lambda _: template.at(0), None, 1, 2, tf.float32)
    found = in_graph(lambda: exponents(steps, qr_every=5))
    np.testing.assert_allclose(found, np.full((2, 1), math.log(gain)), rtol=1e-6)


@pytest.mark.parametrize("gain", [1e30, 1e-30])
def test_a_single_step_may_be_as_large_or_small_as_a_float(gain: float) -> None:
    J = (gain * rotations(8, 3)).astype(np.float32).reshape(4, 2, 3, 3)
    np.testing.assert_allclose(run(J), np.full((3, 2), math.log(gain)), rtol=1e-6)


def test_exponents_far_apart_are_told_apart() -> None:
    found = run(repeated([np.diag([1.0, 1e-3, 1e-5])], 40).astype(np.float32), warmup=20)
    np.testing.assert_allclose(found[:, 0], np.log([1.0, 1e-3, 1e-5]), atol=1e-4)


def test_directions_that_are_lost_are_minus_infinity_and_the_others_as_without_them() -> None:
    rng = np.random.default_rng(0)
    # Rank 3 of 5: what is left are the products of the inner 3 x 3 matrices.
    left, right = rng.standard_normal((2, 300, 2, 5, 3))
    J = left @ right.swapaxes(-1, -2)
    inner = right[1:].swapaxes(-1, -2) @ left[:-1]
    found = run(J, warmup=50)
    assert np.all(found[3:] == -INF)
    np.testing.assert_allclose(found[:3], run(inner, warmup=49), atol=0.02)
    np.testing.assert_allclose(found[:3], run(J, k=3, warmup=50), atol=1e-6)
    # Also in float32, and with steps in between two QRs.
    np.testing.assert_allclose(run(J.astype(np.float32), warmup=50, qr_every=3), found, atol=2e-3)


def test_a_single_step_that_loses_a_direction_loses_it_for_good() -> None:
    J = normal(20, 2, 4, 4).astype(np.float64)
    clean = run(J)
    J[7, 1, 2] = 0
    found = run(J)
    np.testing.assert_array_equal(np.isneginf(found), [[False, False]] * 3 + [[False, True]])
    np.testing.assert_array_equal(found[:, 0], clean[:, 0])


def test_zero_is_minus_infinity() -> None:
    np.testing.assert_array_equal(run(np.zeros((5, 2, 3, 3), np.float32)), np.full((3, 2), -INF, np.float32))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_sample_does_not_disturb_the_others(bad: float) -> None:
    J = normal(9, 3, 4, 4)
    clean = run(J)
    J[4, 1, 2, 3] = bad
    found = run(J)
    assert np.isnan(found[:, 1]).all()
    np.testing.assert_array_equal(found[:, [0, 2]], clean[:, [0, 2]])


# Warm-up, masks, segments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 5])
def test_how_often_a_qr_is_taken_changes_nothing_but_rounding(k: int) -> None:
    J = normal(14, 3, 5, 5).astype(np.float64)
    reference = run(J, k=k, warmup=3)
    for qr_every in (2, 4, 100):
        np.testing.assert_allclose(run(J, k=k, warmup=3, qr_every=qr_every), reference, rtol=1e-4, atol=1e-6)


def test_the_warm_up_does_not_count() -> None:
    J = np.concatenate([repeated([np.diag([7.0, 6.0])], 10), repeated([np.diag([2.0, 0.5])], 50)])
    for qr_every in (1, 4):
        found = run(J, warmup=40, qr_every=qr_every)
        np.testing.assert_allclose(found[:, 0], np.log([2, 0.5]), atol=1e-6)
    assert np.isnan(run(J, warmup=60)).all()
    assert np.isfinite(run(J, warmup=59)).all()


MASK = np.array([[1] * 12, [1] * 7 + [0] * 5, [0] * 3 + [1] * 9, [1, 0, 0, 1] * 3, [0] * 12], bool).T


@pytest.mark.parametrize("qr_every", [1, 3])
def test_skipped_steps_do_not_count(qr_every: int) -> None:
    J = normal(12, 5, 4, 4).astype(np.float64)
    found = run(np.where(MASK[..., None, None], J, NAN), MASK, warmup=2, qr_every=qr_every)
    for sample in range(4):
        kept = MASK[:, sample]
        # The columns of all samples start as those of the whole.
        np.testing.assert_allclose(found[:, sample], run(J[kept], warmup=2)[:, sample], rtol=1e-4, atol=1e-6)
    assert np.isnan(found[:, 4]).all()


def test_skipped_steps_leave_no_rounding_behind() -> None:
    J = normal(400, 2, 4, 4)
    mask = np.zeros((400, 2), bool)
    mask[:5] = True
    np.testing.assert_array_equal(run(J, mask), run(J[:5]), strict=True)


@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
@pytest.mark.parametrize("length", [1, 5, 12])
@pytest.mark.parametrize("qr_every", [1, 3])
def test_segments_give_what_the_whole_gives(qr_every: int, length: int, mask: Any) -> None:
    steps = of_matrices(normal(12, 5, 4, 4), mask)
    carry = start_lyapunov(5, 4, 3, (0, 1), tf.float32)
    for piece in pieces(steps, length):
        carry = lyapunov_segment(piece, carry, warmup=2, qr_every=qr_every)
    whole = exponents(steps, 3, warmup=2, qr_every=qr_every)
    np.testing.assert_array_equal(lyapunov_exponents(carry, warmup=2), whole, strict=True)


def test_the_seed_decides_where_it_starts() -> None:
    J = normal(4, 3, 8, 8)
    first, again, other = (run(J, k=2, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again, strict=True)
    assert np.all(first != other)


def test_shapes_may_be_unknown() -> None:
    J = normal(12, 5, 4, 4)

    @tf.function(input_signature=[tf.TensorSpec((None, None, 4, 4)), tf.TensorSpec((None, None), tf.bool)])
    def graph(J: Any, mask: Any) -> Any:
        steps = of_matrices(J)
        masked = type(steps)(steps.time, steps.at, mask, steps.samples, 4, J.dtype)
        return exponents(masked, 2, warmup=1, qr_every=2)

    np.testing.assert_allclose(graph(J, MASK), run(J, MASK, k=2, warmup=1, qr_every=2), rtol=1e-5)


@pytest.mark.parametrize("k", [0, 5])
def test_there_are_as_many_exponents_as_units(k: int) -> None:
    message = rf"^Invalid value for argument `k`\. Expected 1 to 4, the number of units\. Received: k={k}$"
    with pytest.raises(ValueError, match=message):
        start_lyapunov(2, 4, k, (0, 1), tf.float32)


# Kaplan-Yorke dimension ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "size", "expected"),
    [
        ([0.4192, -1.6231], 2, 1.2583),
        ([0.9056, 0.0, -14.5723], 3, 2.0621),
        ([-14.5723, 0.9056, 0.0], 3, 2.0621),
        ([0.9056, 0.0, -14.5723], 9, 2.0621),
        ([-0.1, -0.2], 2, 0.0),
        ([0.5, -0.2], 2, 2.0),
        ([0.5, -0.2], 3, NAN),
        ([0.5, -INF], 2, 1.0),
        ([-INF, -INF], 2, 0.0),
        ([0.5, NAN], 2, NAN),
    ],
)
def test_the_kaplan_yorke_dimension(values: list[float], size: int, expected: float) -> None:
    # Two samples, so that each is read by itself: Hénon 1.2583, Lorenz 2.0621.
    both = np.stack([values, -np.ones(len(values))], axis=1)
    np.testing.assert_allclose(kaplan_yorke(both, size), [expected, 0.0], atol=1e-4)
