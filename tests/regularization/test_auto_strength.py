"""`strength="auto"`: the gradient of the penalty has a stated share of the gradient of the loss."""

from __future__ import annotations

import re
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import normal, randomize
from trainings import BATCH, FEATURES, PROBE, STEPS, compiled, fit, holding

from keras_jacmon import JacobianMonitor, JacobianRegularizer

L = keras.layers
TARGETS = normal(BATCH, 1, seed=11)


def two_layers(**arguments: Any) -> Any:
    return compiled(L.SimpleRNN(3, return_sequences=True, name="a"), L.SimpleRNN(3, name="b"), **arguments)


def norm(tape: Any, value: Any, model: Any) -> float:
    """The norm of a gradient by the weights of the recurrent layers; some tapes are asked twice."""
    weights = [weight.value for layer in model.layers[:2] for weight in layer.trainable_variables]
    return float(tf.linalg.global_norm(tape.gradient(value, weights)))


def share(model: Any) -> float:
    """The gradient of the scaled penalty over that of the loss, by plain tapes."""
    with tf.GradientTape(persistent=True) as tape:
        loss, penalty = tf.reduce_mean((model(PROBE) - TARGETS) ** 2), tf.add_n(model.losses)
    return norm(tape, penalty, model) / norm(tape, loss, model)


def test_the_gradient_of_the_penalty_is_a_tenth_of_that_of_the_loss() -> None:
    model = two_layers()
    # A penalty that is there already is no part of the loss.
    regularizer = JacobianRegularizer(lambda step: 2.0 + step, 1e6, refresh=50)
    with regularizer.attached(model, PROBE, targets=TARGETS) as held:
        held.begin(0)
        assert held.strength is None
        regularizer.strength = "auto"
        held.begin(1)
        chosen, first = held.strength, held.penalty()
        assert chosen == regularizer.strength
        np.testing.assert_allclose(share(model), 0.1, rtol=1e-4)
        randomize(model, seed=40, scale=1.0)
        held.begin(2)
        assert held.strength == chosen, "not before other points are taken"
        # Farther from the target.
        held.begin(60)
        np.testing.assert_allclose(share(model), 0.1, rtol=1e-4)
        farthest = held.penalty()
        assert farthest > first
        regularizer.target = 2.0
        held.begin(120)
        np.testing.assert_allclose(share(model), 0.1 * np.sqrt(held.penalty() / farthest), rtol=1e-4)
        regularizer.strength = 0.5
        held.begin(180)
        assert (held.strength, regularizer.strength) == (None, 0.5)


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_it_is_chosen_alike_in_eager_and_in_compiled_trainings(*, jit_compile: bool) -> None:
    def strengths(**arguments: Any) -> list[float]:
        keras.utils.set_random_seed(8)
        monitor = holding(JacobianRegularizer(refresh=3), targets=TARGETS)
        found: list[float] = fit(compiled(**arguments), monitor, epochs=2).history["jac_strength"]
        return found

    once = strengths(jit_compile=jit_compile)
    assert once[0] != once[1]
    assert min(once) > 0
    np.testing.assert_allclose(strengths(run_eagerly=True), once, rtol=1e-3)


def test_a_small_loss_counts_in_half_precision_too() -> None:
    def strength(policy: str) -> float:
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(policy)
        try:
            model = compiled(loss=lambda y, z: 1e-4 * keras.losses.mean_squared_error(y, z))
        finally:
            keras.config.set_dtype_policy(before)
        regularizer = JacobianRegularizer()
        with regularizer.attached(model, PROBE, targets=TARGETS) as held:
            held.begin(0)
        return regularizer.strength

    np.testing.assert_allclose(strength("mixed_float16"), strength("float32"), rtol=0.02)


def test_a_penalty_without_a_gradient_needs_no_strength() -> None:
    regularizer = JacobianRegularizer(1e3, side="at_most")
    with regularizer.attached(compiled(), PROBE, targets=TARGETS) as held:
        held.begin(0)
        assert held.strength == 0.0
    assert JacobianRegularizer.from_config(regularizer.get_config()).get_config()["strength"] == "auto"


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        (compiled, None, "without targets"),
        (lambda: keras.Sequential([keras.Input((STEPS, FEATURES)), L.SimpleRNN(3)]), TARGETS, "which is not compiled"),
        (compiled, normal(BATCH, 7, 2), "Invalid value for argument `targets`"),
    ],
)
def test_what_it_cannot_do_without_is_said(model: Any, targets: Any, message: str) -> None:
    with (
        pytest.raises(ValueError, match=re.escape(message)),
        JacobianRegularizer().attached(model(), PROBE, targets=targets),
    ):
        pass


def test_a_monitor_without_targets_is_refused_before_the_first_batch() -> None:
    monitor = JacobianMonitor(PROBE, measures="variance", log_dir=None, regularizer=JacobianRegularizer())
    sentence = "Expected a number, or 'auto' for a compiled model and with `targets` beside the probe"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        fit(compiled(), monitor)
