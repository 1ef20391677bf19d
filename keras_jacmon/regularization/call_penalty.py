"""The penalty on one recurrent call, at its own points and with its own weights."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.graphs.trace import Traced, trace
from keras_jacmon.jacobians.cell_jacobian import Assumptions
from keras_jacmon.jacobians.diagnosis import CheckResults, diagnose
from keras_jacmon.measurement.measurable_call import MeasurableCall, SequenceTensors
from keras_jacmon.model.distribution import own_variable
from keras_jacmon.model.guard import foreign_put_back
from keras_jacmon.regularization.compiled_penalty import CompiledPenalties, CompiledPenalty
from keras_jacmon.regularization.penalty import NewPoints, PenaltyMoment, PenaltyPoints
from keras_jacmon.regularization.penalty_config import PenaltyConfig

# Returns the sequence of a call, and the objects that must live as long as the graph that is being traced.
Record = Callable[[], tuple[SequenceTensors, Any]]


class CallPenalty:
    """The penalty on one call of a recurrent layer: called, it returns a scalar with derivatives by the weights.

    Args:
        config: `PenaltyConfig`.
        model: Keras model, which puts back its own variables if a cell writes to them.
        call: `MeasurableCall`.
        compiled: `CompiledPenalties`, shared by the calls of the model.
        target: Scalar variable, the target of the measure.
        weights: Sequence of variables; the penalty is differentiated by them.
        record: Callable that runs the model on the probe, in the graph that is being traced, and returns the sequence
            of this call, and an object that must live as long as the graph.
        turn: Integer variable, the number of times that points of the trajectory were taken.
        step: Integer variable, the number of batches so far; it seeds the random vectors.

    Attributes:
        layer: The recurrent layer.
        share: Number, the weight of this call among all calls. Default: 1.
        points: `PenaltyPoints` of variables, the points that were taken last.

    Raises:
        ValueError: If the cell has no Jacobian of the view.
    """

    def __init__(
        self,
        config: PenaltyConfig,
        model: keras.Model,
        call: MeasurableCall,
        compiled: CompiledPenalties,
        *,
        target: tf.Variable,
        weights: Sequence[Any],
        record: Record,
        turn: tf.Variable,
        step: tf.Variable,
    ) -> None:
        self.layer = call.layer
        self.share = 1.0
        self._config, self._model, self._call, self._kinds = config, model, call, compiled
        self._target, self._weights, self._record, self._turn, self._step = target, weights, record, turn, step
        self._assumptions = Assumptions()
        self._compiled: CompiledPenalty = compiled.of(call, self._assumptions)
        specs = self._compiled.specs
        self.points = tf.nest.map_structure(_variable_of, specs.points)
        self._leading = None if specs.leading is None else _variable_of(specs.leading)
        self._recorded: Traced[Any] | None = None
        # Graphs of others that contain this penalty refer to these.
        self._alive: list[Traced[Any]] = []

    def __call__(self) -> tf.Tensor:
        """Returns the penalty with the present weights, not scaled by the strength."""
        if not self.holds:
            return tf.zeros([])
        # A tape must know them before it meets a function that reads them.
        for weight in self._weights:
            tf.convert_to_tensor(weight)
        return self.share * self._compiled(self._call, self._given(), self._known_leading(), self._moment())

    def to_log(self) -> float:
        """Returns the penalty with the present weights; a spectral norm is found anew and not only brought up to date.

        It costs more than a batch of a training, so it is for once in an epoch.
        """
        if self._leading is None or not self.holds:
            return float(self())
        found = self._compiled.anew(self._call, self._given(), self._known_leading(), self._moment())
        return self.share * float(found)

    @property
    def target(self) -> float:
        """Float, the target of the measure at this moment."""
        return float(self._target)

    @property
    def holds(self) -> bool:
        """True if there is a penalty; otherwise it is zero."""
        # It treats points of different steps as one batch, which needs independent points.
        return self._assumptions.independent

    def refresh(self, sequence: SequenceTensors) -> NewPoints:
        """Takes other points of the trajectory along a sequence, with the present weights."""
        found = self._compiled.refresh(self._call, sequence, self._moment())
        tf.nest.map_structure(lambda variable, value: variable.assign(value), self.points, found.points)
        if self._leading is not None:
            self._leading.assign(found.leading)
        return found

    def refute(self, checks: CheckResults) -> str | None:
        """Takes the Jacobian in another way if a check failed.

        Returns:
            A sentence about it; None if no check failed.
        """
        diagnosis = diagnose(checks, self._assumptions)
        # A layer without a penalty is not warned of again.
        if diagnosis is None or diagnosis.assumptions is None or not self.holds:
            return None
        if diagnosis.assumptions.independent:
            self._compiled = self._kinds.of(self._call, diagnosis.assumptions)
        self._assumptions = diagnosis.assumptions
        consequence = f"{diagnosis.consequence} from now on" if self.holds else "It has no penalty"
        return f"{diagnosis.reason}. {consequence}"

    def _moment(self) -> PenaltyMoment:
        return PenaltyMoment(*(variable.read_value() for variable in (self._target, self._turn, self._step)))

    def _known_leading(self) -> tf.Tensor | None:
        return None if self._leading is None else self._leading.read_value()

    def _given(self) -> PenaltyPoints | SequenceTensors:
        """Returns the points, or the present sequence for fresh states."""
        if self._config.states == "cached":
            points: PenaltyPoints = tf.nest.map_structure(lambda variable: variable.read_value(), self.points)
            return points
        if tf.executing_eagerly():
            self._recorded = traced = self._recorded or trace(self._record)
        else:
            # Not once for all: each replica of a distributed training has variables of its own.
            traced = trace(self._record)
            self._alive.append(traced)
        with foreign_put_back(traced.graph.graph, self._model):
            sequence: SequenceTensors = traced()
        return sequence


def _variable_of(spec: tf.TensorSpec) -> tf.Variable:
    """Makes a variable of a shape and type; its sizes may be unknown."""
    with tf.init_scope():
        nothing = tf.zeros([size or 0 for size in spec.shape], spec.dtype)
    return own_variable(nothing, spec.shape)
