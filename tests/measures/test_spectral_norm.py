"""`spectral_norms`, on dense operators, against LAPACK and the known values of random matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import helpers
import numpy as np
import pytest
import tensorflow as tf
from helpers import normal

from keras_jacmon.measures.context import MeasureContext, Measured
from keras_jacmon.measures.spectral_norm import (
    EXACT_SIZE,
    LEAST_STEPS,
    _orthogonal,
    leading_singular_vectors,
    spectral_norms,
)
from keras_jacmon.operators.contract import JacobianOperator
from keras_jacmon.options import Options

if TYPE_CHECKING:
    from numpy.typing import NDArray


def norm_of(operator: tf.linalg.LinearOperator, context: MeasureContext) -> Measured:
    """The spectral norm of a single operator."""
    (norm,) = spectral_norms([operator], context)
    return norm


def measured(J: NDArray[Any], tolerance: float = 1e-2, seed: int = 0) -> NDArray[Any]:
    """The iterated value, the exact one of small matrices being held to be exact.

    The residual is held to be one: some singular value is as near to the value as it says.
    """
    operator = tf.linalg.LinearOperatorFullMatrix(tf.convert_to_tensor(J))
    context = MeasureContext(Options(seed=seed, tolerance=tolerance, max_entries=2**26))
    exact, (value, residual, _) = norm_of(operator, context), leading_singular_vectors(operator, context)
    value, residual = value.numpy(), residual.numpy()
    assert value.shape == residual.shape == exact.value.shape == J.shape[:1]
    finite = np.isfinite(value)
    spectrum = np.linalg.svd(J[finite].astype(np.float64), compute_uv=False)
    distance = np.min(np.abs(spectrum - value[finite, None]), axis=1)
    assert np.all(distance <= residual[finite] + 2e-5 * spectrum[:, 0])
    assert np.all(residual[finite] <= (tolerance + 2e-5) * value[finite])
    if J.shape[-1] <= EXACT_SIZE:
        assert exact.uncertainty is None
        np.testing.assert_array_equal(np.isfinite(exact.value), finite)
        np.testing.assert_allclose(exact.value.numpy()[finite], spectrum[:, 0], rtol=1e-5)
    else:
        np.testing.assert_array_equal(exact.value, value)
    return value


def diagonal(*values: float) -> NDArray[np.float32]:
    return np.diag(values).astype(np.float32)[None]


def orthogonal(rows: int, n: int, seed: int = 0) -> NDArray[np.float32]:
    return np.linalg.qr(normal(rows, n, n, seed=seed))[0].astype(np.float32)


@pytest.mark.parametrize("n", [1, 2, 5, 32, 129])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-4])
def test_equal_to_lapack_within_the_tolerance(n: int, tolerance: float) -> None:
    J = normal(7, n, n, scale=1 / np.sqrt(n))
    np.testing.assert_allclose(measured(J, tolerance), helpers.spectral_norm(J), rtol=tolerance + 1e-5)


@pytest.mark.parametrize(("m", "n"), [(24, 24), (2, 32), (90, 7)])
def test_the_norm_of_small_matrices_is_exact(m: int, n: int) -> None:
    J = normal(50, m, n)
    value = norm_of(tf.linalg.LinearOperatorFullMatrix(J), MeasureContext()).value
    np.testing.assert_allclose(value, helpers.spectral_norm(J), rtol=1e-5)


def test_nearly_every_row_is_within_the_tolerance() -> None:
    # A start vector that is almost orthogonal to the leading one may lead to another singular value: rarely, and then
    # to one that is nearly as large.
    J = normal(1000, 64, 64)
    error = 1 - measured(J) / helpers.spectral_norm(J)
    assert np.mean(error > 1e-2) <= 5e-3
    assert error.max() < 0.05


def test_a_row_alone_is_as_exact_as_a_row_among_others() -> None:
    # PointBatch that have converged are left out of the further steps.
    J = normal(20, 64, 64)
    context = MeasureContext(Options(tolerance=1e-2, max_entries=2**26))
    graph = tf.function(lambda J: leading_singular_vectors(tf.linalg.LinearOperatorFullMatrix(J), context).value)
    alone = np.concatenate([graph(J[row : row + 1]) for row in range(len(J))])
    np.testing.assert_allclose(alone, helpers.spectral_norm(J), rtol=1e-2)


@pytest.mark.parametrize("n", [4, 8, 16])
def test_small_matrices_are_as_exact_as_large_ones(n: int) -> None:
    J = normal(300, n, n)
    options = Options(tolerance=1e-2, max_entries=2**26)
    graph = tf.function(
        lambda J, stream: norm_of(tf.linalg.LinearOperatorFullMatrix(J), MeasureContext(options, stream=stream)).value
    )
    alone = np.concatenate([graph(J[row : row + 1], tf.constant(row % 7)).numpy() for row in range(len(J))])
    np.testing.assert_allclose(alone, helpers.spectral_norm(J), rtol=1e-2)


def test_the_seed_decides_the_value() -> None:
    J = normal(3, 64, 64)
    np.testing.assert_array_equal(measured(J, seed=1), measured(J, seed=1), strict=True)


def test_equal_to_lapack_inside_a_graph() -> None:
    J = normal(4, 16, 16)

    @tf.function(input_signature=[tf.TensorSpec((None, 16, 16))])
    def graph(matrix: Any) -> Any:
        operator = tf.linalg.LinearOperatorFullMatrix(matrix)
        return norm_of(operator, MeasureContext(Options(seed=0, tolerance=1e-2, max_entries=2**26))).value

    np.testing.assert_allclose(graph(J).numpy(), helpers.spectral_norm(J), rtol=1e-2)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_equal_to_lapack_at_every_scale(scale: float) -> None:
    J = normal(4, 16, 16) * np.float32(scale)
    np.testing.assert_allclose(measured(J), helpers.spectral_norm(J), rtol=1e-2)


@pytest.mark.parametrize("n", [1, 2, 33])
def test_an_orthogonal_matrix_has_norm_one(n: int) -> None:
    np.testing.assert_allclose(measured(orthogonal(3, n)), np.ones(3, np.float32), rtol=1e-5, strict=True)
    identity = np.tile(np.eye(n, dtype=np.float32), (3, 1, 1))
    np.testing.assert_allclose(measured(identity), np.ones(3, np.float32), rtol=1e-5, strict=True)


def test_zero_is_zero() -> None:
    np.testing.assert_array_equal(measured(np.zeros((2, 5, 5), np.float32)), np.zeros(2, np.float32), strict=True)


def test_rank_one() -> None:
    u, v = normal(3, 6, seed=1), normal(3, 6, seed=2)
    expected = np.linalg.norm(u, axis=1) * np.linalg.norm(v, axis=1)
    actual = measured(u[:, :, None] * v[:, None, :])
    np.testing.assert_allclose(actual, expected.astype(np.float32), rtol=1e-5, strict=True)


def test_singular_vectors_that_a_start_with_ones_would_miss() -> None:
    v = np.array([1.0, -1.0, 1.0, -1.0], np.float32) / 2
    J = (3 * np.outer(v, v) + 0.5 * np.outer(np.abs(v), np.abs(v)))[None].astype(np.float32)
    np.testing.assert_allclose(measured(J), np.array([3.0], np.float32), rtol=1e-2, strict=True)


@pytest.mark.parametrize(
    ("J", "expected"),
    [
        (diagonal(2, 2, 2, 1), 2.0),
        (diagonal(2, 1.999, 1.998, 1, 0.5, 0), 2.0),
        (diagonal(*[1.0] * 30, 1.5, 1.5), 1.5),
        (diagonal(0, 0, 0, 5), 5.0),
        (diagonal(-3, 1, 2), 3.0),
        (diagonal(1e-3, 1e3), 1e3),
        (np.eye(6, k=1, dtype=np.float32)[None], 1.0),
        (np.triu(np.ones((1, 2, 2), np.float32)), (1 + np.sqrt(5)) / 2),
    ],
    ids=["repeated", "clustered", "two_above_a_bulk", "one_direction", "negative", "wide", "nilpotent", "shear"],
)
def test_spectra_that_are_hard_to_iterate(J: NDArray[np.float32], expected: float) -> None:
    np.testing.assert_allclose(measured(J), np.array([expected], np.float32), rtol=1e-2, strict=True)


def test_rows_of_different_kinds_at_once() -> None:
    J = np.concatenate(
        [normal(1, 5, 5), np.zeros((1, 5, 5), np.float32), diagonal(1, 1, 1, 1, 1), diagonal(9, 0, 0, 0, 0)]
    )
    np.testing.assert_allclose(measured(J), helpers.spectral_norm(J), rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_does_not_disturb_the_others(bad: float) -> None:
    J = normal(4, 12, 12)
    J[1, 2, 3] = bad
    actual = measured(J)
    assert not np.isfinite(actual[1])
    good = [0, 2, 3]
    np.testing.assert_allclose(actual[good], helpers.spectral_norm(J[good]), rtol=1e-2)


def test_all_rows_bad() -> None:
    assert np.isnan(measured(np.full((2, 5, 5), np.nan, np.float32))).all()


class Counted(JacobianOperator):
    """Matrices that count at how many points each product is taken."""

    def __init__(self, matrix: Any, counts: list[int]) -> None:
        super().__init__(dtype=matrix.dtype, parameters={"matrix": matrix, "counts": counts})
        self.matrix, self.counts = matrix, counts

    def _shape(self) -> Any:
        return self.matrix.shape

    def _shape_tensor(self) -> Any:
        return tf.shape(self.matrix)

    def take(self, points: Any) -> Counted:
        return Counted(points.of(self.matrix), self.counts)

    def _matmul(self, x: Any, adjoint: bool = False, adjoint_arg: bool = False) -> Any:  # noqa: FBT001, FBT002 - TensorFlow's own signature
        return tf.matmul(self.matrix, x, adjoint_a=adjoint, adjoint_b=adjoint_arg)

    def _matvec(self, x: Any, adjoint: bool = False) -> Any:  # noqa: FBT001, FBT002 - TensorFlow's own signature
        self.counts.append(int(x.shape[0]))
        return tf.linalg.matvec(self.matrix, x, adjoint_a=adjoint)


def test_rows_that_have_converged_cost_nothing_more() -> None:
    # One direction that leads by far, and in row 17 none.
    J = np.tile(np.diag([2.0, *np.linspace(0, 0.1, 63)]).astype(np.float32), (40, 1, 1))
    J[17] = normal(64, 64)
    operator = Counted(tf.constant(J), [])
    value = norm_of(operator, MeasureContext(Options(tolerance=1e-4))).value.numpy()
    np.testing.assert_allclose(value, helpers.spectral_norm(J), rtol=1e-4)
    # A step takes a product with J and one with Jᵀ.
    least = 2 * LEAST_STEPS
    assert operator.counts[:least] == [40] * least
    assert set(operator.counts[least:]) == {1}


def test_the_leading_singular_vectors_come_with_the_norm() -> None:
    J = normal(3, 12, 12)
    J[1, 2, 3] = np.nan
    value, _, vectors = leading_singular_vectors(tf.linalg.LinearOperatorFullMatrix(J), MeasureContext())
    lengths = np.linalg.norm(np.einsum("rik,rk->ri", J, vectors), axis=-1)
    np.testing.assert_allclose(lengths[::2], value.numpy()[::2], rtol=1e-2)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), [1, 0, 1], atol=1e-5)


def test_reorthogonalised_to_rounding_also_where_little_is_left() -> None:
    basis = orthogonal(4, 32)[:, :20]
    vectors = np.einsum("rkn,rk->rn", basis, normal(4, 20)) + 1e-5 * normal(4, 32, seed=2)
    cleaned = _orthogonal(tf.constant(vectors), tf.constant(basis)).numpy()
    common = np.einsum("rkn,rn->rk", basis, cleaned)
    assert np.abs(common).max() < 1e-6 * np.linalg.norm(cleaned, axis=1).min()
    expected = 1e-5 * normal(4, 32, seed=2)
    expected = expected - np.einsum("rkn,rk->rn", basis, np.einsum("rkn,rn->rk", basis, expected))
    np.testing.assert_allclose(cleaned, expected, atol=1e-6)


# So many draws made the table.
TABLE_DRAWS = {32: 300, 64: 200, 128: 100, 256: 30}


@pytest.mark.parametrize(
    ("n", "mean", "spread"),
    [
        (32, 1.909, 0.083),
        (64, 1.944, 0.051),
        pytest.param(128, 1.964, 0.032, marks=pytest.mark.soak),
        pytest.param(256, 1.977, 0.020, marks=pytest.mark.soak),
    ],
)
def test_gaussian_matrices_have_their_known_norm(n: int, mean: float, spread: float) -> None:
    values = measured(normal(60, n, n, scale=1 / np.sqrt(n)), tolerance=1e-3)
    assert abs(values.mean() - mean) < 4 * spread * np.sqrt(1 / 60 + 1 / TABLE_DRAWS[n])


@pytest.mark.parametrize(
    ("s", "n", "mean"),
    [
        (1, 32, 1.591), (1, 64, 1.650), (2, 32, 2.255), (2, 64, 2.327),
        pytest.param(1, 128, 1.668, marks=pytest.mark.soak), pytest.param(2, 128, 2.354, marks=pytest.mark.soak),
        pytest.param(1, 256, 1.685, marks=pytest.mark.soak), pytest.param(2, 256, 2.397, marks=pytest.mark.soak),
    ],
)  # fmt: skip
def test_masked_matrices_have_their_known_norm(s: int, n: int, mean: float) -> None:
    # Of variance s/n, Glorot and He, behind the mask of a ReLU.
    mask = (normal(60, n, 1, seed=5) > 0).astype(np.float32)
    values = measured(mask * normal(60, n, n, seed=s, scale=np.sqrt(s / n)), tolerance=1e-3)
    # The table gives no spread for it; that of 60 draws is known from the draws themselves.
    assert abs(values.mean() - mean) < 4 * values.std(ddof=1) * np.sqrt(1 / 60 + 1 / TABLE_DRAWS[n])


def test_masked_orthogonal_matrices_have_norm_root_two() -> None:
    mask = (normal(10, 64, 1, seed=5) > 0).astype(np.float32)
    actual = measured(np.float32(np.sqrt(2)) * mask * orthogonal(10, 64))
    np.testing.assert_allclose(actual, np.full(10, np.sqrt(2), np.float32), rtol=1e-4, strict=True)
