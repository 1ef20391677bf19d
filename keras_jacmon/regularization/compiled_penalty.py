"""Compiled penalties: one for each kind of call, which calls of this kind share."""

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import tensorflow as tf

from keras_jacmon.cell.step import CellStep
from keras_jacmon.graphs.trace import Traced, trace
from keras_jacmon.jacobians.cell_jacobian import Assumptions, CellJacobian
from keras_jacmon.jacobians.dependencies import find_dependencies
from keras_jacmon.jacobians.views import chosen_view, floating_states
from keras_jacmon.measurement.measurable_call import MeasurableCall, SequenceTensors
from keras_jacmon.model.guard import foreign_put_back, shielded
from keras_jacmon.options import ViewName
from keras_jacmon.regularization.loss_terms import SCOPE
from keras_jacmon.regularization.penalty import NewPoints, Penalty, PenaltyMoment, PenaltyPoints
from keras_jacmon.regularization.penalty_config import PenaltyConfig
from keras_jacmon.regularization.point_penalty import PointPenalty
from keras_jacmon.regularization.sequence_penalty import SequencePenalty
from keras_jacmon.tensors import spec_of, specs_of

if TYPE_CHECKING:
    from collections.abc import Hashable

_SCALAR, _INTEGER = tf.TensorSpec([], tf.float32), tf.TensorSpec([], tf.int32)
_MOMENT = PenaltyMoment(_SCALAR, _INTEGER, _INTEGER)


class PointSpecs(NamedTuple):
    """The shapes and types of the points that are taken.

    Attributes:
        points: `PenaltyPoints` of `tf.TensorSpec`.
        leading: `tf.TensorSpec` of the leading singular vectors; None if there are none.
    """

    points: Any
    leading: tf.TensorSpec | None


class _Refresh(NamedTuple):
    """Static objects of a traced refresh.

    Attributes:
        specs: Shapes and types of the points.
        jacobian: The Jacobian, which must live as long as the graph.
    """

    specs: PointSpecs
    jacobian: CellJacobian


class CompiledPenalty:
    """The penalty on one kind of call: functions of the tensors and weights of a call, each traced once.

    Args:
        model: Keras model, which puts back its own variables if a cell writes to them.
        call: `MeasurableCall`, a call of this kind.
        config: `PenaltyConfig`.
        view: The view for this cell.
        assumptions: The assumptions behind the Jacobians.
    """

    def __init__(
        self, model: keras.Model, call: MeasurableCall, config: PenaltyConfig, view: ViewName, assumptions: Assumptions
    ) -> None:
        self._model, self._call, self._config = model, call, config
        self._view, self._assumptions = view, assumptions
        self._weights = list(map(spec_of, call.kind.weights))
        self._refresh = trace(self._refreshed, [_MOMENT, call.specs, self._weights])
        self._logged: Traced[CellJacobian] | None = None
        self._eager: Traced[CellJacobian] | None = None
        # By the graph that contains them, and that refers to them.
        self._values: weakref.WeakKeyDictionary[tf.Graph, list[Traced[CellJacobian]]] = weakref.WeakKeyDictionary()

    @property
    def specs(self) -> PointSpecs:
        """The shapes and types of the points."""
        return self._refresh.static.specs

    def refresh(self, call: MeasurableCall, sequence: SequenceTensors, moment: PenaltyMoment) -> NewPoints:
        """Takes points of the trajectory of a call, with its present weights."""
        found: NewPoints = self._run(self._refresh, moment, sequence, call.kind.values())
        return found

    def __call__(
        self,
        call: MeasurableCall,
        given: PenaltyPoints | SequenceTensors,
        leading: tf.Tensor | None,
        moment: PenaltyMoment,
    ) -> tf.Tensor:
        """Returns the penalty on a call with its present weights, a scalar, which a tape can differentiate.

        Args:
            call: The call.
            given: The points; for fresh states the sequence that the cell is unrolled along.
            leading: Leading singular vectors of other weights or points; None if there are none.
            moment: The numbers of this moment.
        """
        return self._run(self._value(), moment, given, leading, call.kind.values())

    def anew(
        self,
        call: MeasurableCall,
        given: PenaltyPoints | SequenceTensors,
        leading: tf.Tensor | None,
        moment: PenaltyMoment,
    ) -> tf.Tensor:
        """Returns the penalty as a call does, with leading singular vectors that are found anew."""
        self._logged = self._logged or self._traced_value(anew=True)
        return self._run(self._logged, moment, given, leading, call.kind.values())

    def _run(self, traced: Traced[Any], *tensors: Any) -> Any:
        # A cell may count its calls.
        with foreign_put_back(traced.graph.graph, self._model):
            return traced(*tensors)

    def _value(self) -> Traced[CellJacobian]:
        """Returns the function for the graph that is being traced, or for eager calls.

        Branches and loops are differentiated in another way where XLA compiles the graph. And a tape needs a function:
        it does not see operations that are replayed from another graph.
        """
        if tf.executing_eagerly():
            self._eager = self._eager or self._traced_value(anew=False)
            return self._eager
        known = self._values.setdefault(tf.compat.v1.get_default_graph(), [])
        # Each replica of a distributed training has variables of its own.
        if not known or known[-1].graph.variables:
            known.append(self._traced_value(anew=False))
        return known[-1]

    def _traced_value(self, *, anew: bool) -> Traced[CellJacobian]:
        given = self.specs.points if self._config.states == "cached" else self._call.specs

        def value(
            moment: PenaltyMoment, given: Any, leading: tf.Tensor | None, weights: list[tf.Tensor]
        ) -> tuple[tf.Tensor, CellJacobian]:
            penalty = self._penalty(weights)
            computed = penalty.at if self._config.states == "cached" else penalty.along
            with tf.name_scope(SCOPE):
                return computed(given, leading, moment, anew=anew)

        return trace(value, [_MOMENT, given, self.specs.leading, self._weights], inline=False)

    def _refreshed(
        self, moment: PenaltyMoment, sequence: SequenceTensors, weights: list[tf.Tensor]
    ) -> tuple[NewPoints, _Refresh]:
        with shielded(self._model):
            found, jacobian = self._penalty(weights).new_points(sequence, moment)
        specs = specs_of((found.points, found.leading))
        return found, _Refresh(PointSpecs(*specs), jacobian)

    def _penalty(self, weights: list[tf.Tensor]) -> Penalty:
        given = list(zip(self._call.kind.weights, weights, strict=True))
        step = CellStep(self._call.cell, self._call.states, given)
        kind = SequencePenalty if self._config.is_over_time else PointPenalty
        return kind(step, self._config, self._view, self._assumptions)


class CompiledPenalties:
    """The compiled penalties of a model, each made when it is first asked for.

    Args:
        model: Keras model.
        config: `PenaltyConfig`.
    """

    def __init__(self, model: keras.Model, config: PenaltyConfig) -> None:
        self._model, self._config = model, config
        self._views: dict[Hashable, ViewName] = {}
        self._known: dict[Hashable, CompiledPenalty] = {}

    def __len__(self) -> int:
        return len(self._known)

    def of(self, call: MeasurableCall, assumptions: Assumptions) -> CompiledPenalty:
        """Returns the penalty on calls of the kind of a call.

        Raises:
            ValueError: If the cell has no Jacobian of the view.
        """
        kind = (call.kind.key, str(call.states), str(call.specs))
        if kind not in self._views:
            self._views[kind] = view_of(self._config.view, call)
        key = (*kind, assumptions)
        if key not in self._known:
            # Kept at the end: an interrupted trace leaves nothing.
            self._known[key] = CompiledPenalty(self._model, call, self._config, self._views[kind], assumptions)
        return self._known[key]


def view_of(view: str | tuple[int | str, ...], call: MeasurableCall) -> ViewName:
    """Returns the view for a cell: the joint view of a cell with one state is the hidden view.

    Raises:
        ValueError: If it has no such view, or nothing connects its states, so that there is no derivative.
    """
    inputs, states, _ = call.specs
    floating = floating_states(states)
    if not floating:
        raise ValueError(f"None of its {len(states)} states is floating-point, so there is no derivative.")
    name = chosen_view(view, call.states, floating)
    name = "hidden" if name == "joint" and len(floating) == 1 else name
    first = tf.TensorSpec(inputs.shape[1:], inputs.dtype)
    dependencies = find_dependencies(CellStep(call.cell, call.states), first, states)
    everywhere = {
        "hidden": dependencies.depends[0][0],
        "joint": any(map(any, dependencies.depends)),
        "inputs": dependencies.on_inputs,
    }
    if isinstance(name, str):
        connected = everywhere[name]
    else:
        chosen = [floating.index(state) for state in name]
        connected = any(dependencies.depends[new][old] for new in chosen for old in chosen)
    if not connected:
        raise ValueError(f"No gradient connects the new state with the old one, or the inputs, of its {name} view.")
    return name
