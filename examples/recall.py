"""Recall the first symbol of a long sequence, with and without a `JacobianRegularizer`.

The first step shows one of four symbols; all later steps are noise. After the last step a `SimpleRNN` with the default
initial weights of Keras has to name the symbol. The regularizer holds `variance` at 1, where gradients keep their size,
with a strength that it chooses itself. A training succeeds if it recalls at least 95 % of the symbols of new ones.

    python examples/recall.py               # 5 seeds, some minutes on two cores
    python examples/recall.py --seeds 1     # one seed
"""

import argparse
from typing import Literal

import keras
import numpy as np
from numpy.typing import NDArray

from keras_jacmon import JacobianMonitor, JacobianRegularizer

UNITS, SYMBOLS, SUCCESS, SAMPLES, BATCH = 64, 4, 0.95, 4096, 64

Data = tuple[NDArray[np.float32], NDArray[np.int64]]


def make_data(samples: int, steps: int, seed: int) -> Data:
    """Returns sequences `(samples, steps, symbols + 1)` and their first symbols `(samples,)`."""
    random = np.random.default_rng(seed)
    x = np.zeros((samples, steps, SYMBOLS + 1), np.float32)
    x[:, :, -1] = random.normal(size=(samples, steps))
    y = random.integers(0, SYMBOLS, samples)
    x[np.arange(samples), 0, y] = 1
    return x, y


def train(
    seed: int, strength: float | Literal["auto"], epochs: int, train: Data, test: Data
) -> tuple[float, list[float], float]:
    """Trains once; returns the accuracy, the mean `variance` at the beginning and the end, and `growth` at the end."""
    keras.utils.set_random_seed(seed)
    rnn = keras.layers.SimpleRNN(UNITS, name="rnn")
    model = keras.Sequential([keras.Input(train[0].shape[1:]), rnn, keras.layers.Dense(SYMBOLS)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3, clipnorm=1.0), loss, metrics=["accuracy"])
    regularizer = JacobianRegularizer(target=1.0, strength=strength, rows=256) if strength else None
    monitor = JacobianMonitor(
        train[0][:32],
        targets=train[1][:32],
        measures=["variance", "joint/growth"],
        log_dir=None,
        regularizer=regularizer,
    )
    model.fit(*train, batch_size=BATCH, epochs=epochs, verbose=0, callbacks=[monitor])
    variances = [report["rnn"].mean("variance") for _, report in (monitor.reports[0], monitor.reports[-1])]
    return model.evaluate(*test, verbose=0)[1], variances, monitor.reports[-1][1]["rnn"].scalars()["growth"]


def strength(word: str) -> float | Literal["auto"]:
    """Returns the strength that a word of the command line means."""
    return "auto" if word == "auto" else float(word)


def main() -> None:
    """Prints the table, and asserts that more trainings succeed with the regularizer than without it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds; default: 5")
    parser.add_argument("--steps", type=int, default=200, help="of a sequence; default: 200")
    parser.add_argument("--epochs", type=int, default=8, help="default: 8")
    parser.add_argument("--strength", type=strength, default="auto", help="a number, or auto, the default")
    arguments = parser.parse_args()
    data = make_data(SAMPLES, arguments.steps, 0), make_data(1000, arguments.steps, 1)
    successes = []
    print(f"{arguments.steps} steps, {arguments.epochs * SAMPLES // BATCH} updates")
    print("regularizer  seed  accuracy  variance      growth (nats per step)")
    for chosen in (0.0, arguments.strength):
        name, count = "with" if chosen else "without", 0
        for seed in range(arguments.seeds):
            accuracy, (first, last), growth = train(seed, chosen, arguments.epochs, *data)
            count += accuracy >= SUCCESS
            print(f"{name:<11}  {seed:<4}  {accuracy:<8.3f}  {first:.2f} -> {last:.2f}  {growth:+.3f}", flush=True)
        successes.append(count)
        print(f"{name:<11}  {count} of {arguments.seeds} recall it", flush=True)
    assert successes[1] > successes[0], "the regularizer did not help"


if __name__ == "__main__":
    main()
