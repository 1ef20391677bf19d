"""The penalty of `JacobianRegularizer` and its gradient, against a loop over the cell and finite differences of it."""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    BY_ID,
    VIEWS,
    BareStateCell,
    FunctionCell,
    build,
    call_cell,
    floating,
    initial_states,
    normal,
    rms_singular_value,
    soak_but,
    spectral_norm,
    step_jacobians,
    variance,
)

from keras_jacmon import JacobianRegularizer, measure

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

BATCH, STEPS, FEATURES = 4, 5, 3
PROBE = normal(BATCH, STEPS, FEATURES, seed=3)
MEASURES = {"variance": variance, "rms_singular_value": rms_singular_value, "spectral_norm": spectral_norm}


def float64_model(make: Callable[..., Any], **kwargs: Any) -> tuple[Any, Any]:
    """A model of one recurrent layer with random weights, in float64."""
    keras.utils.set_random_seed(3)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        layer = make(**kwargs)
        model = keras.Sequential([keras.Input((STEPS, FEATURES), dtype="float64"), layer])
        model(PROBE.astype("float64"))
    finally:
        keras.config.set_dtype_policy(before)
    for index, weight in enumerate(model.trainable_variables):
        weight.assign(0.5 * np.random.default_rng(index).normal(size=weight.shape))
    return model, layer


def trajectory(layer: Any, sequences: Any = PROBE) -> tuple[Any, Any]:
    """The inputs and old states of all steps, by a loop, one step behind the other: `(time * batch, ...)`."""
    states = tf.nest.map_structure(lambda state: tf.cast(state, tf.float64), initial_states(layer, BATCH))
    points = []
    for t in range(STEPS):
        inputs = tf.cast(sequences[:, t], tf.float64)
        points.append((inputs, states))
        states = list(call_cell(layer.cell, inputs, states))
    return tf.nest.map_structure(lambda *steps: tf.concat(steps, axis=0), *points)


def values_at(layer: Any, points: tuple[Any, Any], view: str) -> dict[str, NDArray[np.float64]]:
    """Each measure at all points, by one tape around all of them, and NumPy: each is a function of itself."""
    J = step_jacobians(layer.cell, *points, [view])[0][view]
    return {name: measured(J) for name, measured in MEASURES.items()}


def slope(weights: list[Any], direction: list[Any], function: Callable[[], Any], step: float = 1e-5) -> Any:
    """The derivative along a direction in the space of the weights, by a central difference of fourth order."""
    start = [weight.numpy() for weight in weights]

    def at(distance: float) -> float:
        for weight, value, part in zip(weights, start, direction, strict=True):
            weight.assign(value + distance * part)
        return function()

    far, near = at(2 * step) - at(-2 * step), at(step) - at(-step)
    at(0.0)
    return (8 * near - far) / (12 * step)


_CASES = ("unequal_states", "while_loop", "partly_mixing", "stacked_lstm_gru", "map_fn", "matrix_state", "bare_state")

CELLS: dict[str, Callable[..., Any]] = {
    "simple_rnn": functools.partial(keras.layers.SimpleRNN, 4),
    "simple_rnn_softplus": functools.partial(keras.layers.SimpleRNN, 4, activation="softplus"),
    "lstm": functools.partial(keras.layers.LSTM, 3),
    "gru": functools.partial(keras.layers.GRU, 3),
    "gru_reset_before": functools.partial(keras.layers.GRU, 3, reset_after=False),
    **{key: BY_ID[key].make for key in _CASES},
}


# The others say the same of more cells.
EACH_TIME = {("lstm", "joint"), ("simple_rnn", "inputs"), ("partly_mixing", "joint")}
# Of cells with one state, whose joint view is the hidden one, one is enough.
_HIDDEN_ONLY = {"while_loop", *_CASES[3:]}
_ONE_STATE = {"simple_rnn_softplus", "gru", "gru_reset_before"}


@pytest.mark.parametrize(
    ("cell", "view"),
    [
        pytest.param(cell, view, marks=[] if (cell, view) in EACH_TIME else [pytest.mark.soak])
        for cell in CELLS
        for view in VIEWS
        if view == "hidden" or cell not in _HIDDEN_ONLY | (_ONE_STATE if view == "joint" else set())
    ],
)
def test_value_and_gradient_are_those_of_finite_differences(cell: str, view: str) -> None:
    model, layer = float64_model(CELLS[cell])
    shown = "hidden" if len(floating(initial_states(layer, BATCH))) == 1 and view == "joint" else view
    points = trajectory(layer)
    weights = model.trainable_variables
    direction = [np.random.default_rng(9 + k).normal(size=weight.shape) for k, weight in enumerate(weights)]

    def expected() -> NDArray[np.float64]:
        return np.array([np.mean((values - 0.7) ** 2) for values in values_at(layer, points, shown).values()])

    penalties, slopes = expected(), slope(weights, direction, expected)
    for name, penalty, derivative in zip(MEASURES, penalties, slopes, strict=True):
        if name == "rms_singular_value" and (cell, view) in EACH_TIME:
            # It takes the same operators as the variance.
            continue
        regularizer = JacobianRegularizer(0.7, 1.0, measure=name, view=view)
        with regularizer.attached(model, PROBE) as held:
            with tf.GradientTape() as tape:
                (loss,) = model.losses
            gradients = tape.gradient(loss, [weight.value for weight in weights])
            # The vectors of a norm are within its tolerance, and the error of the value is of second order in that.
            tolerance = 1e-2 if name == "spectral_norm" else 1e-6
            np.testing.assert_allclose(held.penalty(), penalty, rtol=tolerance, err_msg=name)
            np.testing.assert_allclose(loss, held.penalty(), rtol=1e-6, err_msg=name)
        found = sum(np.sum(g * d) for g, d in zip(gradients, direction, strict=True) if g is not None)
        np.testing.assert_allclose(found, derivative, rtol=3 * tolerance, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("name", "through_states"),
    [
        ("variance", True),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in (
                ("variance", False),
                ("spectral_norm", False),
                ("spectral_norm", True),
                ("rms_singular_value", False),
                ("rms_singular_value", True),
            )
        ),
    ],
)
def test_fresh_states_are_those_of_the_moment(name: str, *, through_states: bool) -> None:
    """The gradient passes through them if asked, and through the layers below."""
    _, layer = float64_model(CELLS["lstm"])
    dense = keras.layers.Dense(FEATURES, activation="tanh", dtype="float64")
    model = keras.Sequential([keras.Input((STEPS, FEATURES), dtype="float64"), dense, layer])
    probe = PROBE.astype("float64")
    weights = model.trainable_variables
    direction = [np.random.default_rng(9 + k).normal(size=weight.shape) for k, weight in enumerate(weights)]
    regularizer = JacobianRegularizer(
        0.7, 1.0, measure=name, view="joint", states="fresh", through_states=through_states
    )

    def points() -> tuple[Any, Any]:
        return trajectory(layer, dense(probe))

    held_points = points()

    def expected() -> float:
        here = points() if through_states else held_points
        return float(np.mean((values_at(layer, here, "joint")[name] - 0.7) ** 2))

    tolerance = 1e-2 if name == "spectral_norm" else 1e-6
    with regularizer.attached(model, probe) as held:
        with tf.GradientTape() as tape:
            (loss,) = model.losses
        gradients = tape.gradient(loss, [weight.value for weight in weights])
        np.testing.assert_allclose(loss, expected(), rtol=tolerance)
        found = sum(np.sum(g * d) for g, d in zip(gradients, direction, strict=True) if g is not None)
        np.testing.assert_allclose(found, slope(weights, direction, expected), rtol=3 * tolerance, atol=1e-6)
        dense.kernel.assign(-dense.kernel)
        held_points = points()
        np.testing.assert_allclose(held.penalty(), expected(), rtol=tolerance)


TARGET = 0.4


@pytest.mark.parametrize(
    ("scale", "side", "distance"),
    [
        ("linear", "at_most", lambda v: np.maximum(v - TARGET, 0) ** 2),
        ("log", "at_least", lambda v: np.minimum(np.log(v / TARGET), 0) ** 2),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in (
                ("linear", "at_least", lambda v: np.minimum(v - TARGET, 0) ** 2),
                ("log", "both", lambda v: np.log(v / TARGET) ** 2),
                ("log", "at_most", lambda v: np.maximum(np.log(v / TARGET), 0) ** 2),
            )
        ),
    ],
)
def test_scales_and_sides(scale: Any, side: Any, distance: Callable[[Any], Any]) -> None:
    model, layer = float64_model(CELLS["simple_rnn"])
    values = values_at(layer, trajectory(layer), "hidden")["rms_singular_value"]
    assert values.min() < TARGET < values.max()
    regularizer = JacobianRegularizer(TARGET, 1.0, measure="rms_singular_value", scale=scale, side=side)
    weights = model.trainable_variables
    direction = [np.random.default_rng(9 + k).normal(size=weight.shape) for k, weight in enumerate(weights)]
    points = trajectory(layer)

    def expected() -> float:
        return float(np.mean(distance(values_at(layer, points, "hidden")["rms_singular_value"])))

    with regularizer.attached(model, PROBE) as held:
        np.testing.assert_allclose(held.penalty(), distance(values).mean(), rtol=1e-6)
        with tf.GradientTape() as tape:
            (loss,) = model.losses
        gradients = tape.gradient(loss, [weight.value for weight in weights])
    found = sum(np.sum(g * d) for g, d in zip(gradients, direction, strict=True) if g is not None)
    np.testing.assert_allclose(found, slope(weights, direction, expected), rtol=1e-5)


# The logarithm is of the value that the linear scale has, and two measures take the same operators.
@pytest.mark.parametrize("name", soak_but({"variance", "spectral_norm"}, MEASURES))
@pytest.mark.parametrize("scale", soak_but({"log"}, ["linear", "log"]))
def test_a_jacobian_of_zeros_has_a_finite_gradient(name: str, scale: Any) -> None:
    layer = keras.layers.SimpleRNN(3, activation="relu", bias_initializer=keras.initializers.Constant(-100.0))
    model = keras.Sequential([keras.Input((STEPS, FEATURES)), layer])
    with JacobianRegularizer(1.0, 1.0, measure=name, scale=scale).attached(model, PROBE):
        with tf.GradientTape() as tape:
            (loss,) = model.losses
        gradients = tape.gradient(loss, [weight.value for weight in model.trainable_variables])
    assert np.isfinite(loss)
    assert all(np.isfinite(gradient).all() for gradient in gradients if gradient is not None)


def test_estimates_are_unbiased_for_cells_without_structure() -> None:
    # Its Jacobians are large, so that the square of an estimate would be far from the square of the value.
    model, layer = float64_model(lambda: keras.layers.RNN(BareStateCell(12)))
    values = values_at(layer, trajectory(layer), "hidden")["variance"]
    exact, estimated = (JacobianRegularizer(0.7, 1.0, vectors=vectors, refresh=1000) for vectors in (12, 2))

    def gradient() -> Any:
        with tf.GradientTape() as tape:
            (loss,) = model.losses
        gradients = tape.gradient(loss, [weight.value for weight in model.trainable_variables])
        return tf.concat([[loss], *(tf.reshape(g, [-1]) for g in gradients if g is not None)], axis=0)

    with exact.attached(model, PROBE):
        value, *expected = gradient().numpy()
        np.testing.assert_allclose(value, np.mean((values - 0.7) ** 2), rtol=1e-6)
    with estimated.attached(model, PROBE) as held:
        estimate, found = tf.function(gradient), []
        for step in range(250):
            # Other vectors at each batch, and the same points.
            held.begin(step)
            found.append(estimate().numpy())
    mean, error = np.mean(found, axis=0), np.std(found, axis=0) / len(found) ** 0.5
    assert (error > 0).any()
    z = (mean - [value, *expected]) / np.maximum(error, 1e-12)
    assert np.abs(z).max() < 4.5
    assert np.mean(z**2) < 2


@pytest.mark.fast
def test_masked_steps_do_not_count() -> None:
    probe = PROBE.copy()
    probe[1, 2:], probe[3, :] = 0, 0
    inputs = keras.Input((STEPS, FEATURES))
    outputs = keras.layers.GRU(3, name="gru")(keras.layers.Masking()(inputs))
    model = keras.Model(inputs, outputs)
    values = measure(model, probe, measures=["variance"])["gru"]["variance"]
    assert np.isnan(values).sum() == 2 * STEPS - 2
    with JacobianRegularizer(0.7, 1.0).attached(model, probe) as held:
        np.testing.assert_allclose(held.penalty(), np.nanmean((values - 0.7) ** 2), rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "steps"), [(7, 5), *(pytest.param(*case, marks=pytest.mark.soak) for case in ((4, 9), (1, 3)))]
)
def test_every_step_and_sample_has_its_turn(rows: int, steps: int) -> None:
    model = keras.Sequential([keras.Input((steps, 1)), keras.layers.SimpleRNN(2)])
    # Each input says which one it is.
    probe = np.arange(3 * steps, dtype="float32").reshape(3, steps, 1)
    with JacobianRegularizer(1.0, 0.01, rows=rows, refresh=1).attached(model, probe) as held:
        (call,) = held._penalty.calls.values()
        seen = []
        for step in range(3 * steps):
            held.begin(step)
            seen.append(call.points.inputs.numpy().ravel())
    assert all(len(points) == len(set(points)) <= rows for points in seen)
    assert len({len(points) for points in seen}) == 1
    assert set(np.concatenate(seen)) == set(probe.ravel())
    with JacobianRegularizer(1.0, 0.01, rows=rows, refresh=1).attached(model, probe) as held:
        (call,) = held._penalty.calls.values()
        for step, points in enumerate(seen[:2]):
            held.begin(step)
            np.testing.assert_array_equal(call.points.inputs.numpy().ravel(), points)


def test_states_that_are_not_finite_do_not_count() -> None:
    model = keras.Sequential([keras.Input((STEPS, FEATURES)), keras.layers.SimpleRNN(3, activation="linear")])
    model.layers[0].cell.recurrent_kernel.assign(np.full((3, 3), 1e30))
    with contextlib.ExitStack() as stack:
        with pytest.warns(UserWarning, match="the penalty is not finite"):
            held = stack.enter_context(JacobianRegularizer(1.0, 1.0).attached(model, PROBE))
        model.layers[0].cell.recurrent_kernel.assign(np.eye(3) * 0.5)
        with tf.GradientTape() as tape:
            (loss,) = model.losses
        assert np.isfinite(held.penalty())
        (gradient,) = tape.gradient(loss, [model.layers[0].cell.recurrent_kernel.value])
        assert np.isfinite(gradient).all()


def test_the_penalty_on_the_spectral_norm_keeps_up_with_the_weights() -> None:
    model, layer = float64_model(functools.partial(keras.layers.SimpleRNN, 4, activation="linear"))
    # Each direction is an invariant one, and the second takes the lead after the refresh.
    gains = np.linspace(1, 0.9, 4)
    layer.cell.recurrent_kernel.assign(np.diag(gains))
    with JacobianRegularizer(0.7, 1.0, measure="spectral_norm").attached(model, PROBE) as held:
        held.begin(0)
        gains[1] = 1.3
        layer.cell.recurrent_kernel.assign(np.diag(gains))
        with tf.GradientTape() as tape:
            (loss,) = model.losses
        np.testing.assert_allclose(loss, 0.6**2, rtol=1e-4)
        (gradient,) = tape.gradient(loss, [layer.cell.recurrent_kernel.value])
        np.testing.assert_allclose(gradient[1, 1], 2 * 0.6, rtol=1e-3)
        np.testing.assert_allclose(held.penalty(), 0.6**2, rtol=1e-6)


# "threshold" needs arguments, and "glu" halves the units.
ACTIVATIONS: dict[str, Callable[..., Any]] = {
    **{name: function for name, function in vars(keras.activations).items() if inspect.isfunction(function)},
    "threshold": functools.partial(keras.activations.threshold, threshold=0.1, default_value=-1.0),
    "glu": lambda z: tf.repeat(keras.activations.glu(z), 2, axis=-1),
}
MIXING = {"glu", "log_softmax", "softmax", "sparsemax"}
ELEMENTWISE = ACTIVATIONS.keys() - MIXING - {"deserialize", "get", "serialize"}


@pytest.mark.soak
@pytest.mark.parametrize(
    ("names", "width"),
    [(ELEMENTWISE, 1), ({*MIXING, "softsign"}, 2)],
    ids=["structure", "autodiff"],
)
def test_the_gradient_is_right_with_every_activation(names: set[str], width: int) -> None:
    functions = [ACTIVATIONS[name] for name in sorted(names)]

    def step(c: Any, x: Any, h: Any) -> Any:
        parts = tf.split(x + h @ c.U, len(functions), axis=-1)
        return tf.concat([function(part) for function, part in zip(functions, parts, strict=True)], axis=-1)

    model, layer = float64_model(lambda: keras.layers.RNN(FunctionCell(step, width * len(functions))))
    weights = [layer.cell.recurrent_kernel]
    weights[0].assign(0.2 * weights[0])
    points = trajectory(layer)
    direction = [np.random.default_rng(9).normal(size=weights[0].shape)]

    def expected() -> float:
        return float(np.mean((values_at(layer, points, "hidden")["variance"] - 0.7) ** 2))

    with JacobianRegularizer(0.7, 1.0, vectors=99).attached(model, PROBE), tf.GradientTape() as tape:
        (loss,) = model.losses
    np.testing.assert_allclose(loss, expected(), rtol=1e-6)
    gradient = tape.gradient(loss, weights[0].value)
    np.testing.assert_allclose(np.sum(gradient * direction[0]), slope(weights, direction, expected), rtol=1e-5)


class GatedCell(keras.layers.Layer):
    """A part of `WiredCell`: two candidates, and a gate between them."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.units = units
        self.slope, self.shift = (keras.layers.Dense(units, name=name) for name in ("time_a", "time_b"))

    def build(self, input_shape: tuple[int, ...]) -> None:
        shape = (input_shape[-1] + self.units, self.units)
        self.kernels = [self.add_weight(shape=shape, name=f"kernel_{k}") for k in range(2)]
        self.biases = [self.add_weight(shape=(self.units,), name=f"bias_{k}") for k in range(2)]
        self.mask = keras.ops.ones(shape)
        for part in (self.slope, self.shift):
            part.build((None, shape[0]))

    def call(self, inputs: Any, states: Any, time: float = 1.0) -> tuple[Any, list[Any]]:
        x = keras.ops.concatenate([inputs, states[0]], -1)
        one, other = (
            1.7 * keras.ops.tanh(0.7 * (keras.ops.matmul(x, kernel * self.mask) + bias))
            for kernel, bias in zip(self.kernels, self.biases, strict=True)
        )
        gate = keras.ops.sigmoid(-self.slope(x) * time + self.shift(x))
        new_h = one * (1.0 - gate) + gate * other
        return new_h, [new_h]


class WiredCell(keras.layers.Layer):
    """The units of one group feed the next one within a step, as in a wired closed-form continuous-time network."""

    def __init__(self) -> None:
        super().__init__()
        self.state_size, self.groups = 5, [GatedCell(3), GatedCell(2)]

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.groups[0].build(input_shape)
        self.groups[1].build((1, 3))

    def call(self, inputs: Any, states: Any) -> tuple[Any, Any]:
        new = []
        for group, part in zip(self.groups, (states[0][:, :3], states[0][:, 3:]), strict=True):
            inputs, _ = group(inputs, [part])
            new.append(inputs)
        return inputs, keras.ops.concatenate(new, -1)


@pytest.mark.soak
def test_a_cell_of_many_pieces_that_are_laid_out_several_times() -> None:
    """TensorFlow numbers what a branch returns for its derivative, and two names must not become equal by that."""
    layer = keras.layers.RNN(WiredCell(), name="rnn")
    model = build(keras.Sequential([keras.Input((STEPS, FEATURES)), layer]), PROBE)
    expected = measure(model, PROBE, measures=["variance"])["rnn"]["variance"]
    with JacobianRegularizer(0.5, 1.0).attached(model, PROBE) as held:
        np.testing.assert_allclose(held.penalty(), np.mean((expected - 0.5) ** 2), rtol=1e-4)
