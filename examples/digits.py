"""Read digits pixel by pixel, with and without a `JacobianRegularizer`: variance of the Jacobian, and accuracy.

A `SimpleRNN` reads the 64 pixels of scikit-learn's digits one at a time. At gain 1 of the recurrent kernel a linear
network keeps the size of its gradient; the trainings start at gains 0.5 and 1.5. The regularizer holds `variance` at 1.

    python examples/digits.py               # 5 seeds, some minutes on two cores
    python examples/digits.py --seeds 1     # one seed
"""

import argparse
from typing import Literal

import keras
import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from keras_jacmon import JacobianMonitor, JacobianRegularizer

UNITS, BATCH, TARGET = 64, 32, 1.0
GAINS = (0.5, 1.5)

Data = tuple[NDArray[np.float32], NDArray[np.int64]]


def load() -> tuple[Data, Data]:
    """Returns pixels `(samples, 64, 1)` and digits `(samples,)`, for training and for testing."""
    x, y = load_digits(return_X_y=True)
    x = (x / 8.0 - 1.0).astype(np.float32)[:, :, None]
    order = np.random.default_rng(0).permutation(len(x))
    test, train = order[:360], order[360:]
    return (x[train], y[train]), (x[test], y[test])


def make_model(gain: float, seed: int) -> keras.Model:
    """Returns a compiled model; its recurrent kernel is Gaussian with the given gain."""
    keras.utils.set_random_seed(seed)
    # gain² = variance of the entries * units
    recurrent = keras.initializers.RandomNormal(stddev=gain / UNITS**0.5)
    layers = [
        keras.Input((64, 1)),
        keras.layers.SimpleRNN(UNITS, recurrent_initializer=recurrent, name="rnn"),
        keras.layers.Dense(10),
    ]
    model = keras.Sequential(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3, clipnorm=1.0), loss, metrics=["accuracy"])
    return model


def train(
    model: keras.Model, strength: float | Literal["auto"], epochs: int, train: Data, test: Data
) -> tuple[float, float, float]:
    """Trains a model; returns the variance before and after the training, and the accuracy on the test digits."""
    regularizer = JacobianRegularizer(TARGET, strength, rows=256) if strength else None
    monitor = JacobianMonitor(
        train[0][:BATCH], targets=train[1][:BATCH], measures=["variance"], log_dir=None, regularizer=regularizer
    )
    model.fit(*train, batch_size=BATCH, epochs=epochs, verbose=0, callbacks=[monitor])
    variances = [report["rnn"].mean("variance") for _, report in (monitor.reports[0], monitor.reports[-1])]
    return variances[0], variances[1], model.evaluate(*test, verbose=0)[1]


def strength(word: str) -> float | Literal["auto"]:
    """Returns the strength that a word of the command line means."""
    return "auto" if word == "auto" else float(word)


def main() -> None:
    """Prints the table, and asserts that the variance ends at its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds; default: 5")
    parser.add_argument("--epochs", type=int, default=40, help="default: 40")
    parser.add_argument("--strength", type=strength, default="auto", help="a number, or auto, the default")
    arguments = parser.parse_args()
    data = load()
    print("gain  regularizer  variance at first  at the end (each seed)                 accuracy (each seed)")
    for gain in GAINS:
        for chosen in (0.0, arguments.strength):
            found = [train(make_model(gain, seed), chosen, arguments.epochs, *data) for seed in range(arguments.seeds)]
            first, last, accuracy = np.transpose(found)
            values = " ".join(f"{value:.3f}" for value in last)
            accuracies = " ".join(f"{value:.3f}" for value in accuracy)
            print(
                f"{gain:<4}  {'with' if chosen else 'without':<11}  {first.mean():<17.3f}  {values:<37}"
                f"  {accuracies}  mean {accuracy.mean():.3f}",
                flush=True,
            )
            if chosen:
                np.testing.assert_allclose(last, TARGET, rtol=0.05)


if __name__ == "__main__":
    main()
