"""How far the Jacobians of one call of a recurrent layer are from where they should be."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
from keras_jacmon.measures.context import MeasureContext, Memory
from keras_jacmon.measures.differentiable import DIFFERENTIABLE, TINY, Directions
from keras_jacmon.measures.registry import MEASURES
from keras_jacmon.model.distribution import own_variable
from keras_jacmon.model.guard import foreign_variables, put_back
from keras_jacmon.model.recording import RecurrentCall
from keras_jacmon.options import Options
from keras_jacmon.tensors import known_sizes

# What the unrolling may hold at once, in numbers.
_MOST_HOISTED = 2**24


@dataclass(frozen=True)
class PenaltyConfig:
    """What is held, and how; see `JacobianRegularizer`."""

    measure: str
    view: str
    scale: Literal["linear", "log"]
    side: Literal["both", "at_most", "at_least"]
    states: Literal["cached", "fresh"]
    through_states: bool
    rows: int
    vectors: int
    seed: int


def squared_distance(draws: tf.Tensor, target: tf.Tensor, aim: PenaltyConfig) -> tf.Tensor:
    """`(measure - target)²` of each row, or of the logarithms; zero on the side that is allowed.

    Args:
        draws: `(draws, rows)`: the measure, or independent estimates of it, whose square is estimated without bias:
            from the products of different ones.
        target: A scalar.
        aim: `scale` and `side` count.
    """
    if aim.scale == "log":
        # Of an estimate the logarithm has a bias, which falls with the number of vectors.
        value = tf.reduce_mean(draws, axis=0, keepdims=True)
        # No derivative below, where it would be larger than any number.
        difference = tf.math.log(tf.maximum(value, TINY)) - tf.math.log(target)
    else:
        difference = draws - target
    count = int(difference.shape[0])
    square = tf.reduce_sum(difference, axis=0) ** 2
    if count > 1:
        square = (square - tf.reduce_sum(difference**2, axis=0)) / (count * (count - 1))
    if aim.side == "both":
        return square
    mean = tf.reduce_mean(difference, axis=0)
    wrong = mean > 0 if aim.side == "at_most" else mean < 0
    return tf.where(wrong, square, tf.zeros_like(square))


def _are_finite(distances: tf.Tensor) -> tf.Tensor:
    """Whether there is a mean of them, `(rows,)`."""
    return tf.math.is_finite(distances * tf.cast(tf.size(distances), distances.dtype))


class CallPenalty:
    """The penalty on one call of a recurrent layer: called, it gives a scalar with derivatives by the weights.

    Args:
        aim: What is held.
        model: Whose variables a cell may write to, since that is undone by others.
        call: Of which the states are kept, but no tensor.
        target: Of the measure, a scalar.
        weights: Those that it has a derivative by.
        record: Runs the model on the probe and gives the call, in the graph that is being traced.
        turn: Counts the samples of the trajectory that were taken.
        step: Counts the batches, for random vectors that are others each time.

    Raises:
        ValueError: If the cell has no Jacobian of this view.
    """

    def __init__(
        self,
        aim: PenaltyConfig,
        model: keras.Model,
        call: RecurrentCall,
        *,
        target: tf.Variable,
        weights: Sequence[Any],
        record: Callable[[], RecurrentCall],
        turn: tf.Variable,
        step: tf.Variable,
    ) -> None:
        self.layer, self.target = call.layer, target
        # What its mean over the rows counts for beside those of other calls.
        self.share = 1.0
        self._model = model
        self._aim, self._weights, self._record, self._turn, self._step = aim, weights, record, turn, step
        self._cell_step = CellStep(call.layer.cell, call.states)
        self._view = _view_of(aim.view, self._cell_step, call)
        self._trust = Assumptions()
        self._points: list[tf.Variable] = []
        self._leading: tf.Variable | None = None
        self._eager: Any = None
        # Graphs must live as long as what was made with them.
        self._alive: list[Any] = []

    def __call__(self) -> tf.Tensor:
        """The penalty, not scaled by any strength, with the weights of this moment."""
        if not self.holds:
            return tf.zeros([])
        # A tape must know them before it meets a function that reads them.
        for weight in self._weights:
            tf.convert_to_tensor(weight)
        if tf.executing_eagerly():
            self._eager = graph = self._eager or self._traced()
        else:
            # Not once for all: each replica of a distributed training has variables of its own. And not without a
            # function around it: a tape does not see operations that are laid out from another graph.
            graph = self._traced()
        # A cell may count its calls.
        with put_back(foreign_variables(graph.graph, self._model, self.variables)):
            return graph()

    @property
    def variables(self) -> list[tf.Variable]:
        """Those of its own."""
        given = [self.target, self._turn, self._step]
        return [*self._points, *([] if self._leading is None else [self._leading]), *given]

    @property
    def holds(self) -> bool:
        """Whether there is a penalty, and not a zero in its place."""
        # PointBatch of all steps are put together for it.
        return self._trust.independent

    def refute(self, checks: CheckResults) -> str | None:
        """Changes how the Jacobian is taken if a check failed, and says so; None if none did."""
        refutation = diagnose(checks, self._trust)
        # A layer without a penalty is not warned of again.
        if refutation is None or refutation.assumptions is None or not self.holds:
            return None
        self._eager, self._trust = None, refutation.assumptions
        consequence = f"{refutation.consequence} from now on" if self.holds else "It has no penalty"
        return f"{refutation.reason}. {consequence}"

    def refresh(self, call: RecurrentCall) -> tuple[CheckResults, tf.Tensor]:
        """Takes other points of the trajectory, in the graph that is being traced.

        Returns:
            Checks, at some of them, of what the Jacobians rest on; and at how many the penalty is not finite.
        """
        points, jacobian = self._sampled(call)
        tensors = (points.inputs, *points.states, points.weights)
        self._points = self._points or [_variable_like(tensor) for tensor in tensors]
        for variable, tensor in zip(self._points, tensors, strict=True):
            variable.assign(tensor)
        rows = PointBatch(points.inputs, points.states)
        if self._aim.measure == "spectral_norm":
            operator = jacobian.operators([self._view], rows)[self._view]
            nothing = tf.zeros([*known_sizes(points.weights), int(operator.shape[-1])], operator.dtype)
            self._leading = _variable_like(nothing) if self._leading is None else self._leading
            # These are other rows than the last time.
            self._leading.assign(nothing)
            memory = Memory(self._leading, tf.range(tf.shape(points.weights)[0]))
            context = MeasureContext(Options(seed=self._aim.seed), memory=memory)
            MEASURES["spectral_norm"].function(operator, context)
        seed = tf.random.experimental.stateless_fold_in([self._aim.seed, 4], self._turn)
        chosen = tf.cast(tf.where(points.weights > 0)[:, 0], tf.int32)

        def checked(check: Callable[..., CheckResults], some: tf.Tensor) -> CheckResults:
            new = [tf.gather(state, some) for state in points.new]
            return check(jacobian, [self._view], rows.take(some), new, seed)

        checks = checked(check_points, chosen[:CHECKED_POINTS])
        if not jacobian.row_by_row:
            checks = checks.worst(checked(check_independence, chosen))
        usable = self._usable(jacobian, rows)
        left_out = tf.math.count_nonzero((points.weights > 0) & ~usable)
        self._points[-1].assign(tf.where(usable, points.weights, tf.zeros_like(points.weights)))
        return checks, left_out

    def _traced(self) -> Any:
        graph = tf.function(self._value, autograph=False).get_concrete_function()
        self._alive.append(graph)
        return graph

    def _value(self) -> tf.Tensor:
        if self._aim.states == "cached":
            inputs, *states, weights = (variable.read_value() for variable in self._points)
            jacobian = self._jacobian(inputs, states)
        else:
            call = self._record()
            points, jacobian = self._sampled(call)
            inputs, states, weights = points.inputs, list(points.states), points.weights
            if not self._aim.through_states:
                inputs, *states = map(tf.stop_gradient, (inputs, *states))
        rows = PointBatch(inputs, tuple(states))
        # What has a weight has a derivative, if the points were looked at before.
        finite = _are_finite(tf.stop_gradient(self._distances(jacobian, rows, self._leading))) & (weights > 0)
        if self._aim.states == "fresh":
            finite &= self._usable(jacobian, rows)

        def mean() -> tf.Tensor:
            # One that is not finite would make the gradient of all of them NaN, also with a weight of zero.
            stand_in = tf.argmax(finite)

            def mended(tensor: tf.Tensor) -> tf.Tensor:
                keep = tf.reshape(finite, [-1] + [1] * (tensor.shape.rank - 1))
                return tf.where(keep, tensor, tensor[stand_in])

            leading = None if self._leading is None else mended(self._leading.read_value())
            safe = PointBatch(mended(inputs), tuple(map(mended, states)))
            distances = self._distances(jacobian, safe, leading)
            shares = tf.cast(weights, distances.dtype) * tf.cast(finite, distances.dtype)
            return self.share * tf.reduce_sum(shares * distances) / tf.maximum(tf.reduce_sum(shares), 1)

        total = tf.cond(tf.reduce_any(finite), mean, lambda: tf.zeros([], inputs.dtype))
        # Of the type of Keras' own losses, but not of half precision.
        return tf.cast(total, tf.float64 if keras.config.floatx() == "float64" else tf.float32)

    def _usable(self, jacobian: CellJacobian, rows: PointBatch) -> tf.Tensor:
        """Whether the penalty at each of some rows is finite and has a finite derivative, `(rows,)`.

        By the states; a NaN in the second derivative of the cell reaches those and the weights.
        """
        floating = floating_states(rows.states)
        states = [tf.stop_gradient(state) for state in rows.states]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([states[q] for q in floating])
            distances = self._distances(
                jacobian, PointBatch(tf.stop_gradient(rows.inputs), tuple(states)), self._leading
            )
        slopes = tape.gradient(distances, [states[q] for q in floating], unconnected_gradients="zero")
        slopes = side_by_side(list(map(tf.convert_to_tensor, slopes)))
        return _are_finite(distances) & tf.reduce_all(tf.math.is_finite(slopes), axis=-1)

    def _distances(self, jacobian: CellJacobian, rows: PointBatch, leading: tf.Tensor | None) -> tf.Tensor:
        """How far the measure is from the target, `(rows,)`."""
        operator = jacobian.operators([self._view], rows)[self._view]
        seed = tf.random.experimental.stateless_fold_in([self._aim.seed, 5], self._step)
        draws = DIFFERENTIABLE[self._aim.measure](operator, Directions(self._aim.vectors, seed, leading))
        return squared_distance(draws, tf.cast(self.target, draws.dtype), self._aim)

    def _sampled(self, call: RecurrentCall) -> tuple[Sample, CellJacobian]:
        walk = UnrollInputs.of(call)
        jacobian = self._jacobian(walk.inputs[0], walk.states)
        shortcut = without_values(jacobian.shortcut(), known_sizes(walk.inputs)[:2], _MOST_HOISTED)
        return sample(self._cell_step, walk, shortcut, self._aim.rows, self._turn), jacobian

    def _jacobian(self, inputs: tf.Tensor, states: Sequence[tf.Tensor]) -> CellJacobian:
        jacobian = CellJacobian(self._cell_step, inputs, states, self._trust)
        self._alive.append(jacobian)
        return jacobian


def _view_of(name: str, step: CellStep, call: RecurrentCall) -> str:
    """The view of this cell: one with a single state has no joint one of its own."""
    walk = UnrollInputs.of(call)
    floating = floating_states(walk.states)
    if not floating:
        raise ValueError(f"None of its {len(walk.states)} states is floating-point, so there is no derivative.")
    name = "hidden" if name == "joint" and len(floating) == 1 else name
    connections = find_dependencies(step, walk.inputs[0], walk.states)
    connected = {
        "hidden": connections.depends[0][0],
        "joint": any(map(any, connections.depends)),
        "inputs": connections.on_inputs,
    }
    if not connected[name]:
        raise ValueError(f"No gradient connects the new state with the old one, or the inputs, of its {name} view.")
    return name


def _variable_like(tensor: tf.Tensor) -> tf.Variable:
    with tf.init_scope():
        nothing = tf.zeros([size or 0 for size in tensor.shape], tensor.dtype)
    return own_variable(nothing, tensor.shape)
