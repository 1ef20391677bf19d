"""Watch a minGRU, an associative scan and no `keras.layers.RNN`, while it learns to recall a symbol.

`h_t = (1 - z(x_t)) h_{t-1} + z(x_t) c(x_t)` (arXiv 2410.01201) has the Jacobian `diag(1 - z_t)`: the script asserts
that the report has its numbers. The first step shows one of four symbols, all later steps are noise, and after the last
step the network has to name the symbol. It learns to keep its gates shut: `growth` rises towards 0.

    python examples/min_gru.py      # half a minute on two cores
"""

import argparse
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from keras_jacmon import JacobianMonitor, Recurrence, explain, register_recurrence

UNITS, STEPS, SYMBOLS = 32, 64, 4


class MinGRU(keras.layers.Layer):
    """A minGRU that takes all steps at once."""

    def __init__(self, units: int, **kwargs: str) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.gate = keras.layers.Dense(units, "sigmoid", bias_initializer=keras.initializers.Constant(-2.0))
        self.candidate = keras.layers.Dense(units)

    def build(self, shape: tuple[int | None, ...]) -> None:
        """Makes the weights."""
        self.gate.build(shape)
        self.candidate.build(shape)

    def call(self, x: Any) -> Any:
        """Returns the hidden states `(batch, time, units)`."""
        z = self.gate(x)

        def combine(left: Any, right: Any) -> tuple[Any, Any]:
            return left[0] * right[0], right[0] * left[1] + right[1]

        _, h = ops.associative_scan(combine, (1 - z, z * self.candidate(x)), axis=1)
        # The scan forgets the shape.
        return ops.reshape(h, ops.shape(z))


def recurrence(layer: MinGRU, x: Any) -> Recurrence:
    """Says what one step of a `MinGRU` is."""

    def step(x_t: Any, states: list[Any]) -> tuple[Any, list[Any]]:
        z = layer.gate(x_t)
        h = (1 - z) * states[0] + z * layer.candidate(x_t)
        return h, [h]

    return Recurrence(inputs=x, states=[ops.zeros((ops.shape(x)[0], layer.units))], step=step)


def make_data(samples: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Returns sequences `(samples, STEPS, SYMBOLS + 1)` and their first symbols `(samples,)`."""
    random = np.random.default_rng(seed)
    x = np.zeros((samples, STEPS, SYMBOLS + 1), np.float32)
    x[:, :, -1] = random.normal(size=(samples, STEPS))
    y = random.integers(0, SYMBOLS, samples)
    x[np.arange(samples), 0, y] = 1
    return x, y


def assert_diagonal(monitor: JacobianMonitor, layer: MinGRU, probe: NDArray[np.float32]) -> None:
    """Asserts that the newest report is that of `diag(1 - z_t)`."""
    report = monitor.reports[-1][1]["min_gru"]
    kept = 1 - ops.convert_to_numpy(layer.gate(probe)).swapaxes(0, 1).astype(np.float64)
    n = layer.units
    variance = np.mean(kept**2, axis=-1) - np.mean(kept, axis=-1) ** 2 / n
    np.testing.assert_allclose(report["rms_singular_value"], np.sqrt(np.mean(kept**2, axis=-1)), rtol=1e-5)
    np.testing.assert_allclose(report["variance"], variance, rtol=1e-4)
    for (step, sample), eigenvalues in zip(report.spectra_at, report["eigenvalues"], strict=True):
        np.testing.assert_allclose(np.sort(np.real(eigenvalues)), np.sort(kept[step, sample]), rtol=1e-4)


def main() -> None:
    """Trains, and asserts the identity and that the task is learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="default: 10")
    arguments = parser.parse_args()
    register_recurrence(MinGRU, recurrence)
    keras.utils.set_random_seed(0)
    (x, y), test = make_data(2048, 0), make_data(500, 1)
    layer = MinGRU(UNITS, name="min_gru")
    last = keras.layers.Lambda(lambda h: h[:, -1])
    model = keras.Sequential([keras.Input(x.shape[1:]), layer, last, keras.layers.Dense(SYMBOLS)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"])
    print(explain(model, x[:16]))
    measures = ["variance", "rms_singular_value", "eigenvalues", "joint/growth"]
    monitor = JacobianMonitor(x[:16], measures=measures, log_dir=None)
    model.fit(x, y, batch_size=64, epochs=arguments.epochs, verbose=0, callbacks=[monitor])
    for step, report in monitor.reports:
        numbers = report["min_gru"]
        gain, growth = numbers.mean("rms_singular_value"), numbers.scalars()["growth"]
        print(f"step {step:4}: rms singular value {gain:.3f}, growth {growth:+.4f} nats per step")
    assert_diagonal(monitor, layer, x[:16])
    accuracy = model.evaluate(*test, verbose=0)[1]
    print(f"recalls {accuracy:.1%} of new sequences")
    assert accuracy > 0.95, "the task is not learned"


if __name__ == "__main__":
    main()
