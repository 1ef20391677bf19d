"""One call of a recurrent layer over its whole sequence: the flow, and the Lyapunov exponents.

A long sequence is unrolled in segments, forwards for the exponents. The flow needs the Jacobians in the opposite
order: the states at the beginning of each segment are saved, and each segment is unrolled once more.
"""

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
from keras_jacmon.measurement.results import MeasuredArray
from keras_jacmon.measures import flow, lyapunov
from keras_jacmon.measures.context import MeasureContext, Measured
from keras_jacmon.measures.kinds import Exponents, Flow
from keras_jacmon.measures.registry import Selection, of_kind, views_of
from keras_jacmon.measures.steps import Steps
from keras_jacmon.operators.contract import JacobianOperator
from keras_jacmon.options import Options
from keras_jacmon.tensors import known_sizes

# Purposes of random numbers, beside the purposes that the measures of a step have.
_FLOW, _EXPONENTS = 5, 6


class _Carry(NamedTuple):
    """State of the iterations between two segments, by view."""

    flow: dict[str, flow.FlowCarry]
    exponents: dict[str, lyapunov.LyapunovCarry]


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
    """

    step: CellStep
    sequence: UnrollInputs
    unroll_plan: UnrollPlan | None
    jacobian: CellJacobian
    independent: bool
    most_steps: int


def measure_sequence(
    measurement: SequenceMeasurement, quantities: Selection, context: MeasureContext, points: PointBatch | None
) -> list[MeasuredArray]:
    """Measures products of Jacobians over time, in the graph that is being traced.

    Args:
        measurement: The sequence and the operators of its cell.
        quantities: The quantities to measure, of the kinds `Flow` and `Exponents`.
        context: Settings of the measures.
        points: The points of the whole trajectory; None if they are not held at once.

    Returns:
        For each quantity: `(spans, samples)` for the flow; `(exponents, samples)` for the Lyapunov exponents;
        `(samples,)` for the others.
    """
    sequence, time = measurement.sequence, measurement.sequence.inputs.shape[0]
    steps, samples = known_sizes(sequence.inputs)[:2]
    warmup = steps // 10 if context.options.warmup is None else context.options.warmup
    sizes = {
        view: View.of(view, sequence.states).columns(sequence.inputs[0], sequence.states)
        for view in views_of(quantities)
    }
    flows, chaotic = views_of(of_kind(quantities, Flow)), views_of(of_kind(quantities, Exponents))
    carry = _Carry(
        {view: _start_flow(samples, sizes[view], context) for view in flows},
        {view: _start_exponents(samples, sizes[view], context) for view in chaotic},
    )
    if points is not None and time is not None and time <= measurement.most_steps:
        logs, exponents = _at_once(measurement, points, carry, warmup, context)
    else:
        logs, exponents = _in_segments(measurement, carry, warmup, context)
    gains = {view: _gains(logs[view], sequence.mask, context.options) for view in flows}
    found = {view: lyapunov.lyapunov_exponents(exponents[view], warmup=warmup) for view in chaotic}
    arrays = []
    for view, measure in quantities:
        if isinstance(measure.kind, Flow):
            error = gains[view].uncertainty if measure.uncertainty else None
            arrays.append(MeasuredArray.of(measure.function(gains[view].value), error))
        else:
            arrays.append(MeasuredArray.of(measure.function(found[view], sizes[view])))
    return arrays


def _gains(logs: tf.Tensor, mask: tf.Tensor | None, options: Options) -> Measured:
    """Returns the log gains by span, `(spans, samples)`, with standard errors if they are estimates."""
    if options.exact_flow:
        return Measured(flow.by_span(logs[:, 0], mask), None)
    return Measured(*flow.flow_by_span(logs, mask))


def _start_flow(samples: int | tf.Tensor, size: int, context: MeasureContext) -> flow.FlowCarry:
    if context.options.exact_flow:
        return flow.start_exact_flow(samples, size, context.dtype)
    return flow.start_flow(samples, size, context.options.flow_vectors, context.seeds(_FLOW), context.dtype)


def _start_exponents(samples: int | tf.Tensor, size: int, context: MeasureContext) -> lyapunov.LyapunovCarry:
    count = min(context.options.exponents, size)
    return lyapunov.start_lyapunov(samples, size, count, context.seeds(_EXPONENTS), context.dtype)


def _at_once(
    measurement: SequenceMeasurement,
    points: PointBatch,
    carry: _Carry,
    warmup: int | tf.Tensor,
    context: MeasureContext,
) -> tuple[dict[str, Any], dict[str, Any]]:
    steps = _steps(measurement, measurement.sequence, points, {*carry.flow, *carry.exponents}, context)
    logs = {view: _flow_segment(steps[view], start, context)[0] for view, start in carry.flow.items()}
    return logs, {view: _exponents(steps[view], start, warmup, context) for view, start in carry.exponents.items()}


def _in_segments(
    measurement: SequenceMeasurement, carry: _Carry, warmup: int | tf.Tensor, context: MeasureContext
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Walks through the segments forwards for the exponents, and backwards for the flow."""
    starts, exponents = _forwards(measurement, carry, warmup, context)
    return (_backwards(measurement, carry, starts, context) if carry.flow else {}), exponents


def _forwards(
    measurement: SequenceMeasurement, carry: _Carry, warmup: int | tf.Tensor, context: MeasureContext
) -> tuple[list[tf.TensorArray], dict[str, Any]]:
    """Returns the states at the beginning of each segment, and the exponents of the whole sequence by view."""
    initial, count = measurement.sequence.states, _segment_count(measurement)

    def body(index: tf.Tensor, states: list[tf.Tensor], starts: Any, exponents: Any) -> tuple[Any, ...]:
        part, trajectory = _segment(measurement, index, states)
        starts = [array.write(index, state) for array, state in zip(starts, states, strict=True)]
        steps = _steps(measurement, part, PointBatch.of(trajectory), set(exponents), context)
        exponents = {view: _exponents(steps[view], known, warmup, context) for view, known in exponents.items()}
        return index + 1, list(trajectory.last), starts, exponents

    empty = [tf.TensorArray(s.dtype, count, element_shape=s.shape, clear_after_read=False) for s in initial]
    _, _, starts, exponents = tf.while_loop(
        lambda index, *_: index < count,
        body,
        [tf.constant(0), list(initial), empty, carry.exponents],
        parallel_iterations=1,
    )
    return starts, exponents


def _backwards(
    measurement: SequenceMeasurement, carry: _Carry, starts: list[tf.TensorArray], context: MeasureContext
) -> dict[str, tf.Tensor]:
    """Returns the log gains of the flow by view, `(time, vectors, samples)`; unrolls each segment once more."""
    count = _segment_count(measurement)

    def body(index: tf.Tensor, flows: Any, arrays: Any) -> tuple[Any, ...]:
        part, trajectory = _segment(measurement, index, [array.read(index) for array in starts])
        steps = _steps(measurement, part, PointBatch.of(trajectory), set(flows), context)
        found = {view: _flow_segment(steps[view], known, context) for view, known in flows.items()}
        arrays = {view: array.write(index, tf.reshape(found[view][0], [-1])) for view, array in arrays.items()}
        return index - 1, {view: known for view, (_, known) in found.items()}, arrays

    empty = {view: tf.TensorArray(tf.float64, count, infer_shape=False, element_shape=[None]) for view in carry.flow}
    _, _, arrays = tf.while_loop(
        lambda index, *_: index >= 0, body, [count - 1, carry.flow, empty], parallel_iterations=1
    )
    inputs = measurement.sequence.inputs
    time, samples = tf.shape(inputs)[0], known_sizes(inputs)[1]
    return {
        view: tf.reshape(array.concat(), [time, carry.flow[view].logs.shape[1], samples])
        for view, array in arrays.items()
    }


def _segment_count(measurement: SequenceMeasurement) -> tf.Tensor:
    return -(-tf.shape(measurement.sequence.inputs)[0] // measurement.most_steps)


def _segment(
    measurement: SequenceMeasurement, index: tf.Tensor, states: Sequence[tf.Tensor]
) -> tuple[UnrollInputs, Trajectory]:
    """Returns one segment that begins with the given states, and its trajectory."""
    start, time = index * measurement.most_steps, tf.shape(measurement.sequence.inputs)[0]
    part = measurement.sequence.between(start, tf.minimum(start + measurement.most_steps, time), states)
    return part, unroll(measurement.step, part, measurement.unroll_plan)


def _flow_segment(steps: Steps, carry: flow.FlowCarry, context: MeasureContext) -> tuple[tf.Tensor, flow.FlowCarry]:
    return (flow.exact_flow_segment if context.options.exact_flow else flow.flow_segment)(steps, carry)


def _exponents(
    steps: Steps, carry: lyapunov.LyapunovCarry, warmup: int | tf.Tensor, context: MeasureContext
) -> lyapunov.LyapunovCarry:
    return lyapunov.lyapunov_segment(steps, carry, warmup=warmup, qr_every=context.options.qr_every)


def _steps(
    measurement: SequenceMeasurement, part: UnrollInputs, points: PointBatch, views: set[str], context: MeasureContext
) -> dict[str, Steps]:
    """Returns the Jacobians of each step of a part of the sequence, by view; `points` are the points of that part."""
    time, samples = known_sizes(part.inputs)[:2]

    def steps(view: str) -> Steps:
        whole = measurement.jacobian.operators([view], points)[view] if measurement.independent else None

        def at(t: tf.Tensor) -> JacobianOperator:
            start, stop = t * samples, (t + 1) * samples
            # A structured operator is computed once for all steps; autodiff is taken step by step.
            taken = None if whole is None else whole.take(slice(start, stop))
            if taken is not None:
                return taken
            return measurement.jacobian.operators([view], points.between(start, stop))[view]

        size = View.of(view, part.states).columns(part.inputs[0], part.states)
        return Steps(time, at, part.mask, samples, size, context.dtype)

    return {view: steps(view) for view in sorted(views)}
