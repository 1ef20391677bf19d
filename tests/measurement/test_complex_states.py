"""Complex states, measured as their real and imaginary parts side by side, against a loop in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from helpers import MEASURES, RTOL, normal, randomize

from keras_jacmon import JacobianMeter, Recurrence, register_recurrence

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

BATCH, STEPS, FEATURES, UNITS = 2, 6, 2, 3
PROBE = normal(BATCH, STEPS, FEATURES, seed=3)


class ModulusRNN(keras.layers.Layer):
    """`h' = z / (1 + |z|²)` with `z = x B + h A + conj(h)/2`, which is not holomorphic; returns the last state."""

    def build(self, shape: Any) -> None:
        self.into = self.add_weight(shape=(2, shape[-1], UNITS), name="into")
        self.kernel = self.add_weight(shape=(2, UNITS, UNITS), name="kernel")

    def driven(self, x: Any) -> Any:
        return tf.complex(x @ self.into[0], x @ self.into[1])

    def step(self, driven: Any, states: Any) -> Any:
        (h,) = states
        z = driven + h @ tf.complex(self.kernel[0], self.kernel[1]) + 0.5 * tf.math.conj(h)
        h = z / tf.complex(1 + tf.abs(z) ** 2, tf.zeros_like(tf.abs(z)))
        return h, (h,)

    def initial(self, x: Any) -> Any:
        return (tf.complex(tf.ones((tf.shape(x)[0], UNITS)), 0.5 * tf.ones((tf.shape(x)[0], UNITS))),)

    def call(self, x: Any) -> Any:
        states = self.initial(x)
        for t in range(x.shape[1]):
            output, states = self.step(self.driven(x[:, t]), states)
        return output


def step_in_float64(
    layer: ModulusRNN, kernel: NDArray[np.float64] | None = None
) -> Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]:
    """One step of real and imaginary parts side by side, `(samples, 2 units)`; with another kernel if it is given."""
    weights = map(np.asarray, (layer.into, layer.kernel if kernel is None else kernel))
    B, A = ((weight[0] + 1j * weight[1]).astype(np.complex128) for weight in weights)

    def step(x: NDArray[np.float64], s: NDArray[np.float64]) -> NDArray[np.float64]:
        h = s[:, :UNITS] + 1j * s[:, UNITS:]
        z = x @ B + h @ A + 0.5 * h.conj()
        h = z / (1 + np.abs(z) ** 2)
        return np.concatenate([h.real, h.imag], axis=1)

    return step


def jacobians_in_float64(layer: ModulusRNN) -> NDArray[np.float64]:
    """The Jacobians `(time, samples, 2 units, 2 units)`, by central differences."""
    step, found = step_in_float64(layer), []
    s = np.concatenate([np.ones((BATCH, UNITS)), 0.5 * np.ones((BATCH, UNITS))], axis=1)
    for t in range(STEPS):
        x = PROBE[:, t].astype(np.float64)
        moved = 1e-6 * np.eye(2 * UNITS)
        columns = [(step(x, s + move) - step(x, s - move)) / 2e-6 for move in moved]
        found.append(np.stack(columns, axis=2))
        s = step(x, s)
    return np.stack(found)


def sensitivity_in_float64(layer: ModulusRNN) -> NDArray[np.float64]:
    """The norms of the derivative of the last state by the kernel, `(samples,)`, by central differences."""
    kernel, squares = np.asarray(layer.kernel), np.zeros(BATCH)
    for place in np.ndindex(kernel.shape):
        last = []
        for sign in (1, -1):
            changed = kernel.astype(np.float64)
            changed[place] += sign * 1e-6
            step = step_in_float64(layer, changed)
            s = np.concatenate([np.ones((BATCH, UNITS)), 0.5 * np.ones((BATCH, UNITS))], axis=1)
            for t in range(STEPS):
                s = step(PROBE[:, t].astype(np.float64), s)
            last.append(s)
        squares += np.sum(((last[0] - last[1]) / 2e-6) ** 2, axis=1)
    return np.sqrt(squares)


def test_complex_states_have_the_values_of_a_loop_in_float64() -> None:
    layer = ModulusRNN(name="modulus")
    register_recurrence(layer, lambda layer, x: Recurrence(layer.driven(x), layer.initial(x), layer.step))
    real = keras.layers.Lambda(tf.math.real)
    keras.utils.set_random_seed(4)
    model = keras.Sequential([keras.Input((STEPS, FEATURES)), layer, real])
    randomize(model)
    names = ["variance", "rms_singular_value", "spectral_norm", "spectral_radius", "flow", "lyapunov"]
    exact = {"exact_flow": True, "exponents": 2 * UNITS, "warmup": 0, "tolerance": 1e-4, "flow_vectors": 2 * UNITS}
    meter = JacobianMeter(model, PROBE, measures=[*names, "sensitivity"], **exact)
    report = meter()["modulus"]
    assert report.methods["sensitivity"] == "exact, by `kernel`"
    np.testing.assert_allclose(report["sensitivity"][-1], sensitivity_in_float64(layer), rtol=1e-4)
    assert report.units == 2 * UNITS
    assert {choice.how.value for choice in meter.choices["modulus"]["hidden"]} == {"structure"}
    J = jacobians_in_float64(layer)
    for name, measure in MEASURES.items():
        np.testing.assert_allclose(report[name], measure(J), rtol=RTOL[name], err_msg=name)
    radius = np.abs(np.linalg.eigvals(J)).max(axis=-1)
    np.testing.assert_allclose(report["spectral_radius"], radius, rtol=1e-3)
    products, norms = np.broadcast_to(np.eye(2 * UNITS), J.shape[1:]), []
    for at_step in J[::-1]:
        products = products @ at_step
        norms.append(np.log(np.linalg.svd(products, compute_uv=False)[:, 0]))
    np.testing.assert_allclose(report["flow"], np.stack(norms), rtol=1e-3, atol=1e-4)
    mean_log = np.linalg.slogdet(J)[1].mean(axis=0)
    np.testing.assert_allclose(report["lyapunov"].sum(axis=0), mean_log, rtol=1e-3)
