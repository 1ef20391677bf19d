"""A sequence whose products of Jacobians are measured, and its segments."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow as tf

from keras_jacmon.cell.step import CellStep
from keras_jacmon.cell.trajectory import Trajectory, UnrollInputs, unroll
from keras_jacmon.cell.unroll_plan import UnrollPlan
from keras_jacmon.jacobians.cell_jacobian import CellJacobian
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.jacobians.views import View
from keras_jacmon.measurement.results import PlannedFlow
from keras_jacmon.measures.context import MeasureContext
from keras_jacmon.measures.steps import Steps
from keras_jacmon.operators.contract import JacobianOperator
from keras_jacmon.options import ViewName, label_of
from keras_jacmon.tensors import PointRange, known_sizes


@dataclass(frozen=True)
class SequenceMeasurement:
    """A sequence whose products of Jacobians are measured.

    Attributes:
        step: The step of the cell.
        sequence: The whole sequence, in the order in which the cell runs.
        unroll_plan: The plan that `unroll` follows; None for a plain loop.
        jacobian: The Jacobians of the cell.
        independent: Boolean, False if the points of a step must stay together.
        most_steps: Integer, maximum number of steps of a segment.
        flows: Tuple of the flows to be measured.
    """

    step: CellStep
    sequence: UnrollInputs
    unroll_plan: UnrollPlan | None
    jacobian: CellJacobian
    independent: bool
    most_steps: int
    flows: tuple[PlannedFlow, ...]

    @property
    def segment_count(self) -> tf.Tensor:
        """The number of segments, an integer scalar."""
        return -(-tf.shape(self.sequence.inputs)[0] // self.most_steps)

    def range_of(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the first step of a segment, and the one after its last."""
        start, time = index * self.most_steps, tf.shape(self.sequence.inputs)[0]
        return start, tf.minimum(start + self.most_steps, time)

    def segment_at(self, index: tf.Tensor, states: Sequence[tf.Tensor]) -> tuple[UnrollInputs, Trajectory]:
        """Returns one segment that begins with the given states, and its trajectory."""
        part = self.sequence.between(*self.range_of(index), states)
        return part, unroll(self.step, part, self.unroll_plan)

    def states_at_segments(self) -> tuple[list[tf.TensorArray], list[tf.Tensor]]:
        """Returns the states at the beginning of each segment, and the last ones."""
        initial, count = list(self.sequence.states), self.segment_count

        def body(
            index: tf.Tensor, states: list[tf.Tensor], starts: list[tf.TensorArray]
        ) -> tuple[tf.Tensor, list[tf.Tensor], list[tf.TensorArray]]:
            starts = [array.write(index, state) for array, state in zip(starts, states, strict=True)]
            _, trajectory = self.segment_at(index, states)
            return index + 1, list(trajectory.last), starts

        empty = [tf.TensorArray(s.dtype, count, element_shape=s.shape, clear_after_read=False) for s in initial]
        _, last, starts = tf.while_loop(
            lambda index, *_: index < count, body, [tf.constant(0), initial, empty], parallel_iterations=1
        )
        return starts, last

    def steps_of(
        self, part: UnrollInputs, points: PointBatch, views: set[ViewName], context: MeasureContext
    ) -> dict[ViewName, Steps]:
        """Returns the Jacobians of each step of a part of the sequence, by view.

        Args:
            part: The part.
            points: Its points.
            views: Set of the views.
            context: Settings of the measures.
        """
        time, samples = known_sizes(part.inputs)[:2]
        wholes = self.jacobian.operators(sorted(views, key=label_of), points) if self.independent else {}

        def steps(view: ViewName) -> Steps:
            whole = wholes.get(view)

            def at(t: tf.Tensor) -> JacobianOperator:
                start = t * samples
                # A structured operator is computed once for all steps; autodiff is taken step by step.
                taken = None if whole is None else whole.take(PointRange(start, samples))
                if taken is not None:
                    return taken
                return self.jacobian.operators([view], points.between(start, start + samples))[view]

            size = View.of(view, part.states).columns(part.of_a_step, part.states)
            return Steps(time, at, part.mask, samples, size, context.dtype)

        return {view: steps(view) for view in sorted(views, key=label_of)}


@dataclass(frozen=True)
class Segments(ABC):
    """The segments of a sequence.

    Attributes:
        measurement: The sequence and the operators of its cell.
    """

    measurement: SequenceMeasurement

    @property
    @abstractmethod
    def initial(self) -> list[tf.Tensor]:
        """The states before the first segment, if segments are made from the states before them; otherwise none."""

    @abstractmethod
    def at(self, index: tf.Tensor, states: Sequence[tf.Tensor]) -> tuple[UnrollInputs, PointBatch, list[tf.Tensor]]:
        """Returns a segment, its points, and the states before the next one, as far as they are needed.

        Args:
            index: Integer scalar, number of the segment.
            states: Sequence of the states before it, as `initial`.
        """


class UnrolledSegments(Segments):
    """Segments whose points are found by unrolling the cell."""

    @property
    def initial(self) -> list[tf.Tensor]:
        """The states before the sequence."""
        return list(self.measurement.sequence.states)

    def at(self, index: tf.Tensor, states: Sequence[tf.Tensor]) -> tuple[UnrollInputs, PointBatch, list[tf.Tensor]]:
        """Returns a segment, its points, and the states after it."""
        part, trajectory = self.measurement.segment_at(index, states)
        return part, PointBatch.of(trajectory), list(trajectory.last)


@dataclass(frozen=True)
class KnownSegments(Segments):
    """Segments whose points are known.

    Attributes:
        points: The points of the whole sequence.
    """

    points: PointBatch

    @property
    def initial(self) -> list[tf.Tensor]:
        """None: the points do not depend on the states before them."""
        return []

    def at(self, index: tf.Tensor, states: Sequence[tf.Tensor]) -> tuple[UnrollInputs, PointBatch, list[tf.Tensor]]:
        """Returns a segment, its points, and the states as they were given."""
        start, stop = self.measurement.range_of(index)
        samples = known_sizes(self.measurement.sequence.inputs)[1]
        part = self.measurement.sequence.between(start, stop, self.measurement.sequence.states)
        return part, self.points.between(start * samples, stop * samples), list(states)
