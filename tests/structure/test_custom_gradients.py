"""Elementwise functions with a gradient of their own, as the spikes of spiking cells have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import FEATURES, FunctionCell, normal
from structure_laws import assert_structured_as_autodiff, double_precision

from keras_jacmon import state_jacobian
from keras_jacmon.cell.cell_graph import CellGraph
from keras_jacmon.cell.step import CellStep
from keras_jacmon.jacobians.linearise import kernels_of, structured_jacobian, weights_only_values
from keras_jacmon.structure.index_map import Node
from keras_jacmon.structure.interpreter import find_structure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with double_precision():
        yield


@tf.custom_gradient
def spike(v: Any) -> Any:
    """The triangle of Bellec and others (2018)."""
    return tf.cast(v > 0, v.dtype), lambda upstream: upstream * 0.3 * tf.maximum(1.0 - tf.abs(v), 0.0)


@tf.custom_gradient
def damped_spike(v: Any, damping: Any) -> Any:
    def gradient(upstream: Any) -> Any:
        return upstream * damping * tf.maximum(1.0 - tf.abs(v), 0.0), tf.zeros_like(damping)

    return tf.cast(v > 0, v.dtype), gradient


@tf.custom_gradient
def boxed_sign(v: Any) -> Any:
    return tf.sign(v), lambda upstream: tf.where(tf.abs(v) < 1.0, upstream, tf.zeros_like(upstream))


@tf.custom_gradient
def spike_by_tape(v: Any) -> Any:
    def gradient(upstream: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(v)
            smooth = tf.sigmoid(3.0 * v) * v
        return tape.gradient(smooth, v, upstream)

    return tf.cast(v > 0, v.dtype), gradient


@tf.custom_gradient
def scaled_over_units(v: Any) -> Any:
    """The slope is made from all units, but each gradient has its own unit alone."""
    slope = tf.exp(-v * v) / (1.0 + tf.reduce_sum(v * v, axis=-1, keepdims=True))
    return tf.tanh(v), lambda upstream: upstream * slope


def keras_sign(v: Any) -> Any:
    ops = keras.ops
    return ops.custom_gradient(lambda v: (ops.sign(v), lambda upstream: upstream * ops.exp(-v * v)))(v)


@tf.function(autograph=False)
def spike_in_a_function(cell: Any, z: Any) -> Any:
    return spike(z) @ cell.V


STRUCTURED: dict[str, Callable[[Any, Any, Any], Any]] = {
    "spike": lambda c, x, h: 0.5 * h + spike(x + h @ c.U),
    "two_arguments": lambda c, x, h: 0.5 * h + damped_spike(x + h @ c.U, tf.constant(0.3, x.dtype)),
    "where": lambda c, x, h: boxed_sign(x + boxed_sign(h @ c.U) @ c.V),
    "tape": lambda c, x, h: spike_by_tape(x + h @ c.U),
    "over_units": lambda c, x, h: scaled_over_units(x + h @ c.U),
    "keras": lambda c, x, h: keras_sign(x + h @ c.U),
    # Its derivative was taken before the second look at it, and has left more outputs in its graph.
    "function": lambda c, x, h: tf.tanh(x + spike_in_a_function(c, h @ c.U)),
}


@tf.custom_gradient
def clipped(v: Any) -> Any:
    return tf.tanh(v), lambda upstream: tf.clip_by_value(upstream, -0.1, 0.1)


@tf.custom_gradient
def centred(v: Any) -> Any:
    return tf.tanh(v), lambda upstream: upstream - tf.reduce_mean(upstream, axis=-1, keepdims=True)


@tf.custom_gradient
def with_a_constant(v: Any) -> Any:
    return tf.tanh(v), lambda upstream: tf.where(v > 0, upstream, tf.ones_like(v))


UNSTRUCTURED: dict[str, Callable[[Any, Any, Any], Any]] = {
    "clipped": lambda c, x, h: clipped(x + h @ c.U),
    "centred": lambda c, x, h: centred(x + h @ c.U),
    "with_a_constant": lambda c, x, h: with_a_constant(x + h @ c.U),
}


def cell_and_point(function: Any) -> tuple[Any, tf.Tensor, tf.Tensor]:
    cell = FunctionCell(function)
    cell.build((1, FEATURES))
    x, h = (tf.constant(normal(7, n), tf.float64) for n in (FEATURES, 4))
    return cell, x, h


@pytest.mark.fast
@pytest.mark.parametrize("name", STRUCTURED)
def test_a_gradient_that_acts_unit_by_unit_is_seen_through(name: str) -> None:
    cell, x, h = cell_and_point(STRUCTURED[name])
    assert set(assert_structured_as_autodiff(cell, x, [h], 1e-10).values()) == {None}
    assert find_structure(CellGraph(CellStep(cell, [h]), x, [h])).point_by_point
    assert np.abs(state_jacobian(cell, x, [h]).to_dense()).max() > 0.01


@pytest.mark.parametrize("name", UNSTRUCTURED)
def test_a_gradient_that_mixes_units_or_is_not_linear_is_left_to_autodiff(name: str) -> None:
    cell, x, h = cell_and_point(UNSTRUCTURED[name])
    structure = find_structure(CellGraph(CellStep(cell, [h]), x, [h]))
    assert "which mixes units or is not linear" in str(structure.reason(0, Node.state(0)))
    assert not structure.point_by_point


def test_a_penalty_has_the_gradient_that_it_has_by_autodiff() -> None:
    """The slope of a spike is differentiated as the user wrote it, not as a constant."""
    cell, *point = cell_and_point(STRUCTURED["tape"])
    kept: list[Any] = []

    def size_of(J: Any) -> Any:
        return tf.reduce_sum(J.to_dense() ** 2 * tf.constant(normal(7, 4, 4), tf.float64))

    @tf.function(autograph=False)
    def gradients(x: Any, h: Any) -> Any:
        graph = CellGraph(CellStep(cell, [h]), x, [h])
        kept.append(graph)
        structure = find_structure(graph)
        fixed = weights_only_values(structure)
        values = {**fixed, graph.step_inputs.name: x, graph.states[0].name: h}
        J = structured_jacobian(structure, values, kernels_of(structure, fixed, h.dtype), [0], [Node.state(0)])
        expected = size_of(state_jacobian(cell, x, [h]))
        return tf.gradients(size_of(J), [x, h]), tf.gradients(expected, [x, h])

    for found, expected in zip(*gradients(*point), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12)
        assert np.abs(expected).max() > 1e-3
