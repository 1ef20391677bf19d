"""How far the Jacobians of recurrent layers are from where they should be, as a term of a loss."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from keras_jacmon.jacobians.resolve import CERTIFICATE_TOLERANCE, CellJacobian, Rows
from keras_jacmon.jacobians.views import find_connections, floating_states
from keras_jacmon.measures.differentiable import DIFFERENTIABLE, TINY, Directions
from keras_jacmon.measures.options import Memory, Options
from keras_jacmon.measures.registry import MEASURES
from keras_jacmon.points import CERTIFICATE, CERTIFIED_ROWS, DEPENDENCE
from keras_jacmon.probe.capture import RecurrentCall, foreign_variables, put_back, record_calls, shielded
from keras_jacmon.probe.layers import RecurrentLayer
from keras_jacmon.probe.replicas import own_variable
from keras_jacmon.probe.sampling import Sample, sample, without_values
from keras_jacmon.probe.step import CellStep
from keras_jacmon.probe.trajectory import Walk, known_sizes

# Beside the tests of what a penalty rests on: at how many points it is not finite.
LEFT_OUT = "left_out"

# What the unrolling may hold at once, in numbers.
_MOST_HOISTED = 2**24


@dataclass(frozen=True)
class Aim:
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


def squared_distance(draws: tf.Tensor, target: tf.Tensor, aim: Aim) -> tf.Tensor:
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
        aim: Aim,
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
        # Whether structures may be used, and whether rows of all steps may be put together.
        self._trusted = self._independent = True
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
        return self._independent

    def refute(self, tests: Mapping[str, float]) -> str | None:
        """Changes how the Jacobian is taken if a test failed, and says so; None if none did."""
        failed = [name for name, residual in tests.items() if not residual <= CERTIFICATE_TOLERANCE]
        if not failed:
            return None
        self._eager = None
        if DEPENDENCE in failed:
            self._independent = False
            return "what its cell makes of a sample depends on the other samples of the batch, so it has no penalty"
        self._trusted = False
        return (
            f"the structure of its Jacobian differs from autodiff (relative difference {tests[CERTIFICATE]:.2g}, "
            f"allowed is {CERTIFICATE_TOLERANCE:.0e}), so its penalty is taken by autodiff from now on"
        )

    def refresh(self, call: RecurrentCall) -> dict[str, tf.Tensor]:
        """Takes other points of the trajectory, in the graph that is being traced.

        Returns:
            Tests, at some of them, of what the Jacobians rest on; and at how many the penalty is not finite.
        """
        points, jacobian = self._sampled(call)
        tensors = (points.inputs, *points.states, points.weights)
        self._points = self._points or [_variable_like(tensor) for tensor in tensors]
        for variable, tensor in zip(self._points, tensors, strict=True):
            variable.assign(tensor)
        rows = Rows(points.inputs, points.states)
        if self._aim.measure == "spectral_norm":
            operator = jacobian.operators([self._view], rows)[self._view]
            nothing = tf.zeros([*known_sizes(points.weights), int(operator.shape[-1])], operator.dtype)
            self._leading = _variable_like(nothing) if self._leading is None else self._leading
            # These are other rows than the last time.
            self._leading.assign(nothing)
            memory = Memory(self._leading, tf.range(tf.shape(points.weights)[0]))
            MEASURES["spectral_norm"].function(operator, Options(seed=self._aim.seed, memory=memory))
        chosen = tf.cast(tf.where(points.weights > 0)[:CERTIFIED_ROWS, 0], tf.int32)
        new = [tf.gather(state, chosen) for state in points.new]
        seed = tf.random.experimental.stateless_fold_in([self._aim.seed, 4], self._turn)
        dependence, certificate = jacobian.tests([self._view], rows.take(chosen), new, seed)
        finite = _are_finite(self._distances(jacobian, rows, self._leading))
        left_out = tf.math.count_nonzero((points.weights > 0) & ~finite)
        tests = {DEPENDENCE: dependence} | ({} if certificate is None else {CERTIFICATE: certificate})
        return {LEFT_OUT: left_out, **tests}

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
        rows = Rows(inputs, tuple(states))
        finite = _are_finite(tf.stop_gradient(self._distances(jacobian, rows, self._leading)))

        def mean() -> tf.Tensor:
            # One that is not finite would make the gradient of all of them NaN, also with a weight of zero.
            stand_in = tf.argmax(finite)

            def mended(tensor: tf.Tensor) -> tf.Tensor:
                keep = tf.reshape(finite, [-1] + [1] * (tensor.shape.rank - 1))
                return tf.where(keep, tensor, tensor[stand_in])

            leading = None if self._leading is None else mended(self._leading.read_value())
            safe = Rows(mended(inputs), tuple(map(mended, states)))
            distances = self._distances(jacobian, safe, leading)
            shares = tf.cast(weights, distances.dtype) * tf.cast(finite, distances.dtype)
            return self.share * tf.reduce_sum(shares * distances) / tf.maximum(tf.reduce_sum(shares), 1)

        total = tf.cond(tf.reduce_any(finite), mean, lambda: tf.zeros([], inputs.dtype))
        # Of the type of Keras' own losses, but not of half precision.
        return tf.cast(total, tf.float64 if keras.config.floatx() == "float64" else tf.float32)

    def _distances(self, jacobian: CellJacobian, rows: Rows, leading: tf.Tensor | None) -> tf.Tensor:
        """How far the measure is from the target, `(rows,)`."""
        operator = jacobian.operators([self._view], rows)[self._view]
        seed = tf.random.experimental.stateless_fold_in([self._aim.seed, 5], self._step)
        draws = DIFFERENTIABLE[self._aim.measure](operator, Directions(self._aim.vectors, seed, leading))
        return squared_distance(draws, tf.cast(self.target, draws.dtype), self._aim)

    def _sampled(self, call: RecurrentCall) -> tuple[Sample, CellJacobian]:
        walk = Walk.of(call)
        jacobian = self._jacobian(walk.inputs[0], walk.states)
        shortcut = without_values(jacobian.shortcut(), known_sizes(walk.inputs)[:2], _MOST_HOISTED)
        return sample(self._cell_step, walk, shortcut, self._aim.rows, self._turn), jacobian

    def _jacobian(self, inputs: tf.Tensor, states: Sequence[tf.Tensor]) -> CellJacobian:
        jacobian = CellJacobian(self._cell_step, inputs, states, trusted=self._trusted)
        self._alive.append(jacobian)
        return jacobian


class ModelPenalty:
    """The penalties on the calls of a model's recurrent layers.

    Args:
        model: A built model.
        inputs: The probe, in the structure that the model takes.
        layers: Those with weights to train.
        aim: What is held.
        target: From the key of a call and the name of its layer to the target; None for no penalty.

    Raises:
        ValueError: If a penalty cannot be computed, or has no derivative by any weight.
    """

    def __init__(
        self,
        model: keras.Model,
        inputs: Any,
        layers: Sequence[RecurrentLayer],
        aim: Aim,
        target: Callable[[str, str], tf.Variable | None],
    ) -> None:
        self._model, self._inputs, self._layers, self._aim, self._target = model, inputs, layers, aim, target
        self.calls: dict[str, CallPenalty] = {}
        # Of calls and layers, with or without a penalty; and why a layer has no call.
        self.names: dict[str, None] = {}
        self.unmeasured: dict[str, str] = {}
        self._told: set[str] = set()
        self._turn, self._step = own_variable(-1), own_variable(0)
        self._alive: list[Any] = []
        self._traced = self._trace()
        for call in self.calls.values():
            call.share = 1.0 / len(self.calls)
        self.notes, _ = self.refresh()
        for key, call in self.calls.items():
            if call.holds:
                _try(key, call)

    def refresh(self) -> tuple[list[str], bool]:
        """Takes other points of the trajectories, with the weights of this moment.

        Returns:
            Sentences on what is not as it was thought to be, and whether Jacobians are taken in another way from now
            on, so that what contains a penalty must be traced anew.
        """
        self._turn.assign_add(1)
        with put_back(self._foreign):
            tests = self._traced()
        notes, changed = [], False
        for key, found in tests.items():
            residuals = {name: float(residual) for name, residual in found.items()}
            left_out = residuals.pop(LEFT_OUT)
            note = self.calls[key].refute(residuals)
            if note is not None:
                notes.append(f"Layer `{key}`: {note}")
                changed = True
            elif left_out and key not in self._told:
                self._told.add(key)
                notes.append(
                    f"Layer `{key}`: at {left_out:.0f} points of its trajectory the penalty is not finite. Such points "
                    "are left out; later ones of this layer are not warned of."
                )
        if changed:
            self._traced = self._trace()
        return notes, changed

    def begin(self, step: int) -> None:
        """Says which batch is the next one."""
        # Of numbers of Python TensorFlow keeps a copy on the device, for ever.
        self._step.assign(np.int32(step))
        if self._aim.states == "fresh":
            self._turn.assign_add(1)

    def __call__(self) -> float:
        """The sum of the penalties, with the weights of this moment."""
        return float(sum(float(call()) for call in self.calls.values()))

    def _trace(self) -> Any:
        graph = tf.function(self._refresh, autograph=False).get_concrete_function()
        own = [variable for call in self.calls.values() for variable in call.variables]
        self._foreign = foreign_variables(graph.graph, self._model, own)
        return graph

    def _refresh(self) -> dict[str, dict[str, tf.Tensor]]:
        names = {id(item.layer): item.name for item in self._layers}
        tests = {}
        with shielded(self._model):
            for recorded in self._recorded(self._layers):
                name = names[id(recorded.layer)]
                self.names |= dict.fromkeys([name, recorded.name])
                if recorded.name not in self.calls and not self._add(recorded, name):
                    continue
                with _naming(recorded.name):
                    tests[recorded.name] = self.calls[recorded.name].refresh(recorded)
        return tests

    def _add(self, call: RecurrentCall, name: str) -> bool:
        """Adds the penalty on a call, if there is a target for it."""
        target = self._target(call.name, name)
        if target is None:
            return False
        owner: Any = self._model if self._aim.through_states else call.layer
        layers = [item for item in self._layers if item.layer is call.layer]

        def record() -> RecurrentCall:
            with shielded(self._model):
                return next(found for found in self._recorded(layers) if found.name == call.name)

        with _naming(call.name):
            self.calls[call.name] = CallPenalty(
                self._aim,
                self._model,
                call,
                target=target,
                weights=owner.trainable_variables,
                record=record,
                turn=self._turn,
                step=self._step,
            )
        return True

    def _recorded(self, layers: Sequence[RecurrentLayer]) -> tuple[RecurrentCall, ...]:
        recording = record_calls(self._model, self._inputs, layers)
        self.unmeasured |= recording.unmeasured
        self._alive.append(recording)
        return recording.calls


def _view_of(name: str, step: CellStep, call: RecurrentCall) -> str:
    """The view of this cell: one with a single state has no joint one of its own."""
    walk = Walk.of(call)
    floating = floating_states(walk.states)
    if not floating:
        raise ValueError(f"None of its {len(walk.states)} states is floating-point, so there is no derivative.")
    name = "hidden" if name == "joint" and len(floating) == 1 else name
    connections = find_connections(step, walk.inputs[0], walk.states)
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


def _try(key: str, call: CallPenalty) -> None:
    """Finds out before a training whether a penalty has a derivative.

    Raises:
        ValueError: If not.
    """
    weights = call.layer.trainable_variables
    with _naming(key):
        with tf.GradientTape() as tape:
            penalty = call()
        gradients = tape.gradient(penalty, [weight.value for weight in weights])
        if all(gradient is None for gradient in gradients):
            raise ValueError("Its penalty has no gradient by any of the layer's weights.")


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"The Jacobians of layer `{key}` cannot be regularized; name the other layers in `layers` to leave it out. "
            f"{error}"
        ) from error
