"""The penalty on one recurrent call: squared distances of a measure of its Jacobians from a target."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_jacmon.cell.sampling import Sample, sample, without_values
from keras_jacmon.cell.step import CellStep
from keras_jacmon.cell.trajectory import UnrollInputs
from keras_jacmon.jacobians.cell_jacobian import Assumptions, CellJacobian
from keras_jacmon.jacobians.checks import CheckResults, check_independence, check_points, diagnose
from keras_jacmon.jacobians.dependencies import find_dependencies
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.jacobians.views import floating_states, side_by_side
from keras_jacmon.measurement.per_step import CHECKED_POINTS
from keras_jacmon.measures.context import MeasureContext
from keras_jacmon.measures.differentiable import DIFFERENTIABLE, TINY, Directions, refined_vectors
from keras_jacmon.measures.spectrum import leading_singular_vectors
from keras_jacmon.model.distribution import own_variable
from keras_jacmon.model.guard import foreign_variables, put_back
from keras_jacmon.model.recording import Recording, RecurrentCall
from keras_jacmon.options import Options
from keras_jacmon.regularization.loss_terms import SCOPE
from keras_jacmon.regularization.penalty_config import PenaltyConfig
from keras_jacmon.tensors import known_sizes
from keras_jacmon.traced_graph import Traced, trace

# Relative tolerance of a spectral norm whose penalty is logged.
_LOGGED_TOLERANCE = 1e-3

# Maximum number of values that the unrolling computes for all steps at once.
_MOST_HOISTED = 2**24


class RefreshResult(NamedTuple):
    """The findings at new points of a trajectory.

    Attributes:
        checks: Checks of the assumptions behind the Jacobians, at some of the points.
        left_out: Integer scalar, the number of points without a finite penalty.
        valid: Integer scalar, the number of points that are not masked and have finite states.
    """

    checks: CheckResults
    left_out: tf.Tensor
    valid: tf.Tensor


class CallPenalty:
    """The penalty on one call of a recurrent layer: called, it returns a scalar with derivatives by the weights.

    Args:
        config: `PenaltyConfig`.
        model: Keras model, which puts back its own variables if a cell writes to them.
        call: The recorded call, for its shapes and states; its tensors are not kept.
        target: Scalar variable, the target of the measure.
        weights: Sequence of variables; the penalty is differentiated by them.
        record: Callable that runs the model on the probe, in the graph that is being traced, and returns the recording.
        turn: Integer variable, the number of times that points of the trajectory were taken.
        step: Integer variable, the number of batches so far; it seeds the random vectors.

    Attributes:
        layer: The recurrent layer.
        share: Number, the weight of this call among all calls. Default: 1.

    Raises:
        ValueError: If the cell has no Jacobian of the view.
    """

    def __init__(
        self,
        config: PenaltyConfig,
        model: keras.Model,
        call: RecurrentCall,
        *,
        target: tf.Variable,
        weights: Sequence[Any],
        record: Callable[[], Recording],
        turn: tf.Variable,
        step: tf.Variable,
    ) -> None:
        self.layer = call.layer
        self.share = 1.0
        self._config, self._model, self._name = config, model, call.name
        self._target, self._weights, self._record, self._turn, self._step = target, weights, record, turn, step
        self._cell_step = CellStep(call.layer.cell, call.states)
        self._view = _view_of(config.view, self._cell_step, call)
        self._assumptions = Assumptions()
        # Inputs, states and weights of the points, made when their shapes are known.
        self._points: list[tf.Variable] = []
        self._leading: tf.Variable | None = None
        self._eager: Traced[Any] | None = None
        self._logged: Traced[Any] | None = None
        # Graphs of others that contain this penalty refer to these.
        self._alive: list[Traced[Any]] = []

    def __call__(self) -> tf.Tensor:
        """Returns the penalty with the present weights, not scaled by the strength."""
        if not self.holds:
            return tf.zeros([])
        # A tape must know them before it meets a function that reads them.
        for weight in self._weights:
            tf.convert_to_tensor(weight)
        return self._run(self._traced())

    def to_log(self) -> float:
        """Returns the penalty with the present weights; a spectral norm is found anew and not only brought up to date.

        It costs more than a batch of a training, so it is for once in an epoch.
        """
        if self._config.measure != "spectral_norm" or not self.holds:
            return float(self())
        self._logged = self._logged or trace(partial(self._value, anew=True))
        return float(self._run(self._logged))

    def _run(self, traced: Traced[Any]) -> tf.Tensor:
        # A cell may count its calls.
        with put_back(foreign_variables(traced.graph.graph, self._model, self.variables)):
            return traced()

    @property
    def target(self) -> float:
        """Float, the target of the measure at this moment."""
        return float(self._target)

    @property
    def variables(self) -> list[tf.Variable]:
        """List of the variables that it reads beside the weights of the model."""
        leading = [] if self._leading is None else [self._leading]
        return [*self._points, *leading, self._target, self._turn, self._step]

    @property
    def holds(self) -> bool:
        """True if there is a penalty; otherwise it is zero."""
        # It treats points of different steps as one batch, which needs independent points.
        return self._assumptions.independent

    def refute(self, checks: CheckResults) -> str | None:
        """Takes the Jacobian in another way if a check failed.

        Returns:
            A sentence about it; None if no check failed.
        """
        diagnosis = diagnose(checks, self._assumptions)
        # A layer without a penalty is not warned of again.
        if diagnosis is None or diagnosis.assumptions is None or not self.holds:
            return None
        self._eager, self._logged, self._assumptions = None, None, diagnosis.assumptions
        consequence = f"{diagnosis.consequence} from now on" if self.holds else "It has no penalty"
        return f"{diagnosis.reason}. {consequence}"

    def refresh(self, call: RecurrentCall) -> tuple[RefreshResult, CellJacobian]:
        """Takes other points of the trajectory, in the graph that is being traced.

        Returns:
            The findings at these points, and the Jacobian, which must live as long as the graph.
        """
        chosen, jacobian = self._sampled(call)
        tensors = (chosen.inputs, *chosen.states, chosen.weights)
        self._points = self._points or [_variable_like(tensor) for tensor in tensors]
        for variable, tensor in zip(self._points, tensors, strict=True):
            variable.assign(tensor)
        points = PointBatch(chosen.inputs, chosen.states)
        if self._config.measure == "spectral_norm":
            self._store_leading(self._found_leading(jacobian, points, Options(seed=self._config.seed)))
        checks = self._checked(jacobian, points, chosen)
        usable = self._usable(jacobian, points, self._leading)
        left_out = tf.math.count_nonzero((chosen.weights > 0) & ~usable)
        self._points[-1].assign(tf.where(usable, chosen.weights, tf.zeros_like(chosen.weights)))
        return RefreshResult(checks, left_out, tf.math.count_nonzero(chosen.weights)), jacobian

    def _store_leading(self, vectors: tf.Tensor) -> None:
        """Stores the leading singular vectors at new points."""
        self._leading = _variable_like(vectors) if self._leading is None else self._leading
        self._leading.assign(vectors)

    def _found_leading(self, jacobian: CellJacobian, points: PointBatch, options: Options) -> tf.Tensor:
        """Returns the leading singular vectors at some points `(points, n)`, within the tolerance of the options."""
        operator = jacobian.operators([self._view], points)[self._view]
        return leading_singular_vectors(operator, MeasureContext(options)).vectors

    def _present_leading(self, jacobian: CellJacobian, points: PointBatch, *, anew: bool) -> tf.Tensor | None:
        """Returns the leading singular vectors with the present weights; None if the measure needs none."""
        if self._leading is None:
            return None
        fixed = PointBatch(tf.stop_gradient(points.inputs), tuple(map(tf.stop_gradient, points.states)))
        if anew:
            options = Options(seed=self._config.seed, tolerance=_LOGGED_TOLERANCE)
            return tf.stop_gradient(self._found_leading(jacobian, fixed, options))
        seed = tf.random.experimental.stateless_fold_in([self._config.seed, 6], self._step)
        operator = jacobian.operators([self._view], fixed)[self._view]
        return tf.stop_gradient(refined_vectors(operator, self._leading.read_value(), seed))

    def _checked(self, jacobian: CellJacobian, points: PointBatch, chosen: Sample) -> CheckResults:
        """Returns the results of the checks, at the points with a weight."""
        seed = tf.random.experimental.stateless_fold_in([self._config.seed, 4], self._turn)
        valid = tf.cast(tf.where(chosen.weights > 0)[:, 0], tf.int32)

        def checked(check: Callable[..., CheckResults], some: tf.Tensor) -> CheckResults:
            new = [tf.gather(state, some) for state in chosen.new]
            return check(jacobian, [self._view], points.take(some), new, seed)

        checks = checked(check_points, valid[:CHECKED_POINTS])
        return checks if jacobian.point_by_point else checks.worst(checked(check_independence, valid))

    def _traced(self) -> Traced[Any]:
        if not tf.executing_eagerly():
            # Not once for all: each replica of a distributed training has variables of its own. And not without a
            # function around it: a tape does not see operations that are replayed from another graph.
            self._alive.append(trace(self._value))
            return self._alive[-1]
        if self._eager is None:
            self._eager = trace(self._value)
        return self._eager

    def _value(self, *, anew: bool = False) -> tuple[tf.Tensor, Any]:
        """Returns the penalty, and the objects that must live as long as the graph that is being traced.

        Args:
            anew: Boolean, True to find leading singular vectors anew. Defaults to False.
        """
        with tf.name_scope(SCOPE):
            return self._named_value(anew=anew)

    def _named_value(self, *, anew: bool) -> tuple[tf.Tensor, Any]:
        points, weights, jacobian, recording = self._present_points()
        leading = self._present_leading(jacobian, points, anew=anew)
        # A point with a weight has a derivative, if it was examined when it was taken.
        finite = _are_finite(tf.stop_gradient(self._distances(jacobian, points, leading))) & (weights > 0)
        if self._config.states == "fresh":
            finite &= self._usable(jacobian, points, leading)
        total = tf.cond(
            tf.reduce_any(finite),
            lambda: self._mean(jacobian, points, weights, finite, leading),
            lambda: tf.zeros([], points.inputs.dtype),
        )
        # Of the type of Keras' own losses, but not of half precision.
        total = tf.cast(total, tf.float64 if keras.config.floatx() == "float64" else tf.float32)
        return total, (jacobian, recording)

    def _present_points(self) -> tuple[PointBatch, tf.Tensor, CellJacobian, Recording | None]:
        """Returns the points, their weights, their Jacobian, and the recording; None for cached points."""
        if self._config.states == "cached":
            inputs, *states, weights = (variable.read_value() for variable in self._points)
            return PointBatch(inputs, tuple(states)), weights, self._jacobian(inputs, states), None
        recording = self._record()
        chosen, jacobian = self._sampled(next(call for call in recording.calls if call.name == self._name))
        inputs, states = chosen.inputs, list(chosen.states)
        if not self._config.through_states:
            inputs, *states = map(tf.stop_gradient, (inputs, *states))
        return PointBatch(inputs, tuple(states)), chosen.weights, jacobian, recording

    def _mean(
        self,
        jacobian: CellJacobian,
        points: PointBatch,
        weights: tf.Tensor,
        finite: tf.Tensor,
        leading: tf.Tensor | None,
    ) -> tf.Tensor:
        """Returns the share of this call: the mean distance over the points where it is finite."""
        # A point that is not finite would make the whole gradient NaN, even with a weight of zero.
        stand_in = tf.argmax(finite)

        def mended(tensor: tf.Tensor) -> tf.Tensor:
            keep = tf.reshape(finite, [-1] + [1] * (tensor.shape.rank - 1))
            # XLA would compile a slice anew for each place, and with it the step of the training at each batch.
            return tf.where(keep, tensor, tf.gather(tensor, stand_in))

        leading = None if leading is None else mended(leading)
        safe = PointBatch(mended(points.inputs), tuple(map(mended, points.states)))
        distances = self._distances(jacobian, safe, leading)
        shares = tf.cast(weights, distances.dtype) * tf.cast(finite, distances.dtype)
        return self.share * tf.reduce_sum(shares * distances) / tf.maximum(tf.reduce_sum(shares), 1)

    def _usable(self, jacobian: CellJacobian, points: PointBatch, leading: tf.Tensor | None) -> tf.Tensor:
        """Returns boolean `(points,)`: True if the distance and its derivative by the states are finite.

        A NaN in the second derivative of the cell reaches the states as well as the weights.
        """
        floating = floating_states(points.states)
        states = [tf.stop_gradient(state) for state in points.states]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([states[q] for q in floating])
            fixed = PointBatch(tf.stop_gradient(points.inputs), tuple(states))
            distances = self._distances(jacobian, fixed, leading)
        slopes = tape.gradient(distances, [states[q] for q in floating], unconnected_gradients="zero")
        slopes = side_by_side(list(map(tf.convert_to_tensor, slopes)))
        return _are_finite(distances) & tf.reduce_all(tf.math.is_finite(slopes), axis=-1)

    def _distances(self, jacobian: CellJacobian, points: PointBatch, leading: tf.Tensor | None) -> tf.Tensor:
        """Returns the squared distance of the measure from the target, `(points,)`."""
        operator = jacobian.operators([self._view], points)[self._view]
        seed = tf.random.experimental.stateless_fold_in([self._config.seed, 5], self._step)
        draws = DIFFERENTIABLE[self._config.measure](operator, Directions(self._config.vectors, seed, leading))
        return squared_distance(draws, tf.cast(self._target, draws.dtype), self._config)

    def _sampled(self, call: RecurrentCall) -> tuple[Sample, CellJacobian]:
        """Returns a sample of the points of a call's trajectory, and the Jacobian there."""
        sequence = UnrollInputs.of(call)
        jacobian = self._jacobian(sequence.inputs[0], sequence.states)
        plan = without_values(jacobian.unroll_plan(), known_sizes(sequence.inputs)[:2], _MOST_HOISTED)
        return sample(self._cell_step, sequence, plan, self._config.rows, self._turn), jacobian

    def _jacobian(self, inputs: tf.Tensor, states: Sequence[tf.Tensor]) -> CellJacobian:
        return CellJacobian(self._cell_step, inputs, states, self._assumptions)


def squared_distance(draws: tf.Tensor, target: tf.Tensor, config: PenaltyConfig) -> tf.Tensor:
    """Returns `(measure - target)²` at each point, or the square for the logarithms; zero on the allowed side.

    Args:
        draws: `(draws, points)`, the measure or independent estimates of it. Products of different estimates make the
            square unbiased.
        target: Scalar.
        config: `PenaltyConfig`, for its `scale` and `side`.

    Returns:
        `(points,)`.
    """
    if config.scale == "log":
        # The logarithm of an estimate has a bias, which falls with the number of vectors.
        value = tf.reduce_mean(draws, axis=0, keepdims=True)
        # No derivative below, where it would be larger than any number.
        difference = tf.math.log(tf.maximum(value, TINY)) - tf.math.log(target)
    else:
        difference = draws - target
    count = int(difference.shape[0])
    square = tf.reduce_sum(difference, axis=0) ** 2
    if count > 1:
        square = (square - tf.reduce_sum(difference**2, axis=0)) / (count * (count - 1))
    if config.side == "both":
        return square
    mean = tf.reduce_mean(difference, axis=0)
    wrong = mean > 0 if config.side == "at_most" else mean < 0
    return tf.where(wrong, square, tf.zeros_like(square))


def _are_finite(distances: tf.Tensor) -> tf.Tensor:
    """Returns boolean `(points,)`: True if the distance, times the number of points, is finite."""
    return tf.math.is_finite(distances * tf.cast(tf.size(distances), distances.dtype))


def _view_of(name: str, step: CellStep, call: RecurrentCall) -> str:
    """Returns the view for this cell: the joint view of a cell with one state is the hidden view.

    Raises:
        ValueError: If nothing connects its states, so that there is no derivative.
    """
    sequence = UnrollInputs.of(call)
    floating = floating_states(sequence.states)
    if not floating:
        raise ValueError(f"None of its {len(sequence.states)} states is floating-point, so there is no derivative.")
    name = "hidden" if name == "joint" and len(floating) == 1 else name
    dependencies = find_dependencies(step, sequence.inputs[0], sequence.states)
    connected = {
        "hidden": dependencies.depends[0][0],
        "joint": any(map(any, dependencies.depends)),
        "inputs": dependencies.on_inputs,
    }
    if not connected[name]:
        raise ValueError(f"No gradient connects the new state with the old one, or the inputs, of its {name} view.")
    return name


def _variable_like(tensor: tf.Tensor) -> tf.Variable:
    """Makes a variable of the shape and type of a tensor, whose sizes may be unknown."""
    with tf.init_scope():
        nothing = tf.zeros([size or 0 for size in tensor.shape], tensor.dtype)
    return own_variable(nothing, tensor.shape)
