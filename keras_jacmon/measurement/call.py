"""One call of a recurrent layer, measured: the graph from its inputs to the measures of each step and sample."""

import dataclasses
from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_jacmon.cell.step import CellStep
from keras_jacmon.cell.trajectory import Trajectory, UnrollInputs, unroll
from keras_jacmon.cell.unroll_plan import UnrollPlan
from keras_jacmon.jacobians.cell_jacobian import Assumptions, CellJacobian
from keras_jacmon.jacobians.checks import CheckResults
from keras_jacmon.jacobians.dependencies import find_dependencies
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.jacobians.views import floating_states, size
from keras_jacmon.measurement.assembly import CHECKS, SAMPLED, SPECTRA_AT, CallMetadata
from keras_jacmon.measurement.over_time import SequenceMeasurement, measure_sequence
from keras_jacmon.measurement.per_step import Results, StepMeasurement, in_segments
from keras_jacmon.measurement.subsampling import UNKNOWN_SAMPLES, choose_places
from keras_jacmon.measures.advice import with_advice
from keras_jacmon.measures.context import MeasureContext
from keras_jacmon.measures.registry import MEASURES, Selection, filtered
from keras_jacmon.model.recording import RecurrentCall
from keras_jacmon.options import Options
from keras_jacmon.tensors import known_sizes

# The shares of the memory allowed that a trajectory may take, that the derivatives at its points may take, and those of
# a segment of the sequence. What else is alive at that time, and what the allocator holds back between them, was
# measured to be more than all of these.
_SHARE_OF_TRAJECTORY, _SHARE_OF_DERIVATIVES, _SHARE_OF_SEQUENCES = 8, 3, 6

# What does not belong to single steps.
_NOT_OF_STEPS = {name for name, measure in MEASURES.items() if measure.of == "spectrum"}


def measure_call(
    call: RecurrentCall,
    measures: Selection,
    options: Options,
    *,
    trust: Assumptions,
    draw: tf.Tensor,
) -> tuple[CallMetadata, Results]:
    """Measures one call, in the graph that is being traced.

    Args:
        call: What the layer received.
        measures: What to measure, by view.
        options: How. `max_bytes` bounds the memory, through segments of the sequence and chunks of points.
        trust: What may be relied on. If not on the independence of rows, steps are taken one by one.
        draw: Counts the measurements; it decides which rows are certified.

    Returns:
        What is known before any number is, and the results: `mask` and each measure `(time, batch)`, and the results
        of the checks.

    Raises:
        ValueError: If no state has a derivative.
    """
    walk, step = UnrollInputs.of(call), CellStep(call.layer.cell, call.states)
    if not floating_states(walk.states):
        raise ValueError(f"None of its {len(walk.states)} states is floating-point, so there is no derivative")
    jacobian = CellJacobian(step, walk.inputs[0], walk.states, trust)
    connections = find_dependencies(step, walk.inputs[0], walk.states)
    facts = CallMetadata.of(call, walk.states, jacobian, connections, asked=measures, options=options)
    shortcut = jacobian.shortcut()

    dtype = walk.states[floating_states(walk.states)[0]].dtype
    time, samples = known_sizes(walk.inputs)[:2]
    selection = _of_views(measures, facts.views, several=bool(facts.joint))
    facts = dataclasses.replace(facts, has_structure=jacobian.has_structure(list(selection)))
    of_steps = filtered(selection, lambda measure: measure.of in ("step", "spectrum"))
    over_time = filtered(selection, lambda measure: measure.of in ("flow", "exponents"))
    places = choose_places(walk.mask, [time, samples], of_steps, options, independent=trust.independent)
    # Not a subclass, which may do something else with its gates.
    forgets = type(call.layer.cell) is keras.layers.LSTMCell
    context = MeasureContext(options, dtype, walk.inputs.shape[:2].num_elements())
    points = StepMeasurement(
        jacobian,
        filtered(with_advice(selection, forgets=forgets), lambda measure: measure.of in ("step", "spectrum")),
        tuple(selection),
        context,
        bytes_allowed=options.max_bytes // _SHARE_OF_DERIVATIVES,
        bytes_per_row=connections.bytes_per_row,
        draw=draw,
        independent=trust.independent,
        samples=samples,
    )

    def measure_segment(trajectory: Trajectory, index: tf.Tensor, start: tf.Tensor) -> tuple[Results, CheckResults]:
        stop = start + known_sizes(trajectory.inputs)[0]
        return points.measure(PointBatch.of(trajectory), trajectory.last, places.between(start, stop), index)

    steps = _most_steps(walk, shortcut, options.max_bytes // _SHARE_OF_TRAJECTORY)
    at_once = walk.inputs.shape[0] is not None and walk.inputs.shape[0] <= steps
    rows: PointBatch | None = None
    if at_once:
        trajectory = unroll(step, walk, shortcut)
        rows = PointBatch.of(trajectory)
        # Skipped steps need not be evaluated.
        rows = points.evaluated(rows) if walk.mask is None else rows
        results, checks = points.measure(rows, trajectory.last, places, 0)
    else:

        def unrolled(
            part: UnrollInputs, index: tf.Tensor, start: tf.Tensor
        ) -> tuple[Results, CheckResults, tuple[tf.Tensor, ...]]:
            here = unroll(step, part, shortcut)
            return *measure_segment(here, index, start), here.last

        results, checks = in_segments(walk, steps, points.types(), unrolled, dtype)
    results["mask"] = tf.ones([time, samples], tf.bool) if walk.mask is None else walk.mask
    if places.expensive is not None:
        results[SAMPLED] = places.expensive
    results = _in_order_of_input(results, walk.mask, [time, samples], go_backwards=call.layer.go_backwards)
    if places.spectra is not None:
        at = tf.where(places.spectra)
        results[SPECTRA_AT] = tf.stack([time - 1 - at[:, 0], at[:, 1]], axis=1) if call.layer.go_backwards else at
    if over_time:
        most_steps = max(
            1, min(steps, options.max_bytes // _SHARE_OF_SEQUENCES // points.bytes_per_row // _samples(walk))
        )
        # One behind the other, so that they do not need their memory at the same time.
        done = [*results.values(), *checks]
        with tf.control_dependencies([value.op for value in done]):
            begin = tuple(map(tf.identity, walk.states))
        whole = SequenceMeasurement(
            step, walk.between(0, time, begin), shortcut, jacobian, trust.independent, most_steps
        )
        results |= measure_sequence(whole, over_time, context, rows and rows.behind(done))
    return facts, results | {CHECKS: checks}


def _most_steps(walk: UnrollInputs, shortcut: UnrollPlan | None, max_bytes: int) -> int:
    """Of how many steps the trajectory fits into some memory."""
    once, twice = [walk.inputs[0]], [*walk.states]
    if shortcut:
        once += shortcut.prepared
        # A list of steps becomes one tensor, and for a moment there are both.
        twice += shortcut.saved
    values = sum(map(size, once)) + 2 * sum(map(size, twice))
    return max(1, max_bytes // (values * walk.states[floating_states(walk.states)[0]].dtype.size * _samples(walk)))


def _samples(walk: UnrollInputs) -> int:
    return int(walk.inputs.shape[1] or UNKNOWN_SAMPLES)


def _in_order_of_input(
    results: Results, mask: tf.Tensor | None, shape: Sequence[int | tf.Tensor], *, go_backwards: bool
) -> Results:
    """What belongs to steps as `(time, batch)`, by position in the input; NaN or False where they are skipped."""

    def ordered(value: tf.Tensor) -> tf.Tensor:
        value = tf.reshape(value, shape)
        if mask is not None:
            nothing = tf.constant(False if value.dtype.is_bool else float("nan"), value.dtype)
            value = tf.where(mask, value, nothing)
        return value[::-1] if go_backwards else value

    # A spectrum has two axes, and a certificate none.
    return {key: value if key.split("/")[-1] in _NOT_OF_STEPS else ordered(value) for key, value in results.items()}


def _of_views(measures: Selection, views: Sequence[str], *, several: bool) -> Selection:
    """The measures of the views that a cell has; with one state its hidden view is the joint one."""
    if several:
        return {view: chosen for view, chosen in measures.items() if view in views}
    states = {measure for view, of_view in measures.items() if view != "inputs" for measure in of_view}
    chosen = {"hidden": tuple(m for m in MEASURES.values() if m in states), "inputs": measures.get("inputs", ())}
    return {view: chosen[view] for view in views if chosen[view]}
