"""What `stabilize` reaches, and in how many seconds, beside one step of a script that rebuilds the model each time.

And whether the suggestions of a verdict come true.

Prints Markdown tables.

    python benchmarks/stabilize.py                        # every table, some ten minutes
    python benchmarks/stabilize.py radius --only lstm     # one kind of layer
    python benchmarks/stabilize.py flossing
    python benchmarks/stabilize.py suggestions
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_jacmon
from keras_jacmon.model.layers import find_recurrent_layers
from keras_jacmon.report.suggestion import Suggestion
from keras_jacmon.report.verdict import Verdict
from keras_jacmon.stabilization.flossing import ExponentsObjective

UNITS, STEPS, BATCH, FEATURES = 128, 30, 16, 3
DEPTHS, TARGETS = (2, 5), (1.0, 0.5)
# As published: units, exponents, and steps; the first tenth of the probe is left out.
FLOSSED_UNITS, EXPONENTS, WINDOW, UPDATES = 80, 75, 61, 500
# A prediction has come true if the growth differs from it by at most this share of the change that it promises.
TRUE_WITHIN = 0.1
SUGGESTED_UNITS, LENGTHS = 64, (50, 200)

Maker = Callable[[], keras.layers.RNN]
KINDS: dict[str, Maker] = {
    "lstm": lambda: keras.layers.LSTM(UNITS, return_sequences=True),
    "gru": lambda: keras.layers.GRU(UNITS, return_sequences=True),
    "relu": lambda: keras.layers.SimpleRNN(UNITS, activation="relu", return_sequences=True),
    "sigmoid": lambda: keras.layers.SimpleRNN(UNITS, activation="sigmoid", return_sequences=True),
}

SUGGESTED: dict[str, Maker] = {
    "lstm": lambda: keras.layers.LSTM(SUGGESTED_UNITS, name="rnn"),
    "gru": lambda: keras.layers.GRU(SUGGESTED_UNITS, name="rnn"),
    "tanh": lambda: keras.layers.SimpleRNN(SUGGESTED_UNITS, name="rnn"),
    "relu": lambda: keras.layers.SimpleRNN(SUGGESTED_UNITS, activation="relu", name="rnn"),
}

INITIALIZERS: dict[str, keras.initializers.Initializer] = {
    "orthogonal": keras.initializers.Orthogonal(seed=0),
    "glorot": keras.initializers.GlorotUniform(seed=0),
    "he": keras.initializers.HeNormal(seed=0),
    "0.1 orthogonal": keras.initializers.Orthogonal(0.1, seed=0),
    "2 orthogonal": keras.initializers.Orthogonal(2.0, seed=0),
}


def stack(make: Maker, depth: int) -> tuple[keras.Model, Any]:
    """Makes a stack of equal layers, and a probe."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((STEPS, FEATURES)), *[make() for _ in range(depth)], keras.layers.Dense(1)])
    return model, np.random.default_rng(0).normal(size=(BATCH, STEPS, FEATURES)).astype("float32")


def loop_step(model: keras.Model, probe: Any, target: float) -> float:
    """Returns the seconds of one step of a loop: each layer made anew, its joint Jacobian and radius by tapes."""
    begin = time.perf_counter()
    values = tf.convert_to_tensor(probe)
    for layer in model.layers[:-1]:
        cell = type(layer.cell).from_config(layer.cell.get_config())
        cell.build((BATCH, values.shape[-1]))
        cell.set_weights(layer.cell.get_weights())
        sizes = cell.state_size if isinstance(cell.state_size, (list, tuple)) else [cell.state_size]
        point = tf.random.normal((BATCH, sum(sizes)))
        with tf.GradientTape() as outer:
            with tf.GradientTape() as tape:
                tape.watch(point)
                _, states = cell(values[:, 0], tf.split(point, sizes, axis=1))
                new = tf.concat(tf.nest.flatten(states), axis=1)
            J = tape.batch_jacobian(new, point)
            loss = tf.reduce_mean((tf.reduce_max(tf.abs(tf.linalg.eigvals(J)), axis=1) - target) ** 2)
        outer.gradient(loss, cell.trainable_variables)
        values = layer(values)
    return time.perf_counter() - begin


def radius(only: str | None) -> None:
    """Prints the radii that are reached, for each kind of layer, depth and target."""
    heads = (
        "before",
        "after",
        "all within 0.08",
        "updates",
        "seconds by the clock (of the processors)",
        "a step of the loop",
    )
    print(f"\n| layer | depth | target | {' | '.join(heads)} |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for kind, make in KINDS.items():
        for depth in DEPTHS if only in (None, kind) else ():
            for target in TARGETS:
                model, probe = stack(make, depth)
                step = loop_step(model, probe, target)
                begin = time.process_time()
                result = keras_jacmon.stabilize(model, probe, target, verbose=0)
                busy = time.process_time() - begin
                before, after = (
                    ", ".join(f"{goal.value(report):.2f}" for goal in result.goals)
                    for report in (result.before, result.after)
                )
                print(
                    f"| {kind} | {depth} | {target} | {before} | {after} | {'yes' if result.converged else 'no'} | "
                    f"{result.history['updates'][-1]} | {result.seconds:.0f} ({busy:.0f}) | {step:.2f} s |",
                    flush=True,
                )


def flossing(_: str | None) -> None:
    """Prints the mean squared exponent of a random tanh network along the updates, and the time of an update."""
    print("\n| updates | mean squared exponent | milliseconds of an update (of the processors) |\n| --- | --- | --- |")
    keras.utils.set_random_seed(0)
    layer = keras.layers.SimpleRNN(
        FLOSSED_UNITS,
        kernel_initializer=keras.initializers.RandomNormal(0.0, 1.0),
        recurrent_initializer=keras.initializers.RandomNormal(0.0, FLOSSED_UNITS**-0.5),
        bias_initializer=keras.initializers.RandomUniform(0.0, 0.1),
    )
    model = keras.Sequential([keras.Input((WINDOW, 1)), layer])
    bits = np.random.default_rng(0).integers(0, 2, size=(1, WINDOW, 1)).astype("float32")
    layers = find_recurrent_layers(model)
    loss = ExponentsObjective(model, tf.constant(bits), layers, count=EXPONENTS, target=0.0, seed=0)
    optimizer, weights = keras.optimizers.Adam(1e-3), model.trainable_variables
    optimizer.build(weights)
    apply = tf.function(lambda slopes: optimizer.apply(slopes, weights))
    times: list[tuple[float, float]] = []
    for update in range(UPDATES + 1):
        begin, busy = time.perf_counter(), time.process_time()
        value, slopes = loss.value_and_slopes()
        apply(slopes)
        times.append((time.perf_counter() - begin, time.process_time() - busy))
        if update % 100 == 0:
            wall, cpu = 1e3 * np.median(times, axis=0)
            print(f"| {update} | {float(value):.5f} | {wall:.0f} ({cpu:.0f}) |", flush=True)


def suggestions(only: str | None) -> None:
    """Prints each suggestion, its prediction and what is measured after `apply`, on the probe and on other samples."""
    print(
        "\n| layer | initialization | steps | before | suggestion | predicted | measured | on other samples | after |"
        "\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    rows = [
        (kind, name, steps, row)
        for kind in SUGGESTED
        if only in (None, kind)
        for steps in LENGTHS
        for name, row in suggestions_of(kind, steps).items()
    ]
    for kind, name, steps, (before, suggestion, after, other) in rows:
        print(f"| {kind} | {name} | {steps} | {before.state} {before.growth:+.3f} |", end="")
        if suggestion is None:
            print(" | | | | |" if before.state == "stable" else " none that helps | | | | |")
            continue
        change = suggestion.change
        what = f"{'add' if change.entries else 'multiply by'} {change.amount:.3g}, `{change.names[0]}`"
        print(
            f" {what} | {suggestion.predicted:+.4f} | {after.growth:+.4f} | {other.growth:+.4f} | "
            f"{after.state}; {other.state} |"
        )
    made = [row for *_, row in rows if row[1] is not None]
    unstable = [row for *_, row in rows if row[0].state != "stable"]
    print(f"\n{len(rows)} starts, {len(unstable)} of them not stable, {len(made)} with a suggestion.")
    for place, where in ((2, "on the probe"), (3, "on other samples")):
        true = sum(is_true(row[1], row[place]) for row in made)
        worse = sum(row[place].state != "stable" and abs(row[place].growth) > abs(row[0].growth) for row in made)
        stable = sum(row[place].state == "stable" for row in made)
        print(f"- {where}: {true} of {len(made)} predictions come true, {stable} are stable afterwards, {worse} worse")


def suggestions_of(kind: str, steps: int) -> dict[str, Any]:
    """Returns by initialization the verdict before, the suggestion, and the verdicts after on two sets of samples."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((steps, FEATURES)), SUGGESTED[kind]()])
    first = model.get_weights()
    rng = np.random.default_rng(0)
    meter, other = (
        keras_jacmon.JacobianMeter(
            model, rng.normal(size=(BATCH, steps, FEATURES)).astype("float32"), measures=["joint/growth"]
        )
        for _ in range(2)
    )
    found: dict[str, Any] = {}
    for name, initializer in INITIALIZERS.items():
        model.set_weights(first)
        kernel = model.layers[0].cell.recurrent_kernel
        kernel.assign(initializer(kernel.shape))
        before = meter().verdict["rnn"]
        suggestion = next(iter(before.suggestions), None)
        if suggestion is not None:
            suggestion.apply(model)
        after = [one(suggestions=False).verdict["rnn"] for one in (meter, other)]
        found[name] = (before, suggestion, *after)
    return found


def is_true(suggestion: Suggestion, after: Verdict) -> bool:
    """Returns True if the growth differs from the prediction by at most a tenth of the change that it promises."""
    return abs(after.growth - suggestion.predicted) <= TRUE_WITHIN * abs(suggestion.predicted - suggestion.growth)


TABLES = {"radius": radius, "flossing": flossing, "suggestions": suggestions}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], default=[])
    parser.add_argument("--only", choices=sorted({*KINDS, *SUGGESTED}))
    arguments = parser.parse_args()
    print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} cores", file=sys.stderr)
    for name in arguments.tables or TABLES:
        TABLES[name](arguments.only)
