"""Gradient descent on `(measure - target)²`, where the measure is one of a step by the penalties of the regularizer."""

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import keras
import tensorflow as tf

from keras_jacmon.model.distribution import own_variable
from keras_jacmon.model.layers import RecurrentLayer
from keras_jacmon.regularization.model_penalty import ModelPenalty
from keras_jacmon.regularization.penalty_config import PenaltyConfig
from keras_jacmon.stabilization.goals import Goal, Standing


class Loss(Protocol):
    """A function of the weights of a model."""

    def renew(self) -> None:
        """Takes other points of the trajectories, with the present weights."""

    def begin(self, step: int) -> None:
        """Prepares the update after `step` updates."""

    def __call__(self) -> tf.Tensor:
        """Returns the loss, a scalar with derivatives by the weights."""


class PenaltyLoss:
    """The penalties of the goals in one direction, as a loss.

    Args:
        model: A built Keras model.
        inputs: The tensors of the probe.
        layers: Sequence of the layers whose weights change.
        goals: Sequence of `Goal`.
        config: The settings of the penalty.

    Raises:
        ValueError: If the penalty cannot be computed, or has no gradient.
    """

    def __init__(
        self,
        model: keras.Layer,
        inputs: Any,
        layers: Sequence[RecurrentLayer],
        goals: Sequence[Goal],
        config: PenaltyConfig,
    ) -> None:
        targets: dict[str | None, tf.Variable] = {goal.call: own_variable(goal.target) for goal in goals}
        self._penalty = ModelPenalty(model, inputs, layers, config, targets)
        for note in self._penalty.notes:
            warnings.warn(note, stacklevel=6)

    def renew(self) -> None:
        """Takes other points of the trajectories, with the present weights."""
        self._penalty.refresh()

    def begin(self, step: int) -> None:
        """Prepares the update: other random vectors."""
        self._penalty.begin(step)

    def __call__(self) -> tf.Tensor:
        """Returns the mean of the penalties."""
        return tf.add_n([call() for call in self._penalty.calls.values()])


class Gradient:
    """Updates weights by a Keras optimizer.

    Args:
        losses: Sequence of `Loss`; their sum is minimized.
        weights: Sequence of the weights that change.
        optimizer: Keras optimizer, used by nothing else.
    """

    def __init__(
        self,
        losses: Sequence[Loss],
        weights: Sequence[keras.Variable],
        optimizer: keras.optimizers.Optimizer,
    ) -> None:
        self._losses, self._weights, self._optimizer = losses, weights, optimizer
        # Weights may be mirrored or of half precision. What an optimizer changes is a copy that is neither.
        self._copies = [_copy_of(weight) for weight in weights]
        self._step = 0

    def advance(self, standing: Standing, updates: int) -> None:  # noqa: ARG002 - as every method
        """Takes new points of the trajectories, and updates the weights there."""
        if self._step:
            for loss in self._losses:
                loss.renew()
        for _ in range(updates):
            gradients = self._gradients()
            self._optimizer.apply(gradients, self._copies)
            for weight, copy in zip(self._weights, self._copies, strict=True):
                weight.assign(copy)
            self._step += 1

    def _gradients(self) -> list[tf.Tensor]:
        for loss in self._losses:
            loss.begin(self._step)
        with tf.GradientTape() as tape:
            total = tf.add_n([loss() for loss in self._losses])
        values = [weight.value for weight in self._weights]
        gradients = tape.gradient(total, values, unconnected_gradients="zero")
        return [
            tf.cast(tf.convert_to_tensor(gradient), copy.dtype)
            for gradient, copy in zip(gradients, self._copies, strict=True)
        ]


def penalty_config(measure: str, view: str, rows: int, seed: int) -> PenaltyConfig:
    """Returns the settings of a penalty at points that change between two rounds only."""
    return PenaltyConfig(
        measure=measure,
        view=view,
        scale="linear",
        side="both",
        states="cached",
        through_states=False,
        refresh=1,
        rows=rows,
        vectors=16,
        seed=seed,
    )


def _copy_of(weight: keras.Variable) -> keras.Variable:
    dtype = "float64" if weight.dtype == "float64" else "float32"
    copy = keras.Variable(keras.ops.convert_to_numpy(weight), dtype=dtype)
    copy.constraint = weight.constraint
    return copy
