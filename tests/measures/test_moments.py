"""`variance` and `rms_singular_value`, on dense operators, against NumPy and the known values of random matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import helpers
import numpy as np
import pytest
import tensorflow as tf
from helpers import normal

from keras_jacmon.measures.context import MeasureContext, Measured
from keras_jacmon.measures.moments import _exact, rms_singular_value, variance
from keras_jacmon.operators.autodiff import AutodiffJacobian
from keras_jacmon.operators.formed import WrappedJacobian
from keras_jacmon.options import Options

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

OPTIONS = MeasureContext(Options(seed=0, tolerance=1e-2, max_entries=2**26))
both = pytest.mark.parametrize(
    ("measure", "reference"),
    [(variance, helpers.variance), (rms_singular_value, helpers.rms_singular_value)],
    ids=["variance", "rms_singular_value"],
)


def full(J: Any) -> tf.linalg.LinearOperatorFullMatrix:
    return tf.linalg.LinearOperatorFullMatrix(tf.convert_to_tensor(J))


def exact(measure: Callable[..., Any], J: NDArray[Any]) -> NDArray[Any]:
    measured = measure(full(J), OPTIONS)
    assert measured.uncertainty is None
    value: NDArray[Any] = measured.value.numpy()
    assert value.shape == J.shape[:1]
    return value


def orthogonal(rows: int, n: int, seed: int = 0) -> NDArray[np.float32]:
    return np.linalg.qr(normal(rows, n, n, seed=seed))[0].astype(np.float32)


@both
@pytest.mark.parametrize("n", [1, 2, 5, 32, 129])
@pytest.mark.parametrize("rows", [1, 7])
def test_equal_to_numpy(measure: Any, reference: Any, rows: int, n: int) -> None:
    J = normal(rows, n, n)
    np.testing.assert_allclose(exact(measure, J), reference(J).astype(np.float32), rtol=1e-5, atol=1e-7, strict=True)


@both
def test_equal_to_numpy_in_double_precision(measure: Any, reference: Any) -> None:
    # Seven: an eighth has no digits beyond single precision that could get lost.
    J = normal(3, 7, 7).astype(np.float64)
    np.testing.assert_allclose(exact(measure, J), reference(J), rtol=1e-12, strict=True)


@both
def test_equal_to_numpy_inside_a_graph(measure: Any, reference: Any) -> None:
    J = normal(3, 8, 8)
    value = tf.function(lambda matrix: measure(full(matrix), OPTIONS).value)(J)
    np.testing.assert_allclose(value.numpy(), reference(J).astype(np.float32), rtol=1e-5, strict=True)


@pytest.mark.fast
@both
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_equal_to_numpy_at_every_scale(measure: Any, reference: Any, scale: float) -> None:
    J = normal(3, 8, 8) * np.float32(scale)
    np.testing.assert_allclose(exact(measure, J), reference(J).astype(np.float32), rtol=1e-5, strict=True)


def test_a_large_mean_does_not_drown_the_variance() -> None:
    # E[J²] - E[J]² in float32 would lose all digits here.
    J = 10.0 + 0.01 * normal(4, 32, 32)
    np.testing.assert_allclose(exact(variance, J), helpers.variance(J).astype(np.float32), rtol=1e-4, strict=True)


def test_variance_is_blind_to_the_mean_and_rms_is_not() -> None:
    J = np.full((2, 4, 4), 0.5, np.float32)
    np.testing.assert_allclose(exact(variance, J), np.zeros(2, np.float32), atol=1e-7, strict=True)
    np.testing.assert_allclose(exact(rms_singular_value, J), np.full(2, 1.0, np.float32), rtol=1e-6, strict=True)


@pytest.mark.parametrize("n", [1, 2, 33])
def test_an_orthogonal_matrix_keeps_norms(n: int) -> None:
    for J in (orthogonal(3, n), np.tile(np.eye(n, dtype=np.float32), (3, 1, 1))):
        np.testing.assert_allclose(exact(rms_singular_value, J), np.ones(3, np.float32), rtol=1e-6, strict=True)
        mean = J.astype(np.float64).mean(axis=(1, 2))
        np.testing.assert_allclose(exact(variance, J), (1 - n * mean**2).astype(np.float32), atol=1e-6, strict=True)


@both
def test_zero_is_zero(measure: Any, reference: Any) -> None:
    J = np.zeros((2, 5, 5), np.float32)
    np.testing.assert_array_equal(exact(measure, J), reference(J).astype(np.float32), strict=True)


def test_rank_one() -> None:
    u, v = normal(3, 6, seed=1), normal(3, 6, seed=2)
    norms = np.linalg.norm(u, axis=1) * np.linalg.norm(v, axis=1) / np.sqrt(6)
    actual = exact(rms_singular_value, u[:, :, None] * v[:, None, :])
    np.testing.assert_allclose(actual, norms.astype(np.float32), rtol=1e-5, strict=True)


@both
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_does_not_disturb_the_others(measure: Any, reference: Any, bad: float) -> None:
    J = normal(4, 5, 5)
    J[1, 2, 3] = bad
    actual = exact(measure, J)
    assert not np.isfinite(actual[1])
    good = [0, 2, 3]
    np.testing.assert_allclose(actual[good], reference(J[good]).astype(np.float32), rtol=1e-5, strict=True)


# Variance, and its spread from one matrix of n x n to the next: ground_truths.md.
ENSEMBLES = {
    "gaussian": (1.0, {32: 0.044, 64: 0.022, 128: 0.010, 256: 0.005}),
    "gaussian_relu": (0.5, {32: 0.094, 64: 0.063, 128: 0.042, 256: 0.035}),
    "he_relu": (1.0, {32: 0.19, 64: 0.13, 128: 0.10, 256: 0.06}),
    # Twice the part of the units that are open, so exactly 1 / sqrt(n); the table's draws gave 0.07 for 128 and 256.
    "orthogonal_relu": (1.0, {n: 1 / np.sqrt(n) for n in (32, 64, 128, 256)}),
}


def ensemble(name: str, rows: int, n: int) -> NDArray[np.float32]:
    W = normal(rows, n, n, seed=4, scale=1 / np.sqrt(n))
    mask = (normal(rows, n, 1, seed=5) > 0).astype(np.float32)
    return {
        "gaussian": W,
        "gaussian_relu": mask * W,
        "he_relu": np.float32(np.sqrt(2)) * mask * W,
        "orthogonal_relu": np.float32(np.sqrt(2)) * mask * orthogonal(rows, n, seed=6),
    }[name]


@pytest.mark.parametrize("n", [32, 64, *(pytest.param(n, marks=pytest.mark.soak) for n in (128, 256))])
@pytest.mark.parametrize("name", ENSEMBLES)
def test_random_matrices_have_their_known_variance(name: str, n: int) -> None:
    mean, spreads = ENSEMBLES[name]
    values = exact(variance, ensemble(name, rows=100, n=n))
    assert abs(values.mean() - mean) < 4 * spreads[n] / np.sqrt(100)
    assert 0.75 * spreads[n] < values.std(ddof=1) < 1.3 * spreads[n]


# Estimates -------------------------------------------------------------------------------------------


class OneSide(tf.linalg.LinearOperatorFullMatrix):
    """Knows the products that one side asks for, and refuses the others."""

    def __init__(self, matrix: Any, *, adjoint: bool) -> None:
        super().__init__(matrix)
        self.adjoint_only = adjoint

    def _matmul(self, x: Any, adjoint: bool = False, adjoint_arg: bool = False) -> Any:  # noqa: FBT001, FBT002 - TensorFlow's own signature
        assert adjoint == self.adjoint_only
        return super()._matmul(x, adjoint=adjoint, adjoint_arg=adjoint_arg)


@pytest.mark.parametrize(("m", "n", "adjoint"), [(5, 5, True), (12, 5, False), (5, 12, True)])
def test_the_exact_value_is_taken_by_the_smaller_side(m: int, n: int, adjoint: bool) -> None:  # noqa: FBT001 - pytest passes it by name
    J = normal(3, m, n)
    mean = tf.constant(J.mean(axis=(1, 2)))
    value, _ = _exact(WrappedJacobian(OneSide(tf.constant(J), adjoint=adjoint)), mean, MeasureContext())
    np.testing.assert_allclose(value.numpy(), J.var(axis=(1, 2)) * m * n, rtol=1e-4)


@pytest.mark.parametrize("points", [2, 300, 1100])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("m", [7, 8])
def test_an_exact_value_is_the_same_however_many_vectors_are_in_a_pass(
    points: int, m: int, *, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes of one, of some and of all vectors, the last of which may be a smaller one."""
    x, W = normal(points, 9), normal(9, m, seed=1)
    widths = []
    columns = AutodiffJacobian.columns

    def watched(operator: AutodiffJacobian, vectors: tf.Tensor, *, adjoint: bool = False) -> tf.Tensor:
        widths.append(vectors.shape[0])
        return columns(operator, vectors, adjoint=adjoint)

    monkeypatch.setattr(AutodiffJacobian, "columns", watched)

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([points if known else None, 9])])
    def run(x: tf.Tensor) -> Measured:
        return variance(AutodiffJacobian(lambda x, _: tf.tanh(x @ W), x, [], m, vectorized=True), OPTIONS)

    found = run(tf.constant(x))
    J = (1 - np.tanh(x @ W) ** 2)[:, :, None] * W.T
    assert found.uncertainty is None
    np.testing.assert_allclose(found.value.numpy(), helpers.variance(J), rtol=1e-4)
    # With 300 points three at a time, and eight are not divided by three.
    assert widths == [{2: m, 300: None, 1100: 1}[points] if known else None]


def estimate(measure: Any, J: NDArray[Any], seed: int, max_entries: int = 1) -> Any:
    return measure(full(J), MeasureContext(Options(seed=seed, tolerance=1e-2, max_entries=max_entries)))


def estimates(measure: Any, J: NDArray[Any]) -> list[Any]:
    """Sixty estimates, each with random vectors of its own, by one graph."""

    @tf.function(autograph=False)
    def run(stream: Any) -> Any:
        context = MeasureContext(Options(tolerance=1e-2, max_entries=1), stream=stream)
        return tuple(measure(full(J), context))

    return [Measured(*run(tf.constant(stream))) for stream in range(60)]


@both
def test_estimates_begin_above_max_entries(measure: Any, reference: Any) -> None:
    J = normal(3, 6, 6)
    at_the_limit, above = estimate(measure, J, 0, J.size), estimate(measure, J, 0, J.size - 1)
    assert at_the_limit.uncertainty is None
    np.testing.assert_allclose(at_the_limit.value.numpy(), reference(J), rtol=1e-5)
    assert above.uncertainty.shape == above.value.shape == (3,)
    assert np.all(above.uncertainty.numpy() > 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: normal(4, 24, 24, scale=0.2),
        lambda: normal(4, 24, 24, scale=0.2) + np.float32(0.3),
        lambda: np.tile(np.diag(np.linspace(0, 2, 24)).astype(np.float32), (4, 1, 1)),
    ],
    ids=["gaussian", "with_mean", "diagonal"],
)
def test_an_estimated_variance_is_unbiased(make: Any) -> None:
    J = make()
    runs = estimates(variance, J)
    # PointBatch of one run may share their random vectors, runs do not.
    errors = np.stack([run.value.numpy() - helpers.variance(J) for run in runs])
    means = errors.mean(axis=1)
    if np.ptp(errors) > 1e-5:
        assert abs(means.mean()) < 4 * means.std(ddof=1) / np.sqrt(len(runs))
        reported = np.sqrt(np.mean([np.square(run.uncertainty.numpy()) for run in runs]))
        assert 0.6 < errors.std() / reported < 1.6
    else:
        np.testing.assert_allclose(errors, np.zeros_like(errors), atol=1e-5)


def test_an_estimated_mean_square_gain_is_unbiased() -> None:
    J = normal(4, 24, 24, scale=0.2)
    runs = estimates(rms_singular_value, J)
    errors = np.stack([np.square(run.value.numpy()) - helpers.rms_singular_value(J) ** 2 for run in runs])
    means = errors.mean(axis=1)
    assert abs(means.mean()) < 4 * means.std(ddof=1) / np.sqrt(len(runs))
    deviations = np.stack([run.value.numpy() - helpers.rms_singular_value(J) for run in runs])
    reported = np.sqrt(np.mean([np.square(run.uncertainty.numpy()) for run in runs]))
    assert 0.6 < deviations.std() / reported < 1.6


@both
def test_the_seed_decides_the_estimate(measure: Any, reference: Any) -> None:
    J = normal(3, 24, 24)
    first, again, other = (estimate(measure, J, seed).value.numpy() for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again, strict=True)
    assert np.all(first != other)
    np.testing.assert_allclose(first, reference(J), rtol=0.9)


@both
def test_a_bad_row_does_not_disturb_the_other_estimates(measure: Any, reference: Any) -> None:
    J = normal(3, 24, 24)
    clean = estimate(measure, J, 1).value.numpy()
    J[1, 0, 0] = np.nan
    actual = estimate(measure, J, 1).value.numpy()
    assert np.isnan(actual[1])
    np.testing.assert_allclose(actual[[0, 2]], clean[[0, 2]], rtol=1e-6, strict=True)
    assert np.isnan(reference(J)[1])
