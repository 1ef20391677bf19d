"""The cost of a measurement, as a multiple of a forward pass of the layer.

Prints the Markdown tables of `docs/costs.md`. A ratio divides two medians that are taken in one process. Both sides are
compiled with `tf.function` and have run before: `meter()` divided by a forward pass of the layer, and a loop over
`GradientTape.batch_jacobian` divided by `meter()`.

    python benchmarks/cost.py                 # every table, some minutes
    python benchmarks/cost.py units fit       # some of them
"""

import argparse
import collections
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_jacmon
from keras_jacmon import JacobianMeter, JacobianMonitor, JacobianRegularizer

BATCH, STEPS, FEATURES = 32, 50, 64
UNITS = (64, 256, 512, 1024)
# Timed runs of each call, and runs before them that are not timed. The calls take turns.
TURNS, WARM_UP = 15, 2
# Batches of an epoch, and epochs both with and without a monitor.
FIT_BATCHES, FIT_TURNS = 300, 7
# Steps of the models that are started, and their kinds, depths and turns: a short start varies most.
START_STEPS = 100
STARTS = (("forward", 1, 9), ("forward", 5, 5), ("bidirectional", 6, 3))
# Turns of the table of first variances.
FIRST_TURNS = 5
# (units, steps) for the table of memory.
MEMORY_SIZES = ((256, 50), (256, 2000), (1024, 2000))
# Seconds; a call that takes longer is timed once.
MOST_SECONDS = 10.0


class SeedCell(keras.layers.Layer):
    """Two states, of which the first is `relu(h) @ W + b`, from layers made in `__init__`."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.state_size = [units, units]
        self.hidden = keras.layers.Dense(units)
        self.out = keras.layers.Dense(units, use_bias=False)

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        """One step."""
        h, c = states
        new_h = self.hidden(keras.ops.relu(h))
        new_c = c - h + new_h
        return keras.ops.sigmoid(self.out(inputs) + new_c), [new_h, new_c]


class SoftmaxCell(keras.layers.SimpleRNNCell):
    """Mixes its units, so that its Jacobian has no structure."""

    def call(self, inputs: Any, states: Any, training: Any = None) -> tuple[Any, list[Any]]:
        """One step."""
        h, _ = super().call(inputs, states, training=training)
        new_h = h * keras.ops.softmax(h)
        return new_h, [new_h]


LAYERS: dict[str, Callable[[int], keras.layers.RNN]] = {
    "LSTM": keras.layers.LSTM,
    "GRU": keras.layers.GRU,
    "SimpleRNN": keras.layers.SimpleRNN,
    "a cell of one's own": lambda units: keras.layers.RNN(SeedCell(units)),
}
SOFTMAX = "a cell without structure"


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Returns the median time of a call, after one that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def noise(*shape: int) -> tf.Tensor:
    """Returns Gaussian numbers."""
    return tf.constant(np.random.default_rng(0).normal(size=shape), tf.float32)


def make_model(kind: str, units: int, steps: int | None = STEPS) -> tuple[keras.Model, keras.layers.RNN]:
    """Returns a model of one layer, and the layer."""
    layer = keras.layers.RNN(SoftmaxCell(units)) if kind == SOFTMAX else LAYERS[kind](units)
    model = keras.Sequential([keras.Input((steps, FEATURES)), layer])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras on cells without `build()`
        model(noise(1, 2, FEATURES))
    return model, layer


def loop_by_hand(layer: keras.layers.RNN, steps: int) -> Any:
    """Returns a `tf.function`, a plain loop with a gradient tape that takes the hidden variance at each step."""

    @tf.function
    def variances(inputs: tf.Tensor) -> tf.Tensor:
        states = layer.cell.get_initial_state(BATCH)
        values = tf.TensorArray(tf.float32, steps)
        for step in tf.range(steps):
            h = states[0]
            with tf.GradientTape() as tape:
                tape.watch(h)
                _, new = layer.cell(inputs[:, step], [h, *states[1:]], training=False)
            J = tape.batch_jacobian(new[0], h)
            values = values.write(step, tf.math.reduce_variance(J, axis=(1, 2)) * layer.cell.units)
            states = new
        return values.stack()

    return variances


def seconds_of_loop(layer: keras.layers.RNN, probe: tf.Tensor) -> float:
    """Returns the median time of a loop by hand."""
    loop = loop_by_hand(layer, STEPS)
    graph = loop.get_concrete_function(probe)
    start = time.perf_counter()
    graph(probe).numpy()
    seconds = time.perf_counter() - start
    # Some minutes at 1024 units, where the first run takes no longer than others.
    return seconds if seconds > MOST_SECONDS else median_seconds(lambda: graph(probe).numpy(), 3)


def row(*cells: object) -> None:
    """Prints a line of a table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def head(title: str, *cells: str) -> None:
    """Prints the head of a table."""
    print(f"\n{title}\n")
    row(*cells)
    print("|" + "---|" * len(cells))


def ratios_to_forward(layer: keras.layers.RNN, probe: tf.Tensor, meters: Sequence[JacobianMeter]) -> list[float]:
    """Returns the median time of a forward pass, and the times of the meters as multiples of it. All take turns."""
    function = tf.function(partial(layer, training=False))
    calls: list[Callable[[], object]] = [
        lambda: function(probe).numpy(),
        *(partial(meter, suggestions=False) for meter in meters),
    ]
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(WARM_UP + TURNS):
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if turn >= WARM_UP:
                found.append(time.perf_counter() - start)
    forward, *medians = map(statistics.median, times)
    return [forward, *(median / forward for median in medians)]


def by_units() -> None:
    """`variance` and `spectral_norm` by layer and units."""
    names = ("variance", "joint/variance", "spectral_norm", "joint/spectral_norm")
    head(
        f"{BATCH} samples x {STEPS} steps, {FEATURES} features; multiples of a forward pass, but for itself",
        "layer", "units", "forward pass", *(f"`{name}`" for name in names), "`spectral_norm`, `max_rows=None`",
        "`batch_jacobian` loop / `variance`",
    )  # fmt: skip
    probe = noise(BATCH, STEPS, FEATURES)
    for kind in LAYERS:
        for units in UNITS:
            model, layer = make_model(kind, units)
            meters = [JacobianMeter(model, probe, measures=[name]) for name in names]
            everywhere = JacobianMeter(model, probe, measures=["spectral_norm"], max_rows=None)
            forward, *ratios = ratios_to_forward(layer, probe, meters)
            ratios.append(median_seconds(everywhere, 2) / forward)
            loop = "-"
            if kind == "LSTM":
                loop = f"{seconds_of_loop(layer, probe) / (ratios[0] * forward):.1f}"
            row(kind, units, f"{forward * 1e3:.1f} ms", *(f"{ratio:.2f}" for ratio in ratios), loop)


def without_structure() -> None:
    """`variance` of a cell without structure; above `max_entries` it is an estimate."""
    head(
        f"A SimpleRNN with a softmax, {BATCH} samples x {STEPS} steps; multiples of a forward pass, but for itself",
        "units", "forward pass", "`variance`", "`batch_jacobian` loop / `variance`",
    )  # fmt: skip
    probe = noise(BATCH, STEPS, FEATURES)
    for units in (64, 128, 256):
        model, layer = make_model(SOFTMAX, units)
        meter = JacobianMeter(model, probe, measures=["variance"])
        (found,) = meter().layers.values()
        how = "estimate" if found.estimated else "exact"
        forward, ratio = ratios_to_forward(layer, probe, [meter])
        loop = seconds_of_loop(layer, probe) / (ratio * forward)
        row(units, f"{forward * 1e3:.1f} ms", f"{ratio:.1f} ({how})", f"{loop:.1f}")


def over_time() -> None:
    """Presets and measures over time of an LSTM, by units."""
    wanted = ("fast", "standard", "joint/flow", "joint/lyapunov", "sensitivity")
    head(
        f"LSTM, {BATCH} samples x {STEPS} steps; multiples of a forward pass, but for itself",
        "units", "forward pass", *(f"`{name}`" for name in wanted),
    )  # fmt: skip
    probe = noise(BATCH, STEPS, FEATURES)
    for units in UNITS:
        model, layer = make_model("LSTM", units)
        meters = [JacobianMeter(model, probe, measures=name) for name in wanted]
        forward, *ratios = ratios_to_forward(layer, probe, meters)
        row(units, f"{forward * 1e3:.1f} ms", *(f"{ratio:.1f}" for ratio in ratios))


def by_size() -> None:
    """`variance` of an LSTM with 64 units, by steps and samples."""
    head("LSTM, 64 units", "samples", "steps", "forward pass", "`variance` / forward")
    for samples, steps in ((4, 50), (4, 500), (4, 10_000), (32, 50), (128, 50)):
        probe = noise(samples, steps, FEATURES)
        model, layer = make_model("LSTM", 64, steps)
        forward, ratio = ratios_to_forward(layer, probe, [JacobianMeter(model, probe, measures=["variance"])])
        row(samples, steps, f"{forward * 1e3:.1f} ms", f"{ratio:.2f}")


def during_fit() -> None:
    """A training with the monitor, divided by the same training without it: the median over neighbouring pairs."""
    batches = FIT_BATCHES
    head(
        f"`fit` of an LSTM with 256 units, {batches} batches of {BATCH} x {STEPS} steps an epoch; what is traced once "
        "and the report before the first batch are not counted",
        "monitor", "time / time without", "a measurement / a batch",
    )  # fmt: skip
    x, y = noise(batches * BATCH, STEPS, FEATURES), noise(batches * BATCH, 1)
    layers = [keras.Input((STEPS, FEATURES)), keras.layers.LSTM(256), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile("adam", "mse")

    def seconds(monitor: JacobianMonitor | None) -> float:
        clock = Clock()
        callbacks = [clock] if monitor is None else [monitor, clock]
        model.fit(x, y, batch_size=BATCH, verbose=0, callbacks=callbacks)
        return clock.seconds

    seconds(None)
    for measures in ("fast", "standard"):
        rhythms: dict[str, dict[str, Any]] = {"every epoch": {}, "every 100 batches": {"update_freq": 100}}
        for name, rhythm in rhythms.items():
            monitor = JacobianMonitor(x[:BATCH], log_dir=None, measures=measures, **rhythm)
            seconds(monitor)
            pairs = [(seconds(None), seconds(monitor)) for _ in range(FIT_TURNS)]
            meter = JacobianMeter(model, x[:BATCH], measures=measures)
            batch = statistics.median(without for without, _ in pairs) / batches
            ratio = statistics.median(found / without for without, found in pairs)
            row(
                f"`{measures}`, {name}",
                f"{ratio:.3f}",
                f"{median_seconds(partial(meter, suggestions=False), 5) / batch:.1f}",
            )


def stack(kind: str, depth: int, units: int = 64) -> keras.Model:
    """A compiled stack of LSTMs, in both directions if asked; 100 steps of 8 features."""
    x = inputs = keras.Input((START_STEPS, 8))
    for level in range(depth):
        layer = keras.layers.LSTM(units, return_sequences=level < depth - 1)
        x = (keras.layers.Bidirectional(layer) if kind == "bidirectional" else layer)(x)
    model = keras.Model(inputs, keras.layers.Dense(1)(x))
    model.compile("adam", "mse")
    return model


def start() -> None:
    """Seconds until `fit` has run its first batch, with a monitor and without, each time with a fresh model.

    A process keeps the measurements that it compiled for models of other cells and sizes. So each model of the first
    kind of row has a size that no other has; of the second kind, an equal model has been measured before.
    """
    head(
        f"Until the end of the first batch of `fit`, LSTM, {START_STEPS} steps, {BATCH} samples",
        "layers", "`fit` alone", "with `standard` / alone", "with `fast` / alone",
    )  # fmt: skip
    x, y = noise(BATCH, START_STEPS, 8), noise(BATCH, 1)
    sizes = itertools.count(64)

    def seconds(kind: str, depth: int, measures: str | None, units: int) -> float:
        keras.backend.clear_session()
        model = stack(kind, depth, units)
        monitors = [] if measures is None else [JacobianMonitor(x, log_dir=None, measures=measures)]
        clock = Clock()
        begin = time.perf_counter()
        model.fit(x, y, verbose=0, callbacks=[*monitors, clock])
        return clock.begin - begin

    # What a process pays once.
    seconds("forward", 1, "fast", next(sizes))
    for kind, depth, count in STARTS:
        turns = []
        for units in itertools.islice(sizes, count):
            turns.append([seconds(kind, depth, measures, units) for measures in (None, "standard", "fast")])
        _start_row(f"{depth} {kind}", turns)
        # The last size once more.
        again = [
            [seconds(kind, depth, measures, units) for measures in (None, "standard", "fast")] for _ in range(count)
        ]
        _start_row(f"{depth} {kind}, again", again)
    head(
        f"Until the first `variance` of an LSTM, {START_STEPS} steps, {BATCH} samples",
        "a `batch_jacobian` loop", "a meter", "`fit` alone",
    )  # fmt: skip
    turns = [_first_variances(x, y, units) for units in itertools.islice(sizes, FIRST_TURNS)]
    row(*(f"{statistics.median(found):.2f} s" for found in zip(*turns, strict=True)))
    head("A meter and its first report", "calls", "`standard`", "`full`")
    for kind, depth in (("forward", 1), ("bidirectional", 6)):
        spent, units = [], next(sizes)
        for measures in ("standard", "full"):
            model = stack(kind, depth, units)
            begin = time.perf_counter()
            JacobianMeter(model, x, measures=measures)(suggestions=False)
            spent.append(time.perf_counter() - begin)
        row(depth * (1 + (kind == "bidirectional")), *(f"{found:.1f} s" for found in spent))


def _first_variances(x: tf.Tensor, y: tf.Tensor, units: int) -> list[float]:
    """Returns the seconds until the first variances by hand and by a meter, and until the first batch of `fit`."""
    keras.backend.clear_session()
    model, clock = stack("forward", 1, units), Clock()
    begins = [time.perf_counter()]
    loop_by_hand(model.layers[1], START_STEPS)(x).numpy()
    begins.append(time.perf_counter())
    JacobianMeter(model, x, measures="variance")(suggestions=False)
    begins.append(time.perf_counter())
    model.fit(x, y, verbose=0, callbacks=[clock])
    return [end - begin for begin, end in itertools.pairwise([*begins, clock.begin])]


def _start_row(name: str, turns: list[list[float]]) -> None:
    """Prints the medians of turns: the seconds alone, and the ratios of the others to them."""
    alone = statistics.median(turn[0] for turn in turns)
    ratios = [statistics.median(turn[place] / turn[0] for turn in turns) for place in (1, 2)]
    row(name, f"{alone:.1f} s", *(f"{ratio:.2f}" for ratio in ratios))


def operations() -> None:
    """The operations of the graph that measures an LSTM, by the part of the package that makes them."""
    head("Operations of a measurement of an LSTM with 64 units", "part", "`standard`", "`full`")
    counts = [_operations_by_part(measures) for measures in ("standard", "full")]
    for part in sorted(counts[1], key=lambda part: -counts[1][part]):
        row(part, *(count[part] for count in counts))
    row("all", *(sum(count.values()) for count in counts))


def _operations_by_part(measures: str) -> collections.Counter[str]:
    meter = JacobianMeter(stack("forward", 1), noise(BATCH, START_STEPS, 8), measures=measures)
    home = Path(keras_jacmon.__file__).parent
    found: collections.Counter[str] = collections.Counter()
    pending: list[Any] = list(meter.graphs)
    seen: set[str] = set()
    while pending:
        graph = pending.pop()
        for operation in graph.get_operations():
            frames = [frame.filename for frame in operation.traceback or [] if home in Path(frame.filename).parents]
            found[str(Path(frames[-1]).relative_to(home).with_suffix("")) if frames else "loops and arguments"] += 1
            functions = [operation.get_attr(a.name).name for a in operation.op_def.attr if a.type == "func"]
            pending += [graph._get_function(name).graph for name in functions if name not in seen]  # noqa: SLF001 - there is no other way
            seen.update(functions)
    return found


class Clock(keras.callbacks.Callback):
    """Times an epoch from the end of its first batch to its own end, including callbacks that stand before this one."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Starts."""
        if batch == 0:
            self.begin = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Stops."""
        self.seconds = time.perf_counter() - self.begin


def memory() -> None:
    """Memory that measuring adds to the peak of a process that has run the model on a long sequence."""
    head("LSTM, 32 samples, peak of the resident memory", "units", "steps", "measures", "model", "measuring adds")
    script = """if True:
        import pathlib, re, sys
        import keras, numpy as np, tensorflow as tf
        from keras_jacmon import JacobianMeter
        units, steps, features, measures = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
        model = keras.Sequential([keras.Input((steps, features)), keras.layers.LSTM(units)])
        probe = tf.constant(np.random.default_rng(0).normal(size=(32, steps, features)), tf.float32)
        # The peak of this program alone; `getrusage` includes that of its parent.
        peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 2**20
        tf.function(model)(probe)
        before = peak()
        JacobianMeter(model, probe, measures=measures)()
        print(before, peak() - before)
    """
    for units, steps in MEMORY_SIZES:
        for measures in ("fast", "standard"):
            command = [sys.executable, "-c", script, str(units), str(steps), str(FEATURES), measures]
            out = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own words
            model, added = map(float, out.stdout.split())
            row(units, steps, f"`{measures}`", f"{model:.2f} GiB", f"{added:.2f} GiB")


def with_regularizer() -> None:
    """Training with a penalty, divided by the same training without it: 50 batches, including new states for them."""
    steps, batches, turns = 100, 50, 5
    head(
        f"Training steps, 256 units, {BATCH} samples x {steps} steps, {batches} batches at a time; multiples of those "
        "without a penalty, but for themselves",
        "layer", "a step without", "`variance`", "`spectral_norm`", '`variance`, `states="fresh"`',
    )  # fmt: skip
    x, y = noise(BATCH, steps, FEATURES), noise(BATCH, 1)
    kinds: list[dict[str, Any]] = [{}, {"measure": "spectral_norm"}, {"states": "fresh"}]
    for kind in ("LSTM", "SimpleRNN"):
        with contextlib.ExitStack() as stack:
            trainings: list[Callable[[], object]] = []
            for options in (None, *kinds):
                model = keras.Sequential([keras.Input((steps, FEATURES)), LAYERS[kind](256), keras.layers.Dense(1)])
                model.compile("adam", "mse")
                held = None
                if options is not None:
                    held = stack.enter_context(JacobianRegularizer(1.0, 1e-2, **options).attached(model, x))

                def train(model: keras.Model = model, held: Any = held) -> None:
                    for step in range(batches):
                        if held is not None:
                            held.begin(step)
                        model.train_on_batch(x, y)

                trainings.append(train)
            times: list[list[float]] = [[] for _ in trainings]
            for turn in range(1 + turns):
                for training, found in zip(trainings, times, strict=True):
                    start = time.perf_counter()
                    training()
                    if turn:
                        found.append(time.perf_counter() - start)
            without, *others = map(statistics.median, times)
            row(kind, f"{without / batches * 1e3:.0f} ms", *(f"{other / without:.2f}" for other in others))


def once() -> None:
    """Times that are spent once: imports and the first report."""
    head("Paid once", "what", "seconds")
    # Collect the garbage of TensorFlow first, so that none is collected during the import.
    script = (
        "import gc, time, tensorflow, keras; gc.collect(); start = time.perf_counter(); import keras_jacmon; {}; "
        "print(time.perf_counter() - start)"
    )
    for name, names in (
        ("import keras_jacmon", "keras_jacmon"),
        ("and JacobianMonitor", "keras_jacmon.JacobianMonitor"),
    ):
        # Cache the bytecode, as an installer does.
        command = [sys.executable, "-c", script.format(names)]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        seconds = []
        for _ in range(6):
            out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)  # noqa: S603 - our own words
            seconds.append(float(out.stdout))
        row(name, f"{statistics.median(seconds[1:]):.3f}")
    probe = noise(BATCH, STEPS, FEATURES)
    for measures in ("variance", "fast", "standard"):
        model, _ = make_model("LSTM", 256)
        start = time.perf_counter()
        JacobianMeter(model, probe, measures=measures)()
        row(f"first report, LSTM, 256 units, `{measures}`", f"{time.perf_counter() - start:.2f}")


TABLES = {
    "start": start,
    "operations": operations,
    "units": by_units,
    "autodiff": without_structure,
    "time": over_time,
    "size": by_size,
    "fit": during_fit,
    "memory": memory,
    "regularizer": with_regularizer,
    "once": once,
}


def main() -> None:
    """Prints the tables that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help=f"out of {', '.join(TABLES)}; all of them if none is named")
    names = parser.parse_args().tables or list(TABLES)
    if unknown := set(names) - set(TABLES):
        parser.error(f"no table is called {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    keras.utils.set_random_seed(0)
    for name in names:
        TABLES[name]()


if __name__ == "__main__":
    main()
