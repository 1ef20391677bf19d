"""Gradient flossing on delayed copy and delayed XOR, against the claims of the article.

A tanh network of 80 units reads random bits s_t, and names s_{t-D} (copy) or s_{t-D/2} xor s_{t-D} (XOR) at each step
from D on. With flossing, up to 500 updates before the training and again before its steps 100 and 200 bring 75 Lyapunov
exponents to 0. A training succeeds if at least 95 % of the bits of its last 50 batches are right. The settings are
those of R. Engelken, "Gradient flossing: improving gradient descent through dynamic control of Jacobians", arXiv
2312.17306: T = 300, batches of 16 fresh sequences, Adam at 0.001, each gradient clipped to a norm of 0.03, 1500 steps.

Seconds are those of the processor, all cores together, so that other work on the machine counts neither in the table
nor in `--equal-time`.

    python examples/reproduce_flossing.py                                       # every row, 5 seeds: an hour
    python examples/reproduce_flossing.py --task xor --delay 40 --seeds 1       # one seed of a task, some minutes
    python examples/reproduce_flossing.py --fast                                # a small network, less than a minute
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from keras_jacmon import FlossingEpisodes

# An epoch has 50 batches, so that the episodes come before the steps 0, 100 and 200.
SUCCESS, PER_EPOCH, FLOSSED_EPOCHS, MARKS = 0.95, 50, (0, 2, 4), (100, 500, 1500)


@dataclass(frozen=True)
class Size:
    """The numbers of an experiment; the default ones are those of the article."""

    units: int = 80
    exponents: int = 75
    # The first tenth is left out: 55 steps remain.
    window: int = 61
    updates: int = 500
    length: int = 300
    batch: int = 16
    steps: int = 1500


FAST = Size(units=16, exponents=8, window=20, updates=20, length=30, steps=100)

# The claim: all trainings succeed with flossing, and at most one without it, for these delays.
ROWS = (("xor", 40), ("copy", 40), ("xor", 30))
FAST_ROWS = (("copy", 1),)


def batches(task: str, delay: int, size: Size, seed: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Yields fresh bits `(batch, length, 1)` and the bits to be named, `(batch, length - delay, 1)`."""
    random = np.random.default_rng(seed)
    while True:
        bits = random.integers(0, 2, (size.batch, size.length, 1))
        wanted = bits[:, :-delay]
        if task == "xor":
            wanted = wanted ^ bits[:, delay - delay // 2 : -(delay // 2)]
        yield bits.astype(np.float32), wanted.astype(np.float32)


def make_model(delay: int, size: Size, seed: int) -> keras.Model:
    """Returns a compiled network with the random weights of the article."""
    keras.utils.set_random_seed(seed)
    normal = keras.initializers.RandomNormal
    layer = keras.layers.SimpleRNN(
        size.units,
        return_sequences=True,
        kernel_initializer=normal(stddev=1.0),
        recurrent_initializer=normal(stddev=size.units**-0.5),
        bias_initializer=keras.initializers.RandomUniform(0.0, 0.1),
        name="rnn",
    )
    readout = keras.layers.Dense(1, kernel_initializer=normal(stddev=1.0))
    model = keras.Sequential([keras.Input((None, 1)), layer, readout, keras.layers.Cropping1D((delay, 0))])
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    right = keras.metrics.BinaryAccuracy(threshold=0.0, name="accuracy")
    model.compile(keras.optimizers.Adam(1e-3, clipnorm=0.03), loss, metrics=[right], jit_compile=False)
    return model


def train(task: str, delay: int, size: Size, seed: int, *, flosses: bool, seconds: float = 0) -> list[float]:
    """Trains for the steps of the size, and until the seconds are over; returns the accuracy of each 50 batches."""
    model, epochs = make_model(delay, size, seed), math.ceil(size.steps / PER_EPOCH)
    callbacks: list[keras.callbacks.Callback] = []
    if flosses:
        probe = np.random.default_rng(seed).integers(0, 2, (1, size.window, 1)).astype("float32")
        callbacks.append(FlossingEpisodes(probe, FLOSSED_EPOCHS, size.updates, exponents=size.exponents, seed=seed))
    if seconds:
        last, end, epochs = epochs - 1, time.process_time() + seconds, 100 * epochs

        def end_after(epoch: int, _logs: Any) -> None:
            model.stop_training = epoch >= last and time.process_time() >= end

        callbacks.append(keras.callbacks.LambdaCallback(on_epoch_end=end_after))
    data = batches(task, delay, size, 1000 + seed)
    history = model.fit(data, steps_per_epoch=PER_EPOCH, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
    return list(history.history["accuracy"])


def compare(task: str, delay: int, size: Size, seeds: range, *, equal_time: bool) -> tuple[int, int]:
    """Prints a line for each training; returns the number of successes with flossing, and without it."""
    successes = {True: 0, False: 0}
    for seed in seeds:
        seconds = 0.0
        for flosses in (True, False):
            begin = time.process_time()
            accuracies = train(task, delay, size, seed, flosses=flosses, seconds=seconds)
            taken = time.process_time() - begin
            successes[flosses] += accuracies[-1] >= SUCCESS
            shown = " / ".join(f"{accuracies[steps // PER_EPOCH - 1]:.3f}" for steps in MARKS if steps <= size.steps)
            print(
                f"| {task} | {delay} | {seed} | {'with' if flosses else 'without'} | {shown} | "
                f"{len(accuracies) * PER_EPOCH} | {accuracies[-1]:.4f} | {taken:.0f} |",
                flush=True,
            )
            seconds = taken if equal_time else 0.0
    return successes[True], successes[False]


def main() -> None:
    """Prints the accuracies, and the successes against the claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["copy", "xor"], help="one task; all rows without it")
    parser.add_argument("--delay", type=int, help="another delay D than those of the claim")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds; default: 5")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--equal-time", action="store_true", help="train without flossing for as long as with it")
    parser.add_argument("--fast", action="store_true", help="copy at D = 1 with 16 units, one seed")
    arguments = parser.parse_args()
    rows = tuple((task, arguments.delay or delay) for task, delay in ROWS if arguments.task in (None, task))
    seeds, size = range(arguments.first_seed, arguments.first_seed + arguments.seeds), Size()
    if arguments.fast:
        rows, seeds, size = FAST_ROWS, range(1), FAST
    marks = " / ".join(str(steps) for steps in MARKS if steps <= size.steps)
    print(f"| task | delay | seed | flossing | accuracy at {marks} steps | steps | last accuracy | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    found = {row: compare(*row, size, seeds, equal_time=arguments.equal_time) for row in dict.fromkeys(rows)}
    print("\n| task | delay | success with flossing | without | claim |\n| --- | --- | --- | --- | --- |")
    for (task, delay), (with_it, without) in found.items():
        counts = f"{with_it} of {len(seeds)} | {without} of {len(seeds)}"
        print(f"| {task} | {delay} | {counts} | all with it, at most 1 of 5 without |")


if __name__ == "__main__":
    main()
