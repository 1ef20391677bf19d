"""Temporal order: the verdict before a training against its success, and the changes that rescue long sequences.

Two of the symbols of a sequence of length L are marks, A or B, the first between 0.1 L and 0.2 L, the second between
0.5 L and 0.6 L; all others are one of four distractors. After the last step the layer has to name the two marks in
their order, one of four classes (Hochreiter and Schmidhuber 1997; the positions are those of Pascanu and others,
arXiv 1211.5063). A training succeeds if it names at least 95 % of new sequences right.

    python examples/temporal_order.py                               # 5 seeds, no cure, lengths 40 and 120
    python examples/temporal_order.py --length 120 --cure chrono    # 5 seeds with a cure
    python examples/temporal_order.py --fast                        # an LSTM at 20 steps, less than a minute
"""

import argparse
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from keras_jacmon import JacobianMonitor, JacobianRegularizer, chrono_biases, measure, stabilize

UNITS, SYMBOLS, CLASSES, BATCH, SAMPLES, NEW_SAMPLES, PROBE, SUCCESS = 64, 6, 4, 64, 4096, 1000, 32, 0.95
LAYERS: dict[str, type[keras.layers.RNN]] = {
    "SimpleRNN": keras.layers.SimpleRNN,
    "LSTM": keras.layers.LSTM,
    "GRU": keras.layers.GRU,
}

Data = tuple[NDArray[np.float32], NDArray[np.int64]]


def make_data(samples: int, length: int, seed: int) -> Data:
    """Returns one-hot sequences `(samples, length, symbols)` and their classes `(samples,)`."""
    random = np.random.default_rng(seed)
    symbols = random.integers(2, SYMBOLS, (samples, length))
    marks = random.integers(0, 2, (2, samples))
    for mark, start in zip(marks, (0.1, 0.5), strict=True):
        positions = random.integers(round(start * length), round((start + 0.1) * length), samples)
        symbols[np.arange(samples), positions] = mark
    return np.eye(SYMBOLS, dtype=np.float32)[symbols], 2 * marks[0] + marks[1]


def make_model(layer: str, length: int, seed: int) -> keras.Model:
    """Returns a compiled model with the initial weights of Keras."""
    keras.utils.set_random_seed(seed)
    layers = [keras.Input((length, SYMBOLS)), LAYERS[layer](UNITS, name="rnn"), keras.layers.Dense(CLASSES)]
    model = keras.Sequential(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # A penalty on the growth has no derivative that XLA can compile.
    model.compile(keras.optimizers.Adam(1e-3, clipnorm=1.0), loss, metrics=["accuracy"], jit_compile=False)
    return model


def set_identity(model: keras.Model, _probe: Any, _length: int) -> None:
    """Makes the recurrent kernel the identity."""
    kernel = model.get_layer("rnn").cell.recurrent_kernel
    kernel.assign(np.eye(*kernel.shape))


# What is done before the training. "held" is done while it runs.
BEFORE: dict[str, Callable[[keras.Model, Any, int], Any]] = {
    "chrono": lambda model, _, length: chrono_biases(model, length),
    "identity": set_identity,
    "radius": lambda model, probe, _: stabilize(model, probe, verbose=0),
    "growth": lambda model, probe, _: stabilize(model, probe, measure="growth", method="rescale", verbose=0),
    "flossing": lambda model, probe, _: stabilize(model, probe[:4], method="flossing", steps=100, verbose=0),
}
HELD = "held"


def train(layer: str, length: int, seed: int, cure: str, epochs: int) -> tuple[str, float, float, float]:
    """Returns the verdict and its growth before the training, its growth afterwards, and the accuracy."""
    data, new = make_data(SAMPLES, length, 1000 + seed), make_data(NEW_SAMPLES, length, 2000 + seed)
    model, probe = make_model(layer, length, seed), data[0][:PROBE]
    cures = [] if cure == "none" else cure.split("+")
    for name in cures:
        if name != HELD:
            BEFORE[name](model, probe, length)
    verdict = measure(model, probe, measures=["joint/growth"]).verdict["rnn"]
    callbacks = []
    if HELD in cures:
        regularizer = JacobianRegularizer(0.0, measure="growth", view="joint")
        monitor = JacobianMonitor(
            probe, targets=data[1][:PROBE], measures=["joint/growth"], log_dir=None, regularizer=regularizer
        )
        callbacks.append(monitor)
    model.fit(*data, batch_size=BATCH, epochs=epochs, verbose=0, callbacks=callbacks)
    after = measure(model, probe, measures=["joint/growth"]).verdict["rnn"]
    return str(verdict.state), verdict.growth, after.growth, model.evaluate(*new, verbose=0)[1]


def show(layer: str, length: int, cure: str, found: list[tuple[str, float, float, float]]) -> None:
    """Prints a row of the table."""
    states, before, after, accuracies = zip(*found, strict=True)
    print(
        f"| {layer} | {length} | {cure} | {', '.join(dict.fromkeys(states))} | {np.mean(before):+.3f} | "
        f"{np.mean(after):+.3f} | {' '.join(f'{value:.2f}' for value in accuracies)} | "
        f"{sum(value >= SUCCESS for value in accuracies)} of {len(accuracies)} |",
        flush=True,
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", nargs="*", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--length", nargs="*", type=int, default=[40, 120])
    parser.add_argument("--cure", nargs="*", default=["none"], help=f"none, {', '.join(BEFORE)}, {HELD}; join with +")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--fast", action="store_true", help="one seed of an LSTM at 20 steps")
    arguments = parser.parse_args()
    if arguments.fast:
        fast = {"layer": ["LSTM"], "length": [20], "cure": ["chrono"], "seeds": 1, "epochs": 2}
        arguments = argparse.Namespace(**(vars(arguments) | fast))
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    print("| layer | length | cure | verdict before | growth before | growth after | accuracy by seed | success |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for length in arguments.length:
        for cure in arguments.cure:
            for layer in arguments.layer:
                found = [train(layer, length, seed, cure, arguments.epochs) for seed in seeds]
                show(layer, length, cure, found)


if __name__ == "__main__":
    main()
