"""Gradient descent on `(measure - target)²`, by the penalties of the regularizer."""

import warnings
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.model.distribution import own_variable
from keras_jacmon.model.layers import RecurrentLayer
from keras_jacmon.regularization.model_penalty import ModelPenalty
from keras_jacmon.regularization.penalty_config import PenaltyConfig
from keras_jacmon.stabilization.goals import Goal, Standing


class Gradient:
    """Updates weights by a Keras optimizer, with the penalties of all goals as the loss.

    Args:
        penalties: Sequence of `ModelPenalty`, one for each direction.
        weights: Sequence of the weights that change.
        optimizer: Keras optimizer, used by nothing else.
    """

    def __init__(
        self,
        penalties: Sequence[ModelPenalty],
        weights: Sequence[keras.Variable],
        optimizer: keras.optimizers.Optimizer,
    ) -> None:
        self._penalties, self._weights, self._optimizer = penalties, weights, optimizer
        # Weights may be mirrored or of half precision. What an optimizer changes is a copy that is neither.
        self._copies = [_copy_of(weight) for weight in weights]
        self._step = 0

    def advance(self, standing: Standing, updates: int) -> None:  # noqa: ARG002 - as every method
        """Takes new points of the trajectories, and updates the weights there."""
        if self._step:
            for penalty in self._penalties:
                penalty.refresh()
        for _ in range(updates):
            gradients = self._gradients()
            self._optimizer.apply(gradients, self._copies)
            for weight, copy in zip(self._weights, self._copies, strict=True):
                weight.assign(copy)
            self._step += 1

    def _gradients(self) -> list[tf.Tensor]:
        for penalty in self._penalties:
            penalty.begin(self._step)
        with tf.GradientTape() as tape:
            loss = tf.add_n([call() for penalty in self._penalties for call in penalty.calls.values()])
        values = [weight.value for weight in self._weights]
        gradients = tape.gradient(loss, values, unconnected_gradients="zero")
        return [
            tf.cast(tf.convert_to_tensor(gradient), copy.dtype)
            for gradient, copy in zip(gradients, self._copies, strict=True)
        ]


def penalty_of(
    model: keras.Layer, inputs: Any, layers: Sequence[RecurrentLayer], goals: Sequence[Goal], config: PenaltyConfig
) -> ModelPenalty:
    """Traces the penalty of the goals in one direction, and warns of assumptions that do not hold.

    Args:
        model: A built Keras model.
        inputs: The tensors of the probe.
        layers: Sequence of the layers whose weights change.
        goals: Sequence of `Goal`.
        config: The settings of the penalty.

    Raises:
        ValueError: If the penalty cannot be computed, or has no gradient.
    """
    penalty = ModelPenalty(model, inputs, layers, config, {goal.call: own_variable(goal.target) for goal in goals})
    for note in penalty.notes:
        warnings.warn(note, stacklevel=6)
    return penalty


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
