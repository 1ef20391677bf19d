"""One call of a recurrent layer over its whole sequence: the flow, and the Lyapunov exponents.

A long sequence is unrolled in segments, forwards for the exponents. The flow needs the Jacobians in the opposite
order: the states at the beginning of each segment are saved, and each segment is unrolled once more. Where the points
of the whole sequence are known already, segments of them will do, which bound the memory of their derivatives.
"""

from typing import Any, NamedTuple

import tensorflow as tf

from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.jacobians.views import View
from keras_jacmon.measurement.results import MeasuredArray
from keras_jacmon.measurement.segments import KnownSegments, Segments, SequenceMeasurement, UnrolledSegments
from keras_jacmon.measures import flow, lyapunov
from keras_jacmon.measures.context import MeasureContext, Purpose
from keras_jacmon.measures.selection import Selection, views_of
from keras_jacmon.measures.steps import Steps
from keras_jacmon.options import ViewName
from keras_jacmon.tensors import known_sizes


class _Carry(NamedTuple):
    """State of the iterations between two segments: in the order of the flows, and by view."""

    flows: tuple[flow.FlowCarry, ...]
    exponents: dict[ViewName, lyapunov.LyapunovCarry]


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
    warmup = context.options.warmup_of(steps)
    chaotic = views_of(quantities)
    sizes = {view: View.of(view, sequence.states).columns(sequence.of_a_step, sequence.states) for view in chaotic}
    carry = _Carry(
        tuple(_start_flow(samples, planned.plan, context) for planned in measurement.flows),
        {view: _start_exponents(samples, sizes[view], context) for view in chaotic},
    )
    is_short = time is not None and time <= measurement.most_steps
    if points is None:
        numbers, exponents = _in_segments(UnrolledSegments(measurement), carry, warmup, context)
    elif is_short or points.operators:
        numbers, exponents = _at_once(measurement, points, carry, warmup, context)
    else:
        numbers, exponents = _in_segments(KnownSegments(measurement, points), carry, warmup, context)
    found = {view: lyapunov.lyapunov_exponents(exponents[view], warmup=warmup) for view in chaotic}
    return numbers, [MeasuredArray.of(measure.function(found[view], sizes[view])) for view, measure in quantities]


def _start_flow(samples: int | tf.Tensor, plan: flow.FlowPlan, context: MeasureContext) -> flow.FlowCarry:
    if context.options.exact_flow:
        return flow.start_exact_flow(samples, plan, context.dtype)
    return flow.start_flow(samples, plan, context.seeds(Purpose.FLOW), context.dtype)


def _start_exponents(samples: int | tf.Tensor, size: int, context: MeasureContext) -> lyapunov.LyapunovCarry:
    count = min(context.options.exponents, size)
    return lyapunov.start_lyapunov(samples, size, count, context.seeds(Purpose.EXPONENTS), context.dtype)


def _at_once(
    measurement: SequenceMeasurement,
    points: PointBatch,
    carry: _Carry,
    warmup: int | tf.Tensor,
    context: MeasureContext,
) -> tuple[list[tf.Tensor], dict[ViewName, Any]]:
    flows = measurement.flows
    views = {*carry.exponents, *(planned.view for planned in flows)}
    steps = measurement.steps_of(measurement.sequence, points, views, context)
    numbers = [
        _flow_segment(steps[planned.view], start, planned.plan, context)[0]
        for planned, start in zip(flows, carry.flows, strict=True)
    ]
    return numbers, {view: _exponents(steps[view], start, warmup, context) for view, start in carry.exponents.items()}


def _in_segments(
    segments: Segments, carry: _Carry, warmup: int | tf.Tensor, context: MeasureContext
) -> tuple[list[tf.Tensor], dict[ViewName, Any]]:
    """Walks through the segments forwards for the exponents, and backwards for the flow."""
    starts, exponents = _forwards(segments, carry, warmup, context)
    return (_backwards(segments, carry, starts, context) if carry.flows else []), exponents


def _forwards(
    segments: Segments, carry: _Carry, warmup: int | tf.Tensor, context: MeasureContext
) -> tuple[list[tf.TensorArray], dict[ViewName, Any]]:
    """Returns the states at the beginning of each segment, and the exponents of the whole sequence by view."""
    measurement, initial = segments.measurement, segments.initial
    if not initial and not carry.exponents:
        return [], {}
    count = measurement.segment_count

    def body(index: tf.Tensor, states: list[tf.Tensor], starts: Any, exponents: Any) -> tuple[Any, ...]:
        part, points, after = segments.at(index, states)
        starts = [array.write(index, state) for array, state in zip(starts, states, strict=True)]
        steps = measurement.steps_of(part, points, set(exponents), context)
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
    segments: Segments, carry: _Carry, starts: list[tf.TensorArray], context: MeasureContext
) -> list[tf.Tensor]:
    """Returns what `flow_segment` does for the whole sequence, for each flow."""
    measurement = segments.measurement
    count, flows = measurement.segment_count, measurement.flows

    def body(index: tf.Tensor, carries: Any, arrays: Any) -> tuple[Any, ...]:
        part, points, _ = segments.at(index, [array.read(index) for array in starts])
        steps = measurement.steps_of(part, points, {planned.view for planned in flows}, context)
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
