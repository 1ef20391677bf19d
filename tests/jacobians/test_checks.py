"""What a measurement rests on is tested each time: no cell gets a wrong number, whatever it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    BATCH,
    BY_ID,
    FEATURES,
    KEYS,
    MOMENTS,
    STEPS,
    FunctionCell,
    assert_layer,
    build,
    make_model,
    normal,
    randomize,
    soak_but,
)

from keras_jacmon import JacobianMeter, measure
from keras_jacmon.cell.cell_graph import CellGraph
from keras_jacmon.cell.step import CellStep
from keras_jacmon.errors import UnmeasurableError
from keras_jacmon.jacobians.cell_jacobian import Assumptions, CellJacobian
from keras_jacmon.jacobians.checks import check_independence, check_points
from keras_jacmon.jacobians.diagnosis import CheckResults, Diagnosis, diagnose
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.structure.independence import independent_tensors

Function = Callable[[Any, Any, Any], Any]

PROBE = normal(BATCH, STEPS, FEATURES, seed=3)
# Steps and samples enough that one step of them is few.
LONG = normal(8, 50, FEATURES, seed=4)
LONG[:, 7] = 0.0

DEPENDS = "^Layer `rnn`: what its cell makes of a sample depends on the other samples of the batch"
DIFFER = "^Layer `rnn`: products with its Jacobian, by the tape applied twice, differ"


def model_of(function: Function, probe: Any) -> tuple[Any, Any]:
    layer = keras.layers.RNN(FunctionCell(function), name="rnn")
    return build(keras.Sequential([keras.Input(probe.shape[1:]), layer]), probe), layer


def assert_measured(function: Function, probe: Any, warning: str, measures: Sequence[str] = MOMENTS) -> None:
    """Holds what is measured against the tape, this time and the next one, of which only the first one warns."""
    model, layer = model_of(function, probe)
    meter = JacobianMeter(model, probe, measures=measures, max_rows=None)
    with pytest.warns(UserWarning, match=warning):
        first = meter()["rnn"]
    assert_layer(first, layer, probe, measures=measures)
    assert_again(meter()["rnn"], first)


def assert_again(report: Any, first: Any) -> None:
    """Holds a second measurement of the same weights against the first one."""
    assert set(report.values) == set(first.values)
    for key, values in first.values.items():
        np.testing.assert_allclose(report[key], values, rtol=1e-5, atol=1e-7, err_msg=key)


def diagnosed(function: Function, assumptions: Assumptions) -> Diagnosis | None:
    """The diagnosis of the checks at two steps of three samples, without a model or a measure around them.

    The states of the first step are zero, and the sums of its inputs have another sign than those of the second one.
    """
    first, h = normal(3, FEATURES, seed=3), np.concatenate([np.zeros((3, 4)), normal(3, 4, seed=4)]).astype(np.float32)
    cell, x = FunctionCell(function), np.concatenate([first, -0.5 * first])
    cell.build(x.shape)
    randomize(cell)

    @tf.function(autograph=False)
    def check() -> Any:
        inputs, states, seed = tf.constant(x), tf.constant(h), tf.constant([1, 2])
        jacobian = CellJacobian(CellStep(cell, [states]), inputs, [states], assumptions)
        points = PointBatch(inputs, (states,))
        steps = [jacobian.step(inputs[here], [states[here]]) for here in (slice(3), slice(3, 6))]
        new_states = [tf.concat(parts, axis=0) for parts in zip(*steps, strict=True)]
        results = check_points(jacobian, ["hidden"], points, new_states, seed)
        if jacobian.point_by_point:
            return results
        return results.worst(check_independence(jacobian, ["hidden"], points, new_states, seed))

    return diagnose(CheckResults(*check()).floats(), assumptions)


# Rows ------------------------------------------------------------------------------------------------


# The branch is the same for all samples of a step, and another one at other steps.
BRANCHING: dict[str, Function] = {
    "conditional_product": lambda c, x, h: tf.cond(
        tf.reduce_sum(x) > 0.0, lambda: tf.tanh(x + h @ c.U), lambda: tf.tanh(x + h @ c.V)
    ),
    "data_dependent_branch": lambda c, x, h: tf.cond(
        tf.reduce_sum(h * h) > 0.0, lambda: tf.tanh(x + h @ c.U), lambda: 0.5 * h + x
    ),
    "mean_of_the_batch": lambda c, x, h: tf.tanh(x - tf.reduce_mean(x, axis=0) + h @ c.U),
}


@pytest.mark.parametrize(
    ("name", "masked"),
    [
        ("mean_of_the_batch", True),
        *(
            # Of what the next test holds, the fallback is the same.
            pytest.param(name, masked, marks=pytest.mark.soak)
            for name in BRANCHING
            for masked in (False, True)
            if (name, masked) != ("mean_of_the_batch", True)
        ),
    ],
)
def test_samples_that_are_not_independent(name: str, masked: bool) -> None:  # noqa: FBT001 - pytest passes it by name
    layer = keras.layers.RNN(FunctionCell(BRANCHING[name]), name="rnn")
    inputs = keras.Input((STEPS, FEATURES))
    model = build(keras.Model(inputs, layer(keras.layers.Masking()(inputs))), PROBE)
    mask = np.ones((BATCH, STEPS), bool)
    mask[0, 1:] = not masked
    probe = PROBE * mask[..., None]
    meter = JacobianMeter(model, probe, measures=MOMENTS)
    with pytest.warns(UserWarning, match=DEPENDS):
        report = meter()
    assert_layer(report["rnn"], layer, probe, mask=mask, measures=MOMENTS)
    assert_again(meter()["rnn"], report["rnn"])
    assert {choice.why for choice in meter.choices["rnn"]["hidden"]} == {
        "its samples are not independent of each other"
    }


@pytest.mark.parametrize("name", BRANCHING)
def test_samples_that_are_not_independent_are_noticed(name: str) -> None:
    diagnosis = diagnosed(BRANCHING[name], Assumptions())
    assert diagnosis is not None
    assert diagnosis.assumptions == Assumptions(independent=False)


# What looks as if it depended on the inputs of a row alone, and could be computed for all rows at once.
OF_THE_BATCH: dict[str, Function] = {
    "its size": lambda c, x, h: tf.tanh(x / tf.sqrt(tf.cast(tf.shape(x)[0], x.dtype)) + h @ c.U),
    "noise": lambda c, x, h: tf.tanh(x + keras.random.normal(tf.shape(x), seed=1) + h @ c.U),
    "any of it": lambda c, x, h: tf.tanh(tf.where(tf.reduce_any(x > 1.0), 3.0 * x, x) + h @ c.U),
    "a count": lambda c, x, h: tf.tanh(x * tf.cast(tf.math.count_nonzero(x > 0.0), x.dtype) / 9.0 + h @ c.U),
    "its order": lambda c, x, h: tf.tanh(x + tf.cast(tf.argsort(x, axis=0), x.dtype) + h @ c.U),
    "the place in it": lambda c, x, h: tf.tanh(x + tf.cast(tf.range(tf.shape(x)[0]), x.dtype)[:, None] + h @ c.U),
}


# That none of them is taken for independent is below, for each.
@pytest.mark.parametrize("name", soak_but({"its size"}, OF_THE_BATCH))
def test_what_depends_on_the_batch_is_not_computed_for_all_steps_at_once(name: str) -> None:
    assert_measured(OF_THE_BATCH[name], PROBE, DEPENDS)


# At one step of fifty, or in one sample of eight.
SELDOM: dict[str, Function] = {
    "branch": lambda c, x, h: tf.cond(
        tf.reduce_all(x == 0.0), lambda: 0.1 * h, lambda: tf.tanh(x + h @ c.U)
    ),
    "choice": lambda c, x, h: tf.where(tf.reduce_all(x == 0.0), 0.1 * h, tf.tanh(x + h @ c.U)),
    "sample": lambda c, x, h: tf.tensor_scatter_nd_update(tf.tanh(x + h @ c.U), [[0]], 0.1 * h[:1]),
}  # fmt: skip


@pytest.mark.parametrize("name", soak_but({"choice"}, SELDOM))
def test_no_row_is_forgiven_where_independence_is_not_proven(name: str) -> None:
    # The spectral norm is taken of some points, and its checks are those of all.
    assert_measured(SELDOM[name], LONG, DEPENDS, [*MOMENTS, "spectral_norm"] if name == "choice" else MOMENTS)


def test_a_choice_that_is_made_later_is_seen_when_it_is() -> None:
    """The first measurement tests all rows; so does each later one."""
    model, layer = model_of(lambda c, x, h: tf.where(tf.reduce_max(x) > 100.0, 0.1 * h, tf.tanh(x + h @ c.U)), LONG)
    meter = JacobianMeter(model, LONG, measures=MOMENTS)
    assert_layer(meter()["rnn"], layer, LONG, measures=MOMENTS)
    kernel = np.asarray(layer.cell.kernel)
    # Only the largest step gets beyond it.
    maxima = np.sort((LONG @ kernel).max(axis=(0, 2)))
    layer.cell.kernel.assign(kernel * 200.0 / (maxima[-1] + maxima[-2]))
    with pytest.warns(UserWarning, match=DEPENDS):
        assert_layer(meter()["rnn"], layer, LONG, measures=MOMENTS)


def without_derivative(x: Any) -> Any:
    return x - tf.stop_gradient(x)


# The values of a sample may not even depend on the others.
INFLUENCED: dict[str, Function] = {
    "mean": lambda c, x, h: tf.tanh(x + (h - tf.reduce_mean(h, axis=0)) @ c.U),
    "derivative alone": lambda c, x, h: tf.tanh(x + (h + without_derivative(tf.reduce_mean(h, axis=0))) @ c.U),
    "one other": lambda c, x, h: tf.tanh(x + h @ c.U + tf.roll(h, 1, axis=0)),
}


@pytest.mark.fast
@pytest.mark.filterwarnings("ignore:Layer `rnn`. what its cell makes of a sample depends")
def test_samples_without_a_jacobian_of_their_own_are_refused() -> None:
    model, _ = model_of(INFLUENCED["derivative alone"], PROBE)
    with pytest.raises(
        ValueError, match=r"^The Jacobians of layer `rnn` .* depend on the old states of others, so it has no Jacobian"
    ):
        measure(model, PROBE, measures=MOMENTS)


def test_a_sample_that_depends_on_the_inputs_of_others_has_no_inputs_view() -> None:
    def centred(c: Any, x: Any, h: Any) -> Any:
        return tf.tanh(x - tf.reduce_mean(x, axis=0, keepdims=True) + h @ c.U)

    model, layer = model_of(centred, PROBE)
    left_out = "depend on the inputs of others. The inputs view is left out from now on"
    with pytest.warns(UserWarning, match=DEPENDS), pytest.warns(UserWarning, match=left_out):
        found = measure(model, PROBE, measures=[*MOMENTS, "inputs/variance"])["rnn"]
    assert "inputs/variance" not in found
    assert_layer(found, layer, PROBE, measures=MOMENTS)
    assert "the new states of a sample depend on the inputs of others, so the inputs view is left out" in found.notes
    refused = "^The Jacobians of layer `rnn` .* depend on the inputs of others"
    with (
        pytest.warns(UserWarning, match=DEPENDS),
        pytest.warns(UserWarning, match=left_out),
        pytest.raises(UnmeasurableError, match=refused),
    ):
        measure(model, PROBE, measures=["inputs/variance"])


@pytest.mark.parametrize("name", INFLUENCED)
def test_samples_without_a_jacobian_of_their_own_are_noticed(name: str) -> None:
    diagnosis = diagnosed(INFLUENCED[name], Assumptions(independent=False))
    assert diagnosis is not None
    assert diagnosis.assumptions is None


def test_a_single_sample_has_a_jacobian_of_its_own() -> None:
    model, layer = model_of(INFLUENCED["mean"], PROBE)
    with pytest.warns(UserWarning, match=DEPENDS):
        assert_layer(measure(model, PROBE[:1], measures=MOMENTS)["rnn"], layer, PROBE[:1], measures=MOMENTS)


@pytest.mark.filterwarnings("ignore:Layer `rnn`. what its cell makes of a sample depends")
def test_a_tracing_that_is_interrupted_leaves_the_meter_as_it_was() -> None:
    """Tracing takes seconds, in which users press a key."""
    pressed = False

    def interrupted(c: Any, x: Any, h: Any) -> Any:
        if pressed:
            raise KeyboardInterrupt
        return BRANCHING["mean_of_the_batch"](c, x, h)

    model, layer = model_of(interrupted, PROBE)
    meter = JacobianMeter(model, PROBE, measures=MOMENTS)
    pressed = True
    # Its samples depend on each other, and it is traced again without that assumption.
    with pytest.raises(KeyboardInterrupt):
        meter()
    pressed = False
    assert meter.layers == ("rnn",)
    assert_layer(meter()["rnn"], layer, PROBE, measures=MOMENTS)


@pytest.mark.filterwarnings("ignore:Layer `rnn`. new state 0 does not depend")
def test_where_no_gradient_flows_there_is_nothing_to_test() -> None:
    model, _ = model_of(lambda c, x, h: x + tf.stop_gradient(h) @ c.U, PROBE)
    layer = measure(model, PROBE, measures=KEYS)["rnn"]
    assert not layer.values
    assert layer.notes


# Products ------------------------------------------------------------------------------------------------------------


@tf.custom_gradient
def clipped(z: Any) -> Any:
    return tf.identity(z), lambda upstream: tf.clip_by_value(upstream, -0.1, 0.1)


# TensorFlow takes the second derivative of the first three for zero.
NOT_TWICE: dict[str, Function] = {
    "max-pooling": lambda c, x, h: tf.tanh(keras.ops.max_pool((x + h @ c.U)[..., None], 2, 1, "same")[..., 0]),
    "resizing": lambda c, x, h: tf.tanh(
        x + tf.reshape(tf.image.resize(tf.reshape(h @ c.U, [-1, 2, 2, 1]), [4, 1]), [-1, 4])
    ),
    "quantisation": lambda c, x, h: tf.quantization.fake_quant_with_min_max_args(tf.tanh(x + h @ c.U), -1, 1),
    "a clipped gradient": lambda c, x, h: tf.tanh(x + clipped(h @ c.U)),
}


# That the others are noticed is in the next test.
@pytest.mark.parametrize("name", soak_but({"quantisation"}, NOT_TWICE))
def test_products_that_the_tape_gets_wrong_are_refuted(name: str) -> None:
    assert_measured(NOT_TWICE[name], PROBE, DIFFER, [*MOMENTS, "spectral_norm"])


@pytest.mark.parametrize("name", NOT_TWICE)
def test_products_that_the_tape_gets_wrong_are_noticed(name: str) -> None:
    diagnosis = diagnosed(NOT_TWICE[name], Assumptions())
    assert diagnosis is not None
    assert diagnosis.assumptions == Assumptions(products=False)


def test_the_exponents_too_are_those_of_the_matrices() -> None:
    model, layer = model_of(NOT_TWICE["quantisation"], PROBE)
    with pytest.warns(UserWarning, match=DIFFER):
        report = measure(model, PROBE, measures=["lyapunov"], exponents=4, warmup=0)["rnn"]
    h, logs, Q = tf.zeros((BATCH, 4)), np.zeros((BATCH, 4)), np.stack([np.eye(4)] * BATCH)
    for step in range(STEPS):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(h)
            new = layer.cell(PROBE[:, step], [h])[0]
        J = np.asarray(tape.batch_jacobian(new, h, experimental_use_pfor=False), np.float64)
        Q, R = np.linalg.qr(J @ Q)
        logs, h = logs + np.log(np.abs(np.diagonal(R, axis1=1, axis2=2))), new
    # The sum is that of the determinants, whatever directions they began with.
    np.testing.assert_allclose(report["lyapunov"].sum(axis=0), logs.sum(axis=1) / STEPS, rtol=1e-3)


@tf.recompute_grad
def recomputed(z: Any) -> Any:
    return tf.tanh(z)


# Their gradients have no gradients, lose their shapes, or are not known to `vectorized_map`.
ODD_GRADIENTS: dict[str, Function] = {
    "recomputed": lambda c, x, h: recomputed(x + h @ c.U),
    "local response": lambda c, x, h: tf.tanh(
        x + tf.nn.local_response_normalization((h @ c.U)[:, None, None, :])[:, 0, 0]
    ),
    "scan": lambda c, x, h: tf.transpose(tf.scan(lambda a, b: tf.tanh(0.5 * a + b), tf.transpose(x + h @ c.U))),
}


@pytest.mark.parametrize("name", soak_but({"recomputed", "local response"}, ODD_GRADIENTS))
def test_odd_gradients(name: str) -> None:
    model, layer = model_of(ODD_GRADIENTS[name], PROBE)
    assert_layer(measure(model, PROBE, measures=MOMENTS)["rnn"], layer, PROBE, measures=MOMENTS)


# What is left behind -------------------------------------------------------------------------------------------------


class LeavingCell(FunctionCell):
    """Divides by the number of its calls, which it keeps in a variable."""

    def __init__(self, where: str, *, felt: bool) -> None:
        super().__init__(lambda c, x, h: tf.tanh(x + h @ c.U))
        self.where, self.felt = where, felt

    def build(self, input_shape: tuple[int, ...]) -> None:
        super().build(input_shape)
        self.calls = self.add_weight(name="calls", initializer="zeros", trainable=False)
        self.hidden = tf.Variable(0.0, trainable=False)

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        divided = tf.function(self.divided, autograph=False) if self.where == "tf.function" else self.divided
        new_h = divided(super().call(inputs, states)[0])
        return new_h, [new_h]

    def divided(self, h: Any) -> Any:
        if self.where == "Keras":
            count = self.calls + 1.0
            self.calls.assign(count)
        else:
            count = self.hidden.assign_add(1.0)
        return h / (count if self.felt else 2.0)


@pytest.mark.parametrize("where", ["Keras", "TensorFlow", "tf.function"])
def test_a_cell_that_leaves_something_for_its_next_step_is_refused(where: str) -> None:
    layer = keras.layers.RNN(LeavingCell(where, felt=True), name="rnn")
    model = build(keras.Sequential([keras.Input((STEPS, FEATURES)), layer]), PROBE)
    which = "the variable `.*calls`" if where == "Keras" else "a `tf.Variable` of its own"
    with pytest.raises(ValueError, match=f"Its cell writes to {which}, and its next step depends on it"):
        measure(model, PROBE, measures=["variance"])


@pytest.mark.parametrize("where", ["Keras", "TensorFlow", "tf.function"])
def test_a_count_that_no_step_feels_is_none_of_our_business(where: str) -> None:
    layer = keras.layers.RNN(LeavingCell(where, felt=False), name="rnn")
    model = build(keras.Sequential([keras.Input((STEPS, FEATURES)), layer]), PROBE)
    assert_layer(measure(model, PROBE, measures=MOMENTS)["rnn"], layer, PROBE, measures=MOMENTS)


def test_a_cell_that_calls_python_is_refused() -> None:
    model, _ = model_of(
        lambda c, x, h: tf.ensure_shape(tf.py_function(tf.tanh, [x + h @ c.U], tf.float32), x.shape), PROBE
    )
    with pytest.raises(ValueError, match="runs Python at each step"):
        measure(model, PROBE, measures=["variance"])


# The proof -----------------------------------------------------------------------------------------------------------


def is_proven(function: Function) -> bool:
    cell, h = FunctionCell(function), tf.zeros((3, 4))
    cell.build((1, FEATURES))
    try:
        graph = CellGraph(CellStep(cell, [h]), tf.zeros((3, FEATURES)), [h])
    except (NotImplementedError, ValueError):
        # It cannot be seen through; what is true for as many rows as units only is an error for others.
        return False
    return independent_tensors(graph).issuperset(tensor.name for tensor in graph.new_states)


PROVEN: dict[str, Function] = {
    "plain": lambda c, x, h: tf.tanh(x + h @ c.U),
    "zeros of the batch's size": lambda c, x, h: tf.tanh(x + h @ c.U + tf.zeros((tf.shape(x)[0], 4))),
    "a bias for each row": lambda c, x, h: h + tf.broadcast_to(c.U[0], tf.shape(x)),
    "reshaped": lambda c, x, h: tf.reshape(tf.reshape(x + h @ c.U, [tf.shape(x)[0], 2, 2]), [-1, 4]),
    "norm": lambda _, x, h: x + h / tf.reduce_sum(h * h, axis=-1, keepdims=True),
    "softmax": lambda c, x, h: tf.nn.softmax(x + h @ c.U),
    "comparison": lambda c, x, h: tf.where((x > 0.0) & ~(h < 0.0), x, h @ c.U),
    "moved": lambda _, x, h: tf.concat([x[:, 2:], tf.gather(h, [1, 0], axis=1)], axis=-1),
    "a kernel for each row": lambda _, x, h: tf.matmul(h[:, None], h[:, :, None] * x[:, None])[:, 0],
}

UNPROVEN: dict[str, Function] = {
    **OF_THE_BATCH,
    **SELDOM,
    **INFLUENCED,
    "units meet rows": lambda _, x, h: x + tf.reduce_sum(h, axis=-1),
    "flipped": lambda _, x, h: x + h[::-1],
    "summed": lambda _, x, h: x + tf.cumsum(h, axis=0),
    "transposed": lambda _, x, h: x + tf.matmul(tf.matmul(h, x, transpose_b=True), h),
    "a gradient of its own": lambda _, x, h: x + clipped(h),
    "a size decides": lambda _, x, h: tf.where(tf.shape(x)[0] > 3, x, h),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", PROVEN)
def test_what_is_row_by_row_is_proven(name: str) -> None:
    assert is_proven(PROVEN[name])


@pytest.mark.fast
@pytest.mark.parametrize("name", UNPROVEN)
def test_what_may_not_be_is_not(name: str) -> None:
    assert not is_proven(UNPROVEN[name])


def test_the_cells_of_keras_are_proven() -> None:
    for case in ("lstm", "gru_reset_after", "gru_reset_before", "simple_rnn", "stacked_lstm_gru"):
        _, layer = make_model(BY_ID[case], PROBE)
        states = layer.cell.get_initial_state(batch_size=BATCH)
        graph = CellGraph(CellStep(layer.cell, states), tf.constant(PROBE[:, 0]), tf.nest.flatten(states))
        assert independent_tensors(graph).issuperset(tensor.name for tensor in graph.new_states)
