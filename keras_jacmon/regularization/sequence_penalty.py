"""The penalty along whole trajectories: squared distances of a measure over time from a target."""

from collections.abc import Sequence

import tensorflow as tf

from keras_jacmon.cell.trajectory import UnrollInputs, unroll
from keras_jacmon.jacobians.cell_jacobian import CellJacobian
from keras_jacmon.jacobians.checks import check_independence, check_points
from keras_jacmon.jacobians.dependencies import find_dependencies
from keras_jacmon.jacobians.diagnosis import CheckResults
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.jacobians.views import floating_states, size
from keras_jacmon.measurement.measurable_call import SequenceTensors
from keras_jacmon.measurement.per_step import CHECKED_POINTS
from keras_jacmon.measures.differentiable_over_time import DIFFERENTIABLE_OVER_TIME, Beginnings
from keras_jacmon.measures.flow import FlowPlan
from keras_jacmon.measures.steps import Steps
from keras_jacmon.regularization.penalty import (
    NewPoints,
    Penalty,
    PenaltyMoment,
    PenaltyPoints,
    PenaltyPurpose,
    mended,
    of_loss_type,
    seed_of,
    squared_distance,
)
from keras_jacmon.tensors import as_points, finite_points, known_sizes, swapped


class SequencePenalty(Penalty):
    """The penalty on a cell as a function of trajectories, in the graph that is being traced.

    Its points are samples: inputs and states are `(samples, time, ...)`, and weights `(samples, time)`, 0 at the steps
    that are skipped. There are no leading singular vectors.
    """

    def new_points(self, sequence: SequenceTensors, moment: PenaltyMoment) -> tuple[NewPoints, CellJacobian]:
        """Takes the trajectories of some samples."""
        points, new, jacobian = self._sampled(sequence, moment)
        checks = self._checked(jacobian, points, new, moment)
        usable = self._are_usable(jacobian, points, moment)
        counts = tf.reduce_any(points.weights > 0, axis=1)
        weights = tf.where(usable[:, None], points.weights, tf.zeros_like(points.weights))
        left_out = tf.math.count_nonzero(counts & ~usable)
        taken = PenaltyPoints(points.inputs, points.states, weights)
        return NewPoints(taken, None, checks, left_out, tf.math.count_nonzero(counts)), jacobian

    def at(
        self,
        chosen: PenaltyPoints,
        known: tf.Tensor | None,  # noqa: ARG002 - as in the base class
        moment: PenaltyMoment,
        *,
        anew: bool,  # noqa: ARG002 - as in the base class
    ) -> tuple[tf.Tensor, CellJacobian]:
        """Returns the penalty along trajectories that were taken before."""
        jacobian = self._jacobian(chosen.inputs[:, 0], [state[:, 0] for state in chosen.states])
        return self._mean(jacobian, chosen, tf.reduce_any(chosen.weights > 0, axis=1), moment), jacobian

    def along(
        self,
        sequence: SequenceTensors,
        known: tf.Tensor | None,  # noqa: ARG002 - as in the base class
        moment: PenaltyMoment,
        *,
        anew: bool,  # noqa: ARG002 - as in the base class
    ) -> tuple[tf.Tensor, CellJacobian]:
        """Returns the penalty along the present trajectories."""
        points, _, jacobian = self._sampled(sequence, moment)
        if not self._config.through_states:
            points = PenaltyPoints(*tf.nest.map_structure(tf.stop_gradient, tuple(points)))
        usable = self._are_usable(jacobian, points, moment) & tf.reduce_any(points.weights > 0, axis=1)
        return self._mean(jacobian, points, usable, moment), jacobian

    def _mean(
        self, jacobian: CellJacobian, points: PenaltyPoints, counts: tf.Tensor, moment: PenaltyMoment
    ) -> tf.Tensor:
        """Returns the mean over the samples that count and whose distance is finite; zero if there are none."""
        counts &= tf.math.is_finite(tf.stop_gradient(self._distances(jacobian, points, moment)))

        def mean() -> tf.Tensor:
            safe = PenaltyPoints(*mended(tuple(points), counts))
            distances = self._distances(jacobian, safe, moment)
            shares = tf.cast(counts, distances.dtype)
            return tf.reduce_sum(shares * distances) / tf.reduce_sum(shares)

        none = tf.zeros([], points.weights.dtype)
        return of_loss_type(tf.cond(tf.reduce_any(counts), mean, lambda: none))

    def _are_usable(self, jacobian: CellJacobian, points: PenaltyPoints, moment: PenaltyMoment) -> tf.Tensor:
        """Returns boolean `(samples,)`: True if the distance and its derivative by the states are finite."""
        floating = floating_states(points.states)
        states = [tf.stop_gradient(state) for state in points.states]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([states[q] for q in floating])
            fixed = PenaltyPoints(tf.stop_gradient(points.inputs), tuple(states), points.weights)
            distances = self._distances(jacobian, fixed, moment)
        slopes = tape.gradient(distances, [states[q] for q in floating], unconnected_gradients="zero")
        finite = [finite_points(x) for x in slopes]
        return tf.reduce_all(tf.stack([tf.math.is_finite(distances), *finite]), axis=0)

    def _distances(self, jacobian: CellJacobian, points: PenaltyPoints, moment: PenaltyMoment) -> tf.Tensor:
        """Returns the mean squared distance of the values of each sample from the target, `(samples,)`."""
        inputs, mask = swapped(points.inputs), swapped(points.weights) > 0
        states = list(map(swapped, points.states))
        time, samples = known_sizes(inputs)[:2]

        def at(t: tf.Tensor) -> tf.linalg.LinearOperator:
            here = PointBatch(tf.gather(inputs, t), tuple(tf.gather(state, t) for state in states))
            return jacobian.operators([self._view], here)[self._view]

        def every() -> tf.linalg.LinearOperator:
            together = PointBatch(as_points(inputs), tuple(map(as_points, states)))
            return jacobian.operators([self._view], together)[self._view]

        sizes = self._sizes(points.states)
        steps = Steps(time, at, mask, samples, sum(sizes), states[floating_states(states)[0]].dtype, every)
        plan = FlowPlan.of(sizes, self._begins(inputs, states), self._config.vectors, cheap=False)
        seeds = [seed_of(self._config, PenaltyPurpose.TRAJECTORIES, number) for number in (moment.step, 0)]
        values = DIFFERENTIABLE_OVER_TIME[self._config.measure](steps, Beginnings(plan, *seeds))
        # Several values are no draws of one, whose products would be taken.
        flat = tf.reshape(values, [1, -1])
        squares = squared_distance(flat, tf.cast(moment.target, values.dtype), self._config)
        return tf.reduce_mean(tf.reshape(squares, tf.shape(values)), axis=0)

    def _sizes(self, states: Sequence[tf.Tensor]) -> tuple[int, ...]:
        """Returns the sizes of the states of the view."""
        floating = floating_states(states)
        flat = [states[q][:, 0] for q in (floating[:1] if self._view == "hidden" else floating)]
        return tuple(map(size, flat))

    def _begins(self, inputs: tf.Tensor, states: Sequence[tf.Tensor]) -> tuple[bool, ...]:
        """Returns for each state of the view True if the flow begins there: those that the output is made from."""
        if self._view == "hidden":
            return (True,)
        outputs = find_dependencies(self._cell_step, inputs[0], [state[0] for state in states]).outputs
        return tuple(place in outputs for place in range(len(floating_states(states))))

    def _sampled(
        self, sequence: SequenceTensors, moment: PenaltyMoment
    ) -> tuple[PenaltyPoints, tuple[tf.Tensor, ...], CellJacobian]:
        """Returns the trajectories of some samples, other ones at each turn; their new states; and the Jacobian."""
        unrolled = UnrollInputs(*sequence)
        jacobian = self._jacobian(unrolled.inputs[0], unrolled.states)
        time, samples = known_sizes(unrolled.inputs)[:2]
        width = max(1, self._config.rows // time) if isinstance(time, int) else 1
        width = min(width, samples) if isinstance(samples, int) else 1
        chosen = (tf.range(width) + width * moment.turn) % samples
        trajectory = unroll(self._cell_step, unrolled, None, tf.tile(chosen[None], [time, 1]))
        dtype = trajectory.states[floating_states(trajectory.states)[0]].dtype
        if unrolled.mask is None:
            weights = tf.ones([width, time], dtype)
        else:
            weights = tf.cast(tf.transpose(tf.gather(unrolled.mask, chosen, axis=1)), dtype)
        points = PenaltyPoints(swapped(trajectory.inputs), tuple(map(swapped, trajectory.states)), weights)
        return points, trajectory.new, jacobian

    def _checked(
        self, jacobian: CellJacobian, points: PenaltyPoints, new: Sequence[tf.Tensor], moment: PenaltyMoment
    ) -> CheckResults:
        """Returns the results of the checks at the points that are not skipped."""
        seed = seed_of(self._config, PenaltyPurpose.CHECKS, moment.turn)
        flat = PointBatch(as_points(swapped(points.inputs)), tuple(as_points(swapped(s)) for s in points.states))
        made = list(map(as_points, new))
        finite = [finite_points(x) for x in made if x.dtype.is_floating]
        valid = tf.reduce_all(tf.stack([as_points(swapped(points.weights)) > 0, *finite]), axis=0)
        places = tf.cast(tf.where(valid)[:, 0], tf.int32)
        few = places[:CHECKED_POINTS]
        views = [self._view]
        checks = check_points(jacobian, views, flat.take(few), [tf.gather(x, few) for x in made], seed)
        if jacobian.point_by_point:
            return checks
        others = check_independence(jacobian, views, flat.take(places), [tf.gather(x, places) for x in made], seed)
        return checks.worst(others)
