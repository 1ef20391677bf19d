"""Calls of one kind share one compiled measurement, also those of other models; calls of different kinds never do."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import BATCH, MOMENTS, STEPS, ScaledCell, WeightedCell, assert_layer, build, normal, randomize

from keras_jacmon import register_jacobian
from keras_jacmon.measurement.shared import Shared
from keras_jacmon.meter import JacobianMeter

pytestmark = pytest.mark.fast

L = keras.layers
PROBE, NARROW = normal(BATCH, STEPS, 4), normal(BATCH, STEPS, 2)


class CountedCell(WeightedCell):
    """Counts its calls in a weight of Keras."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        super().build(input_shape)
        self.calls = self.add_weight(shape=(), trainable=False, name="calls", initializer="zeros")

    def call(self, inputs: Any, states: Any) -> Any:
        self.calls.assign_add(1.0)
        new = tf.tanh(self.preactivation(inputs, states[0]))
        return new, [new]


def stack_of(*layers: Any, probe: Any = PROBE) -> Any:
    """A model of one layer on another, each with weights of its own."""
    model = build(keras.Sequential([keras.Input(probe.shape[1:]), *layers]), probe)
    randomize(model)
    return model


def assert_each_equals_the_loop(
    meter: JacobianMeter, model: Any, *, measures: Any = ("variance",), probe: Any = PROBE
) -> None:
    report, values = meter(), tf.constant(probe)
    for layer in model.layers:
        assert_layer(report[layer.name], layer, values.numpy(), measures=measures)
        values = layer(values)


def test_equal_layers_are_traced_once_and_measured_with_their_own_weights() -> None:
    model = stack_of(*(L.LSTM(4, return_sequences=True, name=f"lstm_{k}") for k in range(4)))
    meter = JacobianMeter(model, PROBE, measures=MOMENTS)
    assert meter.trace_count == 1
    assert_each_equals_the_loop(meter, model, measures=MOMENTS)
    randomize(model, seed=5)
    assert_each_equals_the_loop(meter, model, measures=MOMENTS)
    assert meter.trace_count == 1


@pytest.mark.parametrize("cell", [L.LSTM, L.GRU, L.SimpleRNN])
def test_a_first_layer_with_fewer_features_is_of_the_kind_of_the_next(cell: Any) -> None:
    model = stack_of(*(cell(4, return_sequences=True) for _ in range(2)), probe=NARROW)
    meter = JacobianMeter(model, NARROW, measures=MOMENTS)
    assert meter.trace_count == 1
    assert_each_equals_the_loop(meter, model, measures=MOMENTS, probe=NARROW)
    randomize(model, seed=5)
    assert_each_equals_the_loop(meter, model, measures=MOMENTS, probe=NARROW)


def test_the_number_of_features_counts_where_the_inputs_are_a_view() -> None:
    model = stack_of(*(L.SimpleRNN(4, return_sequences=True) for _ in range(2)), probe=NARROW)
    meter, first = JacobianMeter(model, NARROW, measures=["inputs/variance"]), model.layers[0].name
    assert meter.trace_count == 2
    alone = JacobianMeter(model, NARROW, layers=first, measures=["inputs/variance"])
    np.testing.assert_allclose(meter()[first]["inputs/variance"], alone()[first]["inputs/variance"])


class ShiftedCell(WeightedCell):
    """Adds a mean to its state: that of its inputs, or of the weights that these meet."""

    def __init__(self, *, by_inputs: bool) -> None:
        super().__init__(4)
        self.by_inputs = by_inputs

    def call(self, inputs: Any, states: Any) -> Any:
        mean = tf.reduce_mean(inputs, axis=1, keepdims=True) if self.by_inputs else tf.reduce_mean(self.kernel)
        new = tf.tanh(self.preactivation(inputs, states[0] + mean))
        return new, [new]


@pytest.mark.parametrize("by_inputs", [True, False])
def test_the_number_of_features_counts_where_inputs_or_their_weights_do_more_than_meet(*, by_inputs: bool) -> None:
    layers = (L.RNN(ShiftedCell(by_inputs=by_inputs), return_sequences=True) for _ in range(2))
    model = stack_of(*layers, probe=NARROW)
    meter = JacobianMeter(model, NARROW, measures=["variance"])
    assert meter.trace_count == 2
    assert_each_equals_the_loop(meter, model, probe=NARROW)


def test_a_layer_is_not_measured_with_many_more_features_than_it_has() -> None:
    wide = normal(BATCH, STEPS, 9)
    model = stack_of(*(L.SimpleRNN(4, return_sequences=True) for _ in range(2)), probe=wide)
    assert JacobianMeter(model, wide, measures=["variance"]).trace_count == 2


def test_both_directions_are_of_one_kind() -> None:
    model = build(keras.Sequential([keras.Input((STEPS, 4)), L.Bidirectional(L.GRU(4))]), PROBE)
    meter = JacobianMeter(model, PROBE, measures=["variance"])
    assert len(meter.layers) == 2
    assert meter.trace_count == 1


@pytest.mark.parametrize(
    "others",
    [
        [L.SimpleRNN(4, "relu", return_sequences=True), L.SimpleRNN(4, use_bias=False, return_sequences=True)],
        [L.SimpleRNN(3, return_sequences=True), L.SimpleRNN(2, return_sequences=True)],
        [L.GRU(4, return_sequences=True), L.GRU(4, reset_after=False, return_sequences=True)],
    ],
    ids=["options", "sizes", "cells"],
)
def test_other_steps_are_other_kinds(others: list[Any]) -> None:
    model = stack_of(L.SimpleRNN(4, return_sequences=True, name="first"), *others)
    meter = JacobianMeter(model, PROBE, measures=["variance"])
    assert meter.trace_count == 3
    assert_each_equals_the_loop(meter, model)


@pytest.mark.parametrize(
    ("factors", "kinds"),
    [
        ((1.0, 0.5, 0.5), 2),
        ((tf.Variable(1.0), tf.Variable(0.5), tf.Variable(0.7)), 3),
        ((np.full(4, 1.0, np.float32), np.full(4, 0.5, np.float32), np.full(4, 0.5, np.float32)), 2),
    ],
    ids=["numbers", "variables", "arrays"],
)
def test_the_step_counts_and_not_the_configuration(factors: Any, kinds: int) -> None:
    model = stack_of(*(L.RNN(ScaledCell(factor), return_sequences=True) for factor in factors))
    meter = JacobianMeter(model, PROBE, measures=["variance"])
    assert meter.trace_count == kinds
    assert_each_equals_the_loop(meter, model)


def test_a_cell_that_writes_to_its_variables_is_of_a_kind_of_its_own() -> None:
    model = stack_of(*(L.RNN(CountedCell(4), return_sequences=True) for _ in range(2)))
    before = [float(layer.cell.calls) for layer in model.layers]
    meter = JacobianMeter(model, PROBE, measures=["variance"])
    assert meter.trace_count == 2
    assert_each_equals_the_loop(meter, model)
    assert [float(layer.cell.calls) for layer in model.layers] != before, "the loop counts"
    counted = [float(layer.cell.calls) for layer in model.layers]
    meter()
    assert [float(layer.cell.calls) for layer in model.layers] == counted


def test_a_registered_form_may_read_what_the_step_does_not() -> None:
    def form(cell: Any, inputs: Any, states: Any, _: str) -> Any:
        slope = float(cell.factor) * (1 - tf.tanh(cell.factor * cell.preactivation(inputs, states[0])) ** 2)
        return tf.linalg.LinearOperatorFullMatrix(slope[:, :, None] * tf.transpose(cell.recurrent_kernel))

    register_jacobian(ScaledCell, form)
    try:
        model = stack_of(*(L.RNN(ScaledCell(0.5), return_sequences=True) for _ in range(2)))
        meter = JacobianMeter(model, PROBE, measures=["variance"])
        assert meter.trace_count == 2
        assert_each_equals_the_loop(meter, model)
    finally:
        register_jacobian(ScaledCell, None)


def test_a_check_that_fails_concerns_one_call() -> None:
    """Two cells of one kind, of which one is measured where its samples depend on each other."""

    class Gated(WeightedCell):
        """Uses the mean over the samples where a weight says so."""

        def build(self, input_shape: tuple[int, ...]) -> None:
            super().build(input_shape)
            self.share = self.add_weight(shape=(), name="share", initializer="zeros")

        def call(self, inputs: Any, states: Any) -> Any:
            h = states[0] + self.share * (tf.reduce_mean(inputs) + inputs[:, :1])
            new = tf.tanh(self.preactivation(inputs, h))
            return new, [new]

    model = stack_of(*(L.RNN(Gated(4), return_sequences=True, name=f"rnn_{k}") for k in range(2)))
    for layer, share in zip(model.layers, (0.0, 1.0), strict=True):
        layer.cell.share.assign(share)
    meter = JacobianMeter(model, PROBE, measures=["variance"])
    assert meter.trace_count == 1
    with pytest.warns(UserWarning, match="^Layer `rnn_1`: what its cell makes of a sample depends on"):
        assert_each_equals_the_loop(meter, model)
    assert meter.trace_count == 2


def of_one_layer(layer: Any, seed: int = 3) -> Any:
    model = build(keras.Sequential([keras.Input((STEPS, 4)), layer]), PROBE)
    randomize(model, seed=seed)
    return model


def graph_of(layer: Any, **options: Any) -> tf.Graph:
    """The graph of the measurement of a model with one layer, whose numbers are right."""
    model = of_one_layer(layer)
    meter = JacobianMeter(model, PROBE, **{"measures": ["variance"], **options})
    assert_each_equals_the_loop(meter, model, measures=options.get("measures", ["variance"]))
    (graph,) = meter.graphs
    return graph


def test_models_share_the_measurements_of_equal_kinds() -> None:
    graph = graph_of(L.SimpleRNN(4))
    assert graph_of(L.SimpleRNN(4, name="another")) is graph
    keras.backend.clear_session()
    assert graph_of(L.SimpleRNN(4)) is graph


def test_models_share_measurements_that_draw_random_numbers() -> None:
    first, second = (JacobianMeter(of_one_layer(L.LSTM(4)), PROBE, measures="full").graphs[0] for _ in range(2))
    assert first is second


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (lambda: L.SimpleRNN(4, "relu"), {}),
        (lambda: L.SimpleRNN(4), {"measures": ["variance", "rms_singular_value"]}),
        (lambda: L.SimpleRNN(4), {"seed": 1}),
    ],
    ids=["step", "measures", "options"],
)
def test_models_share_nothing_else(layer: Any, options: Any) -> None:
    assert graph_of(layer(), **options) is not graph_of(L.SimpleRNN(4))


def test_a_report_names_the_weights_of_its_own_model() -> None:
    """Of two weights with one name the report shows their layers, whose names differ from model to model."""
    for layers in (("below", "above"), ("first", "second")):
        cells = L.StackedRNNCells([L.SimpleRNNCell(2, name=name) for name in layers])
        model = of_one_layer(L.RNN(cells, name="rnn"))
        method = JacobianMeter(model, PROBE, measures=["sensitivity"])()["rnn"].methods["sensitivity"]
        assert all(f"`{name}/recurrent_kernel`" in method for name in layers), method


def test_a_device_is_not_shared() -> None:
    graph = graph_of(L.SimpleRNN(4))
    with tf.device("/cpu:0"):
        assert graph_of(L.SimpleRNN(4)) is not graph


def test_a_cell_that_reads_what_it_is_not_given_shares_with_no_other_model() -> None:
    variable = tf.Variable(0.5)
    first, second = (graph_of(L.RNN(ScaledCell(variable))) for _ in range(2))
    assert first is not second


def test_a_measurement_that_reads_a_seed_in_vain_is_not_shared() -> None:
    """Keras' simple cell makes the mask of a dropout also where it is not applied."""

    def graph() -> tf.Graph:
        # Of a size that no other test has: the measurement of one without dropout would do for these.
        layers = [L.SimpleRNN(13, dropout=0.5, return_sequences=True), L.SimpleRNN(13, dropout=0.5)]
        model = keras.Sequential([keras.Input(PROBE.shape[1:]), *layers])
        return JacobianMeter(model, PROBE, measures=["variance"]).graphs[0]

    assert graph() is not graph()


def test_what_is_shared_holds_neither_model_nor_cell() -> None:
    model = of_one_layer(L.SimpleRNN(4, use_bias=False))
    meter = JacobianMeter(model, PROBE, measures=["variance"])
    meter()
    graph = weakref.ref(meter.graphs[0])
    gone = [weakref.ref(thing) for thing in (model, model.layers[0], model.layers[0].cell, model.weights[0], meter)]
    del model, meter
    gc.collect()
    assert [thing() for thing in gone] == [None] * len(gone)
    assert graph() is not None


def test_the_objects_that_were_used_last_are_kept() -> None:
    shared, made = Shared[int](most=2), list[int]()

    def get(key: int) -> int:
        def make() -> int:
            made.append(key)
            return 10 * key

        return shared.get(key, make, lambda _: True)

    assert [get(key) for key in (1, 2, 1, 3, 1, 2)] == [10, 20, 10, 30, 10, 20]
    assert made == [1, 2, 3, 2]


def test_of_what_fails_nothing_is_kept() -> None:
    shared = Shared[int](most=2)

    def fail() -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shared.get("key", fail, lambda _: True)
    assert shared.get("key", lambda: 1, lambda _: True) == 1


def test_of_what_only_the_caller_may_use_nothing_is_kept() -> None:
    shared = Shared[int](most=2)
    assert [shared.get("key", partial(int, text), lambda made: made > 1) for text in "123"] == [1, 2, 2]
