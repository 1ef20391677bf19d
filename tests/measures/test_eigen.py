"""Eigenvalues, against LAPACK, exact identities and the known values of random matrices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import normal, soak_but, step_jacobians
from sequences import built, in_graph, of_cell, rotations

from keras_jacmon.measures import eigen
from keras_jacmon.measures.arnoldi import arnoldi_radius
from keras_jacmon.measures.context import MeasureContext
from keras_jacmon.measures.differentiable import Directions
from keras_jacmon.measures.differentiable import spectral_radius as differentiable_radius
from keras_jacmon.measures.eigen import eigenvalues, spectral_radius
from keras_jacmon.measures.singular_values import condition_number, singular_values
from keras_jacmon.options import Options

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

NAN, INF = math.nan, math.inf
# Where eigenvalues begin to be iterated for.
LARGE = eigen.EXACT_SIZE + 1
# By autodiff in the default tier: a large network. The eigenvalues do not know where their matrices come from.
both = pytest.mark.parametrize(
    "structured", [True, pytest.param(False, marks=pytest.mark.soak)], ids=["structure", "autodiff"]
)


def full(J: Any) -> tf.linalg.LinearOperatorFullMatrix:
    return tf.linalg.LinearOperatorFullMatrix(tf.convert_to_tensor(J))


def radius(J: NDArray[Any], tolerance: float = 1e-2, seed: int = 0) -> NDArray[Any]:
    measured = in_graph(lambda: spectral_radius(full(J), MeasureContext(Options(seed=seed, tolerance=tolerance))))
    assert (measured.uncertainty is None) == (J.shape[-1] < LARGE)
    value: NDArray[Any] = measured.value
    assert value.shape == J.shape[:1]
    assert value.dtype == J.dtype
    return value


def iterated(J: NDArray[Any], tolerance: float = 1e-2, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """The way of large matrices, and its residual, for matrices of any size."""
    measured = in_graph(lambda: tuple(arnoldi_radius(full(J), MeasureContext(Options(seed=seed, tolerance=tolerance)))))
    return measured[0], measured[1]


def lapack_radius(J: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(np.abs(np.linalg.eigvals(J.astype(np.float64))).max(axis=-1))


def lstm_like(rows: int, units: int, seed: int = 0) -> NDArray[np.float32]:
    """The joint view of an LSTM at the origin: [[U/4, f/2], [U/2, f]]."""
    U, eye = normal(rows, units, units, seed=seed, scale=1 / math.sqrt(units)), np.eye(units, dtype=np.float32)
    f = np.broadcast_to(np.float32(1 / (1 + math.exp(-1))) * eye, U.shape)
    return np.block([[0.25 * U, 0.5 * f], [0.5 * U, f]]).astype(np.float32)


ENSEMBLES: dict[str, Callable[[int, int], NDArray[np.float32]]] = {
    "gaussian": lambda rows, n: normal(rows, n, n, seed=4, scale=1 / math.sqrt(n)),
    "gaussian_relu": lambda rows, n: relu_mask(rows, n) * normal(rows, n, n, seed=4, scale=1 / math.sqrt(n)),
    "he_relu": lambda rows, n: relu_mask(rows, n) * normal(rows, n, n, seed=4, scale=math.sqrt(2 / n)),
    "orthogonal_relu": lambda rows, n: (math.sqrt(2) * relu_mask(rows, n) * rotations(rows, n)).astype(np.float32),
}


def relu_mask(rows: int, n: int) -> NDArray[np.float32]:
    return (normal(rows, n, 1, seed=5) > 0).astype(np.float32)


# Eigenvalues -----------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 5, 32])
def test_eigenvalues_are_those_of_lapack(n: int, dtype: Any) -> None:
    J = normal(4, n, n).astype(dtype)
    found = eigenvalues(full(J)).numpy()
    assert found.shape == (4, n)
    assert np.all(np.diff(np.abs(found)) <= 0)
    # The characteristic polynomial does not ask for the order of pairs.
    tolerance = 2e-4 if dtype == np.float32 else 1e-10
    for row in range(4):
        expected = np.poly(np.linalg.eigvals(J[row].astype(np.float64)))
        np.testing.assert_allclose(
            np.poly(found[row]), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
        )


def test_eigenvalues_of_a_rotation_and_of_a_shear() -> None:
    J = np.array([[[0, -2], [2, 0]], [[3, 1], [0, -5]], [[0, 0], [0, 0]]], np.float32)
    found = eigenvalues(full(J)).numpy()
    np.testing.assert_allclose(np.sort_complex(found[0]), [-2j, 2j], atol=1e-6)
    np.testing.assert_allclose(found[1], [-5, 3], atol=1e-6)
    np.testing.assert_array_equal(found[2], [0, 0])


@both
def test_an_lstm_at_the_origin(structured: bool) -> None:  # noqa: FBT001 - a parameter of the test
    # 0 and σ(1) + u/4 for the eigenvalues u of U_g.
    cell = built(keras.layers.LSTMCell(5, seed=1), 2)
    J = np.zeros((1, 3, 2), np.float32)
    found, rho = in_graph(
        lambda: (
            eigenvalues(of_cell(cell, J, structured=structured).at(0)),
            spectral_radius(of_cell(cell, J, structured=structured).at(0), MeasureContext()).value,
        )
    )
    u = np.linalg.eigvals(cell.recurrent_kernel.numpy()[:, 10:15])
    expected = 1 / (1 + math.exp(-1)) + u / 4
    for row in range(3):
        np.testing.assert_allclose(np.poly(found[row, :5]), np.poly(expected), atol=1e-5)
    # Five eigenvalues of zero, to the root of rounding if they are defective.
    np.testing.assert_allclose(found[:, 5:], np.zeros((3, 5)), atol=1e-3)
    np.testing.assert_allclose(rho, np.full(3, np.abs(expected).max()), rtol=1e-5)


@both
def test_a_gru_at_the_origin(structured: bool) -> None:  # noqa: FBT001 - a parameter of the test
    # Half of the identity and a quarter of the kernel.
    cell = built(keras.layers.GRUCell(6, seed=1), 2)
    x = np.zeros((1, 2, 2), np.float32)
    found = in_graph(lambda: eigenvalues(of_cell(cell, x, structured=structured).at(0)))
    expected = 0.5 + np.linalg.eigvals(cell.recurrent_kernel.numpy()[:, 12:]) / 4
    for row in range(2):
        np.testing.assert_allclose(np.poly(found[row]), np.poly(expected), atol=1e-5)


def test_the_largest_eigenvalues_of_large_matrices_are_those_of_lapack_or_nan() -> None:
    n = eigen.SPECTRUM_SIZE + 8
    # All eigenvalues of an orthogonal matrix are as large as the largest.
    J = np.stack([normal(n, n, seed=2) / np.sqrt(n), np.linalg.qr(normal(n, n, seed=3))[0]])
    operator = tf.linalg.LinearOperatorFullMatrix(tf.constant(J, tf.float32))
    found, lost = eigen.leading_eigenvalues(operator, MeasureContext(Options(tolerance=1e-2))).numpy()
    assert found.shape == lost.shape == (eigen.LEADING,)
    assert np.isnan(lost).any()
    known, expected = found[~np.isnan(found)], np.linalg.eigvals(J[0])
    assert len(known) >= eigen.LEADING // 2
    nearest = np.abs(known[:, None] - expected[None]).min(axis=1)
    assert (nearest < 2e-2).all()
    assert (np.diff(np.abs(known)) <= 0).all()
    np.testing.assert_allclose(np.abs(found[0]), np.abs(expected).max(), rtol=1e-2)


# Spectral radius -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 64, 150])
def test_an_orthogonal_matrix_has_radius_one(n: int) -> None:
    J = rotations(3, n).astype(np.float32)
    np.testing.assert_allclose(radius(J), np.ones(3, np.float32), rtol=1e-5 if n < LARGE else 1e-2, strict=True)


@pytest.mark.parametrize(
    ("name", "n", "expected", "spread"),
    # The table gives a spread for the first; for the others it is that of their own draws.
    [
        ("gaussian", 32, 1.065, 0.077),
        ("gaussian", 64, 1.060, 0.055),
        ("gaussian", 128, 1.047, 0.035),
        pytest.param("gaussian", 256, 1.038, 0.020, marks=pytest.mark.soak),
        ("gaussian_relu", 32, 0.748, None),
        ("gaussian_relu", 64, 0.751, None),
        pytest.param("gaussian_relu", 128, 0.751, None, marks=pytest.mark.soak),
        pytest.param("gaussian_relu", 256, 0.744, None, marks=pytest.mark.soak),
        ("he_relu", 32, 1.061, None),
        ("he_relu", 64, 1.071, None),
        pytest.param("he_relu", 128, 1.054, None, marks=pytest.mark.soak),
        pytest.param("he_relu", 256, 1.059, None, marks=pytest.mark.soak),
        ("orthogonal_relu", 32, 1.058, None),
        ("orthogonal_relu", 64, 1.062, None),
        pytest.param("orthogonal_relu", 128, 1.050, None, marks=pytest.mark.soak),
        pytest.param("orthogonal_relu", 256, 1.044, None, marks=pytest.mark.soak),
    ],
)
def test_random_matrices_have_their_known_radius(name: str, n: int, expected: float, spread: float | None) -> None:
    # So many draws made the table.
    table = {32: 300, 64: 200, 128: 100, 256: 30}[n]
    draws = {32: 150, 64: 100, 128: 40, 256: 20}[n]
    values = radius(ENSEMBLES[name](draws, n))
    spread = spread or values.std(ddof=1)
    assert abs(values.mean() - expected) < 4 * spread * math.sqrt(1 / draws + 1 / table)


@pytest.mark.parametrize(
    ("make", "gates", "expected"),
    [
        (keras.layers.GRUCell, 3, 1 / math.sqrt(3)),
        (keras.layers.LSTMCell, 4, 1 / 2),
        (keras.layers.SimpleRNNCell, 1, 1),
    ],
)
def test_orthogonal_gate_blocks_have_the_radius_of_what_is_left_of_them(make: Any, gates: int, expected: float) -> None:
    n = 128
    kernels = [built(make(n, seed=seed), 2).recurrent_kernel.numpy().T.reshape(gates, n, n) for seed in range(6)]
    values = radius(np.concatenate(kernels))
    # Gaussian matrices of 128 units are 4.7 % above their limit, and orthogonal ones are orthogonal.
    np.testing.assert_allclose(values.mean(), expected, rtol=0.06 if gates > 1 else 1e-5)
    assert values.std() < 0.05


def test_a_relu_network_of_one_cell() -> None:
    cell = built(keras.layers.SimpleRNNCell(150, activation="relu", recurrent_initializer="he_normal"), 2)
    x = normal(1, 4, 2)
    h = normal(4, 150, seed=1)

    def graph() -> Any:
        cell.get_initial_state = lambda batch_size: [tf.constant(h)]  # noqa: ARG005 - as Keras calls it
        return tuple(spectral_radius(of_cell(cell, x, structured=False).at(0), MeasureContext()))

    value, residual = in_graph(graph)
    J, _ = step_jacobians(cell, x[0], [tf.constant(h)], ["hidden"])
    np.testing.assert_allclose(value, lapack_radius(J["hidden"]), rtol=1e-2)
    assert np.all(residual <= 1e-2 * value)


@pytest.mark.parametrize("name", soak_but({"gaussian", "orthogonal_relu", "lstm"}, [*ENSEMBLES, "lstm"]))
def test_large_matrices_are_iterated_to_the_tolerance(name: str) -> None:
    n = 192
    J = lstm_like(4, n // 2) if name == "lstm" else ENSEMBLES[name](4, n)
    expected = lapack_radius(J)
    for tolerance in (1e-2, 1e-3):
        value, residual = iterated(J, tolerance)
        assert np.all(residual <= tolerance * value)
        np.testing.assert_allclose(value, expected, rtol=tolerance)


def test_the_residual_bounds_the_error_of_a_normal_matrix() -> None:
    J = normal(5, 200, 200)
    J += J.swapaxes(1, 2)
    spectrum = np.abs(np.linalg.eigvalsh(J.astype(np.float64)))
    for tolerance in (0.3, 1e-2, 1e-4):
        value, residual = iterated(J, tolerance)
        assert np.all(residual <= tolerance * value)
        distance = np.abs(spectrum - value[:, None]).min(axis=1)
        assert np.all(distance <= residual + 1e-5 * spectrum.max())
    np.testing.assert_allclose(value, spectrum.max(axis=1), rtol=1e-4)


def test_what_does_not_converge_says_so() -> None:
    # All eigenvalues of an orthogonal matrix are as large as the largest.
    value, residual = iterated(rotations(2, 400).astype(np.float32))
    np.testing.assert_allclose(value, np.ones(2), rtol=2e-2)
    assert np.all(residual > 1e-2 * value)
    assert np.all(np.abs(value - 1) <= residual)


@pytest.mark.parametrize(
    ("J", "expected"),
    [
        (np.diag([2.0, 2.0, 2.0, 1.0]), 2.0),
        (np.diag([-3.0, 1.0, 2.0]), 3.0),
        (np.diag([1.0] * 60 + [1.5, -1.5]), 1.5),
        (np.diag([0.0, 0.0, 5.0]), 5.0),
        (np.kron(np.diag([1.0, 0.5]), [[0.0, -2.0], [2.0, 0.0]]), 2.0),
        (np.outer([1.0, 2.0, 3.0], [1.0, -1.0, 1.0]), 2.0),
        (np.zeros((60, 60)), 0.0),
        (np.full((1, 1), -0.3), 0.3),
    ],
    ids=["repeated", "negative", "bulk", "one_direction", "pairs", "rank_one", "zero", "scalar"],
)
def test_spectra_that_are_hard_to_iterate(J: NDArray[Any], expected: float) -> None:
    value, _ = iterated(J[None].astype(np.float32))
    np.testing.assert_allclose(value, [expected], rtol=1e-2)


@pytest.mark.parametrize("diagonal", [0.0, 1e-3])
def test_a_matrix_far_from_normal_is_some_rounding_away_from_others(diagonal: float) -> None:
    # Of 60 units, one entry of 1e-7 in the corner would make eigenvalues of modulus 0.76.
    J = np.eye(60, k=1) + diagonal * np.eye(60)
    value, residual = iterated(np.stack([J, 1e3 * J]).astype(np.float32))
    assert np.all(value < [1, 1e3])
    assert np.all(np.isfinite(residual))


@pytest.mark.fast
@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("n", [16, LARGE])
def test_the_radius_at_every_scale(n: int, scale: float) -> None:
    J = normal(2, n, n)
    np.testing.assert_allclose(radius(J * np.float32(scale)), scale * lapack_radius(J), rtol=1e-2)


def test_rows_of_different_kinds_at_once() -> None:
    n = LARGE
    rotation = rotations(1, n).astype(np.float32)
    J = np.concatenate([normal(1, n, n), np.zeros((1, n, n), np.float32), rotation, np.eye(n, dtype=np.float32)[None]])
    np.testing.assert_allclose(radius(J), lapack_radius(J), rtol=1e-2)


def test_the_seed_decides_the_iteration() -> None:
    J = normal(3, LARGE, LARGE)
    np.testing.assert_array_equal(radius(J, seed=1), radius(J, seed=1), strict=True)
    assert np.all(radius(J, 0.3, seed=1) != radius(J, 0.3, seed=2))


# With singular values --------------------------------------------------------------------------------------------

MEASURES: dict[str, Callable[[Any], Any]] = {
    "eigenvalues": eigenvalues,
    "singular_values": singular_values,
    "condition_number": lambda operator: condition_number(operator, MeasureContext()).value,
    "spectral_radius": lambda operator: spectral_radius(operator, MeasureContext()).value,
}


@pytest.mark.parametrize(("name", "n"), [*((name, 6) for name in MEASURES), ("spectral_radius", LARGE)])
def test_bad_rows_do_not_disturb_the_others(name: str, n: int) -> None:
    J = normal(5, n, n)
    J[1, 2, 3], J[3, 4, 5] = NAN, INF
    graph = tf.function(
        lambda J: MEASURES[name](full(J)), input_signature=[tf.TensorSpec((None, n, n))], autograph=False
    )
    found, good = graph(J).numpy(), [0, 2, 4]
    assert np.isnan(found[[1, 3]]).all()
    np.testing.assert_allclose(np.abs(found[good]), np.abs(graph(J[good])), rtol=2e-2 if n > 6 else 1e-5)
    for bad in (NAN, INF):
        assert np.isnan(graph(np.full_like(J, bad))).all()
    # The number of rows is not known in the graph.
    np.testing.assert_allclose(np.abs(graph(J[:1])), np.abs(MEASURES[name](full(J[:1]))), rtol=1e-5)
    assert graph(J[:0]).shape[0] == 0


def slope_of_radius(J: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The differentiable radius of each matrix, and its derivative."""
    matrices = tf.convert_to_tensor(J)
    with tf.GradientTape() as tape:
        tape.watch(matrices)
        value = differentiable_radius(full(matrices), Directions(2, tf.constant([0, 0])))
    return value.numpy()[0], tape.gradient(value, matrices).numpy()


@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_the_derivative_of_the_radius_is_that_of_finite_differences(size: int) -> None:
    J, direction = (normal(3, size, size, seed=seed).astype(np.float64) for seed in (0, 1))
    step = 1e-6
    expected = (lapack_radius(J + step * direction) - lapack_radius(J - step * direction)) / (2 * step)
    value, slope = slope_of_radius(J)
    np.testing.assert_allclose(value, lapack_radius(J), rtol=1e-12)
    np.testing.assert_allclose(np.sum(slope * direction, axis=(1, 2)), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_defective_matrix_has_the_derivative_zero_and_a_nearly_defective_one_its_own(dtype: Any) -> None:
    defective = np.array([[[1, 1], [0, 1]], [[0, 1], [0, 0]], [[0, 0], [0, 0]]], dtype)
    value, slope = slope_of_radius(defective)
    np.testing.assert_allclose(value, [1, 0, 0], atol=1e-5)
    np.testing.assert_array_equal(slope, np.zeros_like(defective))
    # The eigenvalues are 1 ± sqrt(e), and the derivative of the radius by e is 1 / (2 sqrt(e)).
    value, slope = slope_of_radius(np.array([[[1, 1], [1e-4, 1]]], dtype))
    np.testing.assert_allclose(value, 1.01, rtol=1e-6)
    np.testing.assert_allclose(slope[0, 1, 0], 50.0, rtol=1e-3)


def test_the_derivative_of_the_radius_of_a_large_matrix_is_that_of_lapack() -> None:
    # One eigenvalue outside of the disk of the others, so that a single Krylov space finds it.
    J = normal(2, LARGE, LARGE, scale=0.5 / math.sqrt(LARGE)) + np.float32(1.5 / LARGE)
    values, right = np.linalg.eig(J.astype(np.float64))
    value, slope = slope_of_radius(J)
    for b in range(2):
        k = np.argmax(np.abs(values[b]))
        left = np.linalg.inv(right[b])[k]
        np.testing.assert_allclose(value[b], np.abs(values[b, k]), rtol=1e-5)
        np.testing.assert_allclose(slope[b], np.outer(left, right[b][:, k]).real, rtol=1e-2, atol=1e-5)
