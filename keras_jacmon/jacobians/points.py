"""Batches of points at which Jacobians are taken."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import tensorflow as tf

from keras_jacmon.cell.trajectory import Trajectory
from keras_jacmon.jacobians.views import View
from keras_jacmon.operators.structured import StructuredJacobian
from keras_jacmon.tensors import ChosenPoints, PointRange, Points, as_points, known_sizes


@dataclass(frozen=True)
class PointBatch:
    """Points at which Jacobians are taken.

    Attributes:
        inputs: Tensor `(points, ...)`.
        states: Tuple of tensors `(points, ...)`, the flat states.
        values: Known values of tensors of the cell's graph, by their names.
        operators: Structured Jacobians that have been evaluated at these points, by view.
        size: Integer or scalar tensor, number of points, if it is known before the points are. Defaults to None.
    """

    inputs: tf.Tensor
    states: tuple[tf.Tensor, ...]
    values: Mapping[str, tf.Tensor] = field(default_factory=dict)
    operators: Mapping[View, StructuredJacobian] = field(default_factory=dict)
    size: int | tf.Tensor | None = None

    @property
    def count(self) -> int | tf.Tensor:
        """The number of points."""
        return known_sizes(self.inputs)[0] if self.size is None else self.size

    @classmethod
    def of(cls, trajectory: Trajectory) -> "PointBatch":
        """The points of a trajectory, step by step."""
        values = {name: as_points(value) for name, value in trajectory.values.items()}
        return cls(as_points(trajectory.inputs), tuple(map(as_points, trajectory.states)), values)

    def take(self, indices: tf.Tensor) -> "PointBatch":
        """The points with these indices, `(k,)`."""
        return self._of(ChosenPoints(indices))

    def after(self, results: Iterable[tf.Tensor]) -> "PointBatch":
        """The same points, computed after some results: the memory of the two is not needed at once."""
        with tf.control_dependencies([result.op for result in results]):
            return self._each(tf.identity, lambda operator: operator, self.size)

    def between(self, start: tf.Tensor, stop: tf.Tensor) -> "PointBatch":
        """The points from one index up to another one, without a copy."""
        return self._of(PointRange(start, stop - start))

    def _of(self, points: Points) -> "PointBatch":
        return self._each(points.of, lambda operator: operator.take(points), points.count)

    def _each(
        self,
        of_tensor: Callable[[tf.Tensor], tf.Tensor],
        of_operator: Callable[[StructuredJacobian], StructuredJacobian],
        size: int | tf.Tensor | None,
    ) -> "PointBatch":
        values = {name: of_tensor(value) for name, value in self.values.items()}
        operators = {view: of_operator(operator) for view, operator in self.operators.items()}
        return PointBatch(of_tensor(self.inputs), tuple(map(of_tensor, self.states)), values, operators, size)
