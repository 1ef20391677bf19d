"""Calls of one kind share one compiled measurement; calls of different kinds never do."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import BATCH, KEYS, STEPS, WeightedCell, assert_layer, build, normal, randomize

from keras_jacmon import register_jacobian
from keras_jacmon.meter import JacobianMeter

pytestmark = pytest.mark.fast

L = keras.layers
PROBE = normal(BATCH, STEPS, 4)


class ScaledCell(WeightedCell):
    """A factor that its configuration does not tell, and that it reads from a number, a tensor or a variable."""

    def __init__(self, factor: Any, **kwargs: Any) -> None:
        super().__init__(4, **kwargs)
        self.factor = factor

    def call(self, inputs: Any, states: Any) -> Any:
        new = tf.tanh(tf.convert_to_tensor(self.factor) * self.preactivation(inputs, states[0]))
        return new, [new]


class CountedCell(WeightedCell):
    """Counts its calls in a weight of Keras."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        super().build(input_shape)
        self.calls = self.add_weight(shape=(), trainable=False, name="calls", initializer="zeros")

    def call(self, inputs: Any, states: Any) -> Any:
        self.calls.assign_add(1.0)
        new = tf.tanh(self.preactivation(inputs, states[0]))
        return new, [new]


def stack_of(*layers: Any) -> Any:
    """A model of one layer on another, each with weights of its own."""
    model = build(keras.Sequential([keras.Input((STEPS, 4)), *layers]), PROBE)
    randomize(model)
    return model


def assert_each_equals_the_loop(meter: JacobianMeter, model: Any, *, measures: Any = ("variance",)) -> None:
    report, values = meter(), tf.constant(PROBE)
    for layer in model.layers:
        assert_layer(report[layer.name], layer, values.numpy(), measures=measures)
        values = layer(values)


def test_equal_layers_are_traced_once_and_measured_with_their_own_weights() -> None:
    model = stack_of(*(L.LSTM(4, return_sequences=True, name=f"lstm_{k}") for k in range(4)))
    meter = JacobianMeter(model, PROBE, measures=KEYS)
    assert meter.trace_count == 1
    assert_each_equals_the_loop(meter, model, measures=KEYS)
    randomize(model, seed=5)
    assert_each_equals_the_loop(meter, model, measures=KEYS)
    assert meter.trace_count == 1


def test_both_directions_are_of_one_kind() -> None:
    model = build(keras.Sequential([keras.Input((STEPS, 4)), L.Bidirectional(L.GRU(4))]), PROBE)
    meter = JacobianMeter(model, PROBE, measures=["variance"])
    assert len(meter.layers) == 2
    assert meter.trace_count == 1


@pytest.mark.parametrize(
    "others",
    [
        [L.LSTM(4, activation="relu", return_sequences=True), L.LSTM(4, use_bias=False, return_sequences=True)],
        [L.LSTM(3, return_sequences=True), L.LSTM(4, return_sequences=True)],
        [L.GRU(4, return_sequences=True), L.GRU(4, reset_after=False, return_sequences=True)],
    ],
    ids=["options", "sizes", "cells"],
)
def test_other_steps_are_other_kinds(others: list[Any]) -> None:
    model = stack_of(L.LSTM(4, return_sequences=True, name="first"), *others)
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
