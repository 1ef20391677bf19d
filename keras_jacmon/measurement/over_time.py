"""One call of a recurrent layer over its whole sequence: the flow, and the Lyapunov exponents.

A long sequence is unrolled in segments, forwards for the exponents. The flow needs the Jacobians in the opposite
order: the states at the beginning of each segment are saved, and each segment is unrolled once more. Where the points
of the whole sequence are known already, segments of them will do, which bound the memory of their derivatives.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from keras_jacmon.cell.step import CellStep
from keras_jacmon.cell.trajectory import Trajectory, UnrollInputs, unroll
from keras_jacmon.cell.unroll_plan import UnrollPlan
from keras_jacmon.jacobians.cell_jacobian import CellJacobian
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.jacobians.views import View
from keras_jacmon.measurement.results import MeasuredArray, PlannedFlow
from keras_jacmon.measures import flow, lyapunov
from keras_jacmon.measures.context import MeasureContext
from keras_jacmon.measures.registry import Selection, views_of
from keras_jacmon.measures.steps import Steps
from keras_jacmon.operators.contract import JacobianOperator
from keras_jacmon.options import ViewName, label_of
from keras_jacmon.tensors import PointRange, known_sizes

# Purposes of random numbers, beside the purposes that the measures of a step have.
_FLOW, _EXPONENTS = 5, 6


class _Carry(NamedTuple):
    """State of the iterations between two segments: in the order of the flows, and by view."""

    flows: tuple[flow.FlowCarry, ...]
    exponents: dict[ViewName, lyapunov.LyapunovCarry]


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


def measure_sequence(
    measurement: SequenceMeasurement, quantities: Selection, context: MeasureContext, points: PointBatch | None
) -> tuple[list[tf.Tensor], list[MeasuredArray]]:
    """Measures products of Jacobians over time, in the graph that is being traced.

    Args:
        measurement: The sequence and the operators of its cell.
        quantities: The quantities to measure, of the kind `Exponents`.
        context: Settings of the measures.
        points: The points of the whole trajectory; None if they are not held at once.

    Returns:
        For each flow its numbers `(time, numbers, samples)`, as `flow_segment` or `exact_flow_segment` returns them;
        for each quantity `(exponents, samples)` or `(samples,)`.
    """
    sequence, time = measurement.sequence, measurement.sequence.inputs.shape[0]
    steps, samples = known_sizes(sequence.inputs)[:2]
    warmup = steps // 10 if context.options.warmup is None else context.options.warmup
    chaotic = views_of(quantities)
    sizes = {view: View.of(view, sequence.states).columns(sequence.of_a_step, sequence.states) for view in chaotic}
    carry = _Carry(
        tuple(_start_flow(samples, planned.plan, context) for planned in measurement.flows),
        {view: _start_exponents(samples, sizes[view], context) for view in chaotic},
    )
    is_short = time is not None and time <= measurement.most_steps
    if points is None:
        numbers, exponents = _in_segments(_UnrolledSegments(measurement), carry, warmup, context)
    elif is_short or points.operators:
        numbers, exponents = _at_once(measurement, points, carry, warmup, context)
    else:
        numbers, exponents = _in_segments(_KnownSegments(measurement, points), carry, warmup, context)
    found = {view: lyapunov.lyapunov_exponents(exponents[view], warmup=warmup) for view in chaotic}
    return numbers, [MeasuredArray.of(measure.function(found[view], sizes[view])) for view, measure in quantities]


def _start_flow(samples: int | tf.Tensor, plan: flow.FlowPlan, context: MeasureContext) -> flow.FlowCarry:
    if context.options.exact_flow:
        return flow.start_exact_flow(samples, plan, context.dtype)
    return flow.start_flow(samples, plan, context.seeds(_FLOW), context.dtype)


def _start_exponents(samples: int | tf.Tensor, size: int, context: MeasureContext) -> lyapunov.LyapunovCarry:
    count = min(context.options.exponents, size)
    return lyapunov.start_lyapunov(samples, size, count, context.seeds(_EXPONENTS), context.dtype)


def _at_once(
    measurement: SequenceMeasurement,
    points: PointBatch,
    carry: _Carry,
    warmup: int | tf.Tensor,
    context: MeasureContext,
) -> tuple[list[tf.Tensor], dict[ViewName, Any]]:
    flows = measurement.flows
    views = {*carry.exponents, *(planned.view for planned in flows)}
    steps = steps_of(measurement, measurement.sequence, points, views, context)
    numbers = [
        _flow_segment(steps[planned.view], start, planned.plan, context)[0]
        for planned, start in zip(flows, carry.flows, strict=True)
    ]
    return numbers, {view: _exponents(steps[view], start, warmup, context) for view, start in carry.exponents.items()}


@dataclass(frozen=True)
class _Segments(ABC):
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


class _UnrolledSegments(_Segments):
    """Segments whose points are found by unrolling the cell."""

    @property
    def initial(self) -> list[tf.Tensor]:
        return list(self.measurement.sequence.states)

    def at(self, index: tf.Tensor, states: Sequence[tf.Tensor]) -> tuple[UnrollInputs, PointBatch, list[tf.Tensor]]:
        part, trajectory = segment_at(self.measurement, index, states)
        return part, PointBatch.of(trajectory), list(trajectory.last)


@dataclass(frozen=True)
class _KnownSegments(_Segments):
    """Segments whose points are known.

    Attributes:
        points: The points of the whole sequence.
    """

    points: PointBatch

    @property
    def initial(self) -> list[tf.Tensor]:
        return []

    def at(self, index: tf.Tensor, states: Sequence[tf.Tensor]) -> tuple[UnrollInputs, PointBatch, list[tf.Tensor]]:
        start, stop = _range_of(self.measurement, index)
        samples = known_sizes(self.measurement.sequence.inputs)[1]
        part = self.measurement.sequence.between(start, stop, self.measurement.sequence.states)
        return part, self.points.between(start * samples, stop * samples), list(states)


def _in_segments(
    segments: _Segments, carry: _Carry, warmup: int | tf.Tensor, context: MeasureContext
) -> tuple[list[tf.Tensor], dict[ViewName, Any]]:
    """Walks through the segments forwards for the exponents, and backwards for the flow."""
    starts, exponents = _forwards(segments, carry, warmup, context)
    return (_backwards(segments, carry, starts, context) if carry.flows else []), exponents


def _forwards(
    segments: _Segments, carry: _Carry, warmup: int | tf.Tensor, context: MeasureContext
) -> tuple[list[tf.TensorArray], dict[ViewName, Any]]:
    """Returns the states at the beginning of each segment, and the exponents of the whole sequence by view."""
    measurement, initial = segments.measurement, segments.initial
    if not initial and not carry.exponents:
        return [], {}
    count = segment_count(measurement)

    def body(index: tf.Tensor, states: list[tf.Tensor], starts: Any, exponents: Any) -> tuple[Any, ...]:
        part, points, after = segments.at(index, states)
        starts = [array.write(index, state) for array, state in zip(starts, states, strict=True)]
        steps = steps_of(measurement, part, points, set(exponents), context)
        exponents = {view: _exponents(steps[view], known, warmup, context) for view, known in exponents.items()}
        return index + 1, after, starts, exponents

    empty = [tf.TensorArray(s.dtype, count, element_shape=s.shape, clear_after_read=False) for s in initial]
    _, _, starts, exponents = tf.while_loop(
        lambda index, *_: index < count,
        body,
        [tf.constant(0), initial, empty, carry.exponents],
        parallel_iterations=1,
    )
    return starts, exponents


def _backwards(
    segments: _Segments, carry: _Carry, starts: list[tf.TensorArray], context: MeasureContext
) -> list[tf.Tensor]:
    """Returns what `flow_segment` does for the whole sequence, for each flow."""
    measurement = segments.measurement
    count, flows = segment_count(measurement), measurement.flows

    def body(index: tf.Tensor, carries: Any, arrays: Any) -> tuple[Any, ...]:
        part, points, _ = segments.at(index, [array.read(index) for array in starts])
        steps = steps_of(measurement, part, points, {planned.view for planned in flows}, context)
        found = [
            _flow_segment(steps[planned.view], known, planned.plan, context)
            for planned, known in zip(flows, carries, strict=True)
        ]
        arrays = [
            array.write(index, tf.reshape(numbers, [-1])) for array, (numbers, _) in zip(arrays, found, strict=True)
        ]
        return index - 1, tuple(known for _, known in found), arrays

    empty = [tf.TensorArray(tf.float64, count, infer_shape=False, element_shape=[None]) for _ in flows]
    _, _, arrays = tf.while_loop(
        lambda index, *_: index >= 0, body, [count - 1, carry.flows, empty], parallel_iterations=1
    )
    time, samples = tf.shape(measurement.sequence.inputs)[0], known_sizes(measurement.sequence.inputs)[1]
    numbers = 1 if context.options.exact_flow else 2
    return [tf.reshape(array.concat(), [time, numbers, samples]) for array in arrays]


def segment_count(measurement: SequenceMeasurement) -> tf.Tensor:
    """Returns the number of segments."""
    return -(-tf.shape(measurement.sequence.inputs)[0] // measurement.most_steps)


def segment_at(
    measurement: SequenceMeasurement, index: tf.Tensor, states: Sequence[tf.Tensor]
) -> tuple[UnrollInputs, Trajectory]:
    """Returns one segment that begins with the given states, and its trajectory."""
    part = measurement.sequence.between(*_range_of(measurement, index), states)
    return part, unroll(measurement.step, part, measurement.unroll_plan)


def _range_of(measurement: SequenceMeasurement, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the first step of a segment, and the one after its last."""
    start, time = index * measurement.most_steps, tf.shape(measurement.sequence.inputs)[0]
    return start, tf.minimum(start + measurement.most_steps, time)


def _flow_segment(
    steps: Steps, carry: flow.FlowCarry, plan: flow.FlowPlan, context: MeasureContext
) -> tuple[tf.Tensor, flow.FlowCarry]:
    if context.options.exact_flow:
        return flow.exact_flow_segment(steps, carry)
    return flow.flow_segment(steps, carry, plan)


def _exponents(
    steps: Steps, carry: lyapunov.LyapunovCarry, warmup: int | tf.Tensor, context: MeasureContext
) -> lyapunov.LyapunovCarry:
    return lyapunov.lyapunov_segment(steps, carry, warmup=warmup, qr_every=context.options.qr_every)


def steps_of(
    measurement: SequenceMeasurement,
    part: UnrollInputs,
    points: PointBatch,
    views: set[ViewName],
    context: MeasureContext,
) -> dict[ViewName, Steps]:
    """Returns the Jacobians of each step of a part of the sequence, by view; `points` are the points of that part."""
    time, samples = known_sizes(part.inputs)[:2]
    wholes = measurement.jacobian.operators(sorted(views, key=label_of), points) if measurement.independent else {}

    def steps(view: ViewName) -> Steps:
        whole = wholes.get(view)

        def at(t: tf.Tensor) -> JacobianOperator:
            start = t * samples
            # A structured operator is computed once for all steps; autodiff is taken step by step.
            taken = None if whole is None else whole.take(PointRange(start, samples))
            if taken is not None:
                return taken
            return measurement.jacobian.operators([view], points.between(start, start + samples))[view]

        size = View.of(view, part.states).columns(part.of_a_step, part.states)
        return Steps(time, at, part.mask, samples, size, context.dtype)

    return {view: steps(view) for view in sorted(views, key=label_of)}
