"""Reproduce the largest Lyapunov exponent of the Lorenz system by a GRU that is trained on it.

    x' = 10 (y - x),    y' = x (28 - z) - y,    z' = x y - 8/3 z

The largest exponent of the equations is 0.9056 nats per unit of time, and that of a published GRU is 0.9075. Here a GRU
learns to predict the next point, 0.05 units of time later, from the true points before it. Then it runs freely: each
prediction is its next input. So the whole state is that of the GRU together with the point, and the exponents are those
of the view `joint`. The equations themselves, written as a cell, are measured in the same way.

    python examples/reproduce_lorenz.py           # three minutes on two cores
    python examples/reproduce_lorenz.py --fast    # hardly trained, without a claim
"""

import argparse
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from keras_jacmon import measure

DT, SUBSTEPS, WINDOW, BATCH, EXPONENTS = 0.05, 2, 50, 64, 3
EQUATIONS, PUBLISHED, TOLERANCE = 0.9056, 0.9075, 0.05
# Of the attractor: about the mean and the standard deviation of each coordinate.
CENTER, SPREAD = np.array([0.0, 0.0, 23.5]), np.array([7.9, 9.0, 8.6])

Floats = NDArray[np.float64]


def slope(p: Any, stack: Any) -> Any:
    """Returns the right side of the equations at points `(..., 3)`, with the `stack` of NumPy or TensorFlow."""
    x, y, z = p[..., 0], p[..., 1], p[..., 2]
    return stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], axis=-1)


def advance(p: Any, stack: Any = np.stack) -> Any:
    """Returns the points after the time DT, by the classical Runge-Kutta method."""
    dt = DT / SUBSTEPS
    for _ in range(SUBSTEPS):
        a = slope(p, stack)
        b = slope(p + dt / 2 * a, stack)
        c = slope(p + dt / 2 * b, stack)
        d = slope(p + dt * c, stack)
        p = p + dt / 6 * (a + 2 * b + 2 * c + d)
    return p


def make_data(trajectories: int, windows: int) -> Floats:
    """Returns normalized windows of trajectories on the attractor, `(samples, WINDOW + 1, 3)`."""
    p = CENTER + SPREAD * np.random.default_rng(0).normal(size=(trajectories, 3))
    # Until the attractor is reached.
    for _ in range(400):
        p = advance(p)
    points = []
    for _ in range(windows * (WINDOW + 1)):
        points.append((p - CENTER) / SPREAD)
        p = advance(p)
    return np.stack(points, axis=1).reshape(-1, WINDOW + 1, 3)


class LorenzCell(keras.layers.Layer):
    """The equations as a cell without inputs."""

    state_size = output_size = 3

    def call(self, _: tf.Tensor, states: list[tf.Tensor]) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Returns the next point as output and state."""
        point = advance(states[0], tf.stack)
        return point, [point]


class FreeCell(keras.layers.Layer):
    """A trained GRU that is fed with its own predictions; its states are that of the GRU and the point."""

    def __init__(self, gru: keras.layers.GRU, readout: keras.layers.Dense, scale: Floats) -> None:
        super().__init__()
        self.gru, self.readout, self.scale = gru.cell, readout, scale.astype(np.float32)
        self.state_size, self.output_size = [gru.units, 3], 3

    def call(self, _: tf.Tensor, states: list[tf.Tensor]) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Returns the next point as output, and both states."""
        h, point = states
        h, _ = self.gru(point, [h])
        point = point + self.scale * self.readout(h)
        return point, [h, point]


def train(data: Floats, units: int, epochs: int) -> tuple[keras.layers.GRU, FreeCell, float]:
    """Trains a GRU to predict the next increment; returns it, its free-running cell, and the loss at the end."""
    increments = np.diff(data, axis=1)
    scale = np.std(increments, axis=(0, 1))
    gru, readout = keras.layers.GRU(units, return_sequences=True), keras.layers.Dense(3)
    model = keras.Sequential([keras.Input((None, 3)), gru, readout])
    decay = keras.optimizers.schedules.CosineDecay(3e-3, epochs * (len(data) // BATCH), alpha=1e-3)
    model.compile(keras.optimizers.Adam(decay), "mse")
    x, y = data[:, :-1].astype(np.float32), (increments / scale).astype(np.float32)
    history = model.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=0)
    return gru, FreeCell(gru, readout, scale), history.history["loss"][-1]


def exponents(cell: Any, states: list[Any], steps: int, measured: str) -> Floats:
    """Returns the leading exponents of a cell without inputs, in nats per unit of time: `(EXPONENTS, samples)`."""
    x = keras.Input((steps, 1))
    initial = [keras.Input(state.shape[1:]) for state in states]
    model = keras.Model([x, *initial], keras.layers.RNN(cell, name="rnn")(x, initial_state=initial))
    probe = [np.zeros((len(states[0]), steps, 1), np.float32), *states]
    report = measure(model, probe, measures=[measured], exponents=EXPONENTS)
    return report["rnn"][measured] / DT


def main() -> None:
    """Prints the table, and asserts that the exponent of the trained network is that of the equations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a smaller GRU, hardly trained, without a claim")
    fast = parser.parse_args().fast
    trajectories, units, epochs, samples, steps = (64, 16, 2, 4, 300) if fast else (1024, 64, 60, 16, 2000)
    keras.utils.set_random_seed(0)
    data = make_data(trajectories, 4)
    gru, free, loss = train(data, units, epochs)
    print(f"{units} units, {epochs * (len(data) // BATCH)} updates, mean squared error of an increment {loss:.2g}\n")
    seen = data[:samples].astype(np.float32)
    # The network has seen all points of a window but the last one, which is its first own input.
    states = [np.asarray(gru(seen[:, :-1])[:, -1]), seen[:, -1]]
    points = (seen[:, -1] * SPREAD + CENTER).astype(np.float32)
    measured = {
        "the equations": exponents(LorenzCell(), [points], steps, "lyapunov"),
        "the GRU": exponents(free, states, steps, "joint/lyapunov"),
    }
    print("| exponents of | published | ours | off by | second | third | spread of the first over samples |")
    print("| --- " * 7 + "|")
    for (name, found), published in zip(measured.items(), (EQUATIONS, PUBLISHED), strict=True):
        first, second, third = np.mean(found, axis=1)
        off, spread = first / EQUATIONS - 1, np.std(found[0], ddof=1)
        print(f"| {name} | {published} | {first:.4f} | {off:+.1%} | {second:+.4f} | {third:+.3f} | {spread:.4f} |")
        assert fast or abs(off) < TOLERANCE, "the exponent is not that of the equations"


if __name__ == "__main__":
    main()
