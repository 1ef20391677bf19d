"""Every activation of Keras is measured, also one whose gradient has no gradient."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import FEATURES, FunctionCell, normal, step_jacobians

from keras_jacmon.cell.step import CellStep
from keras_jacmon.jacobians.cell_jacobian import Assumptions, CellJacobian, JacobianMethod
from keras_jacmon.jacobians.checks import check_points
from keras_jacmon.jacobians.diagnosis import diagnose
from keras_jacmon.jacobians.points import PointBatch

if TYPE_CHECKING:
    from collections.abc import Callable

POINTS = 6
# Of a different kind: they need arguments, or halve the units.
SPECIAL: dict[str, Callable[..., Any]] = {
    "threshold": functools.partial(keras.activations.threshold, threshold=0.1, default_value=-1.0),
    "glu": lambda z: tf.repeat(keras.activations.glu(z), 2, axis=-1),
}
MIXING = ("glu", "log_softmax", "softmax", "sparsemax")
OTHERS = ("get", "serialize", "deserialize")
NAMES = [name for name in dir(keras.activations) if callable(getattr(keras.activations, name)) and name not in OTHERS]
ELEMENTWISE = [name for name in NAMES if name not in (*MIXING, "softsign")]


@pytest.mark.parametrize(
    ("names", "width", "method"),
    [
        (ELEMENTWISE, 1, JacobianMethod.STRUCTURE),
        (MIXING, 2, JacobianMethod.AUTODIFF),
        (["softsign"], 3, JacobianMethod.STRUCTURE),
    ],
    ids=["elementwise", "mixing", "softsign"],
)
def test_every_activation_is_measured(names: list[str], width: int, method: JacobianMethod) -> None:
    functions = [SPECIAL.get(name) or getattr(keras.activations, name) for name in names]

    def step(c: Any, x: Any, h: Any) -> Any:
        parts = tf.split(x + h @ c.U, len(functions), axis=-1)
        return tf.concat([function(part) for function, part in zip(functions, parts, strict=True)], axis=-1)

    cell = FunctionCell(step, width * len(functions))
    x, h = tf.constant(normal(POINTS, FEATURES)), tf.constant(normal(POINTS, cell.units, seed=1))
    cell.build(x.shape)
    expected = step_jacobians(cell, x, [h], ["hidden"])[0]["hidden"]
    vectors = normal(POINTS, cell.units, seed=2)

    @tf.function(autograph=False)
    def run() -> Any:
        jacobian, points = CellJacobian(CellStep(cell, [h]), x, [h]), PointBatch(x, (h,))
        assert [choice.how for choice in jacobian.choices("hidden")] == [method]
        J = jacobian.operators(["hidden"], points)["hidden"]
        return check_points(jacobian, ["hidden"], points, jacobian.step(x, [h]), tf.constant([1, 2])), [
            J.to_dense(),
            J.matvec(vectors),
        ]

    checks, (dense, image) = run()
    assert diagnose(checks.floats(), Assumptions()) is None
    np.testing.assert_allclose(dense, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(image, np.einsum("bik,bk->bi", expected, vectors), rtol=1e-4, atol=1e-4)
