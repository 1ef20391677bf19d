"""Cells and layers drawn at random: structured and autodiff agree, or the structure is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from draws import DRAWS, each_part, for_each_draw
from helpers import (
    build,
    call_cell,
    initial_states,
    normal,
    randomize,
    rms_singular_value,
    step_jacobians,
    variance,
)
from hypothesis import strategies as st
from structure_laws import assert_structured_as_autodiff, double_precision

from keras_jacmon import measure
from keras_jacmon.structure.index_map import Node

if TYPE_CHECKING:
    from numpy.typing import NDArray

ACTIVATIONS = {
    "linear": tf.identity,
    "tanh": tf.tanh,
    "sigmoid": tf.sigmoid,
    "softplus": tf.math.softplus,
    "gelu": tf.nn.gelu,
    "silu": tf.nn.silu,
    "square": tf.square,
    "sine": tf.sin,
}
STRUCTURED = ("product", "fused", "concatenated", "chain", "diagonal", "moved", "kernel of kernels")
UNSTRUCTURED = ("softmax", "norm", "two states multiplied")

# (kind, source state, inner activation, outer activation)
Term = tuple[str, int, str, str]


class DrawnCell(keras.layers.Layer):
    """Each new state is a sum of drawn terms, gated by the state that follows if it is of the same size."""

    def __init__(self, sizes: list[int], recipes: list[list[Term]]) -> None:
        super().__init__()
        self.state_size = sizes
        self.recipes = recipes

    def build(self, input_shape: tuple[int, ...]) -> None:
        everything = input_shape[-1] + sum(self.state_size)
        self.kernels: dict[str, Any] = {}
        for new, recipe in enumerate(self.recipes):
            for k, (kind, source, *_) in enumerate(recipe):
                rows, columns = self.state_size[source], self.state_size[new]
                rows = everything if kind == "concatenated" else rows
                for name, shape in (
                    ("W", (rows, 2 * columns if kind == "fused" else columns)),
                    ("V", (columns, columns)),
                ):
                    key = f"{name}_{new}_{k}"
                    self.kernels[key] = self.add_weight(shape=shape, name=key)

    def term(self, new: int, k: int, x: Any, states: Any) -> Any:
        kind, source, inner, outer = self.recipes[new][k]
        W, V = (tf.convert_to_tensor(self.kernels[f"{name}_{new}_{k}"]) for name in ("W", "V"))
        state = ACTIVATIONS[inner](states[source])
        same_size = self.state_size[source] == self.state_size[new]
        if kind == "fused":
            gate, value = tf.split(state @ W, 2, axis=-1)
            return tf.sigmoid(gate) * ACTIVATIONS[outer](value)
        if kind == "diagonal" and same_size:
            return ACTIVATIONS[outer](0.5 * state)
        product = tf.concat([x, *states], axis=-1) @ W if kind == "concatenated" else state @ W
        if kind == "chain":
            product = tf.tanh(product) @ V
        elif kind == "moved":
            product = tf.roll(tf.reverse(product, [-1]), 1, axis=-1)
        elif kind == "kernel of kernels":
            product = state @ (tf.nn.l2_normalize(W, axis=0) @ tf.exp(V))
        elif kind == "softmax":
            product = tf.nn.softmax(product)
        elif kind == "norm":
            product = product / (1.0 + tf.norm(state, axis=-1, keepdims=True))
        elif kind == "two states multiplied":
            product = product * tf.reduce_sum(states[0], axis=-1, keepdims=True)
        return ACTIVATIONS[outer](product)

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        new_states = []
        for new, recipe in enumerate(self.recipes):
            total = tf.add_n([self.term(new, k, inputs, states) for k in range(len(recipe))])
            following = (new + 1) % len(states)
            if self.state_size[following] == self.state_size[new]:
                total = total * tf.tanh(states[following] + 1.0)
            new_states.append(total)
        return new_states[0], new_states


@st.composite
def recipes(draw: st.DrawFn, kinds: tuple[str, ...]) -> tuple[list[int], list[list[Term]]]:
    """Draw the sizes of the states of a cell, and the terms of each new state."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    names = st.sampled_from(sorted(ACTIVATIONS))
    term = st.tuples(st.sampled_from(kinds), st.integers(0, len(sizes) - 1), names, names)
    return sizes, [draw(st.lists(term, min_size=1, max_size=3)) for _ in sizes]


def evaluated(recipe: tuple[list[int], list[list[Term]]], rows: int, features: int) -> dict[Any, str | None]:
    """Build the cell, compare it at random rows, and return the reasons against a structure by block."""
    with double_precision():
        cell = DrawnCell(*recipe)
        states = [tf.constant(normal(rows, size, seed=k).astype(np.float64)) for k, size in enumerate(cell.state_size)]
        inputs = tf.constant(normal(rows, features, seed=9).astype(np.float64))
        cell.build((1, features))
        randomize(cell)
        return assert_structured_as_autodiff(cell, inputs, states, 1e-10)


def assert_structured(recipe: tuple[list[int], list[list[Term]]], rows: int, features: int) -> None:
    assert set(evaluated(recipe, rows, features).values()) == {None}


@each_part
def test_cells_with_a_structure(part: int) -> None:
    for_each_draw(part, DRAWS // 5, assert_structured, recipes(STRUCTURED), st.integers(0, 4), st.integers(1, 3))


def assert_right_or_refused(recipe: tuple[list[int], list[list[Term]]], rows: int, features: int) -> None:
    reasons = evaluated(recipe, rows, features)
    sizes, terms = recipe
    for new, terms_of_state in enumerate(terms):
        for kind, source, *_ in terms_of_state:
            # A norm may go to two units: each unit that it is made from is used twice then.
            mixes_all = kind == "norm" and sizes[source] > 1 and sizes[new] > 2
            if mixes_all or (kind == "softmax" and sizes[new] > 1):
                assert reasons[new, Node.state(source)] is not None


@each_part
def test_cells_that_may_have_none(part: int) -> None:
    kinds = (*STRUCTURED, *UNSTRUCTURED)
    for_each_draw(part, DRAWS // 5, assert_right_or_refused, recipes(kinds), st.integers(1, 4), st.integers(1, 3))


def jacobians_of_all_steps(layer: Any, probe: NDArray[Any], mask: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    """Dense Jacobians `(time, samples, m, n)` in each view along a masked layer, by one tape around all steps at once.

    That is faster than a tape around each, and the same: each row of a step is a function of itself.
    """
    states, visited = initial_states(layer, len(probe)), []
    order = range(probe.shape[1])[:: -1 if layer.go_backwards else 1]
    for t in order:
        visited.append(states)
        new = call_cell(layer.cell, tf.constant(probe[:, t]), states)
        states = [tf.where(mask[:, t, None], *pair) for pair in zip(new, states, strict=True)]
    rows = [tf.concat(step, axis=0) for step in zip(*visited, strict=True)]
    J, _ = step_jacobians(layer.cell, np.concatenate([probe[:, t] for t in order]), rows)
    back = np.argsort(order)
    return {view: found.reshape(len(order), len(probe), *found.shape[1:])[back] for view, found in J.items()}


class DrawnLayer(NamedTuple):
    kind: str
    units: int
    features: int
    activation: str
    gate: str
    go_backwards: bool
    lengths: list[int]
    steps: int


def assert_layer_as_its_cell(drawn: DrawnLayer) -> None:
    kind, units, features, activation, gate, go_backwards, lengths, steps = drawn
    name, _, reset_before = kind.partition(", ")
    options: dict[str, Any] = {} if name == "SimpleRNN" else {"recurrent_activation": gate}
    options |= {"reset_after": False} if reset_before else {}
    mask = np.arange(steps)[None] < np.array(lengths, np.int64)[:, None]
    probe = (normal(len(lengths), steps, features) * mask[..., None]).astype(np.float64)
    with double_precision():
        options |= {"activation": activation, "go_backwards": go_backwards, "name": "rnn"}
        layer = getattr(keras.layers, name)(units, **options)
        inputs = keras.Input((steps, features))
        model = build(keras.Model(inputs, layer(keras.layers.Masking()(inputs))), probe)
        prefixes = {"hidden": "", "inputs": "inputs/"} | ({"joint": "joint/"} if kind == "LSTM" else {})
        measures = {"variance": variance, "rms_singular_value": rms_singular_value}
        keys = [prefix + key for prefix in prefixes.values() for key in measures]
        report = measure(model, probe, measures=keys)["rnn"]
        expected = jacobians_of_all_steps(layer, probe, mask)
    assert report.certificate is not None
    np.testing.assert_array_equal(report.mask, mask.T, strict=True)
    assert set(report.values) == set(keys)
    for view, prefix in prefixes.items():
        for key, reference in measures.items():
            values = np.where(mask.T, reference(expected[view]), np.nan)
            scale = np.nanmax(values, initial=0.0) or 1.0
            np.testing.assert_allclose(
                report[prefix + key] / scale, values / scale, rtol=0, atol=1e-10, err_msg=prefix + key, strict=True
            )


def test_a_layer_of_one_step() -> None:
    """Beside the draws, which do not promise it; of no step at all is `test_a_mask_that_skips_everything`."""
    assert_layer_as_its_cell(
        DrawnLayer("LSTM", 3, 2, "tanh", "sigmoid", go_backwards=False, lengths=[1, 0, 1], steps=1)
    )


LAYERS = st.builds(
    DrawnLayer,
    kind=st.sampled_from(["LSTM", "GRU", "GRU, reset before", "SimpleRNN"]),
    units=st.integers(1, 12),
    features=st.integers(1, 5),
    activation=st.sampled_from(["tanh", "relu", "linear", "softplus", "gelu", "elu", "selu"]),
    gate=st.sampled_from(["sigmoid", "hard_sigmoid", "tanh"]),
    go_backwards=st.booleans(),
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    steps=st.integers(1, 6),
)


@each_part
def test_layers_on_sequences_of_any_length(part: int) -> None:
    for_each_draw(part, DRAWS // 10, assert_layer_as_its_cell, LAYERS)
