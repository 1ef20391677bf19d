"""Products with several vectors at once are those with one vector, or are noticed and given up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    BATCH,
    FEATURES,
    MOMENTS,
    STEPS,
    FunctionCell,
    assert_layer,
    build,
    normal,
    reference_jacobians,
    variance,
)

from keras_jacmon import JacobianMeter, JacobianRegularizer, register_jacobian
from keras_jacmon.cell.step import CellStep
from keras_jacmon.jacobians.cell_jacobian import Assumptions, CellJacobian
from keras_jacmon.jacobians.checks import check_points
from keras_jacmon.jacobians.comparison import column_differences
from keras_jacmon.jacobians.diagnosis import TOLERANCES, diagnose
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.operators.autodiff import AutodiffJacobian

if TYPE_CHECKING:
    from collections.abc import Callable

POINTS, UNITS = 5, 4
AT_ONCE = "with several vectors at once, by `tf.vectorized_map`, differ from those with one vector"
PROBE = normal(BATCH, STEPS, FEATURES, seed=3)


def blocks(u: Any) -> Any:
    """The units as a matrix at each point, `(points, 2, 2)`."""
    return tf.reshape(u, [-1, 2, 2])


# Of units `(points, 4)` along an axis, 1 or -1, which is the same one.
ALONG: dict[str, Callable[[Any, int], Any]] = {
    "roll": lambda u, axis: tf.roll(u, 1, axis),
    "roll by two axes": lambda u, axis: tf.roll(blocks(u), [1, 1], [axis, axis - 1 if axis < 0 else axis + 1]),
    "keras roll": lambda u, axis: keras.ops.roll(u, 1, axis=axis),
    "reverse": lambda u, axis: tf.reverse(u, [axis]),
    "keras flip": lambda u, axis: keras.ops.flip(u, axis=axis),
    "cumsum": tf.cumsum,
    "cumsum from the end": lambda u, axis: tf.cumsum(u, axis, exclusive=True, reverse=True),
    "cumprod": tf.math.cumprod,
    "cumulative logsumexp": tf.math.cumulative_logsumexp,
    "sum": lambda u, axis: tf.reduce_sum(u, axis, keepdims=True),
    "mean": lambda u, axis: tf.reduce_mean(u, axis, keepdims=True),
    "max": lambda u, axis: tf.reduce_max(u, axis, keepdims=True),
    "min": lambda u, axis: tf.reduce_min(u, axis, keepdims=True),
    "prod": lambda u, axis: tf.reduce_prod(u, axis, keepdims=True),
    "logsumexp": lambda u, axis: tf.reduce_logsumexp(u, axis, keepdims=True),
    "euclidean norm": lambda u, axis: tf.math.reduce_euclidean_norm(u, axis, keepdims=True),
    "standard deviation": lambda u, axis: tf.math.reduce_std(u, axis, keepdims=True),
    "moments": lambda u, axis: tf.nn.moments(u, [axis], keepdims=True)[1],
    "softmax": tf.nn.softmax,
    "softmax of an inner axis": lambda u, axis: tf.nn.softmax(blocks(u), axis - 1 if axis < 0 else axis),
    "log softmax": tf.nn.log_softmax,
    "normalised": tf.math.l2_normalize,
    "clipped norm": lambda u, axis: tf.clip_by_norm(u, 1.0, [axis]),
    "sort": tf.sort,
    "keras sort": lambda u, axis: keras.ops.sort(u, axis=axis),
    "largest two": lambda u, _: tf.math.top_k(u, 2).values,
    "gather": lambda u, axis: tf.gather(u, [2, 0, 3, 3], axis=axis),
    "gather by points": lambda u, axis: tf.gather(u, tf.argsort(u, axis), axis=axis, batch_dims=1),
    "take along": lambda u, axis: keras.ops.take_along_axis(u, keras.ops.argsort(u, axis=axis), axis=axis),
    "concatenation": lambda u, axis: tf.concat([u[:, 1:], u * u], axis),
    "split": lambda u, axis: tf.math.multiply(*tf.split(u, 2, axis)),
    "unequal split": lambda u, axis: tf.split(u, [1, 3], axis)[1],
    "stack": lambda u, axis: tf.stack([u, u * u], axis),
    "unstack": lambda u, axis: tf.math.multiply(*tf.unstack(u, axis=axis)[1:3])[:, None],
    "expanded": lambda u, axis: tf.expand_dims(u, axis) * tf.ones([1, 2, 1] if axis == 1 else [1, 1, 2]),
    "squeezed": lambda u, axis: tf.squeeze(tf.reshape(u, [-1, 1, 4] if axis == 1 else [-1, 4, 1]), axis),
    "repeat": lambda u, axis: tf.repeat(u, 2, axis),
    "differences": lambda u, axis: keras.ops.diff(u, axis=axis),
    "swapped axes": lambda u, axis: keras.ops.swapaxes(blocks(u), axis, 2 if axis == 1 else 1),
    "moved axis": lambda u, axis: keras.ops.moveaxis(blocks(u), axis, 3 + axis if axis < 0 else 2),
    "tensordot": lambda u, axis: tf.tensordot(u, tf.constant(normal(4, 3)), [[axis], [0]]),
    "median": lambda u, axis: keras.ops.median(u, axis=axis, keepdims=True),
    "layer norm": lambda u, axis: keras.ops.layer_normalization(u, axis=axis),
}


# One of each kind, and what TensorFlow gets wrong; the others say the same of operations that are like them.
KINDS = {"roll", "roll by two axes", "reverse", "cumsum", "max", "softmax", "gather", "concatenation", "expanded"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.fast if name in KINDS else pytest.mark.soak) for name in ALONG]
)
def test_no_product_along_the_units_is_wrong_in_silence(name: str) -> None:
    point = tf.constant(normal(POINTS, UNITS, seed=5))

    def along(axis: int) -> Callable[..., Any]:
        return lambda u, *_: tf.reshape(ALONG[name](u * u, axis), [POINTS, -1])

    expected = [by_one_gradient_for_each_unit(along(axis), point) for axis in (1, -1)]
    rows = expected[0].shape[1]
    w = tf.constant(normal(POINTS, rows, seed=6))

    @tf.function(autograph=False)
    def for_both_signs() -> Any:
        operators = [AutodiffJacobian(along(axis), point, [], rows, vectorized=True) for axis in (1, -1)]
        return [(J.to_dense(), column_differences(J, w, J.matvec(w, adjoint=True), adjoint=True)) for J in operators]

    for (found, difference), J in zip(for_both_signs(), expected, strict=True):
        is_right = np.allclose(found, J, rtol=1e-4, atol=1e-5)
        assert is_right == (float(tf.reduce_max(difference)) <= TOLERANCES.columns)


def by_one_gradient_for_each_unit(function: Callable[[Any], Any], point: Any) -> Any:
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(point)
        units = tf.unstack(function(point), axis=-1)
    rows = [tape.gradient(unit, point, unconnected_gradients="zero") for unit in units]
    return np.stack(list(map(tf.convert_to_tensor, rows)), axis=1)


def rolled(c: Any, x: Any, h: Any) -> Any:
    # The softmax has no structure, so that the roll is differentiated.
    u = h @ c.U
    return tf.tanh(x + tf.nn.softmax(u) * tf.roll(u, 1, -1))


@pytest.fixture(scope="module")
def model() -> Any:
    """TensorFlow rolls another axis than the last one, without a word."""
    layer = keras.layers.RNN(FunctionCell(rolled), name="rnn")
    return build(keras.Sequential([keras.Input(PROBE.shape[1:]), layer]), PROBE)


def test_a_roll_is_measured_by_one_gradient_for_each_unit(model: Any) -> None:
    meter = JacobianMeter(model, PROBE, measures=MOMENTS)
    with pytest.warns(UserWarning, match=AT_ONCE):
        assert_layer(meter()["rnn"], model.layers[0], PROBE, measures=MOMENTS)
    assert_layer(meter()["rnn"], model.layers[0], PROBE, measures=MOMENTS)


def test_the_penalty_on_a_roll_is_that_of_one_gradient_for_each_unit(model: Any) -> None:
    variances = variance(reference_jacobians(model.layers[0], PROBE)["hidden"])
    with pytest.warns(UserWarning, match=AT_ONCE), JacobianRegularizer(0.5, 1.0).attached(model, PROBE) as held:
        np.testing.assert_allclose(held.penalty(), np.mean((variances - 0.5) ** 2), rtol=1e-4)


class Inconsistent(tf.linalg.LinearOperatorDiag):
    """Its products with one vector are not those with several."""

    def _matvec(self, x: Any, adjoint: bool = False) -> Any:  # noqa: FBT001, FBT002 - as in the base class
        return 2.0 * super()._matvec(x, adjoint)


def test_a_registered_form_must_be_right_for_several_vectors_too() -> None:
    cell = FunctionCell(lambda _, x, h: x + 2.0 * h)
    x, h = tf.ones((POINTS, FEATURES)), tf.ones((POINTS, UNITS))

    @tf.function(autograph=False)
    def check() -> Any:
        jacobian, points = CellJacobian(CellStep(cell, [h]), x, [h]), PointBatch(x, (h,))
        return check_points(jacobian, ["hidden"], points, jacobian.step(x, [h]), tf.constant([1, 2]))

    cell.build(x.shape)
    register_jacobian(FunctionCell, lambda *_: Inconsistent(tf.ones((POINTS, UNITS))))
    try:
        diagnosis = diagnose(check().floats(), Assumptions())
    finally:
        register_jacobian(FunctionCell, None)
    assert diagnosis is not None
    assert diagnosis.assumptions == Assumptions(structure=False)
