"""Equal layers share one loop in the pass on the probe, and receive what their own loops would give them."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import BATCH, STEPS, ScaledCell, WeightedCell, build, normal, randomize

from keras_jacmon.graphs.trace import trace
from keras_jacmon.measurement.loops import record_with_shared_loops
from keras_jacmon.meter import JacobianMeter
from keras_jacmon.model.guard import shielded
from keras_jacmon.model.layers import find_recurrent_layers
from keras_jacmon.model.recording import record_calls

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.fast

L = keras.layers
PROBE = normal(BATCH, STEPS, 4)
PADDED = np.where(np.arange(STEPS)[None, :, None] < np.array([STEPS, 2, 1])[:, None, None][:BATCH], PROBE[:3], 0.0)


class CountedCell(WeightedCell):
    """Counts its calls in a weight of Keras, and reads the count."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        super().build(input_shape)
        self.calls = self.add_weight(shape=(), trainable=False, name="calls", initializer="zeros")

    def call(self, inputs: Any, states: Any) -> Any:
        self.calls.assign_add(1.0)
        new = tf.tanh(self.preactivation(inputs, states[0]) + 0.1 * self.calls)
        return new, [new]


class WithDropout(keras.Model):
    """Calls a layer as in training, whatever the model is called for."""

    def __init__(self) -> None:
        super().__init__()
        self.below = L.LSTM(4, return_sequences=True, dropout=0.5, seed=1)
        self.above = L.LSTM(4)

    def call(self, inputs: Any) -> Any:
        return self.above(self.below(inputs, training=True))


class AroundOthers(keras.Model):
    """Calls layers of another precision than its own."""

    def __init__(self, dtype: str) -> None:
        super().__init__(dtype=dtype)
        self.below, self.above = L.GRU(4, return_sequences=True, dtype="float32"), L.GRU(4, dtype="float32")

    def call(self, inputs: Any) -> Any:
        return self.above(self.below(inputs))


def scaled_by(factor: float) -> Callable[[Any], Any]:
    def activation(x: Any) -> Any:
        return keras.ops.tanh(factor * x)

    return activation


@dataclass
class Scaled:
    """An activation that has neither a name nor a hash."""

    factor: float

    def __call__(self, x: Any) -> Any:
        return keras.ops.tanh(self.factor * x)


def stepping_twice(cell: Any) -> Any:
    """The cell, with a `call` of its own."""
    original = cell.call

    def call(inputs: Any, states: Any, **_: Any) -> Any:
        _, states = original(inputs, states)
        return original(inputs, states)

    cell.call = call
    return cell


def of(*layers: Any, masked: bool = False) -> Any:
    """A model of layers on one another."""
    return keras.Sequential([keras.Input((STEPS, 4)), *([L.Masking()] if masked else []), *layers])


def called_on_its_own_output() -> Any:
    x = keras.Input((STEPS, 4))
    layer = L.GRU(4, return_sequences=True)
    return keras.Model(x, layer(layer(x)))


def encoder_and_decoder() -> Any:
    x = keras.Input((STEPS, 4))
    _, *states = L.LSTM(4, return_state=True)(x)
    return keras.Model(x, L.LSTM(4, return_sequences=True)(x, initial_state=states))


def with_another_call_on_top() -> Any:
    x = keras.Input((STEPS, 4))
    layer = L.LSTM(4, return_state=True)
    _, *states = layer(x)
    return keras.Model(x, layer(x, initial_state=states))


def stateful_and_called_twice() -> Any:
    x = keras.Input((STEPS, 4), batch_size=len(PADDED))
    layer = L.LSTM(4, stateful=True)
    return keras.Model(x, [layer(x), layer(x)])


MODELS: dict[str, Callable[[], Any]] = {
    "LSTM": lambda: of(*(L.LSTM(4, return_sequences=k < 2) for k in range(3))),
    "GRU": lambda: of(*(L.GRU(4, return_sequences=k < 2) for k in range(3))),
    "SimpleRNN": lambda: of(*(L.SimpleRNN(4, return_sequences=k < 2) for k in range(3))),
    "masked": lambda: of(*(L.LSTM(4, return_sequences=k < 2) for k in range(3)), masked=True),
    "masked, zeros in the output": lambda: of(
        *(L.LSTM(4, return_sequences=k < 2, zero_output_for_mask=k < 1) for k in range(3)), masked=True
    ),
    "backwards": lambda: of(*(L.GRU(4, return_sequences=k < 2, go_backwards=k != 1) for k in range(3)), masked=True),
    "both directions": lambda: of(*(L.Bidirectional(L.LSTM(4, return_sequences=k < 2)) for k in range(3)), masked=True),
    "unrolled": lambda: of(*(L.LSTM(4, return_sequences=k < 2, unroll=k < 2) for k in range(3))),
    "different biases": lambda: of(*(L.LSTM(4, return_sequences=k < 2, use_bias=k < 1) for k in range(3))),
    "different ways to reset": lambda: of(
        *(L.GRU(4, return_sequences=k < 2, use_bias=False, reset_after=k < 1) for k in range(3))
    ),
    "cells on one another": lambda: of(*(L.RNN([L.LSTMCell(4), L.GRUCell(4)], return_sequences=True) for _ in "ab")),
    "convolution": lambda: of(L.Reshape((STEPS, 2, 2, 1)), *(L.ConvLSTM2D(1, 1, return_sequences=True) for _ in "ab")),
    "stateful": lambda: keras.Sequential(
        [
            keras.Input((STEPS, 4), batch_size=len(PADDED)),
            *(L.LSTM(4, return_sequences=True, stateful=True) for _ in "ab"),
        ]
    ),
    "a cell of one's own": lambda: of(*(L.RNN(ScaledCell(0.5 + k), return_sequences=k < 2) for k in range(3))),
    "a cell that reads a variable": lambda: of(
        *(L.RNN(ScaledCell(tf.Variable(0.5 + k)), return_sequences=k < 2) for k in range(3))
    ),
    "a cell that counts": lambda: of(*(L.RNN(CountedCell(4), return_sequences=k < 2) for k in range(3))),
    "activations of one name": lambda: of(
        *(L.LSTM(4, return_sequences=k < 2, activation=scaled_by(0.5 + k)) for k in range(3))
    ),
    "activations without a name": lambda: of(
        *(L.LSTM(4, return_sequences=k < 2, activation=Scaled(0.5 + k)) for k in range(3))
    ),
    "a `call` of one's own": lambda: of(
        *(L.RNN(stepping_twice(L.GRUCell(4)) if k else L.GRUCell(4), return_sequences=k < 2) for k in range(3))
    ),
    "float16": lambda: of(*(L.LSTM(4, return_sequences=k < 2, dtype="float16") for k in range(3))),
    "mixed precision": lambda: of(*(L.LSTM(4, return_sequences=k < 2, dtype="mixed_float16") for k in range(3))),
    "cells of another precision": lambda: of(
        *(L.RNN(L.LSTMCell(4, dtype="float32"), return_sequences=k < 2, dtype="mixed_float16") for k in range(3))
    ),
    "a half-precision model around others": lambda: AroundOthers("mixed_float16"),
    "float64": lambda: of(*(L.LSTM(4, return_sequences=k < 2, dtype="float64") for k in range(3))),
    "dropout at inference": WithDropout,
    "called on its own output": called_on_its_own_output,
    "an encoder and a decoder": encoder_and_decoder,
    "another call from the last states": with_another_call_on_top,
    "stateful and called twice": stateful_and_called_twice,
    "an only layer": lambda: of(L.LSTM(4), L.Dense(1)),
}


def received(model: Any, record: Callable[..., Any]) -> Callable[[], list[Any]]:
    """Traces what each recurrent call of a model receives; a function that computes it."""
    layers = find_recurrent_layers(model)

    def run(x: tf.Tensor) -> tuple[list[Any], Any]:
        with shielded(model):
            made = record(model, x, layers)
        recording = made if record is record_calls else made[0]
        flat = [
            [c.inputs, *keras.tree.flatten(c.states), *([] if c.mask is None else [c.mask])] for c in recording.calls
        ]
        return flat, made

    probe = tf.constant(PADDED, tf.float32)
    traced = trace(run, [tf.TensorSpec(probe.shape, probe.dtype)])
    return lambda: [[tensor.numpy() for tensor in call] for call in traced(probe)]


@pytest.mark.parametrize("name", MODELS)
def test_each_layer_receives_what_its_own_loop_would_give_it(name: str) -> None:
    model = build(MODELS[name](), tf.constant(PADDED, tf.float32))
    randomize(model)
    shared, own = received(model, record_with_shared_loops), received(model, record_calls)
    for seed in (1, 2):
        # The loops are given the weights of the moment.
        randomize(model, seed=seed)
        for ours, theirs in zip(shared(), own(), strict=True):
            for found, expected in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(found, expected)
    assert all(np.ptp(call[0]) > 0 for call in shared())


def steps_traced(model: Any, monkeypatch: pytest.MonkeyPatch, cell: Any = L.LSTMCell) -> int:
    """The number of times that the step of cells of a class is traced while the calls of a model are recorded."""
    count, original = [0], cell.call

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(cell, "call", call)
        received(model, record_with_shared_loops)
    return count[0]


def test_equal_layers_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def stack(depth: int, units: int) -> Any:
        model = of(*(L.Bidirectional(L.LSTM(units, return_sequences=True)) for _ in range(depth)))
        return build(model, tf.constant(PADDED, tf.float32))

    three, six = (steps_traced(stack(depth, 5), monkeypatch) for depth in (3, 6))
    # The first layer has other features. Keras traces a step twice for a loop; the second model finds both loops.
    kinds = 2
    assert three == kinds + 2 * kinds
    assert six == kinds


def test_a_loop_that_reads_more_than_it_is_given_is_traced_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [L.RNN(ScaledCell(tf.Variable(0.5)), return_sequences=True), L.LSTM(4)]
    model = build(of(*layers), tf.constant(PADDED, tf.float32))
    once, again = (steps_traced(model, monkeypatch, ScaledCell) for _ in range(2))
    assert once == again > 1


@pytest.mark.parametrize("dropout", ["dropout", "recurrent_dropout"])
def test_a_loop_that_reads_a_seed_in_vain_does_not_outlive_its_model(dropout: str) -> None:
    """Keras' simple cell makes the mask of a dropout also where it is not applied, unlike its others."""
    for _ in range(2):
        # Of a size that no other test has, whose loop might be known.
        layers = [L.SimpleRNN(11, return_sequences=True, **{dropout: 0.5}) for _ in "ab"]
        model = build(of(*layers), tf.constant(PADDED, tf.float32))
        report = JacobianMeter(model, PADDED.astype(np.float32), measures=["variance"])(suggestions=False)
        assert all(np.isfinite(layer.mean("variance")) for layer in report.values())
        del layers, model
        gc.collect()


def test_a_loop_in_half_precision_is_traced_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [L.LSTM(4, return_sequences=True, dtype="float16") for _ in "ab"]
    model = build(of(*layers), tf.constant(PADDED, tf.float32))
    once, again = (steps_traced(model, monkeypatch) for _ in range(2))
    assert once == again


def test_the_loop_of_an_only_layer_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert steps_traced(build(of(L.LSTM(6), L.Dense(1)), tf.constant(PADDED, tf.float32)), monkeypatch) == 0


def test_nothing_is_kept_of_a_model() -> None:
    factor = tf.Variable(0.5)
    cells: list[Any] = [L.LSTMCell(7), L.LSTMCell(7), ScaledCell(factor), ScaledCell(factor)]
    model = build(of(*(L.RNN(cell, return_sequences=True) for cell in cells)), tf.constant(PADDED, tf.float32))
    compute = received(model, record_with_shared_loops)
    kept = [weakref.ref(part) for part in (factor, model, *model.layers, *cells, *model.weights)]
    del factor, cells, model, compute
    gc.collect()
    assert [reference() for reference in kept if reference() is not None] == []


def test_recording_leaves_the_layers_as_they_were() -> None:
    model = build(of(*(L.GRU(4, return_sequences=k < 1, go_backwards=True) for k in range(2))), PADDED)
    before = [dict(vars(layer)) for layer in model.layers]
    received(model, record_with_shared_loops)
    for layer, attributes in zip(model.layers, before, strict=True):
        assert vars(layer) == attributes


class LimitedCell(WeightedCell):
    """Fails where its inputs are not below a weight."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        super().build(input_shape)
        self.limit = self.add_weight(shape=(), trainable=False, name="limit", initializer="ones")

    def call(self, inputs: Any, states: Any) -> Any:
        limit = tf.convert_to_tensor(self.limit)
        with tf.control_dependencies([tf.debugging.assert_less(inputs, limit, "beyond the limit")]):
            new = tf.tanh(self.preactivation(inputs, states[0]))
        return new, [new]


def test_a_shared_loop_that_fails_names_its_layer() -> None:
    model = of(*(L.RNN(LimitedCell(4), return_sequences=True, name=name) for name in "abc"))
    build(model, np.zeros_like(PADDED))
    for layer in model.layers:
        layer.cell.limit.assign(100.0)
    meter = JacobianMeter(model, PADDED, measures=["variance"], layers=["a", "b", "c"])
    meter()
    model.get_layer("b").cell.limit.assign(-100.0)
    for _ in range(5):
        with pytest.raises(RuntimeError, match=r"^Measuring layer `b` failed: .*beyond the limit"):
            meter()
