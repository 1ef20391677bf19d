"""One call of a recurrent layer, measured: the graph from its inputs to the measures of each step and sample."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow as tf

from keras_jacmon.cell.step import CellStep
from keras_jacmon.cell.trajectory import UnrollInputs, unroll
from keras_jacmon.cell.unroll_plan import UnrollPlan
from keras_jacmon.jacobians.cell_jacobian import Assumptions, CellJacobian
from keras_jacmon.jacobians.dependencies import find_dependencies
from keras_jacmon.jacobians.diagnosis import CheckResults
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.jacobians.recurrent_weights import RecurrentWeights
from keras_jacmon.jacobians.registered_forms import registered_form
from keras_jacmon.jacobians.views import floating_states, size
from keras_jacmon.measurement.metadata import CallMetadata
from keras_jacmon.measurement.over_time import measure_sequence
from keras_jacmon.measurement.per_segment import in_segments
from keras_jacmon.measurement.per_step import StepMeasurement
from keras_jacmon.measurement.results import (
    CallResults,
    MeasuredArray,
    PlannedFlow,
    PlannedSensitivity,
    SensitivityResults,
)
from keras_jacmon.measurement.segments import SequenceMeasurement
from keras_jacmon.measurement.sensitivity import measure_sensitivity, plan_sensitivity
from keras_jacmon.measurement.subsampling import UNKNOWN_SAMPLES, Subsample, choose_subsample
from keras_jacmon.measures.context import MeasureContext
from keras_jacmon.measures.kinds import Exponents, Flow, Sensitivity
from keras_jacmon.measures.selection import KEYS, Selection, filtered, of_kind, views_of
from keras_jacmon.options import Options, ViewName
from keras_jacmon.tensors import known_sizes

# `max_bytes` is divided by these numbers for a trajectory, for the derivatives at its points, and for a segment of the
# sequence. Other live tensors, and the memory that the allocator holds back, were measured to take more than all three.
_SHARE_OF_TRAJECTORY, _SHARE_OF_DERIVATIVES, _SHARE_OF_SEQUENCES = 8, 3, 6


def measure_call(
    step: CellStep,
    sequence: UnrollInputs,
    measures: Selection,
    options: Options,
    *,
    assumptions: Assumptions,
    draw: tf.Tensor,
) -> tuple[CallMetadata, CallResults]:
    """Measures one call, in the graph that is being traced.

    Args:
        step: The step of the cell.
        sequence: The sequence, in the order in which the cell runs.
        measures: The quantities that the user selected.
        options: The settings. `max_bytes` bounds the memory, through segments of the sequence and chunks of points.
        assumptions: The assumptions behind the Jacobians. If the points are not independent, steps are measured one
            by one.
        draw: Integer scalar, number of measurements before this one; it decides which points are checked.

    Returns:
        The metadata of the call, and its results in the order in which the cell runs.

    Raises:
        ValueError: If no state has a derivative.
    """
    if not floating_states(sequence.states):
        raise ValueError(f"None of its {len(sequence.states)} states is floating-point, so there is no derivative")
    # A registered form takes tensors. Elsewhere shape and type are enough.
    first = sequence.of_a_step if registered_form(step.cell) is None else sequence.inputs[0]
    jacobian = CellJacobian(step, first, sequence.states, assumptions)
    dependencies = find_dependencies(step, first, sequence.states)
    asked = [view for view in views_of(measures) if view != "inputs" or assumptions.inputs]
    if not asked:
        raise ValueError("The new states of a sample depend on the inputs of others: there is no Jacobian by its own")
    metadata = CallMetadata.of(step.cell, sequence, jacobian, dependencies, asked=asked, options=options)
    if not assumptions.inputs:
        missing = "the new states of a sample depend on the inputs of others, so the inputs view is left out"
        metadata = dataclasses.replace(metadata, notes=(*metadata.notes, missing))
    selection = _selection(measures, metadata, carried=bool(dependencies.carried))
    of_points = filtered(selection, lambda measure: not measure.kind.over_time)
    exponents, of_sensitivity = of_kind(selection, Exponents), of_kind(selection, Sensitivity)
    sensitivity = PlannedSensitivity(None, "")
    if of_sensitivity:
        sensitivity = plan_sensitivity(jacobian, sequence.states, views_of(of_sensitivity), options)
    metadata = dataclasses.replace(
        metadata.with_sensitivity(of_sensitivity, sensitivity),
        has_structure=jacobian.has_structure(views_of(selection)),
        quantities=(*of_points, *exponents),
        of_flows=of_kind(selection, Flow),
        recurrent_places=_recurrent_places(jacobian),
    )
    # The sensitivity is led through all states, whatever its view.
    used = [*views_of(selection), *["joint" for _ in metadata.sensitivity_plans if metadata.joint]]
    measurement = StepMeasurement(
        jacobian,
        of_points,
        tuple(dict.fromkeys(used)),
        MeasureContext(options, _dtype(sequence), sequence.inputs.shape[:2].num_elements()),
        bytes_allowed=options.max_bytes // _SHARE_OF_DERIVATIVES,
        bytes_per_point=dependencies.bytes_per_point,
        draw=draw,
        independent=assumptions.independent,
        samples=known_sizes(sequence.inputs)[1],
    )
    call = _Call(step, sequence, jacobian.unroll_plan(), measurement, metadata.flows, sensitivity)
    results = call.results(exponents)
    return dataclasses.replace(metadata, graphs=jacobian.graphs), results


@dataclass(frozen=True)
class _Call:
    """One call, ready to be measured.

    Attributes:
        step: The step of the cell.
        sequence: The sequence, in the order in which the cell runs.
        unroll_plan: The plan that `unroll` follows; None for a plain loop.
        measurement: The measurement of single points.
        flows: Tuple of the flows to be measured.
        sensitivity: The sensitivity to be measured.
    """

    step: CellStep
    sequence: UnrollInputs
    unroll_plan: UnrollPlan | None
    measurement: StepMeasurement
    flows: tuple[PlannedFlow, ...]
    sensitivity: PlannedSensitivity

    def results(self, exponents: Selection) -> CallResults:
        """Measures single points, and then the products over time: the flows, and the exponents."""
        sequence, measurement, options = self.sequence, self.measurement, self.measurement.context.options
        shape = known_sizes(sequence.inputs)[:2]
        subsample = choose_subsample(
            sequence.mask, shape, measurement.quantities, options, independent=measurement.independent
        )
        steps = _most_steps(sequence, self.unroll_plan, options.max_bytes // _SHARE_OF_TRAJECTORY)
        arrays, checks, points = self._at_points(subsample, steps)
        results = CallResults(
            tf.ones(shape, tf.bool) if sequence.mask is None else sequence.mask,
            subsample.sampled,
            None if subsample.spectra is None else tf.where(subsample.spectra),
            checks,
            tuple(arrays),
        )
        if exponents or self.flows:
            whole, done = self._whole(steps, results)
            numbers, found = measure_sequence(whole, exponents, measurement.context, points and points.after(done))
            results = results._replace(arrays=(*results.arrays, *found), flows=tuple(numbers))
        return results._replace(sensitivities=self._sensitivities(steps, results))

    def _at_points(
        self, subsample: Subsample, steps: int
    ) -> tuple[list[MeasuredArray], CheckResults, PointBatch | None]:
        """Measures the points, at once or in segments.

        Returns:
            The values, the checks, and the points; None for the points if they were measured in segments.
        """
        sequence, measurement = self.sequence, self.measurement
        if sequence.inputs.shape[0] is not None and sequence.inputs.shape[0] <= steps:
            trajectory = unroll(self.step, sequence, self.unroll_plan)
            points = PointBatch.of(trajectory)
            # Skipped steps need not be evaluated.
            points = measurement.evaluated(points) if sequence.mask is None else points
            return *measurement.measure(points, trajectory.last, subsample, 0), points

        def measure_segment(
            part: UnrollInputs, index: tf.Tensor, start: tf.Tensor
        ) -> tuple[list[MeasuredArray], CheckResults, tuple[tf.Tensor, ...]]:
            here = unroll(self.step, part, self.unroll_plan)
            stop = start + known_sizes(here.inputs)[0]
            return *measurement.measure(
                PointBatch.of(here), here.last, subsample.between(start, stop), index
            ), here.last

        return *in_segments(sequence, steps, measurement, measure_segment), None

    def _whole(self, steps: int, results: CallResults) -> tuple[SequenceMeasurement, list[tf.Tensor]]:
        """Returns the sequence for measures over time, and the results that it waits for.

        So the memory of both is not held at once.
        """
        sequence, measurement = self.sequence, self.measurement
        options = measurement.context.options
        most = options.max_bytes // _SHARE_OF_SEQUENCES // measurement.bytes_per_point // _samples(sequence)
        done = [results.mask, *results.checks, *results.flows]
        done += [tensor for array in results.arrays for tensor in (array.value, array.uncertainty)]
        with tf.control_dependencies([tensor.op for tensor in done]):
            begin = tuple(map(tf.identity, sequence.states))
        whole = SequenceMeasurement(
            self.step,
            dataclasses.replace(sequence, states=begin),
            self.unroll_plan,
            measurement.jacobian,
            measurement.independent,
            max(1, min(steps, most)),
            self.flows,
        )
        return whole, done

    def _sensitivities(self, steps: int, results: CallResults) -> tuple[SensitivityResults, ...]:
        """Measures the sensitivity of the last state, in each view."""
        weights, context = self.sensitivity.weights, self.measurement.context
        if weights is None:
            return ()
        whole, _ = self._whole(steps, results)
        bytes_per_point = self.measurement.bytes_per_point
        max_bytes = context.options.max_bytes // _SHARE_OF_SEQUENCES
        return tuple(
            measure_sensitivity(whole, weights, plan, context, max_bytes=max_bytes, bytes_per_point=bytes_per_point)
            for plan in self.sensitivity.plans
        )


def _recurrent_places(jacobian: CellJacobian) -> tuple[int, ...] | None:
    """Returns the positions of the weights that multiply states among those that the step is given, if it is known."""
    # In the scope of a strategy with replicas the step has no graph of its own: no variable tells which copy it is.
    known = bool(jacobian.step.weights) and not tf.distribute.has_strategy()
    graph = jacobian.graph() if known else None
    return None if graph is None else RecurrentWeights.of(jacobian.step, graph).places


def _most_steps(sequence: UnrollInputs, unroll_plan: UnrollPlan | None, max_bytes: int) -> int:
    """Returns the maximum number of steps whose trajectory fits into `max_bytes`."""
    once, twice = [sequence.of_a_step], [*sequence.states]
    if unroll_plan:
        once += unroll_plan.prepared
        # A list of steps becomes one tensor, and for a moment there are both.
        twice += unroll_plan.saved
    values = sum(map(size, once)) + 2 * sum(map(size, twice))
    return max(1, max_bytes // (values * _dtype(sequence).size * _samples(sequence)))


def _samples(sequence: UnrollInputs) -> int:
    return int(sequence.inputs.shape[1] or UNKNOWN_SAMPLES)


def _dtype(sequence: UnrollInputs) -> tf.DType:
    """Returns the dtype of the Jacobians."""
    return sequence.states[floating_states(sequence.states)[0]].dtype


def _selection(measures: Selection, metadata: CallMetadata, *, carried: bool) -> Selection:
    """Returns the selected quantities that a cell has.

    Args:
        measures: The quantities that the user selected.
        metadata: The metadata of the call.
        carried: Boolean, True if there are states that are carried on and that the output never feels.
    """
    measures = tuple(dict.fromkeys(q._replace(view=metadata.labels.get(str(q.view), q.view)) for q in measures))
    selection = _of_views(measures, metadata.views, several=bool(metadata.joint))
    inputs_are_square = metadata.columns.get("inputs") == metadata.units
    selection = tuple(q for q in selection if q.view != "inputs" or inputs_are_square or not q.measure.needs_square)
    of_all = (KEYS["joint/flow_of_all"],) if carried and KEYS["joint/flow"] in selection else ()
    return (*selection, *of_all)


def _of_views(measures: Selection, views: Sequence[ViewName], *, several: bool) -> Selection:
    """Returns the measures of the views that a cell has; with one state, its hidden view is the joint view."""
    if not several:
        wanted = {("hidden" if view == "joint" else view, measure) for view, measure in measures}
        chosen = (quantity for quantity in measures if not isinstance(quantity.view, str))
        measures = (*(quantity for quantity in KEYS.values() if quantity in wanted), *chosen)
    # The last state has a sensitivity even if it is made from other states alone.
    return tuple(
        q for q in measures if q.view in views or (q.view == "hidden" and isinstance(q.measure.kind, Sensitivity))
    )
