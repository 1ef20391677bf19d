"""The contract of penalties: what they are given, what they take from trajectories, and what they return."""

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_jacmon.cell.step import CellStep
from keras_jacmon.jacobians.cell_jacobian import Assumptions, CellJacobian
from keras_jacmon.jacobians.diagnosis import CheckResults
from keras_jacmon.measurement.measurable_call import SequenceTensors
from keras_jacmon.measures.differentiable import TINY
from keras_jacmon.options import ViewName
from keras_jacmon.regularization.penalty_config import PenaltyConfig
from keras_jacmon.tensors import aligned


@enum.unique
class PenaltyPurpose(enum.IntEnum):
    """The purposes of the random numbers of a penalty, each a stream of its own."""

    CHECKS = 4
    VECTORS = 5
    LEADING_VECTORS = 6
    TRAJECTORIES = 7


class PenaltyMoment(NamedTuple):
    """The numbers that a penalty depends on beside weights and points.

    Attributes:
        target: Scalar, the target of the measure.
        turn: Integer scalar, the number of times that points of the trajectory were taken.
        step: Integer scalar, the number of batches so far; it seeds the random vectors.
    """

    target: tf.Tensor
    turn: tf.Tensor
    step: tf.Tensor


class PenaltyPoints(NamedTuple):
    """Points that a penalty is taken at.

    Attributes:
        inputs: Tensor `(points, ...)`.
        states: Tuple of tensors `(points, ...)`, the flat states before the step.
        weights: Tensor `(points,)`, 0 for a point that does not count.
    """

    inputs: tf.Tensor
    states: tuple[tf.Tensor, ...]
    weights: tf.Tensor


class NewPoints(NamedTuple):
    """Points that were taken from a trajectory, and the findings there.

    Attributes:
        points: `PenaltyPoints`; those without a finite penalty do not count.
        leading: Tensor `(points, n)`, the leading singular vectors there; None if the measure needs none.
        checks: Checks of the assumptions behind the Jacobians, at some of the points.
        left_out: Integer scalar, the number of points without a finite penalty.
        valid: Integer scalar, the number of points that are not masked and have finite states.
    """

    points: PenaltyPoints
    leading: tf.Tensor | None
    checks: CheckResults
    left_out: tf.Tensor
    valid: tf.Tensor


class Penalty(ABC):
    """The penalty on a cell, in the graph that is being traced.

    Args:
        step: `CellStep`, the cell's step.
        config: `PenaltyConfig`.
        view: The view for this cell.
        assumptions: The assumptions behind the Jacobians.
    """

    def __init__(self, step: CellStep, config: PenaltyConfig, view: ViewName, assumptions: Assumptions) -> None:
        self._cell_step, self._config, self._view, self._assumptions = step, config, view, assumptions

    @abstractmethod
    def new_points(self, sequence: SequenceTensors, moment: PenaltyMoment) -> tuple[NewPoints, CellJacobian]:
        """Takes points of a trajectory.

        Args:
            sequence: The sequence that the cell is unrolled along.
            moment: The numbers of this moment.

        Returns:
            The points, and the Jacobian, which must live as long as the graph.
        """

    @abstractmethod
    def at(
        self, chosen: PenaltyPoints, known: tf.Tensor | None, moment: PenaltyMoment, *, anew: bool
    ) -> tuple[tf.Tensor, CellJacobian]:
        """Returns the penalty at points that were taken before.

        Args:
            chosen: The points.
            known: Leading singular vectors of other weights or points; None if the measure needs none.
            moment: The numbers of this moment.
            anew: Boolean, True to find leading singular vectors anew.

        Returns:
            A scalar, and the Jacobian, which must live as long as the graph.
        """

    @abstractmethod
    def along(
        self, sequence: SequenceTensors, known: tf.Tensor | None, moment: PenaltyMoment, *, anew: bool
    ) -> tuple[tf.Tensor, CellJacobian]:
        """Returns the penalty at points of the present trajectory; results and other arguments are those of `at`.

        Args:
            sequence: The sequence that the cell is unrolled along.
            known: See `at`.
            moment: See `at`.
            anew: See `at`.
        """

    def _jacobian(self, inputs: tf.Tensor, states: Sequence[tf.Tensor]) -> CellJacobian:
        return CellJacobian(self._cell_step, inputs, states, self._assumptions)


def seed_of(config: PenaltyConfig, purpose: PenaltyPurpose, number: int | tf.Tensor) -> tf.Tensor:
    """Returns the seed of a stateless draw: a stream of its own for each purpose and number.

    Args:
        config: `PenaltyConfig`, for the user's seed.
        purpose: `PenaltyPurpose` of the draw.
        number: Integer or integer scalar, such as the number of batches so far.
    """
    return tf.random.experimental.stateless_fold_in([config.seed, purpose], number)


def mended(tensors: Any, counts: tf.Tensor) -> Any:
    """Returns a structure of tensors `(points, ...)` with the first point that counts in place of those that do not.

    Values that are not finite would make the whole gradient NaN, even with a weight of zero.

    Args:
        tensors: The structure; None stays None.
        counts: Boolean `(points,)`, True for the points that count.
    """
    stand_in = tf.argmax(counts)

    def mend(tensor: tf.Tensor | None) -> tf.Tensor | None:
        # XLA would compile a slice anew for each place, and with it the step of the training at each batch.
        return None if tensor is None else tf.where(aligned(counts, tensor), tensor, tf.gather(tensor, stand_in))

    return tf.nest.map_structure(mend, tensors)


def of_loss_type(value: tf.Tensor) -> tf.Tensor:
    """Returns a value in the type of Keras' own losses, but not in half precision."""
    return tf.cast(value, tf.float64 if keras.config.floatx() == "float64" else tf.float32)


def squared_distance(draws: tf.Tensor, target: tf.Tensor, config: PenaltyConfig) -> tf.Tensor:
    """Returns `(measure - target)²` at each point, or the square for the logarithms; zero on the allowed side.

    Args:
        draws: `(draws, points)`, the measure or independent estimates of it. Products of different estimates make the
            square unbiased.
        target: Scalar.
        config: `PenaltyConfig`, for its `scale` and `side`.

    Returns:
        `(points,)`.
    """
    if config.scale == "log":
        # The logarithm of an estimate has a bias, which falls with the number of vectors.
        value = tf.reduce_mean(draws, axis=0, keepdims=True)
        # No derivative below, where it would be larger than any number.
        difference = tf.math.log(tf.maximum(value, TINY)) - tf.math.log(target)
    else:
        difference = draws - target
    count = int(difference.shape[0])
    square = tf.reduce_sum(difference, axis=0) ** 2
    if count > 1:
        square = (square - tf.reduce_sum(difference**2, axis=0)) / (count * (count - 1))
    if config.side == "both":
        return square
    mean = tf.reduce_mean(difference, axis=0)
    wrong = mean > 0 if config.side == "at_most" else mean < 0
    return tf.where(wrong, square, tf.zeros_like(square))
