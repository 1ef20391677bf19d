"""What an unrolling computes by itself: it is what the cell computes, and only where that is known."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import CASES, FEATURES, Case, FunctionCell, call_cell, cases_of, make_step, normal, randomize
from structure_laws import double_precision

from keras_jacmon.cell.step import CellStep
from keras_jacmon.cell.trajectory import UnrollInputs, unroll
from keras_jacmon.graphs.calls import function_graph
from keras_jacmon.jacobians.cell_jacobian import CellJacobian

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from keras_jacmon.cell.cell_graph import CellGraph

SAMPLES, TIME, UNITS = 3, 2, 4
# Parts of a product are products of their own where they are wide.
WIDE = 128


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with double_precision():
        yield


def tall(c: Any, x: Any, h: Any, parts: int) -> Any:
    return tf.split(tf.concat([x, h], axis=-1) @ tf.convert_to_tensor(c.tall), parts, axis=-1)


def reset(c: Any, x: Any, h: Any) -> Any:
    return tf.tanh(x + (tf.sigmoid(x + h @ c.U) * h) @ c.V + c.vector)


def both(c: Any, x: Any, h: Any) -> Any:
    z, r = tf.split(tf.tile(x, [1, 2]) + h @ tf.concat([c.U, c.V], axis=1), 2, axis=1)
    return tf.tanh(z) * tf.sigmoid(r + 1.0)


def rounded(x: Any, dtype: Any) -> Any:
    return tf.cast(tf.cast(x, dtype), x.dtype)


def rounded_gate(c: Any, x: Any, h: Any) -> Any:
    a, b = tf.split(h @ tf.concat([4.0 * c.U, 4.0 * c.V], axis=1), 2, axis=1)
    return tf.tanh(a + rounded(b, tf.int32)) + tf.sin(x)


def stopped(c: Any, x: Any, h: Any) -> Any:
    z = h @ c.U
    return tf.tanh(x + z + tf.stop_gradient(tf.sin(z)))


# Each with the number of the tensors that are sums of a product of the states, and of others.
CELLS: dict[str, tuple[Callable[[Any, Any, Any], Any], int]] = {
    "projected inputs and a bias": (lambda c, x, h: tf.tanh(x + h @ c.U + c.vector), 1),
    "a bias alone": (lambda c, x, h: tf.tanh(h @ c.U + c.vector) + tf.sin(x), 1),
    "moved units": (lambda c, x, h: tf.tanh((x + h @ c.U)[:, ::-1] - c.vector), 1),
    "heads": (lambda c, x, h: tf.reshape(tf.tanh(tf.reshape(x + h @ c.U, [-1, 2, 2])), [-1, 4]), 1),
    "one kernel for inputs and state": (lambda c, x, h: tf.add_n([tf.tanh(z) for z in tall(c, x, h, 3)]), 3),
    "a product of a product": (reset, 2),
    "two kernels": (lambda c, x, h: tf.tanh(x + h @ c.U + c.vector) * tf.sigmoid(x + h @ c.V), 2),
    "two products in a sum": (lambda c, x, h: tf.tanh(x + h @ c.U + h @ c.V), 1),
    # A tile moves no units that are known, so it is hoisted, and is no part of a sum.
    "tiled inputs": (both, 0),
    "more parts than it pays for": (lambda c, x, h: tf.concat([tf.tanh(z) for z in tall(c, x, h, 12)[:4]], 1), 0),
    "twice": (lambda c, x, h: tf.tanh(x + h @ c.U + h @ c.U), 1),
    "subtracted": (lambda c, x, h: tf.tanh(x - h @ c.U), 0),
    "scaled": (lambda c, x, h: tf.tanh(2.0 * (x + h @ c.U)), 1),
    "inputs beside it": (lambda c, x, h: tf.tanh(tf.sin(x) + h @ c.U), 0),
    "a state without gradient": (lambda c, x, h: tf.tanh(x + h @ c.U + tf.stop_gradient(h)), 0),
    "a sign of the state": (lambda c, x, h: tf.tanh(x + h @ c.U + tf.cast(h > 0.1, h.dtype)), 0),
    "the product without gradient": (stopped, 0),
    "inputs without gradient": (lambda c, x, h: tf.tanh(x + h @ c.U + tf.stop_gradient(tf.sin(x))), 0),
    "a mean of the samples": (lambda c, x, h: tf.tanh(x + tf.reduce_mean(x, axis=0, keepdims=True) + h @ c.U), 0),
    "a product of a mean of the samples": (
        lambda c, x, h: tf.tanh((x - tf.reduce_mean(x, axis=0, keepdims=True)) @ c.V + h @ c.U),
        0,
    ),
    "a product of a state without gradient": (
        lambda c, x, h: tf.tanh((tf.sin(x) + tf.stop_gradient(h)) @ c.V + h @ c.U),
        0,
    ),
    "an integer of the inputs": (lambda c, x, h: tf.tanh(x + rounded(x, tf.int32) + h @ c.U), 0),
    "an integer of another gate": (rounded_gate, 0),
    "inputs in half precision": (lambda c, x, h: tf.tanh(rounded(x, tf.float16) + c.vector + h @ c.U), 0),
    "the sum in half precision": (lambda c, x, h: tf.tanh(rounded(x + h @ c.U, tf.bfloat16) + c.vector), 0),
    "units used twice": (lambda c, x, h: tf.tanh(tf.gather(x, [0, 0, 1, 1], axis=1) + x + h @ c.U), 0),
    "repeated units": (lambda c, x, h: tf.tanh(tf.concat([x[:, :2], x[:, :2]], 1) + x + h @ c.U), 0),
    "an integer beside a function": (lambda c, x, h: tf.tanh(x + rounded(x, tf.int32) + tf.sin(h @ c.U)), 0),
    "the number of samples": (
        lambda c, x, h: tf.tanh(h @ c.U + x + tf.cast(tf.shape(x)[0], x.dtype) * c.vector),
        0,
    ),
    "in single precision": (
        lambda c, x, h: tf.cast(tf.tanh(tf.cast(x + h, tf.float32) @ tf.cast(c.U, tf.float32) + 1.0), h.dtype),
        0,
    ),
}


def assert_unrolled_as_the_cell(cell: Any, inputs: Any, states: Any) -> int:
    """Compares an unrolling with steps of the cell, and its values with those of the graph; returns how many sums."""
    flat = tf.nest.flatten(states)
    sums: list[Any] = []

    @tf.function(autograph=False)
    def run(inputs: Any, *flat: Any) -> Any:
        sequence, step = UnrollInputs(inputs, flat, None), CellStep(cell, states)
        jacobian = CellJacobian(step, inputs[0], flat)
        unroll_plan = jacobian.unroll_plan()
        assert unroll_plan is not None
        trajectory = unroll(step, sequence, unroll_plan)
        sums.extend(part for part in unroll_plan.sums if part.of_states is not None)
        graph: CellGraph = unroll_plan.graph
        known = [*unroll_plan.saved, *(t for t in unroll_plan.prepared if t.name in trajectory.values)]
        assert {tensor.name for tensor in known} == set(trajectory.values)
        pairs: list[Any] = []
        for t in range(TIME):
            feeds = {graph.step_inputs.name: inputs[t]}
            feeds |= {old.name: state[t] for old, state in zip(graph.states, trajectory.states, strict=True)}
            values = [trajectory.values[tensor.name][t] for tensor in known]
            pairs += zip(values, graph.replay(known, feeds), strict=True)
        return trajectory.states, trajectory.last, pairs

    visited, last, pairs = run(tf.constant(inputs), *flat)
    for t, x in enumerate(inputs):
        for found, expected in zip(visited, tf.nest.flatten(states), strict=True):
            np.testing.assert_allclose(found[t], expected, rtol=1e-11, atol=1e-12)
        states = call_cell(cell, tf.constant(x), states)
    for found, expected in zip(last, tf.nest.flatten(states), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)
    return len(sums)


# The cells that split a product.
IN_PARTS = {
    "one kernel for inputs and state",
    "tiled inputs",
    "more parts than it pays for",
    "an integer of another gate",
}


@pytest.mark.parametrize("name", CELLS)
def test_what_is_computed_by_itself_is_what_the_cell_computes(name: str) -> None:
    function, sums = CELLS[name]
    # Of twelve parts the first four have as many units as the cell.
    units = {"more parts than it pays for": 4 * WIDE}.get(name, WIDE) if name in IN_PARTS else UNITS
    cell = FunctionCell(function, units)
    inputs = tf.cast(normal(TIME, SAMPLES, FEATURES), tf.float64)
    cell(inputs[0], [tf.zeros([SAMPLES, units], tf.float64)])
    randomize(cell, scale=0.5 if units == UNITS else 0.05)
    states = [tf.constant(normal(SAMPLES, units, seed=1), tf.float64)]
    assert assert_unrolled_as_the_cell(cell, inputs, states) == sums


# Gates whose products are computed by themselves.
GATES: dict[str, tuple[Callable[..., Any], int]] = {
    "lstm": (keras.layers.LSTM, 4),
    "gru_reset_after": (keras.layers.GRU, 3),
    "gru_reset_before": (functools.partial(keras.layers.GRU, reset_after=False), 3),
    "simple_rnn": (keras.layers.SimpleRNN, 1),
}
UNROLLED = [case for case in CASES if case.id != "while_loop"]
WIDE_CASES = [Case(f"wide_{name}", functools.partial(make, WIDE)) for name, (make, _) in GATES.items()]


@pytest.mark.parametrize(
    "case", [*cases_of(UNROLLED, soak={"stacked_seed_cell_simple_rnn", "conv_lstm_2d", "map_fn"}), *WIDE_CASES], ids=str
)
def test_cells_of_all_kinds_are_unrolled_as_they_are(case: Case) -> None:
    cell, inputs, states = make_step(case, rows=SAMPLES)
    states = tf.nest.map_structure(lambda s: tf.cast(s, tf.float64) if s.dtype.is_floating else s, states)
    inputs = tf.cast(normal(TIME, *inputs.shape), tf.float64)
    sums = assert_unrolled_as_the_cell(cell, inputs, states)
    if case in WIDE_CASES:
        assert sums >= GATES[case.id.removeprefix("wide_")][1]


@pytest.mark.parametrize(("units", "sums", "saved"), [(64, 0, 1), (128, 4, 4), (511, 4, 4), (512, 0, 1)])
def test_gates_are_products_of_their_own_at_the_sizes_at_which_that_is_faster(
    units: int, sums: int, saved: int
) -> None:
    """Elsewhere the one product of all gates is saved, and divided for all steps at once."""
    cell = keras.layers.LSTMCell(units)
    states = [tf.zeros([SAMPLES, units], tf.float64)] * 2
    cell(x := tf.zeros([SAMPLES, FEATURES], tf.float64), states)

    @tf.function(autograph=False)
    def counted() -> tuple[int, int]:
        unroll_plan = CellJacobian(CellStep(cell, states), x, states).unroll_plan()
        assert unroll_plan is not None
        return len([part for part in unroll_plan.sums if part.of_states]), len(unroll_plan.saved)

    assert tuple(map(int, counted())) == (sums, saved)


def nested(c: Any, x: Any, h: Any) -> Any:
    first, rest = tf.split(x + h @ c.U, 2, axis=-1)
    second, third = tf.split(rest, 2, axis=-1)
    return tf.concat([tf.tanh(first), tf.sigmoid(second), tf.sin(third)], axis=-1)


def test_parts_of_parts_are_saved_as_they_are() -> None:
    cell, states = FunctionCell(nested), [tf.zeros([SAMPLES, UNITS], tf.float64)]
    cell(x := tf.zeros([SAMPLES, FEATURES], tf.float64), states)

    @tf.function(autograph=False)
    def sizes() -> list[int]:
        unroll_plan = CellJacobian(CellStep(cell, states), x, states).unroll_plan()
        assert unroll_plan is not None
        return [tensor.shape[-1] for tensor in unroll_plan.saved]

    assert sorted(map(int, sizes())) == [1, 1, 2]


class RawCell(FunctionCell):
    """Hands the inputs to the function as they are."""

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        new_h = self.function(self, inputs, states[0])
        return new_h, [new_h]


@pytest.mark.parametrize(
    "function",
    [
        lambda c, x, h: tf.tanh(x * (h @ c.U)),
        lambda c, x, h: tf.tanh(h @ c.U + tf.reduce_mean(x, axis=0, keepdims=True)),
        lambda c, x, h: tf.tanh(h @ c.U + x + tf.cast(tf.shape(x)[0], x.dtype)),
    ],
    ids=["a factor", "a mean of the samples", "their number"],
)
def test_a_step_may_read_the_inputs_as_they_are(function: Any) -> None:
    cell, states = RawCell(function, UNITS), [tf.constant(normal(SAMPLES, UNITS, seed=1), tf.float64)]
    inputs = tf.cast(normal(TIME, SAMPLES, UNITS), tf.float64)
    cell(inputs[0], states)
    randomize(cell, scale=0.5)
    assert_unrolled_as_the_cell(cell, inputs, states)


def test_a_step_takes_nothing_from_the_inputs_that_it_has_in_products() -> None:
    cell = keras.layers.LSTMCell(UNITS)
    states = [tf.zeros([SAMPLES, UNITS], tf.float64)] * 2
    inputs = tf.zeros([TIME, SAMPLES, FEATURES], tf.float64)
    cell(inputs[0], states)
    bodies: list[Any] = []

    @tf.function(autograph=False)
    def run(inputs: Any) -> Any:
        jacobian = CellJacobian(CellStep(cell, states), inputs[0], states)
        last = unroll(jacobian.step, UnrollInputs(inputs, tuple(states), None), jacobian.unroll_plan()).last
        (loop,) = [op for op in last[0].graph.get_operations() if op.type in ("While", "StatelessWhile")]
        bodies.append(function_graph(loop.graph, loop.get_attr("body").name))
        return last

    run(inputs)
    sizes = [op.outputs[0].shape for op in bodies[0].get_operations() if op.type == "GatherV2"]
    assert sizes == [[SAMPLES, 4 * UNITS]]
