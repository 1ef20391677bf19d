"""One call of a recurrent layer over its whole sequence: the sensitivity of the last state to the recurrent weights.

The sums over the steps have as many entries as the weights, for each sample and vector. So some samples at a time are
led through the whole sequence, and a long one in segments: forwards for the states at their beginnings, then backwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import tensorflow as tf

from keras_jacmon.cell.trajectory import Trajectory, UnrollInputs, unroll
from keras_jacmon.jacobians.cell_jacobian import CellJacobian
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.jacobians.recurrent_weights import RecurrentWeights
from keras_jacmon.jacobians.views import floating_states, side_by_side, size
from keras_jacmon.measurement.results import PlannedSensitivity, SensitivityResults
from keras_jacmon.measurement.segments import SequenceMeasurement
from keras_jacmon.measures.context import MeasureContext, Purpose
from keras_jacmon.measures.flow import FlowPlan, start_flow
from keras_jacmon.measures.sensitivity import SensitivityCarry, add_derivatives, add_outer_products, lead_backwards
from keras_jacmon.options import Options, ViewName
from keras_jacmon.tensors import known_sizes

# With longer segments the products of all steps with each other take longer than the sums do.
_MOST_STEPS = 128

# Of the sums: as they were, what is added, and what they become.
_COPIES = 3

# Of each derivative by a product: one number in single precision, and two in double precision.
_BYTES_OF_FACTORS = 20

# Relative error at which derivatives that were taken of all points at once count as wrong.
_TOLERANCE = 1e-3


def plan_sensitivity(
    jacobian: CellJacobian, states: Sequence[tf.Tensor], views: Sequence[ViewName], options: Options
) -> PlannedSensitivity:
    """Finds the recurrent weights of a cell, and chooses the random vectors of each view.

    Args:
        jacobian: The Jacobians of the cell.
        states: Sequence of tensors `(points, ...)`, the flat states; only shapes and types count.
        views: Sequence of strings, the views of the last state: `"hidden"` for the first one alone, `"joint"` for all.
        options: The setting `flow_vectors`.
    """
    if not jacobian.assumptions.independent:
        return PlannedSensitivity(None, "its samples are not independent of each other")
    weights = RecurrentWeights.of(jacobian.step, jacobian.graph())
    if not weights.step.weights:
        return PlannedSensitivity(None, "the cell has no weights of Keras that could be read")
    if weights.has_branch:
        return PlannedSensitivity(None, "the step chooses between branches by values")
    if not weights.places:
        return PlannedSensitivity(None, "no weight of the cell multiplies a state")
    sizes = tuple(size(states[place]) for place in floating_states(states))
    felt: dict[ViewName, tuple[bool, ...]] = {
        "hidden": (True, *[False] * (len(sizes) - 1)),
        "joint": (True,) * len(sizes),
    }
    # With products all vectors take one pass together.
    cheap = bool(weights.products)
    plans = tuple(FlowPlan.of(sizes, felt[view], options.flow_vectors, cheap=cheap) for view in views)
    return PlannedSensitivity(weights, "", plans)


def measure_sensitivity(
    measurement: SequenceMeasurement,
    weights: RecurrentWeights,
    plan: FlowPlan,
    context: MeasureContext,
    *,
    max_bytes: int,
    bytes_per_point: int,
) -> SensitivityResults:
    """Measures the sensitivity of the last state, in the graph that is being traced.

    Args:
        measurement: The sequence and the operators of its cell.
        weights: The recurrent weights of the cell.
        plan: The vectors at the last state.
        context: Settings of the measures.
        max_bytes: Integer, memory for the points of a segment, and for the sums.
        bytes_per_point: Integer, memory for one evaluation of the cell with its derivative at a point.

    Returns:
        The numbers of each step, the norms of the last state, and the size of the weights.
    """
    sequence = measurement.sequence
    time, samples = sequence.inputs.shape[0], known_sizes(sequence.inputs)[1]
    points = max_bytes // (bytes_per_point + _BYTES_OF_FACTORS * plan.vectors * weights.outputs)
    at_once = time is not None and time <= min(points, _MOST_STEPS)
    most = time if at_once else min(measurement.most_steps, _MOST_STEPS)
    whole = _Pass(replace(measurement, most_steps=most), weights, plan, context, at_once)
    chunk = max_bytes // max(1, whole.bytes_of_sums)
    if at_once:
        # Fewer samples at a time rather than several segments, which need sums.
        chunk = min(chunk, points // time)
    vectors = start_flow(samples, plan, context.seeds(Purpose.SENSITIVITY), context.dtype).vectors
    if isinstance(samples, int) and samples <= chunk:
        numbers, norms = whole.of_samples(sequence, vectors)
    else:
        numbers, norms = _in_chunks(whole, sequence, vectors, max(1, chunk))
    return SensitivityResults(numbers, norms, weights.size())


def _in_chunks(whole: "_Pass", sequence: UnrollInputs, vectors: tf.Tensor, chunk: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Measures some samples after others."""
    samples = tf.shape(sequence.inputs)[1]
    count = -(-samples // chunk)

    def body(index: tf.Tensor, arrays: list[tf.TensorArray]) -> tuple[tf.Tensor, list[tf.TensorArray]]:
        here = slice(index * chunk, tf.minimum((index + 1) * chunk, samples))
        mask = None if sequence.mask is None else sequence.mask[:, here]
        part = UnrollInputs(sequence.inputs[:, here], tuple(state[here] for state in sequence.states), mask)
        numbers, norms = whole.of_samples(part, vectors[here])
        found = (tf.transpose(numbers, [2, 0, 1]), norms)
        return index + 1, [array.write(index, value) for array, value in zip(arrays, found, strict=True)]

    empty = [
        tf.TensorArray(tf.float64, count, infer_shape=False, element_shape=shape) for shape in ([None, None, 2], [None])
    ]
    # Several chunks at a time would need the memory of all of them.
    _, arrays = tf.while_loop(lambda index, _: index < count, body, [tf.constant(0), empty], parallel_iterations=1)
    numbers, norms = (array.concat() for array in arrays)
    return tf.transpose(numbers, [1, 2, 0]), norms


@dataclass(frozen=True)
class _Pass:
    """A pass through the sequence of some samples.

    Attributes:
        measurement: The sequence and the operators of its cell.
        weights: The recurrent weights of the cell.
        plan: The vectors at the last state.
        context: Settings of the measures.
        at_once: Boolean, True if the sequence is one segment.
    """

    measurement: SequenceMeasurement
    weights: RecurrentWeights
    plan: FlowPlan
    context: MeasureContext
    at_once: bool

    @property
    def bytes_of_sums(self) -> int:
        """The memory for the sums of a sample; 0 if none are kept."""
        kept = sum(map(_entries, self._shapes))
        return _COPIES * tf.float64.size * self.plan.vectors * kept

    @property
    def _shapes(self) -> list[list[int]]:
        """The shapes of the sums, without samples and vectors."""
        if not self.weights.products:
            return [[self.weights.count]]
        if self.at_once:
            return []
        return [list(map(int, operation.inputs[1].shape)) for operation in self.weights.products]

    def of_samples(self, sequence: UnrollInputs, vectors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the numbers of each step, `(time, 2, samples)`, and the norms of the last state, `(samples,)`.

        Derivatives that are no outer products are taken of all points at once; where that is found to be wrong, once
        more of each point by itself.
        """
        vectorized = self.weights.may_be_vectorized
        numbers, norms, deviation = self._run(sequence, vectors, vectorized=vectorized)
        if not vectorized or self.weights.products:
            return numbers, norms

        def one_by_one() -> tf.Tensor:
            return self._run(sequence, vectors, vectorized=False)[0]

        return tf.cond(deviation > _TOLERANCE, one_by_one, lambda: numbers), norms

    def _run(
        self, sequence: UnrollInputs, vectors: tf.Tensor, *, vectorized: bool
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns what `of_samples` does, and the largest relative error that a check found."""
        measurement = replace(self.measurement, sequence=sequence)
        carry = SensitivityCarry.start(vectors, self._shapes)
        if self.at_once:
            trajectory = unroll(measurement.step, sequence, measurement.unroll_plan)
            numbers, carry = self._segment(measurement, sequence, trajectory, carry, vectorized=vectorized)
            return numbers, self._norms(trajectory.last), carry.deviation
        starts, last = measurement.states_at_segments()

        def body(index: tf.Tensor, carry: SensitivityCarry, kept: tf.TensorArray) -> tuple[tf.Tensor, ...]:
            part, trajectory = measurement.segment_at(index, [array.read(index) for array in starts])
            numbers, carry = self._segment(measurement, part, trajectory, carry, vectorized=vectorized)
            return index - 1, carry, kept.write(index, numbers)

        count = measurement.segment_count
        empty = tf.TensorArray(tf.float64, count, infer_shape=False, element_shape=[None, 2, None])
        _, carry, kept = tf.while_loop(
            lambda index, *_: index >= 0, body, [count - 1, carry, empty], parallel_iterations=1
        )
        return kept.concat(), self._norms(last), carry.deviation

    def _segment(
        self,
        measurement: SequenceMeasurement,
        part: UnrollInputs,
        trajectory: Trajectory,
        carry: SensitivityCarry,
        *,
        vectorized: bool,
    ) -> tuple[tf.Tensor, SensitivityCarry]:
        """Leads the vectors through a segment, and adds what its steps do."""
        points = PointBatch.of(trajectory)
        found, carry = lead_backwards(measurement.steps_of(part, points, {"joint"}, self.context)["joint"], carry)
        time, samples = known_sizes(part.inputs)[:2]
        size = [self.plan.vectors, sum(self.plan.sizes)]
        if self.weights.products:
            factors = self.weights.factors(points, tf.reshape(found.vectors, [-1, *size]))
            by_step = [tuple(tf.reshape(part, [time, samples, *part.shape[1:]]) for part in pair) for pair in factors]
            return add_outer_products(found, by_step, carry)

        def at(t: tf.Tensor, vectors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            here, vectors = points.between(t * samples, (t + 1) * samples), tf.ensure_shape(vectors, [None, *size])
            derivatives = self.weights.derivatives(here, vectors, vectorized=vectorized)
            error = self.weights.deviation(here, vectors, derivatives) if vectorized else tf.constant(0.0)
            return derivatives, error

        return add_derivatives(found, at, carry)

    def _norms(self, last: Sequence[tf.Tensor]) -> tf.Tensor:
        """Returns the norms of the states whose sensitivity is measured, `(samples,)`."""
        floating = [last[place] for place in floating_states(last)]
        felt = [state for state, begins in zip(floating, self.plan.begins, strict=True) if begins]
        return tf.norm(tf.cast(side_by_side(felt), tf.float64), axis=-1)


def _entries(shape: Sequence[int]) -> int:
    return int(tf.TensorShape(shape).num_elements())
