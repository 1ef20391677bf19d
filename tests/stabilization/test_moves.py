"""The variables that an optimizer changes in place of the weights."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from helpers import normal

from keras_jacmon.stabilization.moves import Copies, RelativeMoves


def test_gains_and_shifts_move_weights_in_proportion_to_their_size() -> None:
    kernel, bias = normal(4, 4, seed=1), normal(4, seed=2)
    at_most_half = keras.constraints.MaxNorm(0.5, axis=0)
    weights = [keras.Variable(kernel), keras.Variable(bias), keras.Variable(kernel)]
    weights[2].constraint = at_most_half
    moves = RelativeMoves(weights)
    scale = np.sqrt(np.mean(kernel**2))
    slopes = [tf.constant(normal(4, 4, seed=3)), tf.constant(normal(4, seed=4)), tf.zeros((4, 4))]
    by_gain, _, _, by_shifts, by_bias, _ = moves.gradients(slopes)
    np.testing.assert_allclose(by_gain, np.sum(slopes[0] * kernel), rtol=1e-5)
    np.testing.assert_allclose(by_shifts, scale * slopes[0], rtol=1e-5)
    np.testing.assert_array_equal(by_bias, slopes[1])
    for variable, value in zip(moves.variables[:2], (0.1, -0.2), strict=True):
        variable.assign(value)
    moves.variables[3].assign(np.full((4, 4), 0.03))
    moves.variables[4].assign(np.full(4, 0.5))
    moves.follow()
    np.testing.assert_allclose(weights[0], np.exp(0.1) * kernel + 0.03 * scale, rtol=1e-5)
    np.testing.assert_allclose(weights[1], np.exp(-0.2) * bias + 0.5, rtol=1e-5)
    np.testing.assert_allclose(weights[2], at_most_half(kernel), rtol=1e-5)
    # They begin at zero again.
    values = [keras.ops.convert_to_numpy(weight) for weight in weights]
    moves.follow()
    for weight, value in zip(weights, values, strict=True):
        np.testing.assert_allclose(weight, value, rtol=1e-6)


def test_copies_are_of_single_precision_at_least() -> None:
    weights = [keras.Variable(normal(3, seed=1), dtype=dtype) for dtype in ("float16", "float64")]
    copies = Copies(weights)
    assert [copy.dtype for copy in copies.variables] == ["float32", "float64"]
    copies.variables[0].assign([0.5, 1.0, 2.0])
    copies.follow()
    np.testing.assert_array_equal(weights[0], [0.5, 1.0, 2.0])
