"""The derivatives of the Lyapunov exponents, against differences, and their values, against those that are reported."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from helpers import normal
from sequences import of_matrices

from keras_jacmon.measures.differentiable_exponents import differentiable_exponents
from keras_jacmon.measures.lyapunov import lyapunov_exponents, lyapunov_segment, start_lyapunov


@pytest.mark.parametrize("formed", [True, False])
def test_derivatives_along_a_long_trajectory_are_those_of_differences(formed: bool) -> None:  # noqa: FBT001 - a parameter of the test
    # The exponents are far apart, so that rounding in the wrong triangle would grow to any size.
    scales = np.exp(-np.arange(5.0))
    J = (normal(40, 2, 5, 5, seed=1) * scales).astype(np.float32)
    direction, mask = normal(40, 2, 5, 5, seed=2) * scales, np.ones((40, 2), bool)
    mask[7, 0] = mask[30:, 1] = False
    start = start_lyapunov(2, 5, 4, (0, 1), tf.float64).vectors

    @tf.function
    def value(J: Any) -> Any:
        steps = of_matrices(J, mask)
        whole = tf.linalg.LinearOperatorFullMatrix(tf.reshape(J, [-1, 5, 5]))
        steps = replace(steps, every=lambda: whole)
        found = differentiable_exponents(steps, tf.cast(start, steps.dtype), warmup=4, formed=formed)
        return tf.reduce_sum(found**2 * tf.constant([1.0, 2.0, 3.0, 4.0], found.dtype)[:, None])

    matrices = tf.constant(J)
    with tf.GradientTape() as tape:
        tape.watch(matrices)
        loss = value(matrices)
    exact = tf.constant(J, tf.float64)
    ends = [value(exact + sign * 1e-6 * direction) for sign in (1, -1)]
    np.testing.assert_allclose(loss, value(exact), rtol=1e-4)
    expected = float(ends[0] - ends[1]) / 2e-6
    np.testing.assert_allclose(np.sum(tape.gradient(loss, matrices) * direction), expected, rtol=1e-3)
    carry = start_lyapunov(2, 5, 4, (0, 1), tf.float64)
    steps = of_matrices(J.astype(np.float64), mask)
    reported = lyapunov_exponents(lyapunov_segment(steps, carry, warmup=4), warmup=4)
    np.testing.assert_allclose(loss, np.sum(reported**2 * np.arange(1, 5)[:, None]), rtol=1e-4)


def test_a_direction_that_each_step_does_away_with_has_a_finite_logarithm_and_no_derivative() -> None:
    J = tf.constant(normal(6, 1, 4, 4, seed=1) * np.array([1, 1, 1, 0])[:, None], tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(J)
        whole = tf.linalg.LinearOperatorFullMatrix(tf.reshape(J, [-1, 4, 4]))
        steps = replace(of_matrices(J), every=lambda: whole)
        start = start_lyapunov(1, 4, 4, (0, 1), tf.float32).vectors
        found = differentiable_exponents(steps, start, warmup=0, formed=True)
        lost = found[3, 0]
    np.testing.assert_allclose(lost, np.log(1e-12), rtol=1e-5)
    np.testing.assert_array_equal(tape.gradient(lost, J), 0)
    carry = lyapunov_segment(of_matrices(J), start_lyapunov(1, 4, 4, (0, 1), tf.float32), warmup=0)
    np.testing.assert_allclose(found[:3], lyapunov_exponents(carry, warmup=0)[:3], rtol=1e-4)
