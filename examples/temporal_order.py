"""Temporal order: the verdict before a training against its success, and the changes that rescue long sequences.

Two of the symbols of a sequence of length L are marks, A or B, the first between 0.1 L and 0.2 L, the second between
0.5 L and 0.6 L; all others are one of four distractors. After the last step the layer has to name the two marks in
their order, one of four classes (Hochreiter and Schmidhuber 1997; the positions are those of Pascanu and others,
arXiv 1211.5063). A training succeeds if it names at least 95 % of new sequences right.

A cure changes the weights before the training: the biases of the gates (chrono), what the verdict suggests
(suggestion), the kernel (identity), the spectral radius, the growth, or the Lyapunov exponents (flossing). Two of them
act while it runs: a penalty on the growth (held), and Pascanu's on the way of the error through a `SimpleRNN` or a
`GRU` (omega).

    python examples/temporal_order.py        # 5 seeds, no cure, lengths 40 and 120: half an hour on two cores
    python examples/temporal_order.py --length 120 --layer LSTM GRU --cure chrono
    python examples/temporal_order.py --length 120 --layer SimpleRNN --cure radius+omega
    python examples/temporal_order.py --fast        # an LSTM at 20 steps, less than a minute
"""

import argparse
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from reproduce_pascanu import omega

from keras_jacmon import (
    JacobianMonitor,
    JacobianRegularizer,
    chrono_biases,
    measure,
    stabilize,
    state_jacobian,
    suggest,
)

UNITS, SYMBOLS, CLASSES, BATCH, SAMPLES, NEW_SAMPLES, PROBE, SUCCESS = 64, 6, 4, 64, 4096, 1000, 32, 0.95
OMEGA_STRENGTH = 5.0
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
    # A penalty on the growth has no derivative that XLA can compile.
    compile_model(model, jit_compile=False)
    return model


def compile_model(model: keras.Model, *, jit_compile: bool) -> None:
    """Compiles a model for the task; its gradients are clipped."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3, clipnorm=1.0), loss, metrics=["accuracy"], jit_compile=jit_compile)


class OmegaModel(keras.Model):
    """A model of a `SimpleRNN` and a readout that is trained with the Ω of `reproduce_pascanu.py`."""

    def train_step(self, data: Any) -> dict[str, Any]:
        """Updates the weights by the gradients of loss and Ω; returns the logs."""
        x, y = data
        cell, readout = self.get_layer("rnn").cell, self.layers[-1]
        # The tape fills in zeros for tensors only.
        weights = [variable.value for variable in self.trainable_variables]
        with tf.GradientTape() as tape:
            states = keras.layers.RNN(cell, return_sequences=True)(x)
            last = states[:, -1]
            logits = readout(last)
            loss = self.compute_loss(x=x, y=y, y_pred=logits)
        delta, gradients = tape.gradient(loss, [last, weights])
        inputs, states = (tf.transpose(value, [1, 0, 2]) for value in (x, states))
        old = tf.concat([tf.zeros_like(states[:1]), states[:-1]], axis=0)
        with tf.GradientTape() as tape:
            penalty = omega(cell, inputs, old, errors_of_states(cell, inputs, old, delta))
        others = tape.gradient(penalty, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        both = [gradient + OMEGA_STRENGTH * other for gradient, other in zip(gradients, others, strict=True)]
        self.optimizer.apply(both, self.trainable_variables)
        return self.compute_metrics(x, y, logits) | {"loss": loss, "omega": penalty}


def errors_of_states(cell: Any, inputs: tf.Tensor, old: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
    """Returns the derivatives of the loss by all new states `(steps, samples, units)`, from that by the last one."""

    def back(error: tf.Tensor, step: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        return state_jacobian(cell, step[0], [step[1]]).matvec(error, adjoint=True)

    before = tf.scan(back, (inputs[1:], old[1:]), initializer=last, reverse=True)
    return tf.concat([before, last[None]], axis=0)


def set_identity(model: keras.Model, _probe: Any, _length: int) -> None:
    """Makes the recurrent kernel the identity."""
    kernel = model.get_layer("rnn").cell.recurrent_kernel
    kernel.assign(np.eye(*kernel.shape))


def follow_suggestion(model: keras.Model, probe: Any, _length: int) -> None:
    """Applies the first suggestion of the verdict, if there is one."""
    for suggestion in suggest(model, probe)["rnn"][:1]:
        suggestion.apply(model)


def with_omega(model: keras.Model) -> keras.Model:
    """Returns a model with the same weights that is trained with Ω."""
    trained = OmegaModel(model.inputs, model.outputs)
    compile_model(trained, jit_compile=True)
    return trained


def held_growth(probe: Any, targets: Any) -> JacobianMonitor:
    """Returns a monitor whose regularizer holds the growth at 0."""
    regularizer = JacobianRegularizer(0.0, measure="growth", view="joint")
    return JacobianMonitor(probe, targets=targets, measures=["joint/growth"], log_dir=None, regularizer=regularizer)


# What is done before the training. HELD and OMEGA are done while it runs.
BEFORE: dict[str, Callable[[keras.Model, Any, int], Any]] = {
    "chrono": lambda model, _, length: chrono_biases(model, length),
    "suggestion": follow_suggestion,
    "identity": set_identity,
    "radius": lambda model, probe, _: stabilize(model, probe, verbose=0),
    "growth": lambda model, probe, _: stabilize(model, probe, measure="growth", method="rescale", verbose=0),
    "flossing": lambda model, probe, _: stabilize(model, probe[:4], method="flossing", steps=100, verbose=0),
}
HELD, OMEGA = "held", "omega"
CURES = ["none", *BEFORE, HELD, OMEGA]
UNFIT = {"SimpleRNN": ("chrono", "which has no gates"), "LSTM": (OMEGA, "which has two states")}


def train(layer: str, length: int, seed: int, cures: list[str], epochs: int) -> tuple[str, float, float, float]:
    """Returns the verdict and its growth before the training, its growth afterwards, and the accuracy."""
    data, new = make_data(SAMPLES, length, 1000 + seed), make_data(NEW_SAMPLES, length, 2000 + seed)
    model, probe = make_model(layer, length, seed), data[0][:PROBE]
    for name in cures:
        if name in BEFORE:
            BEFORE[name](model, probe, length)
    verdict = measure(model, probe, measures=["joint/growth"]).verdict["rnn"]
    callbacks = [held_growth(probe, data[1][:PROBE])] if HELD in cures else []
    trained = with_omega(model) if OMEGA in cures else model
    trained.fit(*data, batch_size=BATCH, epochs=epochs, verbose=0, callbacks=callbacks)
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


def cure(word: str) -> str:
    """Returns the word if it joins names of cures, for `argparse`."""
    if not set(word.split("+")) <= set(CURES):
        raise argparse.ArgumentTypeError(f"expected {', '.join(CURES)}, or some of them joined with +, not {word!r}")
    return word


def parse_arguments() -> argparse.Namespace:
    """Returns the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", nargs="*", default=list(LAYERS), choices=LAYERS, help="default: all")
    parser.add_argument("--length", nargs="*", type=int, default=[40, 120], help="steps; default: 40 120")
    parser.add_argument("--cure", nargs="*", type=cure, default=["none"], help=f"{', '.join(CURES)}; join with +")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds; default: 5")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=12, help="of 64 batches; default: 12")
    parser.add_argument("--fast", action="store_true", help="one seed of an LSTM at 20 steps, with chrono")
    arguments = parser.parse_args()
    if arguments.fast:
        fast = {"layer": ["LSTM"], "length": [20], "cure": ["chrono"], "seeds": 1, "epochs": 2}
        arguments = argparse.Namespace(**(vars(arguments) | fast))
    for layer, (name, reason) in UNFIT.items():
        if layer in arguments.layer and any(name in word.split("+") for word in arguments.cure):
            parser.error(f"{name} does not fit {layer}, {reason}: choose others with --layer")
    return arguments


def main() -> None:
    """Prints the table."""
    arguments = parse_arguments()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    print("| layer | length | cure | verdict before | growth before | growth after | accuracy by seed | success |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for length in arguments.length:
        for word in arguments.cure:
            for layer in arguments.layer:
                found = [train(layer, length, seed, word.split("+"), arguments.epochs) for seed in seeds]
                show(layer, length, word, found)


if __name__ == "__main__":
    main()
