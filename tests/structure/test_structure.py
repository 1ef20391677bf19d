"""The structure that is found in a cell: it gives the Jacobians of autodiff, or says why there is none."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    BATCH,
    BY_ID,
    CASES,
    FEATURES,
    MOMENTS,
    STEPS,
    Case,
    FunctionCell,
    WeightedCell,
    assert_layer,
    build,
    call_cell,
    cases_of,
    make_model,
    make_step,
    normal,
    randomize,
    soak_but,
    step_jacobians,
)
from recurrences import LOOPS, Loop, make_cell_step
from structure_laws import assert_structured_as_autodiff, double_precision
from watched_points import WatchedCell, watched_points

from keras_jacmon import JacobianMeter, explain, measure, register_jacobian
from keras_jacmon.cell.cell_graph import CellGraph
from keras_jacmon.cell.step import CellStep
from keras_jacmon.cell.trajectory import UnrollInputs, unroll
from keras_jacmon.jacobians.cell_jacobian import CellJacobian
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.measurement.per_step import CHECKED_POINTS
from keras_jacmon.structure import ops
from keras_jacmon.structure.index_map import Node
from keras_jacmon.structure.interpreter import find_structure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from keras_jacmon.structure.structure import Structure

PROBE = normal(BATCH, STEPS, FEATURES, seed=3)
# Two values of the first feature are above it.
RARE = np.sort(PROBE[:, :, 0], axis=None)[-3]
# What rests on closed forms; products with vectors are held against autodiff by themselves.


# What the structure gives ----------------------------------------------------------------------------------------


# A loop with variables in it counts as one that may do something else each time.
SEEN_THROUGH = [case for case in CASES if case.id != "while_loop"]


@pytest.fixture
def _float64() -> Iterator[None]:
    with double_precision():
        yield


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    "case", [*cases_of(SEEN_THROUGH, soak={"conv_lstm_2d", "stacked_seed_cell_simple_rnn"}), *LOOPS], ids=str
)
def test_structured_is_autodiff_in_float64(case: Case | Loop) -> None:
    cell, inputs, states = make_cell_step(case)
    inputs = tf.cast(inputs, tf.float64)
    states = tf.nest.map_structure(lambda s: tf.cast(s, tf.float64) if s.dtype.is_floating else s, states)
    reasons = assert_structured_as_autodiff(cell, inputs, states, 1e-10)
    without = {"map_fn": 2, "tf_function": 2, "bare_state": 2, "partly_mixing": 3}
    # It adds its inputs up.
    without["plain_object"] = 1
    # An input of theirs serves several units of a state.
    without |= {"matrix_memory": 1, "timed_rnn": 2}
    assert sum(reason is not None for reason in reasons.values()) == without.get(case.id, 0)


# Cells of all kinds ----------------------------------------------------------------------------------------------


@tf.function(autograph=False)
def smooth(cell: Any, z: Any) -> Any:
    return tf.nn.silu(z) @ cell.V


@tf.function(autograph=False)
def with_another_function(cell: Any, x: Any, h: Any) -> Any:
    return tf.tanh(x + smooth(cell, h @ cell.U)) + smooth(cell, h)


def gates(cell: Any, x: Any, h: Any) -> Any:
    a, b, c = tf.split(tf.concat([x, h], axis=-1) @ tf.convert_to_tensor(cell.tall), 3, axis=-1)
    return tf.sigmoid(a) * h + tf.tanh(b) * tf.nn.gelu(c)


STRUCTURED: dict[str, Callable[[Any, Any, Any], Any]] = {
    "concatenated": gates,
    "a gradient of TensorFlow's own": lambda cell, x, h: tf.nn.silu(x + h @ cell.U) + keras.activations.silu(h),
    "strided_gates": lambda c, x, h: tf.tanh((tf.concat([x, h], -1) @ tf.convert_to_tensor(c.tall))[:, ::3]) * h,
    "reversed_gates": lambda c, x, h: h[:, ::-1] * tf.tanh(x + h @ c.U),
    "permuted": lambda c, x, h: tf.tanh(x + tf.gather(h, [2, 0, 3, 1], axis=1) @ c.U),
    "permuted_behind": lambda c, x, h: tf.gather(tf.tanh(x + h @ c.U), [2, 0, 3, 1], axis=-1) + 0.1 * h,
    "rolled": lambda c, x, h: tf.roll(h, 1, axis=1) + tf.tanh(x + h @ c.U),
    "einsum": lambda c, x, h: tf.tanh(x + tf.einsum("bi,ij->bj", h, c.U)),
    "einsum_kernel_first": lambda c, x, h: tf.tanh(x + tf.einsum("ji,bi->bj", c.U, h)),
    "einsum_heads": lambda c, x, h: tf.tanh(
        x + tf.reshape(tf.einsum("bhd,hde->bhe", tf.reshape(h, [-1, 2, 2]), tf.reshape(c.U[:2], [2, 2, 2])), [-1, 4])
    ),
    "tensordot": lambda c, x, h: tf.tanh(x + tf.tensordot(h, c.U, 1)),
    "matvec": lambda c, x, h: tf.tanh(x + tf.linalg.matvec(c.U, h)),
    "transposed_kernel": lambda c, x, h: tf.tanh(x + tf.matmul(h, c.U, transpose_b=True)),
    "normalised_kernel": lambda c, x, h: tf.tanh(x + h @ (c.U / tf.norm(c.U, axis=0))),
    "masked_kernel": lambda c, x, h: tf.tanh(x + h @ tf.linalg.band_part(c.U, -1, 0)),
    "two_kernels": lambda c, x, h: tf.tanh(x + h @ c.U) * tf.sigmoid(h @ c.V),
    "chain": lambda c, x, h: tf.tanh(x + tf.nn.relu(h @ c.U) @ c.V) + 0.5 * h,
    "chain_and_direct": lambda c, x, h: tf.tanh(x + (h + tf.sin(h @ c.U)) @ c.V),
    "seed": lambda c, x, h: x + tf.nn.relu(h) @ c.U,
    "leaky": lambda c, x, h: 0.9 * h + 0.1 * tf.nn.leaky_relu(x + h @ c.U),
    "modulated": lambda c, x, h: tf.tanh(x * (h @ c.U)) + tf.cos(h) * tf.convert_to_tensor(c.vector),
    "selected": lambda c, x, h: tf.where(x + h @ c.U > 0, tf.tanh(h @ c.V), h),
    "stop_gradient": lambda c, x, h: tf.tanh(x + tf.stop_gradient(h) @ c.U) + tf.sin(h @ c.V),
    "padded": lambda c, x, h: tf.tanh(x + tf.pad(h[:, 1:], [[0, 0], [0, 1]]) @ c.U) + h,
    "stacked": lambda c, x, h: tf.reshape(tf.stack([tf.tanh(h[:, :2]), (x + h @ c.U)[:, 2:]], axis=1), [-1, 4]),
    "function": tf.function(lambda c, x, h: tf.tanh(x + h @ c.U), autograph=False),
    "function_in_a_function": with_another_function,
    "twice": lambda c, x, h: tf.tanh(x + h @ c.U + h @ c.U) + h + h,
    "padded_with_zeros": lambda c, x, h: tf.tanh(
        x + (tf.concat([tf.zeros([tf.shape(h)[0], 4]), h], -1) @ tf.convert_to_tensor(c.tall))[:, :4]
    ),
    "unknown_shapes": lambda c, x, h: tf.tanh(
        (tf.concat([tf.reshape(x, tf.shape(h)), tf.tensordot(h, c.U, 1)], -1) @ tf.convert_to_tensor(c.tall))[:, :4]
    ),
    "unstacked": lambda c, x, h: tf.stack(tf.unstack(tf.tanh(x + h @ c.U), axis=1)[::-1], axis=1),
    "convolution": lambda c, x, h: tf.nn.conv1d(h[..., None], tf.reshape(c.U[:3, 0], [3, 1, 1]), 1, "SAME")[..., 0] + x,
    "no_product": lambda _, x, h: tf.tanh(x + h),
    "product_in_double_precision": lambda c, x, h: tf.cast(
        tf.tanh(tf.cast(x, tf.float64) + tf.cast(tf.sin(h), tf.float64) @ tf.cast(c.U, tf.float64)), tf.float32
    ),
}


def reduce_to_one(x: Any, h: Any) -> Any:
    return tf.tanh(x) * tf.reduce_mean(h, axis=-1, keepdims=True)


# Each with a word of the reason that is given.
DECEIVING: dict[str, tuple[Callable[[Any, Any, Any], Any], str]] = {
    "softmax": (lambda c, x, h: tf.nn.softmax(x + h @ c.U), "Softmax"),
    "norm": (lambda c, x, h: tf.math.l2_normalize(x + h @ c.U, axis=-1), "several units"),
    "layer_norm": (lambda c, x, h: keras.ops.layer_normalization(x + h @ c.U), "several units"),
    "mean_over_units": (lambda c, x, h: reduce_to_one(x, h) + 0 * (h @ c.U), "several units"),
    "cumulative_sum": (lambda c, x, h: tf.cumsum(tf.tanh(x + h @ c.U), axis=-1), "Cumsum"),
    "maximum_unit": (lambda c, x, h: tf.tanh(x + h @ c.U) * tf.reduce_max(h, -1, keepdims=True), "several units"),
    "idle_branch": (
        lambda c, x, h: tf.cond(tf.reduce_sum(x * x) >= 0.0, lambda: tf.tanh(x + h @ c.U), lambda: h),
        "If",
    ),
    "kernel_of_inputs": (
        lambda c, x, h: tf.tanh(tf.linalg.matvec(tf.reshape(x, [-1, 4, 1]) * c.U, h)),
        "both sides",
    ),
    "fast_weights": (
        lambda c, x, h: x + tf.tanh(tf.linalg.matvec(h[:, :, None] * h[:, None], h @ c.U)),
        "several units",
    ),
    "one_gate_for_all": (lambda c, x, h: tf.sigmoid((h @ c.U)[:, :1]) * tf.tanh(x + h), "several units"),
    "outer_product": (
        lambda c, x, h: tf.tanh(x + tf.reshape(h[:, :2, None] * h[:, None, :2], [-1, 4]) @ c.U),
        "several units",
    ),
    "gather_by_value": (
        lambda c, x, h: tf.tanh(x + tf.gather(h @ c.U, tf.argsort(h, axis=-1), batch_dims=1, axis=1)),
        "Gather",
    ),
    "einsum_of_one": (lambda c, x, h: tf.tanh(x + h @ c.U) * tf.einsum("bi->b", h)[:, None], "Einsum"),
}
# The products there have two operands with rows: it is the general reason that is given.
DECEIVING["kernel_of_inputs"] = (DECEIVING["kernel_of_inputs"][0], "")


def layer_of(function: Callable[[Any, Any, Any], Any]) -> tuple[Any, Any]:
    layer = keras.layers.RNN(FunctionCell(function), name="rnn")
    return build(keras.Sequential([keras.Input((STEPS, FEATURES)), layer]), PROBE), layer


class SideBySide(FunctionCell):
    """A state for each function; all have the inputs and the weights in common."""

    def __init__(self, functions: Sequence[Callable[[Any, Any, Any], Any]]) -> None:
        super().__init__(functions[0])
        self.functions = functions
        self.state_size = [self.units] * len(functions)

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        x = inputs @ tf.convert_to_tensor(self.kernel)
        new_states = [function(self, x, h) for function, h in zip(self.functions, states, strict=True)]
        return new_states[0], new_states


def test_cells_with_a_structure() -> None:
    """They are unrolled as the cells are, and there their structured Jacobians are those of the tape."""
    cell, units = SideBySide(list(STRUCTURED.values())), 4
    cell.build((BATCH, FEATURES))
    randomize(cell)
    sequence = tf.constant(normal(2, BATCH, FEATURES))
    states = [tf.constant(normal(BATCH, units, seed=k)) for k in range(len(STRUCTURED))]
    choices = {}

    @tf.function(autograph=False)
    def run(sequence: Any, *states: Any) -> Any:
        step = CellStep(cell, list(states))
        jacobian = CellJacobian(step, sequence[0], states)
        choices.update({choice.new: choice for choice in jacobian.choices("joint") if choice.new == choice.old})
        trajectory = unroll(step, UnrollInputs(sequence, states, None), jacobian.unroll_plan())
        joint = jacobian.operators(["joint"], PointBatch.of(trajectory))["joint"]
        blocks = [block for k in range(len(states)) if (block := joint.block(k, k)) is not None]
        numbers = [(block.to_dense(), block.entry_sum(), block.spread()) for block in blocks]
        return trajectory.states, tf.nest.map_structure(lambda number: number[BATCH:], numbers)

    visited, blocks = run(sequence, *states)
    second = call_cell(cell, sequence[0], states)
    np.testing.assert_array_equal(np.stack(visited)[:, 0], states)
    np.testing.assert_allclose(np.stack(visited)[:, 1], second, rtol=1e-5, atol=1e-6)
    dense = step_jacobians(cell, sequence[1], second, ["joint"])[0]["joint"]
    for k, (name, (found, entry_sum, spread)) in enumerate(zip(STRUCTURED, blocks, strict=True)):
        assert choices[k].how == "structure", f"{name}: {choices[k].why}"
        here = slice(k * units, (k + 1) * units)
        expected = dense[:, here, here]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(entry_sum, expected.sum((1, 2)), rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(spread, units**2 * expected.var((1, 2)), rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.soak
@pytest.mark.parametrize("name", STRUCTURED)
def test_cells_with_a_structure_are_measured(name: str) -> None:
    model, layer = layer_of(STRUCTURED[name])
    meter = JacobianMeter(model, PROBE, measures=MOMENTS)
    (choice,) = meter.choices["rnn"]["hidden"]
    assert choice.how == "structure", choice.why
    report = meter()["rnn"]
    assert report.certificate is not None
    assert report.certificate < 1e-5
    assert_layer(report, layer, PROBE, measures=MOMENTS)


def choices_of(cell: Any, inputs: Any, states: Any, view: Any) -> list[Any]:
    """How each block of the Jacobian is taken; no number is computed."""
    choices: list[Any] = []

    @tf.function(autograph=False)
    def choose(inputs: Any, *flat: Any) -> None:
        choices.extend(CellJacobian(CellStep(cell, states), inputs, flat).choices(view))

    choose.get_concrete_function(inputs, *tf.nest.flatten(states))
    return choices


@pytest.mark.fast
@pytest.mark.parametrize("name", DECEIVING)
def test_cells_made_to_deceive(name: str) -> None:
    function, reason = DECEIVING[name]
    cell = FunctionCell(function)
    cell.build((1, FEATURES))
    (choice,) = choices_of(cell, tf.zeros((3, FEATURES)), [tf.zeros((3, 4))], "hidden")
    assert choice.how == "autodiff"
    assert reason in choice.why


# Of autodiff, `test_columns.py` says the same of more operations.
@pytest.mark.parametrize("name", soak_but({"kernel_of_inputs"}, DECEIVING))
def test_cells_made_to_deceive_are_measured(name: str) -> None:
    model, layer = layer_of(DECEIVING[name][0])
    report = measure(model, PROBE, measures=MOMENTS)["rnn"]
    assert report.certificate is None
    assert_layer(report, layer, PROBE, measures=MOMENTS)


def test_a_product_in_half_precision_is_left_to_autodiff() -> None:
    """The slopes that the cell has in training have three digits then."""
    model, layer = layer_of(
        lambda c, x, h: tf.tanh(x + tf.cast(tf.cast(h, tf.float16) @ tf.cast(c.U, tf.float16), x.dtype))
    )
    meter = JacobianMeter(model, PROBE, measures=MOMENTS)
    (choice,) = meter.choices["rnn"]["hidden"]
    assert (choice.how, "computes in float16" in choice.why) == ("autodiff", True)
    assert_layer(meter()["rnn"], layer, PROBE, measures=MOMENTS, rtol=dict.fromkeys(MOMENTS, 2e-3))


def test_a_kernel_whose_shape_is_left_open() -> None:
    kernel = tf.Variable(normal(4, 4, seed=8, scale=0.5), shape=tf.TensorShape([None, 4]))
    model, layer = layer_of(lambda _, x, h: tf.tanh(h @ tf.convert_to_tensor(kernel)) + tf.sin(x))
    report = measure(model, PROBE, measures=MOMENTS)["rnn"]
    assert report.certificate is not None
    assert_layer(report, layer, PROBE, measures=MOMENTS)


NO_ACTIVATIONS = {"deserialize", "get", "serialize"}
MIXING = {"log_softmax", "softmax", "sparsemax"}
# `glu` halves the units.
ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    name: function
    for name, function in sorted(inspect.getmembers(keras.activations, callable))
    if name not in {*NO_ACTIVATIONS, *MIXING, "glu"}
}
ACTIVATIONS["threshold"] = functools.partial(keras.activations.threshold, threshold=0.1, default_value=0.0)


def structure_of(function: Callable[[Any, Any, Any], Any]) -> Structure:
    """The structure of a cell's step; no number is computed."""
    cell, h = FunctionCell(function), tf.zeros((3, 4))
    cell.build((1, FEATURES))
    return find_structure(CellGraph(CellStep(cell, [h]), tf.zeros((3, FEATURES)), [h]))


@pytest.mark.fast
@pytest.mark.parametrize("name", [*ACTIVATIONS, *sorted(MIXING)])
def test_what_activations_do_to_units_is_known(name: str) -> None:
    function = getattr(keras.activations, name) if name in MIXING else ACTIVATIONS[name]
    structure = structure_of(lambda c, x, h: function(x + h @ c.U))
    assert structure.depends(0, Node.state(0))
    for source in (Node.state(0), Node.inputs()):
        reason = structure.reason(0, source)
        assert (reason is not None) == (name in MIXING), reason


@pytest.mark.fast
def test_a_cell_may_count_its_calls() -> None:
    class Counting(FunctionCell):
        def build(self, input_shape: tuple[int, ...]) -> None:
            super().build(input_shape)
            self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)
            self.own_calls = tf.Variable(0.0)

        def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
            self.calls.assign_add(1.0)
            self.own_calls.assign_add(1.0)
            return super().call(inputs, states)

    def reason(function: Callable[[Any, Any, Any], Any]) -> str | None:
        cell, h = Counting(function), tf.zeros((3, 4))
        cell.build((1, FEATURES))
        # A training writes to the variables of Keras in a scope, where their values are tensors.
        with keras.StatelessScope(state_mapping=[(cell.calls, tf.ones([]))]):
            structure = find_structure(CellGraph(CellStep(cell, [h]), tf.zeros((3, FEATURES)), [h]))
        assert float(cell.calls) == float(cell.own_calls) == 0.0
        return structure.reason(0, Node.state(0))

    assert reason(lambda c, x, h: tf.tanh(x + h @ c.U)) is None
    with pytest.raises(NotImplementedError, match="`AssignAddVariableOp` may do something else"):
        reason(lambda c, x, h: tf.tanh(x + h @ c.U) * c.own_calls)


def test_a_subclass_that_overrides_call() -> None:
    class Squashed(keras.layers.LSTMCell):
        def call(self, inputs: Any, states: Any, training: bool = False) -> Any:  # noqa: FBT001, FBT002 - Keras' signature
            _, (h, c) = super().call(inputs, states, training=training)
            return tf.sin(2.0 * h), [tf.sin(2.0 * h), tf.cos(c)]

    layer = keras.layers.RNN(Squashed(4), name="rnn")
    model = build(keras.Sequential([keras.Input((STEPS, FEATURES)), layer]), PROBE)
    meter = JacobianMeter(model, PROBE, measures=MOMENTS)
    assert {choice.how for choice in meter.choices["rnn"]["joint"]} == {"structure"}
    assert_layer(meter()["rnn"], layer, PROBE, measures=MOMENTS)


# The certificate -------------------------------------------------------------------------------------------------


@pytest.fixture
def _softmax_passes_for_elementwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops.OPERATIONS, "Softmax", ops.Op("Softmax", ops.ELEMENTWISE))


@pytest.mark.usefixtures("_softmax_passes_for_elementwise")
def test_a_wrong_structure_is_refuted_and_never_reported() -> None:
    model, layer = make_model(BY_ID["bare_state"], PROBE)
    meter = JacobianMeter(model, PROBE, measures=MOMENTS)
    with pytest.warns(UserWarning, match=f"^Layer `{layer.name}`: the structure of its Jacobian differs from autodiff"):
        report = meter()
    assert_layer(report[layer.name], layer, PROBE, measures=MOMENTS)
    assert report[layer.name].certificate is None
    assert meter.trace_count == 2
    assert {choice.why for choice in meter.choices[layer.name]["hidden"]} == {"its structure differs from autodiff"}
    # From now on by autodiff, without another word.
    assert_layer(meter()[layer.name], layer, PROBE, measures=MOMENTS)
    assert meter.trace_count == 2


def test_the_operator_that_is_tested_is_the_one_that_is_measured() -> None:
    """A second one, made in the same way, would hide that the first one is wrong."""
    model, _ = layer_of(lambda c, x, h: tf.math.sinh(0.1 * (x + h @ c.U)))
    meter = JacobianMeter(model, PROBE, measures="standard")
    # Of the hidden view, all points, some points, points to be tested and the steps of the flow have one operator; the
    # other derivative is that of autodiff.
    assert sum(tensor.op.type == "Cosh" for tensor in tensors_of(meter.graphs[0])) == 2


def test_every_point_has_its_turn() -> None:
    samples, time = 4, 16
    probe = np.arange(samples * time, dtype=np.float32).reshape(samples, time, 1) / 64
    model = build(keras.Sequential([keras.Input((time, 1)), keras.layers.RNN(WatchedCell(3))]), probe)
    with watched_points() as seen:
        meter = JacobianMeter(model, probe, measures=["variance"])
        meter()
        # All points are measured, and all are tested.
        assert [len(points) for points in seen].count(probe.size) == 2
        turns: list[Any] = []
        for _ in range(4):
            seen.clear()
            meter()
            turns += [points for points in seen if len(points) not in (samples, probe.size)]
    assert [len(set(points)) for points in turns] == [CHECKED_POINTS] * 4
    assert set(np.concatenate(turns)) == set(probe.ravel())


def test_a_nan_of_the_network_is_no_disagreement() -> None:
    model, layer = layer_of(STRUCTURED["two_kernels"])
    layer.cell.recurrent_kernel.assign(np.full((4, 4), np.nan))
    assert JacobianMeter(model, PROBE, measures=["variance"])()["rnn"].certificate == 0.0


# What a user says ------------------------------------------------------------------------------------------------


class RegisteredCell(WeightedCell):
    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        new_h = tf.tanh(self.preactivation(inputs, states[0]))
        return new_h, [new_h]


def right_form(cell: Any, inputs: Any, states: Any, view: str) -> tf.linalg.LinearOperator | None:
    if view != "hidden":
        return None
    slope = 1.0 - tf.tanh(cell.preactivation(inputs, states[0])) ** 2
    transposed = tf.linalg.matrix_transpose(tf.convert_to_tensor(cell.recurrent_kernel))
    return tf.linalg.LinearOperatorFullMatrix(slope[:, :, None] * transposed)


def form_that_is_seldom_wrong(cell: Any, inputs: Any, states: Any, view: str) -> tf.linalg.LinearOperator | None:
    right = right_form(cell, inputs, states, view)
    wrong = tf.cast(inputs[:, :1, None] > RARE, tf.float32)
    return None if right is None else tf.linalg.LinearOperatorFullMatrix((1.0 + wrong) * right.to_dense())


@pytest.fixture
def _unregistered_afterwards() -> Iterator[None]:
    yield
    register_jacobian(RegisteredCell, None)


def registered_model(cell: Any) -> tuple[Any, Any]:
    layer = keras.layers.RNN(cell, name="rnn")
    return build(keras.Sequential([keras.Input((STEPS, FEATURES)), layer]), PROBE), layer


@pytest.mark.usefixtures("_unregistered_afterwards")
def test_a_registered_form_is_used_for_its_exact_type() -> None:
    class Subclass(RegisteredCell):
        def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
            new_h = tf.sin(self.preactivation(inputs, states[0]))
            return new_h, [new_h]

    register_jacobian(RegisteredCell, right_form)
    model, layer = registered_model(RegisteredCell())
    assert str(explain(model, PROBE)).splitlines() == [
        "rnn:",
        "  hidden  d state 0 / d state 0  registered form: right_form",
        "  inputs  d state 0 / d inputs  structure: the product with `kernel`",
    ]
    report = measure(model, PROBE, measures=MOMENTS)["rnn"]
    assert report.certificate is not None
    assert_layer(report, layer, PROBE, measures=MOMENTS)
    model, layer = registered_model(Subclass())
    meter = JacobianMeter(model, PROBE, measures=MOMENTS)
    assert meter.choices["rnn"]["hidden"][0].how == "structure"
    assert_layer(meter()["rnn"], layer, PROBE, measures=MOMENTS)


@pytest.mark.usefixtures("_unregistered_afterwards")
def test_a_wrong_registered_form_is_refuted() -> None:
    register_jacobian(RegisteredCell, form_that_is_seldom_wrong)
    model, layer = registered_model(RegisteredCell())
    with pytest.warns(UserWarning, match="differs from autodiff"):
        report = measure(model, PROBE, measures=MOMENTS)["rnn"]
    assert_layer(report, layer, PROBE, measures=MOMENTS)


@pytest.mark.usefixtures("_unregistered_afterwards")
def test_a_form_may_leave_a_view_to_discovery() -> None:
    register_jacobian(RegisteredCell, lambda *_: None)
    model, layer = registered_model(RegisteredCell())
    meter = JacobianMeter(model, PROBE, measures=MOMENTS)
    assert_layer(meter()["rnn"], layer, PROBE, measures=MOMENTS)
    (choice,) = meter.choices["rnn"]["hidden"]
    assert choice.how == "structure"


@pytest.mark.parametrize(
    ("cell_type", "form", "name"), [("LSTMCell", right_form, "cell_type"), (RegisteredCell, 3, "form")]
)
def test_nonsense_is_not_registered(cell_type: Any, form: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"^Invalid value for argument `{name}`"):
        register_jacobian(cell_type, form)


@pytest.mark.fast
@pytest.mark.filterwarnings("ignore:Layer `.*`. no gradient connects the new state with the inputs")
def test_the_explanation_is_a_table() -> None:
    model, layer = make_model(BY_ID["partly_mixing"], PROBE)
    lines = str(explain(model, PROBE)).splitlines()
    # Without a name of this cell, since equal cells share the explanation.
    mixes = "autodiff: `Softmax` mixes units or points"
    assert lines == [
        f"{layer.name}:",
        f"  hidden  d state 0 / d state 0  {mixes}",
        f"  joint   d state 0 / d state 0  {mixes}",
        f"  joint   d state 0 / d state 1  {mixes}",
        "  joint   d state 1 / d state 0  structure: a diagonal",
        "  joint   d state 1 / d state 1  structure: a diagonal",
        f"  inputs  d state 0 / d inputs  {mixes}",
    ]


def test_the_parts_of_a_product_and_blocks_of_zeros_are_named() -> None:
    (choice,) = choices_of(*make_step(BY_ID["gru_reset_before"]), "hidden")
    part = "the product with a part of `recurrent_kernel`"
    assert choice.why == f"a diagonal + {part} + {part}, of another product"
    choices = choices_of(*make_step(BY_ID["stacked_seed_cell_simple_rnn"]), "joint")
    hows = {(choice.new, choice.old): choice.how for choice in choices}
    assert hows[0, 2] == "zero"


# What it costs ---------------------------------------------------------------------------------------------------


def tensors_of(graph: Any) -> Iterator[Any]:
    """Every tensor of a graph and of the functions that it calls."""
    for operation in graph.get_operations():
        yield from operation.outputs
        for attribute in operation.op_def.attr:
            if attribute.type == "func":
                name = operation.get_attr(attribute.name).name
                yield from tensors_of(graph._get_function(name).graph)


# All measures for the layer with the most blocks, and the variance for others. A norm of few columns is that of the
# matrix.
NORM = ["joint/spectral_norm"]
SUMS = ["variance", "joint/variance", "joint/rms_singular_value", "joint/flow", "joint/lyapunov"]
LEAN: dict[str, tuple[Any, list[str]]] = {
    "simple_rnn": (keras.layers.SimpleRNN(11, name="rnn"), ["variance"]),
    "gru": (keras.layers.GRU(11, name="rnn"), ["variance"]),
    "seed": (keras.layers.RNN(FunctionCell(STRUCTURED["seed"], 11), name="rnn"), ["variance"]),
    "two_kernels": (keras.layers.RNN(FunctionCell(STRUCTURED["two_kernels"], 11), name="rnn"), ["variance"]),
    "lstm": (keras.layers.LSTM(11, name="rnn"), SUMS),
    "lstm_norm": (keras.layers.LSTM(34, name="rnn"), NORM),
}


@pytest.mark.parametrize(("layer", "keys"), LEAN.values(), ids=LEAN)
def test_no_matrix_for_each_row_on_the_way_to_a_measure(layer: Any, keys: list[str]) -> None:
    samples, time, units = 5, 7, layer.cell.output_size
    probe = normal(samples, time, FEATURES)
    model = build(keras.Sequential([keras.Input((time, FEATURES)), layer]), probe)
    meter = JacobianMeter(model, probe, measures=keys)
    assert {c.how for choices in meter.choices["rnn"].values() for c in choices} <= {"structure", "zero"}

    def entries(shape: Any) -> int:
        # PointBatch, and of what is iterated the number of vectors so far, which is no matter of units.
        unknown = [samples * time, *[1 if keys == NORM else samples * time] * len(shape)]
        return int(np.prod([unknown.pop(0) if size is None else size for size in shape]))

    sizes = [entries(t.shape) for t in tensors_of(meter.graphs[0]) if t.shape.rank]
    assert len(sizes) > 100
    # All steps of the hidden view, or one step of the joint one.
    assert max(sizes) < min(samples * time * units**2, samples * (2 * units) ** 2)


def products_of(graph: Any, *, in_loop: bool = False) -> Iterator[tuple[bool, tuple[int | None, ...], tuple[int, ...]]]:
    """Of every product of two matrices in a graph whether it stands in a loop, and the shapes of both."""
    for operation in graph.get_operations():
        if operation.type == "MatMul":
            left, right = operation.inputs
            yield in_loop, tuple(left.shape), tuple(right.shape)
        for attribute in operation.op_def.attr:
            if attribute.type == "func":
                body = graph._get_function(operation.get_attr(attribute.name).name).graph
                yield from products_of(body, in_loop=in_loop or operation.type.endswith("While"))


@pytest.mark.parametrize(
    ("make", "gates", "units"),
    [
        (keras.layers.LSTM, 4, 11),
        (keras.layers.LSTM, 4, 128),
        (keras.layers.GRU, 3, 128),
        (keras.layers.SimpleRNN, 1, 11),
    ],
)
def test_inputs_are_projected_beforehand_and_what_the_steps_computed_is_kept(make: Any, gates: int, units: int) -> None:
    samples, time, features = 5, 6, 7
    probe = normal(samples, time, features)
    model = build(keras.Sequential([keras.Input((time, features)), make(units, name="rnn")]), probe)
    meter = JacobianMeter(model, probe, measures=["variance", "joint/flow"], flow_vectors=3)
    products = list(products_of(meter.graphs[0]))
    wide = gates * units
    # Wide gates are products of their own, which need no split.
    parts, width = (gates, units) if units > 100 else (1, wide)
    # A step multiplies its states, and the flow its vectors; no step multiplies its inputs, nor the flow any states.
    assert sorted(product[1:] for product in products if product[0]) == [
        *[((samples, units), (units, width))] * parts,
        ((3 * samples, wide), (wide, units)),
    ]
    # All steps together: the inputs, once, and no states. Products with single vectors are those of the variance.
    at_once = [product[1:] for product in products if product[1][0] == samples * time and product[2][1] > 1]
    assert at_once == [((samples * time, features), (features, width))] * parts


@pytest.mark.parametrize("case_id", soak_but({"lstm"}, ["lstm", "bare_state"]))
def test_a_long_sequence_is_measured_in_segments(case_id: str) -> None:
    probe = normal(BATCH, 11, FEATURES)
    layer = BY_ID[case_id].make(go_backwards=case_id == "lstm")
    inputs = keras.Input((11, FEATURES))
    model = build(keras.Model(inputs, layer(keras.layers.Masking()(inputs))), probe)
    mask: NDArray[np.bool_] = np.arange(11)[None] < np.array([[11], [7], [2]])
    report = measure(model, probe * mask[..., None], max_bytes=2000, measures=MOMENTS)[layer.name]
    assert_layer(report, layer, probe * mask[..., None], mask=mask, measures=MOMENTS)
    assert (report.certificate is None) == (case_id == "bare_state")
