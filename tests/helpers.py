"""Makers of recurrent layers, and the reference that the package is held against.

The reference is what a user would write without the package: an eager loop over the steps with a tape around each, and
NumPy for the measures. It imports nothing from `keras_jacmon`.

    b sample, t step, i new state, k old state:    J[t, b, i, k] = d s_t[b, i] / d s_{t-1}[b, k]
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping

    from numpy.typing import NDArray

BATCH = 3
STEPS = 3
FEATURES = 2
VIEWS = ("hidden", "joint", "inputs")


# Cells -----------------------------------------------------------------------------------------------


class WeightedCell(keras.layers.Layer):
    """A cell of `units` with an input and a recurrent kernel; the base of the cells below."""

    def __init__(self, units: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.state_size: Any = units
        self.output_size = units

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.kernel = self.add_weight(shape=(input_shape[-1], self.units), name="kernel")
        self.recurrent_kernel = self.add_weight(shape=(self.units, self.units), name="recurrent_kernel")

    def preactivation(self, inputs: Any, h: Any) -> Any:
        return inputs @ tf.convert_to_tensor(self.kernel) + h @ tf.convert_to_tensor(self.recurrent_kernel)


class ScaledCell(WeightedCell):
    """A factor that its configuration does not tell, and that it reads from a number, a tensor or a variable."""

    def __init__(self, factor: Any, **kwargs: Any) -> None:
        super().__init__(4, **kwargs)
        self.factor = factor

    def call(self, inputs: Any, states: Any) -> Any:
        new = tf.tanh(tf.convert_to_tensor(self.factor) * self.preactivation(inputs, states[0]))
        return new, [new]


class SeedCell(keras.layers.Layer):
    """The cell of the seed: two states, kernels in Dense layers made in `__init__`, no `build()`."""

    def __init__(self, units: int = 4, activation: str = "relu", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.state_size = [units, units]
        self.output_size = units
        self.activation = keras.activations.get(activation)
        self.hidden = keras.layers.Dense(units)
        self.out = keras.layers.Dense(units, use_bias=False)

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        h, c = states
        new_h = self.hidden(self.activation(h))
        new_c = c - h + new_h
        return keras.ops.sigmoid(self.out(inputs) + new_c), [new_h, new_c]


class UnequalStates(WeightedCell):
    """Two states of different sizes that feed each other."""

    def __init__(self, units: int = 3, memory: int = 5, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self.memory = memory
        self.state_size = [units, memory]

    def build(self, input_shape: tuple[int, ...]) -> None:
        super().build(input_shape)
        self.read = self.add_weight(shape=(self.memory, self.units), name="read")
        self.write = self.add_weight(shape=(self.units, self.memory), name="write")

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        h, m = states
        new_h = tf.tanh(self.preactivation(inputs, h) + m @ tf.convert_to_tensor(self.read))
        new_m = 0.5 * m + tf.tanh(h @ tf.convert_to_tensor(self.write))
        return new_h, [new_h, new_m]


@tf.custom_gradient
def straight_through_round(x: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Rounds, with the gradient of the identity."""
    return tf.round(x), lambda upstream: upstream


class StraightThroughCell(WeightedCell):
    """Its values are integers; only the custom gradient says that it is not flat."""

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        new_h = straight_through_round(2.0 * tf.tanh(self.preactivation(inputs, states[0])))
        return new_h, [new_h]


class WhileLoopCell(WeightedCell):
    """Three inner steps in a `tf.while_loop`."""

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        _, new_h = tf.while_loop(
            lambda i, _: i < 3, lambda i, h: (i + 1, 0.5 * h + tf.tanh(self.preactivation(inputs, h))), (0, states[0])
        )
        return new_h, [new_h]


class MapFnCell(WeightedCell):
    """Its activation is mapped over the samples one by one."""

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        new_h = tf.map_fn(lambda z: tf.tanh(z) * tf.reduce_sum(z), self.preactivation(inputs, states[0]))
        return new_h, [new_h]


class FunctionCell(WeightedCell):
    """`h = function(cell, x @ W, h)` with a recurrent kernel U, a second one V, and a vector b."""

    def __init__(self, function: Callable[[Any, Any, Any], Any], units: int = 4) -> None:
        super().__init__(units)
        self.function = function

    def build(self, input_shape: tuple[int, ...]) -> None:
        super().build(input_shape)
        self.second_kernel = self.add_weight(shape=(self.units, self.units), name="second_kernel")
        self.vector = self.add_weight(shape=(self.units,), name="vector")
        self.tall = self.add_weight(shape=(2 * self.units, 3 * self.units), name="tall")

    @property
    def U(self) -> Any:  # noqa: N802 - the letter of the formulas
        return tf.convert_to_tensor(self.recurrent_kernel)

    @property
    def V(self) -> Any:  # noqa: N802 - the letter of the formulas
        return tf.convert_to_tensor(self.second_kernel)

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        new_h = self.function(self, inputs @ tf.convert_to_tensor(self.kernel), states[0])
        return new_h, [new_h]


class TfFunctionCell(WeightedCell):
    """Its step is a `tf.function` of its own, with a condition on the values."""

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        new_h = self.step(inputs, states[0])
        return new_h, [new_h]

    @tf.function
    def step(self, inputs: Any, h: Any) -> Any:
        z = self.preactivation(inputs, h)
        return tf.cond(tf.reduce_sum(tf.abs(z)) >= 0.0, lambda: tf.tanh(z), lambda: z)


class CounterCell(WeightedCell):
    """Damps with the number of steps, which it counts in a second state, an integer one when called with integers."""

    def __init__(self, units: int = 4, *, counter_first: bool = False, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self.counter_first = counter_first
        self.state_size = [1, units] if counter_first else [units, 1]

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        h, count = states[::-1] if self.counter_first else states
        new_h = tf.tanh(self.preactivation(inputs, h)) / (1.0 + tf.cast(count, h.dtype))
        new_states = [new_h, count + tf.ones_like(count)]
        return new_h, new_states[::-1] if self.counter_first else new_states

    def get_initial_state(self, batch_size: int | None = None) -> list[Any]:
        states = [tf.zeros((batch_size, self.units)), tf.zeros((batch_size, 1), tf.int32)]
        return states[::-1] if self.counter_first else states


class MatrixStateCell(WeightedCell):
    """Its state is a 2 x 3 matrix per sample."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(units=6, **kwargs)
        self.state_size = [(2, 3)]

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        new_h = tf.tanh(self.preactivation(inputs, tf.reshape(states[0], (-1, 6))))
        return new_h, [tf.reshape(new_h, (-1, 2, 3))]

    def get_initial_state(self, batch_size: int | None = None) -> list[Any]:
        return [tf.zeros((batch_size, 2, 3), self.compute_dtype)]


class BareStateCell(WeightedCell):
    """Returns its one state as it is, not in a list."""

    def call(self, inputs: Any, states: Any) -> tuple[Any, Any]:
        h = states[0] if isinstance(states, (list, tuple)) else states
        new_h = tf.nn.softmax(self.preactivation(inputs, h))
        return new_h, new_h


class PartlyMixingCell(WeightedCell):
    """Its first state is a softmax over the units of both; its second one acts unit by unit."""

    def __init__(self, units: int = 4, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self.state_size = [units, units]

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        h, m = states
        new_h = tf.nn.softmax(self.preactivation(inputs, h) + m)
        return new_h, [new_h, tf.tanh(m) + 0.5 * tf.sin(h)]


class TrainingSwitchCell(WeightedCell):
    """Does something else in training, which no measurement may see."""

    def call(self, inputs: Any, states: Any, training: Any = None) -> tuple[Any, list[Any]]:
        new_h = tf.tanh(self.preactivation(inputs, states[0]))
        if training:
            new_h = 100.0 * new_h
        return new_h, [new_h]


class PlainCell:
    """No Keras layer at all: an object with a `state_size` that can be called."""

    state_size = 3
    output_size = 3

    @property
    def compute_dtype(self) -> str:
        """Keras' RNN asks for it."""
        return str(keras.config.floatx())

    def __call__(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        return self.call(inputs, states)

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        kernel = tf.constant([[0.5, -0.3, 0.1], [0.2, 0.7, -0.4], [-0.6, 0.1, 0.9]], inputs.dtype)
        new_h = tf.tanh(states[0] @ kernel + tf.reduce_sum(inputs, axis=-1, keepdims=True))
        return new_h, [new_h]


class LinearCell(keras.layers.Layer):
    """`h_t = h_{t-1} @ U + x_t @ W` with given kernels: J = Uᵀ at every step."""

    def __init__(self, U: Any, W: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.U = np.asarray(U, np.float32)
        self.W = None if W is None else np.asarray(W, np.float32)
        self.state_size = len(self.U)
        self.output_size = len(self.U)

    def build(self, _: tuple[int, ...]) -> None:
        self.built = True

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        new_h = states[0] @ tf.cast(self.U, states[0].dtype)
        if self.W is not None:
            new_h += inputs @ tf.cast(self.W, inputs.dtype)
        return new_h, [new_h]


class StoppedCell(WeightedCell):
    """Sees its state only through `tf.stop_gradient`: its values depend on it, its gradient does not."""

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        new_h = tf.tanh(self.preactivation(inputs, tf.stop_gradient(states[0])))
        return new_h, [new_h]


class ReadoutFirstCell(WeightedCell):
    """Its first state is a readout that it never reads: the hidden view is disconnected, the joint view is not."""

    def __init__(self, units: int = 4, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self.state_size = [units, units]

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        new_h = tf.tanh(self.preactivation(inputs, states[1]))
        return new_h, [tf.square(new_h), new_h]


class UserRNN(keras.layers.RNN):
    """A user's own subclass."""

    def __init__(self, units: int = 4, **kwargs: Any) -> None:
        super().__init__(keras.layers.GRUCell(units), **kwargs)


class UserLSTM(keras.layers.LSTM):
    """A user's subclass of a built-in layer that changes what goes in."""

    def call(self, sequences: Any, initial_state: Any = None, mask: Any = None, training: Any = None) -> Any:
        return super().call(2.0 * sequences, initial_state=initial_state, mask=mask, training=training)


# Cases -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A recurrent layer to measure: `make(**kwargs of RNN)`, and the shape of one step of its input, without batch."""

    id: str
    make: Callable[..., Any]
    features: tuple[int, ...] = (FEATURES,)

    def __str__(self) -> str:
        return self.id


def _rnn(make_cell: Callable[[], Any]) -> Callable[..., Any]:
    return lambda **kwargs: keras.layers.RNN(make_cell(), **kwargs)


def _stacked(*make_cells: Callable[[], Any]) -> Callable[..., Any]:
    return lambda **kwargs: keras.layers.RNN([make_cell() for make_cell in make_cells], **kwargs)


BUILT_IN = [
    Case("simple_rnn", lambda **kw: keras.layers.SimpleRNN(4, **kw)),
    Case("simple_rnn_relu", lambda **kw: keras.layers.SimpleRNN(5, activation="relu", **kw)),
    Case("lstm", lambda **kw: keras.layers.LSTM(4, **kw)),
    Case("gru_reset_after", lambda **kw: keras.layers.GRU(4, **kw)),
    Case("gru_reset_before", lambda **kw: keras.layers.GRU(4, reset_after=False, **kw)),
    Case("conv_lstm_1d", lambda **kw: keras.layers.ConvLSTM1D(2, 2, padding="same", **kw), (3, 2)),
    Case("conv_lstm_2d", lambda **kw: keras.layers.ConvLSTM2D(2, 2, padding="valid", **kw), (3, 3, 1)),
    Case("rnn_of_lstm_cell", _rnn(lambda: keras.layers.LSTMCell(3))),
    Case("stacked_lstm_gru", _stacked(lambda: keras.layers.LSTMCell(3), lambda: keras.layers.GRUCell(4))),
    Case("stack_of_one", _stacked(lambda: keras.layers.GRUCell(4))),
    Case("dropout_lstm", lambda **kw: keras.layers.LSTM(4, dropout=0.5, recurrent_dropout=0.5, seed=1, **kw)),
]
CUSTOM = [
    Case("seed_cell", _rnn(SeedCell)),
    Case("stacked_seed_cell_simple_rnn", _stacked(SeedCell, lambda: keras.layers.SimpleRNNCell(3))),
    Case("unequal_states", _rnn(UnequalStates)),
    Case("custom_gradient", _rnn(StraightThroughCell)),
    Case("while_loop", _rnn(WhileLoopCell)),
    Case("map_fn", _rnn(MapFnCell)),
    Case("tf_function", _rnn(TfFunctionCell)),
    Case("counter", _rnn(CounterCell)),
    Case("counter_first", _rnn(lambda: CounterCell(counter_first=True))),
    Case("matrix_state", _rnn(MatrixStateCell)),
    Case("bare_state", _rnn(BareStateCell)),
    Case("partly_mixing", _rnn(PartlyMixingCell)),
    Case("training_switch", _rnn(TrainingSwitchCell)),
    Case("plain_object", _rnn(PlainCell)),
    Case("linear_2x2", _rnn(lambda: LinearCell([[1.0, 2.0], [3.0, 4.0]]))),
    Case("user_rnn", UserRNN),
]
CASES = [*BUILT_IN, *CUSTOM]
FAST = {"lstm", "gru_reset_after", "seed_cell", "partly_mixing"}


# They differ from others in what their layer is made of, and in nothing that a Jacobian is made of.
ALIKE = {"simple_rnn_relu", "rnn_of_lstm_cell", "stack_of_one", "dropout_lstm", "user_rnn"}


def soak_but(default: Container[Any], names: Iterable[Any]) -> list[Any]:
    """The names as parameters of a test; those that are not in the default tier repeat what others hold."""
    return [pytest.param(name, marks=[] if name in default else [pytest.mark.soak]) for name in names]


def cases_of(cases: Iterable[Case], *, soak: Container[str] = ()) -> list[Any]:
    """The cases as parameters of a test; those named in `soak`, and those alike, are in that tier alone."""

    def marks(case: Case) -> list[Any]:
        if case.id in soak or case.id in ALIKE:
            return [pytest.mark.soak]
        return [pytest.mark.fast] if case.id in FAST else []

    return [pytest.param(case, id=case.id, marks=marks(case)) for case in cases]


def each_case(*, soak: Container[str] = ()) -> Any:
    """The mark of a test that runs for every case."""
    return pytest.mark.parametrize("case", cases_of(CASES, soak=soak))


BY_ID: Mapping[str, Case] = {case.id: case for case in CASES}


# Data and models -------------------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> NDArray[np.float32]:
    """Gaussian numbers that depend on nothing but the arguments."""
    return (scale * np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(np.float32)


def randomize(layer: Any, *, seed: int = 7, scale: float = 0.5) -> None:
    """Gives every weight a random value: zero biases and orthogonal kernels would hide mistakes."""
    for index, variable in enumerate(layer.trainable_weights):
        variable.assign(normal(*variable.shape, seed=seed + index, scale=scale))


def build(model: Any, *inputs: Any) -> Any:
    """Calls a model once, so that cells without `build()` have their weights, then randomizes the weights."""
    with warnings.catch_warnings():
        # Keras says so of every layer that makes layers in `__init__` and has no `build()`: the seed's cell.
        warnings.filterwarnings("ignore", message=".*`build\\(\\)` was called on layer")
        model(*inputs)
    randomize(model)
    return model


def sequential(layers: list[Any], features: tuple[int, ...] = (STEPS, FEATURES)) -> Any:
    """A built model of the layers, for inputs of this shape."""
    return build(keras.Sequential([keras.Input(features), *layers]), np.zeros((BATCH, *features), np.float32))


def make_probe(case: Case, *, batch: int = BATCH, steps: int = STEPS, seed: int = 3) -> NDArray[np.float32]:
    return normal(batch, steps, *case.features, seed=seed)


def make_model(case: Case, probe: NDArray[np.float32], **kwargs: Any) -> tuple[Any, Any]:
    """A built model of one layer of the case, and the layer; kwargs go to the layer."""
    keras.utils.set_random_seed(5)
    layer = case.make(**kwargs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*`build\\(\\)` was called on layer")
        # A stateful layer has a batch size of its own.
        batch_size = len(probe) if kwargs.get("stateful") else None
        inputs = keras.Input(batch_shape=(batch_size, *probe.shape[1:]))
        model = keras.Model(inputs, layer(inputs))
    return build(model, probe), layer


def make_step(case: Case, *, rows: int = BATCH, seed: int = 11) -> tuple[Any, Any, Any]:
    """A built cell of the case with inputs and random states for one step: (cell, inputs, states)."""
    probe = make_probe(case, batch=rows, steps=1)
    _, layer = make_model(case, probe)

    def random_like(state: Any) -> Any:
        if state.dtype.is_floating:
            return tf.convert_to_tensor(normal(*state.shape, seed=seed), state.dtype)
        return tf.ones_like(state) * 2

    return (
        layer.cell,
        tf.convert_to_tensor(probe[:, 0]),
        tf.nest.map_structure(random_like, initial_states(layer, rows)),
    )


def initial_states(layer: Any, batch: int) -> list[Any]:
    """The states that an RNN layer starts from when it is given none."""
    get_initial_state = getattr(layer.cell, "get_initial_state", None)
    if get_initial_state is None:
        return [tf.zeros((batch, size)) for size in layer.state_size]
    states = tf.nest.map_structure(tf.convert_to_tensor, get_initial_state(batch_size=batch))
    return list(states) if isinstance(states, (list, tuple)) else [states]


# The reference ---------------------------------------------------------------------------------------


def call_cell(cell: Any, inputs: Any, states: Any) -> Any:
    """The new states, in inference."""
    takes_training = "training" in inspect.signature(cell.call).parameters
    _, new_states = cell(inputs, states, **({"training": False} if takes_training else {}))
    return new_states if isinstance(new_states, (list, tuple)) else [new_states]


def floating(states: Any) -> list[Any]:
    return [state for state in tf.nest.flatten(states) if state.dtype.is_floating]


def step_jacobians(
    cell: Any, inputs: Any, states: Any, views: Iterable[str] = VIEWS
) -> tuple[dict[str, NDArray[np.floating[Any]]], Any]:
    """Dense Jacobians (rows, new, old) of one step in the views asked for, and the new states."""
    inputs = tf.convert_to_tensor(inputs)
    # Copies: a tensor that serves as two states would get the sum of two derivatives.
    states = tf.nest.map_structure(tf.identity, states)
    sources = [*floating(states), inputs]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(sources)
        new_states = call_cell(cell, inputs, states)
        new = floating(new_states)
        units = [unit for state in new for unit in tf.unstack(_flat(state), axis=1)]
    m, n, *_ = (_flat(state[0]).shape[1] for state in (new, sources))
    gradients = [
        tape.gradient(unit, sources, unconnected_gradients="zero")
        for unit in (units if "joint" in views else units[:m])
    ]
    # The rows first, then the new states, then the old ones and the inputs.
    J = np.stack([np.concatenate([_flat(tf.convert_to_tensor(g)) for g in row], axis=1) for row in gradients], axis=1)
    olds = sum(_flat(state).shape[1] for state in sources[:-1])
    parts = {"hidden": J[:, :m, :n], "joint": J[:, :, :olds], "inputs": J[:, :m, olds:]}
    return {view: parts[view] for view in views}, new_states


def _flat(tensor: Any) -> Any:
    return tf.reshape(tensor, (tensor.shape[0], int(np.prod(tensor.shape[1:]))))


def reference_jacobians(
    layer: Any,
    inputs: Any,
    *,
    states: Any = None,
    mask: Any = None,
    by_inputs: bool = False,
) -> dict[str, NDArray[np.floating[Any]]]:
    """Dense Jacobians (time, batch, n, n) along the states that the layer visits, by input position; NaN where masked.

    Args:
        layer: A built RNN layer; its cell and its `go_backwards` are used, its own loop is not.
        inputs: What the layer receives, (batch, time, ...).
        states: Initial states; None for the ones that the cell starts from.
        mask: (batch, time), False where a step is skipped.
        by_inputs: Whether to give the `inputs` view too.
    """
    dtype = layer.cell.compute_dtype if isinstance(layer.cell, keras.layers.Layer) else "float32"
    inputs = tf.cast(inputs, dtype)
    batch, steps = inputs.shape[:2]
    if states is None:
        states = initial_states(layer, batch)
    # Keras casts all initial states of an RNN layer, a counter too.
    states = tf.nest.map_structure(lambda state: tf.cast(state, dtype), list(states))
    mask = np.ones((batch, steps), bool) if mask is None else np.asarray(mask, bool)

    views = ["hidden", "joint"] if len(floating(states)) > 1 else ["hidden"]
    views += ["inputs"] if by_inputs else []
    found: dict[str, list[Any]] = {view: [None] * steps for view in views}
    for t in reversed(range(steps)) if layer.go_backwards else range(steps):
        here, new_states = step_jacobians(layer.cell, inputs[:, t], states, views)
        for view, visited in found.items():
            visited[t] = np.where(mask[:, t, None, None], here[view], np.nan)
        valid = mask[:, t]
        states = tf.nest.pack_sequence_as(
            states,
            [
                tf.where(valid.reshape(-1, *[1] * (len(new.shape) - 1)), new, old)
                for new, old in zip(tf.nest.flatten(new_states), tf.nest.flatten(states), strict=True)
            ],
        )
    return {view: np.stack(visited) for view, visited in found.items()}


def variance(J: NDArray[Any]) -> NDArray[np.float64]:
    """n Var(J), the seed's `np.var(J) * units`."""
    return np.asarray(J.shape[-1] * np.var(J.astype(np.float64), axis=(-2, -1)))


def rms_singular_value(J: NDArray[Any]) -> NDArray[np.float64]:
    """sqrt(‖J‖² / n)."""
    return np.asarray(np.linalg.norm(J.astype(np.float64), axis=(-2, -1)) / np.sqrt(J.shape[-1]))


def spectral_norm(J: NDArray[Any]) -> NDArray[np.float64]:
    """The largest singular value; NaN for a matrix with NaN, which LAPACK refuses."""
    flat = J.astype(np.float64).reshape(-1, *J.shape[-2:])
    largest = [np.linalg.svd(M, compute_uv=False)[0] if np.isfinite(M).all() else np.nan for M in flat]
    return np.reshape(largest, J.shape[:-2])


MEASURES: Mapping[str, Callable[[NDArray[Any]], NDArray[np.float64]]] = {
    "variance": variance,
    "rms_singular_value": rms_singular_value,
    "spectral_norm": spectral_norm,
}
# The keys of a report; a cell with one state has no joint ones.
KEYS = tuple(f"{view}{measure}" for view in ("", "joint/") for measure in MEASURES)
MOMENTS = tuple(key for key in KEYS if "spectral" not in key)
# Where a test is about what is measured and not about the measures, one of them will do.
QUICK = ("variance", "joint/variance")
# What is promised, relative, in float32.
RTOL: Mapping[str, float] = {"variance": 1e-5, "rms_singular_value": 1e-5, "spectral_norm": 1e-2}


def reference_values(
    jacobians: Mapping[str, NDArray[Any]], keys: Iterable[str] = KEYS
) -> dict[str, NDArray[np.float64]]:
    """The values that a report has, by key: `variance`, and `joint/variance` if there are several states."""
    return {
        key: MEASURES[key.removeprefix("joint/")](jacobians["joint" if key.startswith("joint/") else "hidden"])
        for key in keys
        if "joint" in jacobians or not key.startswith("joint/")
    }


def assert_layer(
    actual: Any,
    layer: Any,
    inputs: Any,
    *,
    states: Any = None,
    mask: Any = None,
    measures: Iterable[str] = KEYS,
    rtol: Mapping[str, float] = RTOL,
) -> None:
    """Holds a LayerReport against the reference: keys, shapes, masks, values."""
    expected = reference_values(reference_jacobians(layer, inputs, states=states, mask=mask), measures)
    assert set(actual.values) == set(expected)
    batch, steps = np.shape(inputs)[:2]
    expected_mask = np.ones((steps, batch), bool) if mask is None else np.asarray(mask, bool).T
    np.testing.assert_array_equal(actual.mask, expected_mask, strict=True)
    for key, value in expected.items():
        assert actual[key].dtype in (np.float32, np.float64), key
        np.testing.assert_allclose(
            actual[key],
            value.astype(actual[key].dtype),
            rtol=rtol[key.removeprefix("joint/")],
            strict=True,
            err_msg=key,
        )
