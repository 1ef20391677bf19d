"""Watch a linear recurrent unit, whose state is complex, while it learns to tell frequencies in noise.

`h_t = λ h_{t-1} + B x_t` (arXiv 2303.06349) has one complex eigenvalue λ for each unit. They begin on a ring: |λ|² is
uniform between r_min² and r_max². The Jacobian is measured as that of real and imaginary parts side by side, so each
eigenvalue counts twice. The script asserts that the squared RMS singular value is the mean of |λ|², the mean of all
Lyapunov exponents that of ln |λ|, and both those of the ring: 0.9040 and -0.05137 for 0.9 and 0.999.

    python examples/lru.py      # half a minute on two cores
"""

import argparse
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from numpy.typing import NDArray

from keras_jacmon import JacobianMonitor, Recurrence, register_recurrence

UNITS, STEPS, CLASSES = 64, 64, 4
R_MIN, R_MAX = 0.9, 0.999
# Of the ring: the mean of |λ|², and of ln |λ|.
MEAN_SQUARE, MEAN_LOG = 0.9040, -0.05137


class LRU(keras.layers.Layer):
    """A linear recurrent unit that takes all steps at once."""

    def __init__(self, units: int, **kwargs: str) -> None:
        super().__init__(**kwargs)
        self.units = units

    def build(self, shape: tuple[int | None, ...]) -> None:
        """Makes the weights; the eigenvalues lie on the ring."""
        generator = keras.random.SeedGenerator(0)
        square = keras.random.uniform((self.units,), R_MIN**2, R_MAX**2, seed=generator)
        phase = keras.random.uniform((self.units,), 0.0, 2 * np.pi, seed=generator)
        self.log_decay = self.add_weight(shape=(self.units,), name="log_decay")
        self.log_decay.assign(ops.log(-0.5 * ops.log(square)))
        self.phase = self.add_weight(shape=(self.units,), name="phase")
        self.phase.assign(phase)
        self.into = self.add_weight(shape=(2, shape[-1], self.units), name="into")
        self.out_of = self.add_weight(shape=(2, self.units, self.units), name="out_of")

    @property
    def eigenvalues(self) -> Any:
        """The complex eigenvalues `(units,)`."""
        modulus = ops.exp(-ops.exp(self.log_decay))
        return tf.complex(modulus * ops.cos(self.phase), modulus * ops.sin(self.phase))

    def driven(self, x: Any) -> Any:
        """Returns the normalized inputs `(..., units)`, complex."""
        gamma = ops.sqrt(1 - ops.exp(-2 * ops.exp(self.log_decay)))
        return tf.complex(gamma * (x @ self.into[0]), gamma * (x @ self.into[1]))

    def read(self, h: Any) -> Any:
        """Returns the output `(..., units)`, the real part of a product with the state."""
        return tf.math.real(h) @ self.out_of[0] - tf.math.imag(h) @ self.out_of[1]

    def call(self, x: Any) -> Any:
        """Returns the outputs `(batch, time, units)`."""
        b = self.driven(x)

        def combine(left: Any, right: Any) -> tuple[Any, Any]:
            return left[0] * right[0], right[0] * left[1] + right[1]

        _, h = ops.associative_scan(combine, (self.eigenvalues * tf.ones_like(b), b), axis=1)
        # The scan forgets the shape.
        return self.read(tf.reshape(h, tf.shape(b)))


def recurrence(layer: LRU, x: Any) -> Recurrence:
    """Says what one step of an `LRU` is."""

    def step(x_t: Any, states: list[Any]) -> tuple[Any, list[Any]]:
        h = layer.eigenvalues * states[0] + layer.driven(x_t)
        return layer.read(h), [h]

    return Recurrence(inputs=x, states=[tf.zeros((tf.shape(x)[0], layer.units), tf.complex64)], step=step)


def make_data(samples: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Returns noisy waves `(samples, STEPS, 1)` of four frequencies and random phases, and the frequencies."""
    random = np.random.default_rng(seed)
    y = random.integers(0, CLASSES, samples)
    time = np.arange(STEPS) * (0.2 + 0.1 * y[:, None]) + random.uniform(0, 2 * np.pi, (samples, 1))
    return (np.sin(time) + random.normal(size=time.shape))[..., None].astype(np.float32), y


def assert_ring(monitor: JacobianMonitor, at: int, eigenvalues: NDArray[np.complex64]) -> tuple[float, float]:
    """Asserts that a report has the numbers of the eigenvalues; returns the means of |λ|² and of ln |λ|."""
    report = monitor.reports[at][1]["lru"]
    modulus = np.abs(eigenvalues.astype(np.complex128))
    square, log = float(np.mean(modulus**2)), float(np.mean(np.log(modulus)))
    np.testing.assert_allclose(report["rms_singular_value"] ** 2, square, rtol=1e-5)
    np.testing.assert_allclose(np.mean(report["lyapunov"], axis=0), log, rtol=1e-3)
    return square, log


def main() -> None:
    """Trains, and asserts the identities and that the task is learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="default: 5")
    arguments = parser.parse_args()
    register_recurrence(LRU, recurrence)
    keras.utils.set_random_seed(0)
    (x, y), test = make_data(2048, 0), make_data(500, 1)
    layer = LRU(UNITS, name="lru")
    mix = [keras.layers.Dense(32, "gelu"), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(CLASSES)]
    model = keras.Sequential([keras.Input(x.shape[1:]), layer, *mix])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    before = ops.convert_to_numpy(layer.eigenvalues)
    monitor = JacobianMonitor(
        x[:4], measures=["rms_singular_value", "lyapunov", "joint/growth"], exponents=2 * UNITS, log_dir=None
    )
    model.fit(x, y, batch_size=64, epochs=arguments.epochs, verbose=0, callbacks=[monitor])
    for name, at, eigenvalues in (("before", 0, before), ("after", -1, ops.convert_to_numpy(layer.eigenvalues))):
        square, log = assert_ring(monitor, at, eigenvalues)
        growth = monitor.reports[at][1]["lru"].scalars()["growth"]
        print(f"{name}: mean |λ|² {square:.4f}, mean ln |λ| {log:+.5f}, growth {growth:+.4f} nats per step")
    square, log = assert_ring(monitor, 0, before)
    # The standard errors of means over the units.
    spread, spread_of_log = (
        np.std(values) / np.sqrt(UNITS) for values in (np.abs(before) ** 2, np.log(np.abs(before)))
    )
    assert abs(square - MEAN_SQUARE) < 3 * spread
    assert abs(log - MEAN_LOG) < 3 * spread_of_log
    accuracy = model.evaluate(*test, verbose=0)[1]
    print(f"tells {accuracy:.1%} of new waves")
    assert accuracy > 0.9, "the task is not learned"


if __name__ == "__main__":
    main()
