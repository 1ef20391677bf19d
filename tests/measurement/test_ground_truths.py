"""Known values of variance, RMS singular value and spectral norm, through `measure` on real Keras layers.

Every value comes from outside the project: an exact identity, a published formula, or a Monte-Carlo table
(`ground_truths.md`). Letters: U recurrent kernel, n units, k gates.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import helpers
import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import LinearCell, SeedCell, normal

from keras_jacmon import JacobianMeter, measure

if TYPE_CHECKING:
    from numpy.typing import NDArray

L = keras.layers
SQRT3 = float(np.sqrt(3))


def measured(layer: Any, probe: NDArray[np.float32], **kwargs: Any) -> Any:
    model = keras.Sequential([keras.Input(probe.shape[1:]), layer])
    return measure(model, probe, **{"measures": helpers.KEYS, **kwargs})[layer.name]


def at_the_origin(layer: Any, **kwargs: Any) -> Any:
    """One step at x = h = 0."""
    return measured(layer, np.zeros((1, 1, 2), np.float32), **kwargs)


def sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))


def filled(actual: NDArray[Any], value: float) -> NDArray[Any]:
    return np.full(actual.shape, value, actual.dtype)


def gate(kernel: Any, index: int) -> NDArray[np.float32]:
    """Block `index` of a gated kernel (n, k n)."""
    kernel = np.asarray(kernel)
    n = len(kernel)
    return kernel[:, index * n : (index + 1) * n]


# Exact -----------------------------------------------------------------------------------------------


def test_simple_rnn_with_keras_defaults_keeps_norms_at_the_origin() -> None:
    keys = ["spectral_norm", "spectral_radius", "rms_singular_value"]
    layer = at_the_origin(L.SimpleRNN(16, seed=1), measures=keys)
    for key in keys:
        np.testing.assert_allclose(layer[key], np.ones((1, 1), np.float32), rtol=1e-5, strict=True, err_msg=key)


@pytest.mark.parametrize("initializer", ["identity", "orthogonal"])
def test_a_linear_orthogonal_rnn_keeps_norms_everywhere(initializer: str) -> None:
    layer = L.SimpleRNN(8, activation="linear", recurrent_initializer=initializer)
    report = measured(layer, normal(3, 4, 2))
    for key in ("spectral_norm", "rms_singular_value"):
        np.testing.assert_allclose(report[key], np.ones((4, 3), report[key].dtype), rtol=1e-5, strict=True)
    U = layer.cell.recurrent_kernel.numpy()
    variance = 1 - 8 * U.mean(dtype=np.float64) ** 2
    np.testing.assert_allclose(report["variance"], filled(report["variance"], variance), rtol=1e-5, strict=True)


def test_identity_has_the_variance_of_the_identity() -> None:
    # n (1/n - 1/n²) = 1 - 1/n
    report = measured(L.SimpleRNN(5, activation="linear", recurrent_initializer="identity"), normal(2, 3, 2))
    np.testing.assert_allclose(report["variance"], filled(report["variance"], 0.8), rtol=1e-5, strict=True)


def test_a_diagonal_map() -> None:
    w = np.array([0.5, -2.0, 1.0, 0.25])
    report = measured(L.RNN(LinearCell(np.diag(w))), normal(2, 3, 4))
    np.testing.assert_allclose(report["spectral_norm"], filled(report["spectral_norm"], 2.0), rtol=1e-2, strict=True)
    rms = np.sqrt(np.mean(w**2))
    np.testing.assert_allclose(
        report["rms_singular_value"], filled(report["rms_singular_value"], rms), rtol=1e-5, strict=True
    )


@pytest.mark.parametrize("b", [1.0, 5.0])
def test_a_gru_without_recurrent_kernel_is_its_update_gate(b: float) -> None:
    layer = L.GRU(4, recurrent_initializer="zeros", kernel_initializer="zeros")
    probe = normal(2, 3, 2)
    model = keras.Sequential([keras.Input(probe.shape[1:]), layer])
    bias = np.zeros((2, 12), np.float32)
    bias[0, :4] = b
    layer.cell.bias.assign(bias)
    report = measure(model, probe, measures=helpers.KEYS)[layer.name]
    for key in ("spectral_norm", "rms_singular_value"):
        np.testing.assert_allclose(report[key], filled(report[key], sigmoid(b)), rtol=1e-5, strict=True)
    np.testing.assert_allclose(np.log(report["rms_singular_value"]), {1.0: -0.313262, 5.0: -0.006715}[b], atol=2e-6)


@pytest.mark.parametrize("b", [1.0, 5.0])
def test_an_lstm_without_kernels_is_its_forget_gate(b: float) -> None:
    layer = L.LSTM(4, recurrent_initializer="zeros", kernel_initializer="zeros", unit_forget_bias=False)
    probe = normal(2, 3, 2)
    model = keras.Sequential([keras.Input(probe.shape[1:]), layer])
    layer.cell.bias.assign(np.repeat([0.0, b, 0.0, 0.0], 4))
    report = measure(model, probe, measures=helpers.KEYS)[layer.name]
    # c stays 0, so dc'/dc = σ(b) I and dh'/dc = σ(0) σ(b) I; nothing depends on h.
    f = sigmoid(b)
    np.testing.assert_array_equal(report["spectral_norm"], np.zeros((3, 2), np.float32), strict=True)
    np.testing.assert_allclose(report["joint/spectral_norm"], np.full((3, 2), f * np.sqrt(1.25)), rtol=1e-2)
    np.testing.assert_allclose(report["joint/rms_singular_value"], np.full((3, 2), f * np.sqrt(1.25 / 2)), rtol=1e-5)


def test_a_gru_at_the_origin() -> None:
    # J = 0.5 I + 0.25 U_h, transposed as kernels enter J.
    layer = L.GRU(8, seed=1)
    report = at_the_origin(layer)
    J = 0.5 * np.eye(8) + 0.25 * gate(layer.cell.recurrent_kernel, 2).T
    for key, reference in helpers.MEASURES.items():
        np.testing.assert_allclose(report[key][0, 0], reference(J), rtol=helpers.RTOL[key])


def test_an_lstm_at_the_origin() -> None:
    # c' = i tanh(z_g) + f c, h' = o tanh(c') with i = o = 1/2, f = σ(1), z_g = h U_g.
    layer = L.LSTM(6, seed=1)
    report = at_the_origin(layer)
    U_g, eye, f = gate(layer.cell.recurrent_kernel, 2).T, np.eye(6), sigmoid(1.0)
    hidden = 0.25 * U_g
    joint = np.block([[0.25 * U_g, 0.5 * f * eye], [0.5 * U_g, f * eye]])
    for key, reference in helpers.MEASURES.items():
        np.testing.assert_allclose(report[key][0, 0], reference(hidden), rtol=helpers.RTOL[key])
        np.testing.assert_allclose(report[f"joint/{key}"][0, 0], reference(joint), rtol=helpers.RTOL[key])
    # Eigenvalues 0 and σ(1) + u/4: the matrix that is compared with is the published one.
    eigenvalues = np.sort_complex(np.linalg.eigvals(joint))
    published = np.sort_complex(np.concatenate([np.zeros(6), f + np.linalg.eigvals(U_g) / 4]))
    np.testing.assert_allclose(np.abs(np.poly(eigenvalues)), np.abs(np.poly(published)), atol=1e-6)


def test_the_fixed_point_of_a_scalar_map() -> None:
    # h' = tanh(2 h) -> 0.957504, where ln |J| = -1.793529.
    layer = L.SimpleRNN(
        1, recurrent_initializer=keras.initializers.Constant(2.0), kernel_initializer=keras.initializers.Constant(1.0)
    )
    probe = np.zeros((1, 40, 1), np.float32)
    probe[0, 0] = 1.0
    report = measured(layer, probe)
    np.testing.assert_allclose(np.log(report["rms_singular_value"][-1, 0]), -1.793529, atol=1e-5)
    np.testing.assert_allclose(np.log(report["spectral_norm"][-1, 0]), -1.793529, atol=1e-5)
    np.testing.assert_array_equal(report["variance"], np.zeros((40, 1), np.float32), strict=True)


# Random weights --------------------------------------------------------------------------------------


# Mean of the squared slope at a pre-activation of variance q; of the sine it is (1 + e^(-2q)) / 2.
SLOPES = [
    ("tanh", q, slope) for q, slope in ((0.01, 0.98067), (0.1, 0.84921), (0.5, 0.59243), (1.0, 0.46440), (2.0, 0.34951))
]
SLOPES += [("sin", q, slope) for q, slope in ((0.1, 0.90937), (1.0, 0.56767))]


@pytest.mark.parametrize(("activation", "q", "expected"), SLOPES)
def test_a_slope_at_a_known_preactivation_variance(activation: str, q: float, expected: float) -> None:
    # PointBatch of an orthogonal kernel have norm one, so ‖J‖²/n is the mean of φ'(z)², z ~ N(0, q).
    layer = L.SimpleRNN(64, getattr(keras.ops, activation), kernel_initializer="identity", seed=1)
    report = measured(layer, normal(64, 1, 64, scale=float(np.sqrt(q))), measures=["rms_singular_value"])
    # 4096 values of φ'² in [0, 1], whose sd is below 0.35.
    np.testing.assert_allclose(np.mean(report["rms_singular_value"] ** 2), expected, atol=4 * 0.35 / 64)


@pytest.mark.parametrize(
    ("activation", "initializer", "expected", "spread"),
    [
        ("linear", "glorot_normal", 1.0, 0.022),
        ("linear", "lecun_normal", 1.0, 0.022),
        ("linear", "he_normal", 2.0, 0.044),
        ("relu", "glorot_normal", 0.5, 0.063),
        ("relu", "he_normal", 1.0, 0.13),
        ("relu", "orthogonal", 0.5, 0.06),
    ],
)
def test_simple_rnn_of_64_units(activation: str, initializer: str, expected: float, spread: float) -> None:
    draws = 8
    values = []
    keras.utils.set_random_seed(1)
    layer = L.SimpleRNN(64, activation=activation, recurrent_initializer=initializer, kernel_initializer="identity")
    # One sample, one step, pre-activations of random sign.
    model = keras.Sequential([keras.Input((1, 64)), layer])
    meter = JacobianMeter(model, normal(1, 1, 64), measures=["variance"])
    for seed in range(draws):
        layer.cell.recurrent_kernel.assign(type(layer.cell.recurrent_initializer)(seed=seed)((64, 64)))
        signs = np.sign(normal(64, 1, seed=seed))
        layer.cell.kernel.assign(np.eye(64, dtype=np.float32) * signs)
        values.append(meter()[layer.name]["variance"][0, 0])
    assert abs(np.mean(values) - expected) < 4 * spread / np.sqrt(draws)


@functools.cache
def gated_meter() -> tuple[JacobianMeter, dict[str, Any]]:
    """A meter of layers of 128 units that stay at x = h = 0, and the layers by name.

    Their Jacobians are the kernel of their candidate: Uᵀ, U_hᵀ, and of the LSTM i o U_gᵀ = U_gᵀ / 4.
    """
    n = 128
    options = {"kernel_initializer": "zeros", "return_sequences": True}
    layers = {
        "simple": L.SimpleRNN(n, name="simple", **options),
        "gru": L.GRU(n, name="gru", **options),
        "lstm": L.LSTM(n, name="lstm", unit_forget_bias=False, **options),
    }
    model = keras.Sequential([keras.Input((1, 2)), *layers.values()])
    bias = np.zeros((2, 3 * n), np.float32)
    bias[0, :n], bias[0, n : 2 * n] = -50.0, 50.0  # update gate shut, reset gate open: J = U_hᵀ
    layers["gru"].cell.bias.assign(bias)
    measures = ["variance", "spectral_norm", "spectral_radius"]
    return JacobianMeter(model, np.zeros((1, 1, 2), np.float32), measures=measures), layers


@pytest.mark.parametrize(
    ("initializer", "simple", "gru", "lstm"),
    [
        ("orthogonal", 1.0, 1 / 3, 1 / 4),
        ("glorot_uniform", 1.0, 1 / 2, 2 / 5),
        ("lecun_normal", 1.0, 1.0, 1.0),
        ("he_normal", 2.0, 2.0, 2.0),
    ],
)
def test_gate_blocks_are_not_what_the_initializer_says(
    initializer: str, simple: float, gru: float, lstm: float
) -> None:
    meter, layers = gated_meter()
    for seed, layer in enumerate(layers.values()):
        # As the layer itself does: all gates at once.
        kernel = layer.cell.recurrent_kernel
        kernel.assign(type(keras.initializers.get(initializer))(seed=seed)(kernel.shape))
    report = meter()
    for name, expected in (("simple", simple), ("gru", gru), ("lstm", lstm)):
        part = 4 if name == "lstm" else 1
        # The spread of a Gaussian matrix of 128 is 0.010, times its variance.
        np.testing.assert_allclose(part**2 * report[name]["variance"][0, 0], expected, rtol=0.05, err_msg=name)
        # That of its radius is 0.035 about 1.047, times the root of its variance; a whole orthogonal one has radius 1.
        radius, whole = part * report[name]["spectral_radius"][0, 0], (initializer, name) == ("orthogonal", "simple")
        mean, spread = (1.0, 1e-6) if whole else (1.047, 0.035)
        np.testing.assert_allclose(radius / np.sqrt(expected), mean, atol=4 * spread, rtol=0, err_msg=name)
    if initializer == "orthogonal":
        norms = {"gru": 2 * np.sqrt(2) / 3, "lstm": SQRT3 / 2}
        np.testing.assert_allclose(report["gru"]["spectral_norm"][0, 0], norms["gru"], rtol=0.04)
        np.testing.assert_allclose(4 * report["lstm"]["spectral_norm"][0, 0], norms["lstm"], rtol=0.04)
        np.testing.assert_allclose(report["simple"]["spectral_norm"][0, 0], 1.0, rtol=1e-4)


# The seed's table ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*`build..` was called on layer")
@pytest.mark.parametrize(("activation", "expected", "spread"), [("relu", 0.5, 0.06), ("linear", 1.0, 0.02)])
def test_the_seeds_table(activation: str, expected: float, spread: float) -> None:
    # 100 units, Glorot, inputs of size 2, batch 1, 4 steps, everything ~ N(0, 1); new weights for each of 4 runs.
    layer = L.RNN(SeedCell(100, activation), name="seed")
    x, h, c = keras.Input((4, 2)), keras.Input((100,)), keras.Input((100,))
    model = keras.Model([x, h, c], layer(x, initial_state=[h, c]))
    probe = [normal(1, 4, 2), normal(1, 100), normal(1, 100, seed=10)]
    meter = JacobianMeter(model, probe, measures=["variance"])
    kernels = [weight for weight in layer.trainable_weights if len(weight.shape) > 1]
    means = []
    for run in range(4):
        for index, kernel in enumerate(kernels):
            kernel.assign(keras.initializers.GlorotUniform(10 * run + index)(kernel.shape))
        report = meter()["seed"]
        assert report["variance"].shape == (4, 1)
        assert np.all(np.abs(report["variance"] - expected) < 5 * spread)
        # h_t = W_h relu(h_{t-1}): J is W_hᵀ with the columns of the silent units left out, here at the first step.
        open_units = probe[1][0] > 0 if activation == "relu" else np.ones(100, bool)
        J = np.where(open_units, layer.cell.hidden.kernel.numpy().T, 0.0)
        np.testing.assert_allclose(report["variance"][0, 0], 100 * np.var(J), rtol=1e-5)
        means.append(report["variance"].mean())
    assert abs(np.mean(means) - expected) < 4 * spread / np.sqrt(4)


# Where the hidden view misleads ----------------------------------------------------------------------


def gain_of_a_layer(layer: Any, probe: NDArray[np.float32]) -> float:
    """‖dh_T/dh_0‖ for the one sample of a probe, by one backward pass through the LSTM layer itself."""
    n = layer.units
    # Sample i tells row i: the gradient of its own unit i.
    start = tf.zeros((n, n))
    with tf.GradientTape() as tape:
        tape.watch(start)
        total = tf.linalg.trace(layer(np.repeat(probe, n, axis=0), initial_state=[start, tf.zeros((n, n))]))
    return float(np.linalg.norm(tape.gradient(total, start), ord=2))


def test_the_hidden_view_is_blind_to_the_forget_bias() -> None:
    # maths.md, 64 units, T = 40: forget bias 1 -> 4 leaves variance(hidden) at 0.0143 -> 0.0128, while the radius of
    # the joint one-step map goes 0.884 -> 1.080 and the true ‖dh_T/dh_0‖ 2.3e-4 -> 2.85. Its weights and its probe are
    # not known: others have other numbers, products of 40 steps more so than single ones.
    keras.utils.set_random_seed(0)
    layer, probe = L.LSTM(64, name="lstm"), normal(1, 40, 8)
    measures = ["variance", "flow", "joint/rms_singular_value", "joint/spectral_radius", "joint/flow"]
    meter = JacobianMeter(keras.Sequential([keras.Input((40, 8)), layer]), probe, measures=measures)
    reports, gains = [], []
    for forget_bias in (1.0, 4.0):
        bias = layer.cell.bias.numpy()
        bias[64:128] = forget_bias
        layer.cell.bias.assign(bias)
        reports.append(meter())
        gains.append(gain_of_a_layer(layer, probe))
    before, after = (report["lstm"] for report in reports)

    np.testing.assert_allclose([before.mean("variance"), after.mean("variance")], [0.0143, 0.0128], rtol=0.1)
    for blind in (before, after):
        assert blind["flow"][-1, 0] < np.log(1e-20)
    radii = [before.mean("joint/spectral_radius"), after.mean("joint/spectral_radius")]
    np.testing.assert_allclose(radii, [0.884, 1.080], rtol=0.05)
    assert radii[0] < 1 < radii[1]
    # dc'/dc = Diag(f) makes up most of the joint view: σ(1) = 0.73 -> σ(4) = 0.98.
    assert after.mean("joint/rms_singular_value") > 1.2 * before.mean("joint/rms_singular_value")
    np.testing.assert_allclose(np.log(gains), np.log([2.3e-4, 2.85]), rtol=0, atol=np.log(2))
    # The joint flow is the RMS gain from the output to both states, to a factor of some units; that is what the verdict
    # goes by.
    found = [before["joint/flow"][-1, 0], after["joint/flow"][-1, 0]]
    np.testing.assert_allclose(found, np.log(gains), rtol=0, atol=np.log(4))
    verdicts = [report.verdict["lstm"] for report in reports]
    assert [verdict.state for verdict in verdicts] == ["vanishing", "stable"]
    np.testing.assert_allclose([np.log(verdict.gain) for verdict in verdicts], found, rtol=1e-5)
