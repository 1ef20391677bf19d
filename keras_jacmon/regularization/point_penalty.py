"""The penalty at points of a trajectory: squared distances of a measure of the Jacobians there from a target."""

from collections.abc import Callable
from dataclasses import dataclass

import tensorflow as tf

from keras_jacmon.cell.sampling import Sample, sample, without_values
from keras_jacmon.cell.trajectory import UnrollInputs
from keras_jacmon.jacobians.cell_jacobian import CellJacobian
from keras_jacmon.jacobians.checks import check_independence, check_points
from keras_jacmon.jacobians.diagnosis import CheckResults
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.jacobians.views import floating_states, side_by_side
from keras_jacmon.measurement.measurable_call import SequenceTensors
from keras_jacmon.measurement.per_step import CHECKED_POINTS
from keras_jacmon.measures.context import MeasureContext
from keras_jacmon.measures.differentiable import DIFFERENTIABLE, Directions, eigenvector_parts, refined_vectors
from keras_jacmon.measures.spectral_norm import leading_singular_vectors
from keras_jacmon.operators.contract import JacobianOperator
from keras_jacmon.options import Options, ViewName
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
from keras_jacmon.regularization.penalty_config import PenaltyConfig
from keras_jacmon.tensors import known_sizes

# Relative tolerance of a spectral norm whose penalty is logged.
_LOGGED_TOLERANCE = 1e-3

# Maximum number of values that the unrolling computes for all steps at once.
_MOST_HOISTED = 2**24


class PointPenalty(Penalty):
    """The penalty on a cell as a function of points, in the graph that is being traced."""

    def new_points(self, sequence: SequenceTensors, moment: PenaltyMoment) -> tuple[NewPoints, CellJacobian]:
        """Takes points of a trajectory, all steps and samples alike."""
        chosen, jacobian = self._sampled(sequence, moment)
        points, leading = PointBatch(chosen.inputs, chosen.states), None
        if self._config.measure == "spectral_norm":
            leading = self._found_leading(jacobian, points, Options(seed=self._config.seed))
        checks = self._checked(jacobian, points, chosen, moment)
        distances = self._distances(jacobian, moment)
        present = self._present_leading(distances, points, None, anew=False) if leading is None else leading
        usable = distances.are_usable(points, present)
        left_out = tf.math.count_nonzero((chosen.weights > 0) & ~usable)
        weights = tf.where(usable, chosen.weights, tf.zeros_like(chosen.weights))
        taken = PenaltyPoints(chosen.inputs, chosen.states, weights)
        return NewPoints(taken, leading, checks, left_out, tf.math.count_nonzero(chosen.weights)), jacobian

    def at(
        self, chosen: PenaltyPoints, known: tf.Tensor | None, moment: PenaltyMoment, *, anew: bool
    ) -> tuple[tf.Tensor, CellJacobian]:
        """Returns the penalty at points that were taken before."""
        jacobian = self._jacobian(chosen.inputs, chosen.states)
        distances, points = self._distances(jacobian, moment), PointBatch(chosen.inputs, chosen.states)
        leading = self._present_leading(distances, points, known, anew=anew)
        # A point with a weight has a derivative, for it was examined when it was taken.
        return distances.mean(points, leading, chosen.weights, distances.are_finite(points, leading)), jacobian

    def along(
        self, sequence: SequenceTensors, known: tf.Tensor | None, moment: PenaltyMoment, *, anew: bool
    ) -> tuple[tf.Tensor, CellJacobian]:
        """Returns the penalty at points of the present trajectory."""
        chosen, jacobian = self._sampled(sequence, moment)
        inputs, states = chosen.inputs, chosen.states
        if not self._config.through_states:
            inputs, states = tf.stop_gradient(inputs), tuple(map(tf.stop_gradient, states))
        distances, points = self._distances(jacobian, moment), PointBatch(inputs, states)
        leading = self._present_leading(distances, points, known, anew=anew)
        finite = distances.are_finite(points, leading) & distances.are_usable(points, leading)
        return distances.mean(points, leading, chosen.weights, finite), jacobian

    def _distances(self, jacobian: CellJacobian, moment: PenaltyMoment) -> "_Distances":
        return _Distances(self._config, self._view, jacobian, moment)

    def _found_leading(self, jacobian: CellJacobian, points: PointBatch, options: Options) -> tf.Tensor:
        """Returns the leading singular vectors at some points `(points, n)`, within the tolerance of the options."""
        operator = jacobian.operators([self._view], points)[self._view]
        return leading_singular_vectors(operator, MeasureContext(options)).vectors

    def _present_leading(
        self, distances: "_Distances", points: PointBatch, known: tf.Tensor | None, *, anew: bool
    ) -> tf.Tensor | None:
        """Returns the leading vectors with the present weights; None if the measure needs none."""
        fixed = PointBatch(tf.stop_gradient(points.inputs), tuple(map(tf.stop_gradient, points.states)))
        if self._config.measure == "spectral_radius":
            return eigenvector_parts(distances.operator(fixed))
        if known is None:
            return None
        if anew:
            options = Options(seed=self._config.seed, tolerance=_LOGGED_TOLERANCE)
            return tf.stop_gradient(self._found_leading(distances.jacobian, fixed, options))
        seed = seed_of(self._config, PenaltyPurpose.LEADING_VECTORS, distances.moment.step)
        return tf.stop_gradient(refined_vectors(distances.operator(fixed), known, seed))

    def _checked(
        self, jacobian: CellJacobian, points: PointBatch, chosen: Sample, moment: PenaltyMoment
    ) -> CheckResults:
        """Returns the results of the checks, at the points with a weight."""
        seed = seed_of(self._config, PenaltyPurpose.CHECKS, moment.turn)
        valid = tf.cast(tf.where(chosen.weights > 0)[:, 0], tf.int32)

        def checked(check: Callable[..., CheckResults], some: tf.Tensor) -> CheckResults:
            new = [tf.gather(state, some) for state in chosen.new]
            return check(jacobian, [self._view], points.take(some), new, seed)

        checks = checked(check_points, valid[:CHECKED_POINTS])
        return checks if jacobian.point_by_point else checks.worst(checked(check_independence, valid))

    def _sampled(self, sequence: SequenceTensors, moment: PenaltyMoment) -> tuple[Sample, CellJacobian]:
        """Returns a sample of the points of a trajectory, and the Jacobian there."""
        unrolled = UnrollInputs(*sequence)
        jacobian = self._jacobian(unrolled.inputs[0], unrolled.states)
        plan = without_values(jacobian.unroll_plan(), known_sizes(unrolled.inputs)[:2], _MOST_HOISTED)
        return sample(self._cell_step, unrolled, plan, self._config.rows, moment.turn), jacobian


@dataclass(frozen=True, eq=False)
class _Distances:
    """The squared distance of a measure from its target, as a function of points `(points,)` and leading vectors.

    Attributes:
        config: `PenaltyConfig`.
        view: The view for this cell.
        jacobian: `CellJacobian`.
        moment: The numbers of this moment.
    """

    config: PenaltyConfig
    view: ViewName
    jacobian: CellJacobian
    moment: PenaltyMoment

    def __call__(self, points: PointBatch, leading: tf.Tensor | None) -> tf.Tensor:
        seed = seed_of(self.config, PenaltyPurpose.VECTORS, self.moment.step)
        directions = Directions(self.config.vectors, seed, leading)
        draws = DIFFERENTIABLE[self.config.measure](self.operator(points), directions)
        return squared_distance(draws, tf.cast(self.moment.target, draws.dtype), self.config)

    def operator(self, points: PointBatch) -> JacobianOperator:
        """Returns the Jacobians of the view at some points."""
        return self.jacobian.operators([self.view], points)[self.view]

    def are_finite(self, points: PointBatch, leading: tf.Tensor | None) -> tf.Tensor:
        """Returns boolean `(points,)`: True if the distance is finite."""
        return _are_finite(tf.stop_gradient(self(points, leading)))

    def are_usable(self, points: PointBatch, leading: tf.Tensor | None) -> tf.Tensor:
        """Returns boolean `(points,)`: True if the distance and its derivative by the states are finite.

        A NaN in the second derivative of the cell reaches the states as well as the weights.
        """
        floating = floating_states(points.states)
        states = [tf.stop_gradient(state) for state in points.states]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([states[q] for q in floating])
            distances = self(PointBatch(tf.stop_gradient(points.inputs), tuple(states)), leading)
        slopes = tape.gradient(distances, [states[q] for q in floating], unconnected_gradients="zero")
        slopes = side_by_side(list(map(tf.convert_to_tensor, slopes)))
        return _are_finite(distances) & tf.reduce_all(tf.math.is_finite(slopes), axis=-1)

    def mean(self, points: PointBatch, leading: tf.Tensor | None, weights: tf.Tensor, finite: tf.Tensor) -> tf.Tensor:
        """Returns the mean over the points that have a weight and a finite distance; zero if there are none."""
        finite &= weights > 0
        # Inputs may be whole numbers.
        dtype = points.states[floating_states(points.states)[0]].dtype
        total = tf.cond(
            tf.reduce_any(finite),
            lambda: self._mean_where(points, leading, finite),
            lambda: tf.zeros([], dtype),
        )
        return of_loss_type(total)

    def _mean_where(self, points: PointBatch, leading: tf.Tensor | None, finite: tf.Tensor) -> tf.Tensor:
        inputs, states, leading = mended((points.inputs, points.states, leading), finite)
        distances = self(PointBatch(inputs, states), leading)
        shares = tf.cast(finite, distances.dtype)
        return tf.reduce_sum(shares * distances) / tf.maximum(tf.reduce_sum(shares), 1)


def _are_finite(distances: tf.Tensor) -> tf.Tensor:
    """Returns boolean `(points,)`: True if the distance, times the number of points, is finite."""
    return tf.math.is_finite(distances * tf.cast(tf.size(distances), distances.dtype))
