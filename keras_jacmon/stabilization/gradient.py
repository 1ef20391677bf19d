"""Gradient descent on the mean of `(measure - target)²`."""

import math
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import keras
import tensorflow as tf

from keras_jacmon.graphs.trace import Traced, trace
from keras_jacmon.measures.differentiable_over_time import DIFFERENTIABLE_OVER_TIME
from keras_jacmon.model.distribution import own_variable
from keras_jacmon.model.layers import RecurrentLayer
from keras_jacmon.regularization.model_penalty import ModelPenalty
from keras_jacmon.regularization.penalty_config import PenaltyConfig
from keras_jacmon.stabilization.goals import GivenView, Goal, Standing
from keras_jacmon.stabilization.moves import Copies, Moves, RelativeMoves
from keras_jacmon.tensors import spec_of

# Of relative moves: 3 % of a weight.
_LEARNING_RATE = 0.03

# After this number of rounds, each at other points, without any derivative by the weights there will be none.
_MOST_ROUNDS_IN_VAIN = 3

# A product over time is that of all steps of a sample.
_STEPS_PER_ROW = 32


class Objective(Protocol):
    """A function of the weights of a model."""

    def renew(self) -> None:
        """Takes other points of the trajectories, with the present weights."""

    def begin(self, step: int) -> None:
        """Prepares the update after `step` updates."""

    def gradients(self, weights: Sequence[keras.Variable]) -> list[tf.Tensor]:
        """Returns the derivatives of the loss by the weights."""


class PenaltyObjective:
    """The penalties of the goals in one direction, as an objective.

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

    def gradients(self, weights: Sequence[keras.Variable]) -> list[tf.Tensor]:
        """Returns the derivatives of the mean of the penalties by the weights."""
        with tf.GradientTape() as tape:
            loss = self._penalty.value()
        return slopes_of(loss, tape, weights)


class Gradient:
    """Updates weights by a Keras optimizer.

    Args:
        losses: Sequence of `Objective`; their sum is minimized.
        weights: Sequence of the weights that change.
        optimizer: Keras optimizer, used by nothing else; None for Adam on relative moves of the weights, whose learning
            rate is halved after each round that made the loss larger.
    """

    def __init__(
        self,
        losses: Sequence[Objective],
        weights: Sequence[keras.Variable],
        optimizer: keras.optimizers.Optimizer | None,
    ) -> None:
        self._losses, self._weights, self._adapts = losses, weights, optimizer is None
        self._moves: Moves = RelativeMoves(weights) if optimizer is None else Copies(weights)
        self._optimizer = keras.optimizers.Adam(_LEARNING_RATE) if optimizer is None else optimizer
        self._optimizer.build(self._moves.variables)
        specs = list(map(spec_of, weights))
        self._update: Traced[None] = trace(self._updated, specs)
        self._step, self._last_loss, self._rounds_in_vain = 0, math.inf, 0
        self.notes: list[str] = []

    def advance(self, standing: Standing, updates: int) -> bool:
        """Takes new points of the trajectories, and updates the weights there."""
        if self._adapts and standing.loss > self._last_loss:
            self._optimizer.learning_rate = 0.5 * float(self._optimizer.learning_rate)
        self._last_loss = standing.loss
        if self._step:
            for loss in self._losses:
                loss.renew()
        has_derivative = False
        for _ in range(updates):
            has_derivative |= bool(self._update(*self._gradients()))
            self._step += 1
        self._rounds_in_vain = 0 if has_derivative else self._rounds_in_vain + 1
        if self._rounds_in_vain < _MOST_ROUNDS_IN_VAIN:
            return True
        self.notes.append(
            f"It ended there, since no weight had an influence on the measure in {_MOST_ROUNDS_IN_VAIN} rounds: its "
            "derivative was zero at all points, as where all units are dead."
        )
        warnings.warn(self.notes[-1], stacklevel=5)
        return False

    def _gradients(self) -> list[tf.Tensor]:
        for loss in self._losses:
            loss.begin(self._step)
        each = [loss.gradients(self._weights) for loss in self._losses]
        return [tf.add_n(slopes) for slopes in zip(*each, strict=True)]

    def _updated(self, *slopes: tf.Tensor) -> tuple[tf.Tensor, None]:
        """Updates the weights, and returns True if one of the derivatives is not zero."""
        self._optimizer.apply(self._moves.gradients(slopes), self._moves.variables)
        self._moves.follow()
        return tf.reduce_any(tf.stack([tf.reduce_any(slope != 0) for slope in slopes])), None


def slopes_of(loss: tf.Tensor, tape: tf.GradientTape, weights: Sequence[keras.Variable]) -> list[tf.Tensor]:
    """Returns the derivatives of a loss on a tape by the weights, zero by those that it does not depend on."""
    values = [weight.value for weight in weights]
    return list(map(tf.convert_to_tensor, tape.gradient(loss, values, unconnected_gradients="zero")))


def penalty_config(measure: str, view: GivenView, rows: int, seed: int) -> PenaltyConfig:
    """Returns the settings of a penalty at points that change between two rounds only."""
    is_over_time = measure in DIFFERENTIABLE_OVER_TIME
    return PenaltyConfig(
        measure=measure,
        view=view,
        scale="linear",
        side="both",
        states="cached",
        through_states=False,
        refresh=1,
        rows=_STEPS_PER_ROW * rows if is_over_time else rows,
        vectors=16,
        seed=seed,
    )
