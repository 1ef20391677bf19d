"""Batches of points at which Jacobians are taken."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import tensorflow as tf

from keras_jacmon.cell.trajectory import Trajectory
from keras_jacmon.jacobians.views import View
from keras_jacmon.operators.structured import StructuredJacobian
from keras_jacmon.tensors import as_rows, known_sizes


@dataclass(frozen=True)
class PointBatch:
    """Points at which Jacobians are taken.

    Attributes:
        inputs: `(rows, ...)`.
        states: Flat, each `(rows, ...)`.
        values: Known values of the cell's graph, by name.
        operators: Structured Jacobians that have been evaluated at these points.
        size: How many there are, if that is known before the points are.
    """

    inputs: tf.Tensor
    states: tuple[tf.Tensor, ...]
    values: Mapping[str, tf.Tensor] = field(default_factory=dict)
    operators: Mapping[View, StructuredJacobian] = field(default_factory=dict)
    size: int | tf.Tensor | None = None

    @property
    def count(self) -> int | tf.Tensor:
        """How many there are."""
        return known_sizes(self.inputs)[0] if self.size is None else self.size

    @classmethod
    def of(cls, trajectory: Trajectory) -> "PointBatch":
        """The points of a trajectory, those of the first step first."""
        values = {name: as_rows(value) for name, value in trajectory.values.items()}
        return cls(as_rows(trajectory.inputs), tuple(map(as_rows, trajectory.states)), values)

    def take(self, rows: tf.Tensor) -> "PointBatch":
        """Some of them, by their indices."""
        return self._each(lambda x: tf.gather(x, rows), lambda operator: operator.take(rows), known_sizes(rows)[0])

    def behind(self, results: Iterable[tf.Tensor]) -> "PointBatch":
        """The same, known once some results are: what is made of it does not need its memory at the same time."""
        with tf.control_dependencies([result.op for result in results]):
            return self._each(tf.identity, lambda operator: operator, self.size)

    def between(self, start: tf.Tensor, stop: tf.Tensor) -> "PointBatch":
        """Those from one index up to another one, which takes no copy."""
        return self._each(lambda x: x[start:stop], lambda operator: operator.take(slice(start, stop)), stop - start)

    def _each(
        self,
        of_tensor: Callable[[tf.Tensor], tf.Tensor],
        of_operator: Callable[[StructuredJacobian], StructuredJacobian],
        size: int | tf.Tensor | None,
    ) -> "PointBatch":
        values = {name: of_tensor(value) for name, value in self.values.items()}
        operators = {view: of_operator(operator) for view, operator in self.operators.items()}
        return PointBatch(of_tensor(self.inputs), tuple(map(of_tensor, self.states)), values, operators, size)
