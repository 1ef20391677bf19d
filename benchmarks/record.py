"""Records what the package computes for many small models, and compares two such records.

Whoever moves code without changing what it does writes one record before and one after it, with the same script:

    python benchmarks/record.py write before.npz
    python benchmarks/record.py compare before.npz after.npz

Everything is seeded and runs in one thread, so that two records of the same code are equal to the bit. Only public
names are used. What is recorded has a path, such as `lstm > report > lstm > joint/variance`, and is a number, which
must be the same, or a text, whose differences are shown. `compare` takes a field that has been renamed for the old one
with `--rename old=new`.
"""

import argparse
import contextlib
import difflib
import gc
import importlib
import json
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Before TensorFlow is imported.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

# Its names are imported when they are asked for; see `draw_models`.
import keras_jacmon

Array = npt.NDArray[Any]
L = keras.layers

SEED = 1
SAMPLES, STEPS, FEATURES, UNITS = 3, 4, 2, 4
# Of an embedding; 0 is masked.
IDS = 5
# Samples of a training, and of one of its batches.
TRAINED, BATCH, EPOCHS = 12, 4, 2
# Steps of a loop of one's own.
LOOP = 6
# Models that are drawn, and how often one may call its recurrent layers.
DRAWN, MOST_CALLS = 10, 2
TESTS = Path(__file__).parent.parent / "tests"


# Records -------------------------------------------------------------------------------------------------------------


class Record:
    """Numbers and texts by path.

    Attributes:
        numbers: Arrays by path.
        texts: Texts by path.
    """

    SEPARATOR = " > "

    def __init__(self) -> None:
        self.numbers: dict[str, Array] = {}
        self.texts: dict[str, str] = {}

    def add(self, path: Sequence[str], value: Any) -> None:
        """Adds a value: a mapping key by key, what is made of numbers as an array, and anything else as text."""
        if isinstance(value, Mapping):
            for key, part in value.items():
                self.add([*path, str(key)], part)
            return
        name = self.SEPARATOR.join(path)
        if name in self.numbers or name in self.texts:
            raise ValueError(f"There is a value at '{name}' already.")
        numbers = as_numbers(value)
        if numbers is not None:
            self.numbers[name] = numbers
        else:
            self.texts[name] = "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    def save(self, path: Path) -> None:
        """Writes an `.npz` file: the arrays by their number, and JSON with everything else."""
        rest = json.dumps({"paths": list(self.numbers), "texts": self.texts})
        arrays = {str(index): array for index, array in enumerate(self.numbers.values())}
        with path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, rest=np.frombuffer(rest.encode(), np.uint8), **arrays)

    @classmethod
    def load(cls, path: Path) -> "Record":
        """Reads what `save` has written."""
        record = cls()
        with np.load(path, allow_pickle=False) as arrays:
            rest = json.loads(arrays["rest"].tobytes())
            record.numbers = {name: arrays[str(index)] for index, name in enumerate(rest["paths"])}
        record.texts = rest["texts"]
        return record

    def renamed(self, names: Mapping[str, str]) -> "Record":
        """The same with other names for some parts of the paths."""

        def other(path: str) -> str:
            return self.SEPARATOR.join(names.get(part, part) for part in path.split(self.SEPARATOR))

        record = Record()
        record.numbers = {other(path): array for path, array in self.numbers.items()}
        record.texts = {other(path): text for path, text in self.texts.items()}
        return record


def as_numbers(value: Any) -> Array | None:
    """Numbers as an array, also those that JSON does not know and that are `"nan"`, `"inf"`; None for what is text."""
    try:
        array = np.asarray(value)
        if array.dtype.kind == "U" and array.size:
            array = array.astype(np.float64)
    except ValueError:
        # Of different lengths, or texts.
        return None
    return array if array.dtype.kind in "biufc" and (array.size or isinstance(value, np.ndarray)) else None


# Models --------------------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A model and what it is measured on.

    Attributes:
        model: The model.
        probe: A batch of its inputs.
        options: Of the meter; of all measures, if nothing else is said.
    """

    model: Any
    probe: Any
    options: Mapping[str, Any]


def noise(*shape: int, seed: int = 0) -> Array:
    """Gaussian numbers that depend on nothing but the arguments."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def randomize(model: Any, *, seed: int = 7, scale: float = 0.5) -> None:
    """Gives every weight random values: zero biases and orthogonal kernels would hide mistakes."""
    for index, variable in enumerate(model.trainable_weights):
        variable.assign(scale * noise(*variable.shape, seed=seed + index))


def ready(model: Any, probe: Any, *, scale: float = 0.5, **options: Any) -> Subject:
    """A model with random weights, which cells without `build()` have after a first call."""
    model(probe)
    randomize(model, scale=scale)
    return Subject(model, probe, options)


def of_layer(
    *layers: Any,
    shape: tuple[int, ...] = (STEPS, FEATURES),
    samples: int = SAMPLES,
    scale: float = 0.5,
    **options: Any,
) -> Subject:
    """A model of one layer, or of some one behind the other, and noise; `shape` is that of a sample."""
    probe = noise(samples, *shape)
    known = samples if any(getattr(layer, "stateful", False) for layer in layers) else None
    x = inputs = keras.Input(batch_shape=(known, *shape))
    for layer in layers:
        x = layer(x)
    return ready(keras.Model(inputs, x), probe, scale=scale, **options)


def padded(probe: Array, lengths: Iterable[int]) -> Array:
    """Samples that are zero from their length on."""
    lengths = np.fromiter(lengths, int)
    valid = np.arange(probe.shape[1]) < lengths[:, None]
    return np.asarray(probe * valid.reshape(*valid.shape, *[1] * (probe.ndim - 2)))


class OwnCell(keras.layers.Layer):
    """A cell whose new state is `function(cell, x @ W, h)`, for which it has kernels U and V and a vector b."""

    def __init__(self, function: Callable[[Any, Any, Any], Any], units: int = UNITS) -> None:
        super().__init__()
        self.function = function
        self.state_size = self.output_size = units

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Makes the weights."""
        n = self.state_size
        self.kernel = self.add_weight(shape=(input_shape[-1], n), name="kernel")
        self.recurrent_kernel = self.add_weight(shape=(n, n), name="recurrent_kernel")
        self.second_kernel = self.add_weight(shape=(n, n), name="second_kernel")
        self.vector = self.add_weight(shape=(n,), name="vector")

    @property
    def weights_of_step(self) -> tuple[Any, Any, Any]:
        """U, V and b as tensors."""
        U, V, b = map(tf.convert_to_tensor, (self.recurrent_kernel, self.second_kernel, self.vector))
        return U, V, b

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        """One step."""
        new_h = self.function(self, inputs @ tf.convert_to_tensor(self.kernel), states[0])
        return new_h, [new_h]


def softmax_gated(cell: OwnCell, x: Any, h: Any) -> Any:
    """A gate that mixes the units, so that J has no structure."""
    U, V, b = cell.weights_of_step
    return tf.nn.softmax(x + h @ U) * tf.tanh(x + h @ V + b)


def layer_normalized(cell: OwnCell, x: Any, h: Any) -> Any:
    """Divides by the deviation over the units."""
    U, _, b = cell.weights_of_step
    z = x + h @ U
    mean, variance = tf.nn.moments(z, axes=[-1], keepdims=True)
    return tf.tanh(b * (z - mean) * tf.math.rsqrt(variance + 1e-3))


def chain_of_products(cell: OwnCell, x: Any, h: Any) -> Any:
    """A product that multiplies the result of another one, beside one that does not."""
    U, V, b = cell.weights_of_step
    return tf.tanh(tf.sigmoid(x + h @ U) @ V + b * h) + 0.1 * (h @ V)


def moved_units(cell: OwnCell, x: Any, h: Any) -> Any:
    """Elementwise functions of units that change their places."""
    U, _, b = cell.weights_of_step
    p = x + h @ U
    return tf.concat([b[:2] * tf.sin(p[:, 2:]), tf.nn.relu(p[:, :1]) * h[:, 3:], tf.reverse(h[:, 1:2], [1])], axis=1)


def without_mean(cell: OwnCell, x: Any, h: Any) -> Any:
    """Takes the mean of the batch from the inputs: samples are not independent, yet each has a J of its own."""
    U, _, _ = cell.weights_of_step
    return tf.tanh(x - tf.reduce_mean(x, axis=0) + h @ U)


def quantized(cell: OwnCell, x: Any, h: Any) -> Any:
    """Has a second derivative that TensorFlow takes for zero."""
    U, _, _ = cell.weights_of_step
    return tf.quantization.fake_quant_with_min_max_args(tf.tanh(x + h @ U), -1, 1)


def looped(cell: OwnCell, x: Any, h: Any) -> Any:
    """Takes three steps of its own."""
    U, _, _ = cell.weights_of_step
    _, new = tf.while_loop(lambda k, _: k < STEPS - 1, lambda k, h: (k + 1, 0.5 * h + tf.tanh(x + h @ U)), (0, h))
    return new


@tf.custom_gradient
def straight_through(x: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Rounds, with the gradient of the identity."""
    return tf.round(x), lambda upstream: upstream


def rounded(cell: OwnCell, x: Any, h: Any) -> Any:
    """Has integers as values, and only a gradient of its own says that it is not flat."""
    U, _, _ = cell.weights_of_step
    return straight_through(2.0 * tf.tanh(x + h @ U))


def stopped(cell: OwnCell, x: Any, h: Any) -> Any:
    """Lets no gradient through, so that nothing can be measured."""
    U, _, _ = cell.weights_of_step
    return tf.tanh(x + tf.stop_gradient(h) @ U)


class SeedCell(keras.layers.Layer):
    """Two states, of which the first is `relu(h) @ W + b`, from layers made in `__init__`, without a `build()`."""

    def __init__(self, units: int = UNITS) -> None:
        super().__init__()
        self.state_size = [units, units]
        self.output_size = units
        self.hidden = keras.layers.Dense(units)
        self.out = keras.layers.Dense(units, use_bias=False)

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        """One step."""
        h, c = states
        new_h = self.hidden(keras.ops.relu(h))
        new_c = c - h + new_h
        return keras.ops.sigmoid(self.out(inputs) + new_c), [new_h, new_c]


class UnequalCell(keras.layers.Layer):
    """Two states of different sizes that feed each other, of which the first mixes its units."""

    def __init__(self, units: int = 3, memory: int = 5) -> None:
        super().__init__()
        self.state_size = [units, memory]
        self.output_size = units

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Makes the weights."""
        n, m = self.state_size
        shapes = {"kernel": (input_shape[-1], n), "recurrent_kernel": (n, n), "read": (m, n), "write": (n, m)}
        self.kernels = {name: self.add_weight(shape=shape, name=name) for name, shape in shapes.items()}

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        """One step."""
        h, m = states
        kernel, recurrent_kernel, read, write = map(tf.convert_to_tensor, self.kernels.values())
        new_h = tf.nn.softmax(inputs @ kernel + h @ recurrent_kernel + m @ read)
        return new_h, [new_h, 0.5 * m + tf.tanh(h @ write)]


class CountingCell(keras.layers.Layer):
    """Damps with the number of its steps, which it counts in a second state of integers; its calls in a variable."""

    def __init__(self, units: int = UNITS) -> None:
        super().__init__()
        self.state_size = [units, 1]
        self.output_size = units
        self.calls = tf.Variable(0.0, trainable=False)

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Makes the weights."""
        n = self.output_size
        self.kernel = self.add_weight(shape=(input_shape[-1], n), name="kernel")
        self.recurrent_kernel = self.add_weight(shape=(n, n), name="recurrent_kernel")

    def get_initial_state(self, batch_size: int | None = None) -> list[Any]:
        """Zeros."""
        return [tf.zeros((batch_size, self.output_size)), tf.zeros((batch_size, 1), tf.int32)]

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        """One step."""
        h, count = states
        kernel, recurrent_kernel = map(tf.convert_to_tensor, (self.kernel, self.recurrent_kernel))
        self.calls.assign_add(1.0)
        new_h = tf.tanh(inputs @ kernel + h @ recurrent_kernel) / (1.0 + tf.cast(count, h.dtype))
        return new_h, [new_h, count + tf.ones_like(count)]


class ConvolvingCell(keras.layers.Layer):
    """A convolution of a state of places and filters."""

    def __init__(self, places: int, filters: int) -> None:
        super().__init__()
        self.shape_of_state = (places, filters)
        self.state_size = [self.shape_of_state]
        self.output_size = places * filters

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Makes the weights."""
        _, filters = self.shape_of_state
        self.kernel = self.add_weight(shape=(3, input_shape[-1], filters), name="kernel")
        self.recurrent_kernel = self.add_weight(shape=(3, filters, filters), name="recurrent_kernel")

    def get_initial_state(self, batch_size: int | None = None) -> list[Any]:
        """Zeros."""
        return [tf.zeros((batch_size, *self.shape_of_state))]

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        """One step."""
        kernel, recurrent_kernel = map(tf.convert_to_tensor, (self.kernel, self.recurrent_kernel))
        z = tf.nn.conv1d(inputs, kernel, 1, "SAME") + tf.nn.conv1d(states[0], recurrent_kernel, 1, "SAME")
        new_h = tf.nn.softplus(z) - 0.3 * states[0]
        return tf.reshape(new_h, (-1, self.output_size)), [new_h]


class RegisteredCell(OwnCell):
    """A cell with a form that was derived by hand."""

    def __init__(self) -> None:
        super().__init__(RegisteredCell.step)

    def step(self, x: Any, h: Any) -> Any:
        """The new state."""
        U, _, _ = self.weights_of_step
        return tf.tanh(x + h @ U)


class WronglyRegisteredCell(RegisteredCell):
    """A cell whose form is wrong, which a measurement notices."""


def form(cell: OwnCell, inputs: Any, states: Any, view: str) -> Any:
    """J of a registered cell in the hidden view."""
    if view != "hidden":
        return None
    U, _, _ = cell.weights_of_step
    slope = 1.0 - tf.tanh(inputs @ tf.convert_to_tensor(cell.kernel) + states[0] @ U) ** 2
    return tf.linalg.LinearOperatorFullMatrix(slope[:, :, None] * tf.transpose(U))


def wrong_form(cell: OwnCell, inputs: Any, states: Any, view: str) -> Any:
    """Twice the right one."""
    right = form(cell, inputs, states, view)
    return None if right is None else tf.linalg.LinearOperatorFullMatrix(2.0 * right.to_dense())


def registered(cell: RegisteredCell, its_form: Callable[..., Any]) -> Subject:
    """A model of a cell with a registered form."""
    keras_jacmon.register_jacobian(type(cell), its_form)
    return of_layer(L.RNN(cell))


class UserLSTM(keras.layers.LSTM):
    """A subclass of a layer of Keras that changes what goes in."""

    def call(self, sequences: Any, initial_state: Any = None, mask: Any = None, training: Any = None) -> Any:
        """Runs the layer."""
        return super().call(2.0 * sequences, initial_state=initial_state, mask=mask, training=training)


def own(function: Callable[[OwnCell, Any, Any], Any], units: int = UNITS, **options: Any) -> Subject:
    """A model of a cell of one's own."""
    return of_layer(L.RNN(OwnCell(function, units)), **options)


def masked() -> Subject:
    """Samples that end early, one of them at once, in a layer that goes backwards."""
    subject = of_layer(L.Masking(), L.LSTM(UNITS, go_backwards=True))
    return subject._replace(probe=padded(subject.probe, [STEPS, 0, 2]))


def embedded() -> Subject:
    """Words, of which 0 is no word."""
    ids = np.random.default_rng(0).integers(1, IDS, (SAMPLES, STEPS))
    layers = [keras.Input((None,), dtype="int32"), L.Embedding(IDS, FEATURES, mask_zero=True), L.GRU(UNITS)]
    return ready(keras.Sequential(layers), padded(ids, [STEPS, 1, 2]).astype(np.int32))


def stateful() -> Subject:
    """A layer whose states are not zero when it is measured."""
    subject = of_layer(L.GRU(UNITS, stateful=True))
    subject.model(noise(SAMPLES, STEPS, FEATURES, seed=2))
    return subject


def encoder_and_decoder() -> Subject:
    """Two inputs, and a layer that begins with the states of another one."""
    source, target = keras.Input((STEPS, FEATURES), name="source"), keras.Input((STEPS - 1, FEATURES), name="target")
    _, *states = L.LSTM(UNITS, return_state=True, name="encoder")(source)
    model = keras.Model({"source": source, "target": target}, L.LSTM(UNITS, name="decoder")(target, states))
    probe = {"target": noise(SAMPLES, STEPS - 1, FEATURES), "source": noise(SAMPLES, STEPS, FEATURES)}
    return ready(model, probe, measures="standard")


def called_twice() -> Subject:
    """A layer that is called two times, in a model inside of a model, of which the other layer is not measured."""
    rnn = L.GRU(FEATURES, return_sequences=True, name="twice")
    inputs = keras.Input((STEPS, FEATURES))
    inner = keras.Model(inputs, rnn(rnn(inputs)), name="inner")
    return of_layer(inner, L.SimpleRNN(UNITS, name="other"), layers=["twice"], measures="standard")


def loss_gradient() -> Subject:
    """A compiled model with targets, and a regularizer of weights and one of activities in its loss."""
    layer = L.LSTM(UNITS, kernel_regularizer="l2", activity_regularizer="l2")
    model, probe, _ = of_layer(L.Masking(), layer, L.Dense(1))
    model.compile("sgd", "mse")
    return Subject(model, padded(probe, [STEPS, 2, 3]), {"targets": noise(SAMPLES, 1), "measures": "standard"})


def replicated() -> Subject:
    """A model in two replicas."""
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = keras.Sequential([keras.Input((STEPS, FEATURES)), L.LSTM(3)])
    probe = noise(SAMPLES + 2, STEPS, FEATURES)
    measures = ["variance", "spectral_norm", "joint/flow", "joint/lyapunov", "singular_values"]
    return ready(model, probe, measures=measures)


LONG = (24, FEATURES)

MODELS: dict[str, Callable[[], Subject]] = {
    # Layers of Keras.
    "simple_rnn": lambda: of_layer(L.SimpleRNN(UNITS)),
    "simple_rnn_relu": lambda: of_layer(L.SimpleRNN(UNITS, activation="relu")),
    "simple_rnn_linear": lambda: of_layer(L.SimpleRNN(UNITS, activation="linear", unroll=True)),
    "lstm": lambda: of_layer(L.LSTM(UNITS)),
    "gru": lambda: of_layer(L.GRU(UNITS)),
    "gru_reset_before": lambda: of_layer(L.GRU(UNITS, reset_after=False)),
    "conv_lstm_2d": lambda: of_layer(L.ConvLSTM2D(1, 2, padding="valid"), shape=(STEPS, 3, 3, 1)),
    "bidirectional": lambda: of_layer(L.Bidirectional(L.LSTM(3)), measures="standard"),
    "stack": lambda: of_layer(L.RNN([L.LSTMCell(3), L.GRUCell(UNITS)])),
    "stateful": stateful,
    "go_backwards": lambda: of_layer(L.LSTM(UNITS, go_backwards=True, return_sequences=True)),
    "masked": masked,
    "embedded": embedded,
    "encoder_and_decoder": encoder_and_decoder,
    "called_twice": called_twice,
    "float16": lambda: of_layer(L.LSTM(UNITS, dtype="mixed_float16")),
    "float64": lambda: of_layer(L.GRU(UNITS, dtype="float64")),
    "dropout": lambda: of_layer(L.LSTM(UNITS, dropout=0.3, recurrent_dropout=0.4, seed=3)),
    "user_lstm": lambda: of_layer(UserLSTM(UNITS), measures="standard"),
    # Cells of one's own.
    "seed_cell": lambda: of_layer(L.RNN(SeedCell())),
    "unequal_states": lambda: of_layer(L.RNN(UnequalCell())),
    "counting": lambda: of_layer(L.RNN(CountingCell()), measures="standard"),
    "convolving": lambda: of_layer(L.RNN(ConvolvingCell(5, 2)), shape=(STEPS, 5, 1)),
    "softmax_gated": lambda: own(softmax_gated),
    "layer_normalized": lambda: own(layer_normalized),
    "chain_of_products": lambda: own(chain_of_products),
    "moved_units": lambda: own(moved_units),
    "without_mean": lambda: own(without_mean, measures=["standard", "lyapunov", "eigenvalues"]),
    "quantized": lambda: own(quantized),
    "looped": lambda: own(looped, measures=["variance", "flow"]),
    "rounded": lambda: own(rounded),
    "stopped": lambda: own(stopped, measures="standard"),
    "registered": lambda: registered(RegisteredCell(), form),
    "wrongly_registered": lambda: registered(WronglyRegisteredCell(), wrong_form),
    # Options, and what they are for.
    "all_rows": lambda: of_layer(L.LSTM(UNITS), shape=LONG, max_rows=None, tolerance=1e-3, spectra=5),
    "exact_flow": lambda: of_layer(L.LSTM(UNITS), exact_flow=True, seed=5),
    "few_exponents": lambda: of_layer(
        L.SimpleRNN(8), shape=LONG, scale=0.7, exponents=2, warmup=0, qr_every=3, flow_vectors=5
    ),
    "loss_gradient": loss_gradient,
    "segments": lambda: of_layer(L.LSTM(UNITS), shape=LONG, max_bytes=20_000, qr_every=2),
    "segments_exact_flow": lambda: of_layer(
        L.RNN([L.SimpleRNNCell(3), SeedCell(3)]), shape=LONG, max_bytes=20_000, exact_flow=True
    ),
    "estimated": lambda: own(softmax_gated, 6, max_entries=1, measures="standard"),
    "vanishing": lambda: of_layer(L.LSTM(UNITS), shape=LONG, scale=0.3, measures="standard"),
    "exploding": lambda: of_layer(
        L.SimpleRNN(UNITS, activation="linear"), shape=LONG, scale=1.0, measures="standard", max_rows=20
    ),
    "wide": lambda: of_layer(
        L.LSTM(260), scale=0.1, measures=["spectral_radius", "joint/eigenvalues", "joint/spectral_norm"], max_rows=3
    ),
    # Its states overflow after some steps.
    "overflowing": lambda: of_layer(
        L.SimpleRNN(UNITS, activation="silu"), shape=(8, FEATURES), scale=1e7, measures="standard"
    ),
    "replicated": replicated,
}


# Trainings -----------------------------------------------------------------------------------------------------------


class Training(NamedTuple):
    """A compiled model, its data and the monitor that watches it.

    Attributes:
        model: The model.
        x: Inputs.
        y: Targets.
        monitor: The monitor.
        options: Of `fit`.
    """

    model: Any
    x: Any
    y: Any
    monitor: Any
    options: Mapping[str, Any]


def training(*layers: Any, log_dir: str, lengths: Iterable[int] = (), known: bool = False, **options: Any) -> Training:
    """The training of layers one behind the other; `options` are those of the monitor."""
    x, y = noise(TRAINED, STEPS, FEATURES, seed=1), noise(TRAINED, 1, seed=2)
    x = padded(x, [*lengths, *[STEPS] * TRAINED][:TRAINED])
    inputs = keras.Input(batch_shape=(BATCH if known else None, STEPS, FEATURES))
    model = keras.Sequential([inputs, *layers, L.Dense(1)])
    model, probe, _ = ready(model, x[:BATCH])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return Training(model, x, y, keras_jacmon.JacobianMonitor(probe, log_dir=log_dir, **options), {})


def held(*layers: Any, log_dir: str, lengths: Iterable[int] = (), target: Any = 1.0, **options: Any) -> Training:
    """A training with a regularizer, whose options these are."""
    strength = options.pop("strength", 0.1)
    regularizer = keras_jacmon.JacobianRegularizer(target, strength, **options)
    return training(*layers, log_dir=log_dir, lengths=lengths, measures="fast", regularizer=regularizer)


def with_targets(log_dir: str) -> Training:
    """A cell of one's own and the gradient of its loss."""
    return training(L.RNN(SeedCell()), log_dir=log_dir, targets=noise(TRAINED, 1, seed=2)[:BATCH], slow_freq=2)


def validated(log_dir: str) -> Training:
    """Two layers, of which the second one is held, and a validation."""
    found = held(
        L.Bidirectional(L.LSTM(3, return_sequences=True)),
        L.SimpleRNN(UNITS, name="second"),
        log_dir=log_dir,
        target={"second": 0.5},
        measure="rms_singular_value",
        scale="log",
        side="at_most",
        refresh=2,
    )
    validation = (noise(BATCH, STEPS, FEATURES, seed=3), noise(BATCH, 1, seed=4))
    return found._replace(options={"validation_data": validation})


def diverging(log_dir: str) -> Training:
    """States that overflow, so that there are points without a penalty, and values that are not finite."""
    found = held(L.SimpleRNN(UNITS, activation="silu"), log_dir=log_dir, rows=4, refresh=1)
    randomize(found.model, scale=1e12)
    return found


def falling(step: int) -> float:
    """A schedule."""
    return 0.5 / (1.0 + step)


TRAININGS: dict[str, Callable[[str], Training]] = {
    "fit_lstm": lambda log_dir: training(L.Masking(), L.LSTM(UNITS), log_dir=log_dir, lengths=[2, 3, STEPS, 1]),
    "fit_gru": lambda log_dir: training(
        L.GRU(UNITS, dropout=0.2, seed=1),
        log_dir=log_dir,
        measures="full",
        update_freq=2,
        slow_freq=3,
        max_reports=3,
    ),
    "fit_batches": lambda log_dir: training(
        L.LSTM(UNITS, return_sequences=True), L.SimpleRNN(3), log_dir=log_dir, update_freq="batch"
    ),
    "fit_seed_cell": with_targets,
    "fit_stateful": lambda log_dir: training(
        L.GRU(UNITS, stateful=True), log_dir=log_dir, known=True, measures=["variance", "joint/growth"]
    ),
    "fit_quantized": lambda log_dir: training(L.RNN(OwnCell(quantized)), log_dir=log_dir),
    "held_variance": lambda log_dir: held(L.Masking(), L.LSTM(UNITS), log_dir=log_dir, lengths=[2, 3], refresh=2),
    "held_spectral_norm": lambda log_dir: held(
        L.GRU(UNITS, reset_after=False), log_dir=log_dir, measure="spectral_norm", strength=falling, refresh=3
    ),
    "held_joint": lambda log_dir: held(
        L.LSTM(UNITS, return_sequences=True),
        L.RNN(SeedCell()),
        log_dir=log_dir,
        view="joint",
        states="fresh",
        through_states=True,
    ),
    "held_by_vectors": lambda log_dir: held(
        L.RNN(OwnCell(softmax_gated, 6)), log_dir=log_dir, vectors=2, rows=5, refresh=1, seed=2
    ),
    "held_inputs": lambda log_dir: held(
        L.RNN(OwnCell(chain_of_products)), log_dir=log_dir, view="inputs", side="at_least", vectors=3
    ),
    "held_and_validated": validated,
    "held_diverging": diverging,
}


# What is recorded ----------------------------------------------------------------------------------------------------


def add_report(record: Record, path: Sequence[str], report: "keras_jacmon.Report") -> None:
    """Adds a report: as a dict, each array that it has by key, its scalars, its verdict and what is printed of it."""
    everything = report.to_dict()
    record.add([*path, "to_dict"], everything)
    record.add([*path, "scalars"], report.scalars())
    record.add([*path, "verdict"], {name: str(verdict) for name, verdict in report.verdict.items()})
    record.add([*path, "print"], str(report))
    record.add([*path, "layers"], list(report.layers))
    for name in report.layers:
        for key in sorted(keys_within(everything)):
            # The dict may be built in any way, and not all of its keys are those of arrays.
            with contextlib.suppress(KeyError):
                record.add([*path, name, key], report[name][key])
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "report.npz"
        report.save(file)
        record.add([*path, "is the same when it is loaded"], keras_jacmon.Report.load(file).to_dict() == everything)


def keys_within(value: Any) -> set[str]:
    """The keys of a dict and of the dicts in it."""
    if not isinstance(value, Mapping):
        return set()
    return {*value, *(key for part in value.values() for key in keys_within(part))}


def record_model(record: Record, name: str, make: Callable[[], Subject]) -> None:
    """Records what is said of a model, and its reports with its weights and with other ones."""
    model, probe, options = make()
    record.add([name, "explain"], str(keras_jacmon.explain(model, probe, layers=options.get("layers"))))
    meter = keras_jacmon.JacobianMeter(model, probe, **{"measures": "full", **options})
    add_report(record, [name, "report"], meter())
    randomize(model, seed=8, scale=0.6)
    add_report(record, [name, "report with other weights"], meter(slow=False))
    for attribute in ("layers", "has_slow_measures", "trace_count"):
        record.add([name, attribute], getattr(meter, attribute))


def record_drawn(record: Record, name: str, drawn: Any) -> None:
    """Records the report of a model that was drawn."""
    record.add([name, "drawn"], repr(drawn))
    model, probe = drawn.make(), drawn.inputs(seed=1)
    # Builds it, and moves the states of stateful layers away from zero.
    model(drawn.inputs(seed=2))
    randomize(model)
    record.add([name, "explain"], str(keras_jacmon.explain(model, probe)))
    add_report(record, [name, "report"], keras_jacmon.measure(model, probe, measures="full"))


def record_training(record: Record, name: str, make: Callable[[str], Training]) -> None:
    """Records a training: its history, reports and event files, and the weights that it ends with."""
    with tempfile.TemporaryDirectory() as log_dir:
        model, x, y, monitor, options = make(log_dir)
        fixed: dict[str, Any] = {"batch_size": BATCH, "epochs": EPOCHS, "shuffle": False, "verbose": 0}
        history = model.fit(x, y, **fixed, **options, callbacks=[monitor]).history
        record.add([name, "log keys"], list(history))
        record.add([name, "history"], history)
        record.add([name, "weights"], {str(k): weight for k, weight in enumerate(model.get_weights())})
        record.add([name, "steps"], [step for step, _ in monitor.reports])
        record.add([name, "failures"], monitor.failures)
        for position, (_, report) in enumerate(monitor.reports):
            record.add([name, "scalars", str(position)], report.scalars())
        add_report(record, [name, "report"], monitor.reports[-1][1])
        add_events(record, [name, "events"], Path(log_dir))


def add_events(record: Record, path: Sequence[str], log_dir: Path) -> None:
    """Adds everything that was written to event files below a directory: by tag and step, and the tags."""
    tags: dict[str, str] = {}
    for file in sorted(log_dir.rglob("*.tfevents.*")):
        directory = str(file.parent.relative_to(log_dir))
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                tag = f"{directory}: {value.tag}"
                # A tag's plugin stands only in its first value of a file.
                tags.setdefault(tag, value.metadata.plugin_data.plugin_name)
                record.add([*path, tag, str(event.step)], tf.make_ndarray(value.tensor))
    record.add([*path, "tags"], [f"{tag} ({plugin})" for tag, plugin in tags.items()])


def record_loop(record: Record, name: str) -> None:
    """Records a loop of one's own with a regularizer, and what the regularizer can be made of."""
    regularizer = keras_jacmon.JacobianRegularizer(0.7, 0.2, refresh=2, rows=6)
    model, probe, _ = of_layer(L.RNN(SeedCell()), L.Dense(1))
    model.compile(keras.optimizers.SGD(0.05), "mse")
    x, y = noise(SAMPLES, STEPS, FEATURES, seed=3), noise(SAMPLES, 1, seed=4)
    losses, penalties, terms = [], [], []
    with regularizer.attached(model, probe) as loop:
        for step in range(LOOP):
            loop.begin(step)
            terms.append(float(sum(model.losses)))
            losses.append(float(model.train_on_batch(x, y)))
            penalties.append(loop.penalty())
    record.add([name], {"losses": losses, "penalties": penalties, "terms": terms, "left": len(model.losses)})
    record.add([name, "weights"], {str(k): weight for k, weight in enumerate(model.get_weights())})
    record.add([name, "config"], json.dumps(regularizer.get_config(), sort_keys=True, indent=1))


def record_steps(record: Record, name: str) -> None:
    """Records the Jacobians of single steps of some cells, in each view, and their products."""
    cells: dict[str, tuple[Any, tuple[int, ...], list[tuple[int, ...]]]] = {
        "lstm": (L.LSTMCell(UNITS), (FEATURES,), [(UNITS,), (UNITS,)]),
        "gru": (L.GRUCell(UNITS, dtype="float64"), (FEATURES,), [(UNITS,)]),
        "seed_cell": (SeedCell(), (FEATURES,), [(UNITS,), (UNITS,)]),
        "convolving": (ConvolvingCell(5, 2), (5, 1), [(5, 2)]),
    }
    for kind, (cell, shape, shapes) in cells.items():
        inputs, *states = (tf.constant(noise(SAMPLES, *of), cell.compute_dtype) for of in (shape, *shapes))
        cell(inputs, states)
        randomize(cell)
        for view in ("hidden", "joint", "inputs"):
            J = keras_jacmon.state_jacobian(cell, inputs, states, view=view)
            v, w = (tf.constant(noise(SAMPLES, int(n)), J.dtype) for n in (J.shape[-1], J.shape[-2]))
            found = {"J": J.to_dense(), "J v": J.matvec(v), "transposed J w": J.matvec(w, adjoint=True)}
            record.add([name, kind, view], {key: value.numpy() for key, value in found.items()})


SINGLE: dict[str, Callable[[Record, str], None]] = {"loop": record_loop, "steps": record_steps}


def draw_models(count: int, tests: Path) -> dict[str, Any]:
    """Models drawn by the tests, the same ones each time.

    Hypothesis takes some of the numbers that it draws from the source code that has been imported. So nothing of the
    package may have been; and what was drawn is recorded too.
    """
    sys.path.insert(0, str(tests))
    hypothesis, drawn_models = (importlib.import_module(name) for name in ("hypothesis", "drawn_models"))
    found: list[Any] = []

    def keep(drawn: Any) -> None:
        calls = sum(piece.calls * (1 + (piece.wrapper == "Bidirectional")) for piece in drawn.pieces)
        # Each call takes seconds to trace.
        if drawn not in found and calls <= MOST_CALLS:
            found.append(drawn)

    draw = hypothesis.given(drawn_models.models())(keep)
    settings = hypothesis.settings(
        max_examples=10 * count,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.seed(SEED)(settings(draw))()
    # The first one is the simplest there is.
    chosen = found[1 : count + 1]
    if len(chosen) < count:
        raise RuntimeError(f"Only {len(chosen)} models were drawn.")
    return {f"drawn_{number}": drawn for number, drawn in enumerate(chosen)}


# Writing -------------------------------------------------------------------------------------------------------------


def tasks(tests: Path) -> dict[str, Callable[[Record, str], None]]:
    """What records each of the models, by name."""
    drawn = draw_models(DRAWN, tests)

    def bound(function: Callable[[Record, str, Any], None], argument: Any) -> Callable[[Record, str], None]:
        return lambda record, name: function(record, name, argument)

    return {
        **{name: bound(record_model, make) for name, make in MODELS.items()},
        **{name: bound(record_drawn, model) for name, model in drawn.items()},
        **{name: bound(record_training, make) for name, make in TRAININGS.items()},
        **SINGLE,
    }


@contextlib.contextmanager
def collecting_warnings(record: Record, path: Sequence[str]) -> Iterator[None]:
    """Adds the warnings that are given meanwhile, without addresses of objects."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # NumPy says it whenever it reads a variable of Keras.
        warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy keyword")
        yield
    texts = [f"{warning.category.__name__}: {warning.message}" for warning in caught]
    record.add(path, [re.sub(r"0x[0-9a-f]+", "0x...", text) for text in texts])


def write(file: Path, tests: Path, only: Sequence[str]) -> int:
    """Writes a record; returns 1 if a model could not be recorded."""
    # As in the tests: sums in one order are equal to the bit.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    tf.get_logger().setLevel("ERROR")
    record, failed, begin = Record(), [], time.process_time()
    chosen = tasks(tests)
    if unknown := set(only) - set(chosen):
        raise SystemExit(f"No model is called {', '.join(sorted(unknown))}; there are {', '.join(chosen)}.")
    print(f"The package in {Path(str(keras_jacmon.__file__)).parent}")
    for name in only or chosen:
        start = time.process_time()
        # So that nothing depends on the models before it, such as names of layers.
        keras.backend.clear_session()
        gc.collect()
        keras.utils.set_random_seed(SEED)
        try:
            with collecting_warnings(record, [name, "warnings"]):
                chosen[name](record, name)
        except Exception as error:  # noqa: BLE001 - recorded, and said at the end
            traceback.print_exc()
            record.add([name, "failed"], f"{type(error).__name__}: {error}")
            failed.append(name)
        # Of this process, since others may be running.
        print(f"{name:<24} {time.process_time() - start:6.1f} s", flush=True)
    record.save(file)
    counts = f"{len(record.numbers)} arrays and {len(record.texts)} texts of {len(only or chosen)} models"
    print(f"{counts} in {time.process_time() - begin:.0f} s")
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return int(bool(failed))


# Comparing -----------------------------------------------------------------------------------------------------------

# Relative errors, which are made of rounding: they may change by so much.
ROUNDING = {"certificate": 1e-5}


def difference(one: Array, other: Array, scale: float, floor: float) -> float:
    """How far two arrays are apart, relative to the scale or their own largest number; inf if no number says it."""
    if one.shape != other.shape or (one.dtype.kind == "b") != (other.dtype.kind == "b"):
        return np.inf
    if one.dtype.kind == "b" or not one.size:
        return 0.0 if np.array_equal(one, other) else np.inf
    one, other = (array.astype(np.complex128 if array.dtype.kind == "c" else np.float64) for array in (one, other))
    finite = np.isfinite(one) & np.isfinite(other)
    # NaN is equal to NaN, and inf to inf, not to -inf.
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return np.inf
    sizes = np.abs(np.concatenate([one[finite], other[finite]]))
    apart = np.abs(one[finite] - other[finite]).max(initial=0.0)
    return 0.0 if apart <= floor else float(apart / max(scale, sizes.max(initial=0.0)))


def scale_of(record: Record, path: str) -> float:
    """The size of the values whose uncertainty is at a path; a small residual is itself made of rounding."""
    parts = path.split(Record.SEPARATOR)
    if parts[-2:-1] != ["uncertainties"]:
        return 0.0
    *_, layer, _, key = parts
    values = record.numbers.get(Record.SEPARATOR.join([*parts[: parts.index("to_dict")], layer, key]), np.zeros(0))
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def compare_numbers(one: Record, other: Record, tolerance: float) -> int:
    """Prints the numbers that differ; returns how many there are."""
    equal, close, farthest, lines = 0, 0, (0.0, "none"), []
    for path in [*one.numbers, *(path for path in one.texts if path in other.numbers)]:
        if path in one.texts or path in other.texts:
            lines.append(f"NUMBERS DIFFER: {path}: they are a text in one of the files")
            continue
        if path not in other.numbers:
            continue
        before, after = one.numbers[path], other.numbers[path]
        if before.dtype != after.dtype:
            print(f"another type: {path}: {before.dtype}, {after.dtype}")
        if before.dtype == after.dtype and before.tobytes() == after.tobytes() and before.shape == after.shape:
            equal += 1
            continue
        floor = ROUNDING.get(path.split(Record.SEPARATOR)[-1], 0.0)
        apart = difference(before, after, scale_of(one, path), floor)
        if apart <= tolerance:
            close += 1
            farthest = max(farthest, (apart, path))
        elif before.shape != after.shape:
            lines.append(f"NUMBERS DIFFER: {path}: shape {before.shape}, {after.shape}")
        else:
            lines.append(f"NUMBERS DIFFER: {path}: by {apart:.2g}")
    print("\n".join(lines), end="\n" if lines else "")
    print(f"Numbers: {equal} equal to the bit, {close} within {tolerance:g}, {len(lines)} different")
    if close:
        print(f"  the largest difference within it is {farthest[0]:.2g}: {farthest[1]}")
    return len(lines)


def compare_texts(one: Record, other: Record) -> None:
    """Prints the texts that differ."""
    different = 0
    for path, before in one.texts.items():
        after = other.texts.get(path, before)
        if after != before:
            different += 1
            print(f"another text: {path}")
            changes = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))
            print("\n".join(f"    {line}" for line in changes[2:] if not line.startswith("@@")))
    print(f"Texts: {len(one.texts.keys() & other.texts.keys()) - different} equal, {different} different")


def compare(files: tuple[Path, Path], tolerance: float, names: Mapping[str, str]) -> int:
    """Prints how two records differ; returns 1 if a number, or whether a model can be recorded at all, does."""
    one, other = (Record.load(file) for file in files)
    one = one.renamed(names)
    compare_texts(one, other)
    for first, second, file in ((one, other, files[0]), (other, one, files[1])):
        paths = [*first.numbers, *first.texts]
        alone = [path for path in paths if path not in second.numbers and path not in second.texts]
        print("\n".join(f"only in {file.name}: {path}" for path in alone), end="\n" if alone else "")
        print(f"Only in {file.name}: {len(alone)} of {len(paths)}")
    different = compare_numbers(one, other, tolerance)
    failed = [{path for path in record.texts if path.endswith(f"{Record.SEPARATOR}failed")} for record in (one, other)]
    if failed[0] != failed[1]:
        print(f"FAILED IN ONE OF THEM: {', '.join(sorted(failed[0] ^ failed[1]))}")
    return int(different > 0 or failed[0] != failed[1])


def main() -> int:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="write a record")
    writing.add_argument("file", type=Path)
    writing.add_argument("--tests", type=Path, default=TESTS, help="the directory of `drawn_models.py`")
    writing.add_argument("--only", nargs="+", default=[], metavar="MODEL", help="some of the models")
    comparing = commands.add_parser("compare", help="compare two records")
    comparing.add_argument("files", type=Path, nargs=2, metavar="file")
    comparing.add_argument("--tolerance", type=float, default=1e-6, help="relative to the largest number of an array")
    comparing.add_argument(
        "--rename", nargs="+", default=[], metavar="OLD=NEW", help="parts of paths that have other names in the second"
    )
    arguments = parser.parse_args()
    if arguments.command == "write":
        return write(arguments.file, arguments.tests, arguments.only)
    names = dict(pair.split("=", 1) for pair in arguments.rename)
    return compare((arguments.files[0], arguments.files[1]), arguments.tolerance, names)


if __name__ == "__main__":
    sys.exit(main())
