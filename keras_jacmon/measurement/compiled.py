"""Compiled measurements: one for each kind of call, which all calls of this kind share, also those of other models."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import tensorflow as tf

from keras_jacmon.cell.kind import CellKind, CellKinds
from keras_jacmon.cell.step import CellStep
from keras_jacmon.cell.trajectory import UnrollInputs
from keras_jacmon.graphs.trace import Traced, chosen_device, optimized_briefly, trace
from keras_jacmon.jacobians.cell_jacobian import Assumptions
from keras_jacmon.jacobians.registered_forms import registered_form
from keras_jacmon.measurement.assembly import CallMetadata
from keras_jacmon.measurement.call import measure_call
from keras_jacmon.measurement.results import CallResults
from keras_jacmon.measurement.shared import Shared
from keras_jacmon.measures.registry import Selection, views_of
from keras_jacmon.model.guard import foreign_variables, put_back, shielded
from keras_jacmon.model.recording import RecurrentCall
from keras_jacmon.options import Options

if TYPE_CHECKING:
    from collections.abc import Hashable

# For models to come: a notebook makes its model and the monitor again and again. They hold no model and no weights.
_SHARED: "Shared[CompiledMeasurement]" = Shared(most=16)

# Inputs, flat initial states, and the mask, which may be None.
SequenceTensors = tuple[tf.Tensor, tuple[tf.Tensor, ...], tf.Tensor | None]


@dataclass(frozen=True, eq=False)
class MeasurableCall:
    """A recurrent call as far as its measurement depends on it.

    Attributes:
        name: String, the key of the call in reports.
        layer: The recurrent layer.
        cell: Its cell, or what stands for it.
        go_backwards: Boolean, True if the steps run from the last position of the inputs to the first.
        states: Structure of the layer's states; only the structure counts.
        specs: Structure of `SequenceTensors`, with the `tf.TensorSpec` of each tensor.
        kind: `CellKind` of its cell.
        notes: Tuple of sentences on this call alone that a reader of the numbers must know.
        wider: A call of the same kind but for more features, whose measurement is that of this one as well; None, the
            default, if there is none.
    """

    name: str
    layer: keras.Layer
    cell: Any
    go_backwards: bool
    states: Any
    specs: Any
    kind: CellKind
    notes: tuple[str, ...]
    wider: "MeasurableCall | None" = None

    @property
    def features(self) -> int:
        """The number of values that it receives at each step."""
        return int(self.specs[0].shape[2:].num_elements())

    @classmethod
    def all_of(
        cls, calls: Sequence[RecurrentCall], sequences: Sequence[UnrollInputs], kinds: CellKinds
    ) -> "list[MeasurableCall]":
        """Makes those of all recorded calls of a model, each with the wider one, if there is one."""
        each = [cls.of(call, sequence, kinds) for call, sequence in zip(calls, sequences, strict=True)]
        return [dataclasses.replace(call, wider=_widest_for(call, each)) for call in each]

    @classmethod
    def of(cls, call: RecurrentCall, sequence: UnrollInputs, kinds: CellKinds) -> "MeasurableCall":
        """Makes it from a recorded call, the tensors that the cell is unrolled along, and the kinds of the cells."""

        def spec(tensor: tf.Tensor) -> tf.TensorSpec:
            return tf.TensorSpec(tensor.shape, tensor.dtype)

        mask = None if sequence.mask is None else spec(sequence.mask)
        specs = (spec(sequence.inputs), tuple(map(spec, sequence.states)), mask)
        if registered_form(call.cell) is None:
            first = tf.TensorSpec(sequence.inputs.shape[1:], sequence.inputs.dtype)
            kind = kinds.of(call.cell, call.states, [first, *specs[1]])
        else:
            # A form may read from the cell what its step does not.
            kind = CellKind.own(call.cell)
        states = keras.tree.map_structure(lambda _: 0, call.states)
        return cls(call.name, call.layer, call.cell, call.go_backwards, states, specs, kind, _notes_of(call))


class CompiledMeasurement(NamedTuple):
    """The measurement of one kind of call.

    Attributes:
        function: The traced measurement: of the number of measurements before, `SequenceTensors` and weights.
        foreign: List of the variables that it writes to and that Keras does not know; they are put back.
        specs: Pair of the specs of `SequenceTensors` and of weights. What a call with fewer features has is filled up
            with zeros, which add nothing where its inputs meet their weights.
    """

    function: Traced[CallMetadata]
    foreign: list[Any]
    specs: tuple[Any, list[tf.TensorSpec]]

    @property
    def metadata(self) -> CallMetadata:
        """The metadata of all calls of this kind."""
        return self.function.static

    def __call__(self, draw: tf.Tensor, sequence: SequenceTensors, weights: Sequence[tf.Tensor]) -> CallResults:
        """Measures a call with the given weights of its cell, in the order of its kind."""
        # Keras' variables are shielded while tracing; a `tf.Variable` that a custom cell writes to is put back here.
        given = sequence, list(weights)
        if not sequence[0].shape.is_compatible_with(self.specs[0][0].shape):
            given = tf.nest.map_structure(_filled_up, given, self.specs)
        with put_back(self.foreign), optimized_briefly():
            results: CallResults = self.function(draw, *given)
        return results


class CompiledMeasurements:
    """The compiled measurements of a model, each made when it is first asked for, unless another model has it.

    Args:
        model: Keras model.
        options: The settings of the measurements.
    """

    def __init__(self, model: keras.Layer, options: Options) -> None:
        self._model, self._options = model, options
        self._known: dict[Hashable, CompiledMeasurement] = {}

    @property
    def graphs(self) -> list[tf.Graph]:
        """The graphs of the measurements, in the order in which they were traced."""
        return [compiled.function.graph.graph for compiled in self._known.values()]

    def of(self, call: MeasurableCall, measures: Selection, assumptions: Assumptions) -> CompiledMeasurement:
        """Returns the measurement of a call.

        Args:
            call: The call.
            measures: The quantities that the user selected.
            assumptions: The assumptions behind the Jacobians.
        """
        if call.wider is not None and "inputs" not in views_of(measures):
            call = call.wider
        key = (call.kind.key, str(call.states), str(call.specs), measures, assumptions)
        if key not in self._known:

            def make() -> CompiledMeasurement:
                return self._compiled(call, measures, assumptions)

            # Kept at the end: an interrupted trace leaves nothing.
            self._known[key] = _SHARED.get((key, *self._settings()), make) if _is_for_all(call) else make()
        return self._known[key]

    def _settings(self) -> "tuple[Hashable, ...]":
        """Returns what a trace depends on beside the kind of the call."""
        # The names of the measures, which may be a list, are in the key already, as quantities.
        return dataclasses.replace(self._options, measures=None), chosen_device()

    def _compiled(self, call: MeasurableCall, measures: Selection, assumptions: Assumptions) -> CompiledMeasurement:
        def run(
            draw: tf.Tensor, sequence: SequenceTensors, weights: list[tf.Tensor]
        ) -> tuple[CallResults, CallMetadata]:
            step = CellStep(call.cell, call.states, list(zip(call.kind.weights, weights, strict=True)))
            with shielded(self._model):
                metadata, results = measure_call(
                    step, UnrollInputs(*sequence), measures, self._options, assumptions=assumptions, draw=draw
                )
            return results, metadata

        weights = [tf.TensorSpec(weight.shape, weight.dtype) for weight in call.kind.weights]
        # A step that reads nothing but what it is given leaves nothing behind.
        ordered = not call.kind.is_self_contained
        function = trace(run, [tf.TensorSpec([], tf.int32), call.specs, weights], ordered=ordered)
        foreign = foreign_variables(function.graph.graph, self._model, [])
        return CompiledMeasurement(function, foreign, (call.specs, weights))


def _is_for_all(call: MeasurableCall) -> bool:
    """True if the measurement of a call may be shared with other models: it reads only what it is given."""
    return call.kind.is_self_contained and not tf.distribute.has_strategy()


def _widest_for(call: MeasurableCall, calls: Sequence[MeasurableCall]) -> MeasurableCall | None:
    """Returns the call with the most features among those that differ from a call in nothing else; None for itself.

    It has at most twice as many features as there are values in the states, since products with zeros take time too:
    the first layer of a stack is measured as the next ones are, and these are not as a first layer with wide inputs is.
    """
    inputs, states, mask = call.specs
    if call.kind.key_for_any_features is None:
        return None
    most = 2 * sum(int(state.shape[1:].num_elements()) for state in states)

    def is_wider(other: MeasurableCall) -> bool:
        others, *rest = other.specs
        return (
            other.kind.key_for_any_features == call.kind.key_for_any_features
            and (str(other.states), rest) == (str(call.states), [states, mask])
            and others.shape[:-1].as_list() == inputs.shape[:-1].as_list()
            and call.features < other.features <= most
        )

    return max(filter(is_wider, calls), key=lambda other: other.features, default=None)


def _filled_up(tensor: tf.Tensor | None, spec: tf.TensorSpec | None) -> tf.Tensor | None:
    """Returns a tensor with zeros added at the end of each axis, up to the shape of a spec."""
    if tensor is None or spec is None or tensor.shape.is_compatible_with(spec.shape):
        return tensor
    missing = [wanted - size for size, wanted in zip(tensor.shape, spec.shape, strict=True)]
    return tf.pad(tensor, [[0, count] for count in missing])


def _notes_of(call: RecurrentCall) -> tuple[str, ...]:
    """Returns notes on steps that are made, or left out, in another way than a reader may think."""
    notes = []
    if call.is_stepped_by_hand:
        # As in a forecast that feeds itself.
        notes.append("the model also calls its cell outside of the layer; these steps are not measured")
    if call.has_lost_mask:
        # Layers of Keras 3.16 hand no mask on, nor do others that do not support masks.
        notes.append(
            "a mask reached the layer below and not this one: the layer takes all steps, also the padded ones, and all "
            "are measured"
        )
    return tuple(notes)
