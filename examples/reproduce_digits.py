"""Read digits pixel by pixel with deep stacks: plain, stabilized to a radius of 1, and to a radius of 0.5.

L. Herranz-Celotti and J. Rouat, "Stabilizing RNN Gradients through Pre-training", arXiv 2308.12075, bring the spectral
radius of the Jacobians through time and through depth to a target before the training. They report that this helps, and
that 0.5 is the better target for deep stacks, where the number of paths of the gradient grows with the depth. Their
digits are those of MNIST, 784 pixels each; these are the ones that come with scikit-learn, with 64 pixels.

    python examples/reproduce_digits.py                        # ReLU layers, depth 2 and 5, 4 seeds: half an hour
    python examples/reproduce_digits.py --layer lstm gru       # other layers
    python examples/reproduce_digits.py --figure digits.png    # draws the curves, too
    python examples/reproduce_digits.py --fast                 # small, less than a minute
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from keras_jacmon import stabilize

BATCH, PROBE, TEST = 32, 16, 360
# Stacks of at least this depth are deep.
DEEP = 5
TARGETS: dict[str, float | None] = {"plain": None, "to 1": 1.0, "to 0.5": 0.5}
LAYERS: dict[str, tuple[type[keras.layers.RNN], dict[str, Any]]] = {
    "relu": (keras.layers.SimpleRNN, {"activation": "relu"}),
    "sigmoid": (keras.layers.SimpleRNN, {"activation": "sigmoid"}),
    "lstm": (keras.layers.LSTM, {}),
    "gru": (keras.layers.GRU, {}),
}

Data = tuple[NDArray[np.float32], NDArray[np.int64]]
# Test accuracies `(seeds, epochs)` by target.
Curves = Mapping[str, NDArray[np.float64]]


def load(stride: int) -> tuple[Data, Data]:
    """Returns every `stride`-th pixel `(samples, 64 / stride, 1)` and the digits, for training and for testing."""
    x, y = load_digits(return_X_y=True)
    x = (x / 8.0 - 1.0).astype(np.float32)[:, ::stride, None]
    order = np.random.default_rng(0).permutation(len(x))
    test, train = order[:TEST], order[TEST:]
    return (x[train], y[train]), (x[test], y[test])


def make_model(layer: str, units: int, depth: int, steps: int, seed: int) -> keras.Model:
    """Returns a compiled stack of equal layers with the initial weights of Keras."""
    keras.utils.set_random_seed(seed)
    kind, arguments = LAYERS[layer]
    layers = [kind(units, return_sequences=level + 1 < depth, **arguments) for level in range(depth)]
    model = keras.Sequential([keras.Input((steps, 1)), *layers, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3, clipnorm=1.0), loss, metrics=["accuracy"])
    return model


def train(model: keras.Model, target: float | None, epochs: int, train: Data, test: Data) -> tuple[bool, list[float]]:
    """Returns True if the stack is within the tolerance of its target, and the test accuracy after each epoch."""
    is_there = True
    if target is not None:
        radii = {"time": target, "depth": target}
        is_there = stabilize(model, train[0][:PROBE], radii, "spectral_radius", verbose=0).converged
    history = model.fit(*train, batch_size=BATCH, epochs=epochs, validation_data=test, verbose=0)
    return is_there, list(history.history["val_accuracy"])


def compare(layer: str, depth: int, arguments: argparse.Namespace, data: tuple[Data, Data]) -> Curves:
    """Trains a stack with each target and seed, prints the rows, and returns the curves."""
    curves: dict[str, NDArray[np.float64]] = {}
    for name, target in TARGETS.items():
        found = []
        for seed in range(arguments.seeds):
            model = make_model(layer, arguments.units, depth, data[0][0].shape[1], seed)
            found.append(train(model, target, arguments.epochs, *data))
        there = sum(is_there for is_there, _ in found)
        curves[name] = np.array([curve for _, curve in found])
        at = [epoch - 1 for epoch in marks(arguments.epochs)]
        means = " / ".join(f"{value:.3f}" for value in curves[name].mean(axis=0)[at])
        last = " ".join(f"{value:.3f}" for value in curves[name][:, -1])
        reached = "-" if target is None else f"{there} of {len(found)}"
        print(f"| {layer} | {depth} | {name} | {reached} | {means} | {last} |", flush=True)
    return curves


def judge(curves: Mapping[tuple[str, int], Curves]) -> None:
    """Prints the claims of the article against the mean last accuracies."""
    print("\n| layer | depth | claim of the article | ours: difference | holds |\n| --- | --- | --- | --- | --- |")
    for (layer, depth), by_target in curves.items():
        last = {name: float(values[:, -1].mean()) for name, values in by_target.items()}
        for better, worse in (("to 1", "plain"), ("to 0.5", "to 1"))[: 2 if depth >= DEEP else 1]:
            difference = last[better] - last[worse]
            holds = "yes" if difference > 0 else "no"
            print(f"| {layer} | {depth} | {better} is better than {worse} | {difference:+.3f} | {holds} |")


def marks(epochs: int) -> list[int]:
    """Returns the epochs whose mean accuracy is printed."""
    return sorted({max(1, round(epochs * part)) for part in (0.1, 0.25, 0.5, 1.0)})


def draw(path: str, curves: Mapping[tuple[str, int], Curves]) -> None:
    """Draws the mean accuracy by epoch, with the range of the seeds."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - the extra `plot`

    figure = Figure(figsize=(4 * len(curves), 3.2), layout="constrained")
    axes: Sequence[Any] = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for ax, ((layer, depth), by_target) in zip(axes, curves.items(), strict=True):
        for name, values in by_target.items():
            epochs = np.arange(1, values.shape[1] + 1)
            ax.plot(epochs, values.mean(axis=0), label=name)
            ax.fill_between(epochs, values.min(axis=0), values.max(axis=0), alpha=0.2)
        ax.set(title=f"{layer}, depth {depth}", xlabel="epoch")
    axes[0].set_ylabel("test accuracy")
    axes[0].legend()
    figure.savefig(path)


def main() -> None:
    """Prints the table, and the claims of the article against it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", nargs="*", choices=LAYERS, default=["relu"], help="default: relu")
    parser.add_argument("--depth", nargs="*", type=int, default=[2, 5], help="layers; default: 2 5")
    parser.add_argument("--seeds", type=int, default=4, help="number of seeds; default: 4")
    parser.add_argument("--epochs", type=int, default=20, help="default: 20")
    parser.add_argument("--units", type=int, default=64, help="of each layer; default: 64")
    parser.add_argument("--stride", type=int, default=1, help="read every N-th pixel; default: 1", metavar="N")
    parser.add_argument("--figure", metavar="FILE", help="draw the curves into this file; needs the extra `plot`")
    parser.add_argument(
        "--fast", action="store_true", help="depth 2, 16 units, every fourth pixel, one seed, two epochs"
    )
    arguments = parser.parse_args()
    if arguments.fast:
        fast = {"depth": [2], "seeds": 1, "epochs": 2, "units": 16, "stride": 4}
        arguments = argparse.Namespace(**(vars(arguments) | fast))
    data = load(arguments.stride)
    at = " / ".join(str(epoch) for epoch in marks(arguments.epochs))
    print(f"| layer | depth | stabilized | radii reached | mean accuracy at epoch {at} | last accuracy by seed |")
    print("| --- | --- | --- | --- | --- | --- |")
    curves = {
        (layer, depth): compare(layer, depth, arguments, data) for layer in arguments.layer for depth in arguments.depth
    }
    judge(curves)
    if arguments.figure:
        draw(arguments.figure, curves)


if __name__ == "__main__":
    main()
