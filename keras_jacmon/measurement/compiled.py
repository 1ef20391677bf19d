"""Compiled measurements: one for each kind of call, which all calls of this kind share, also those of other models."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import tensorflow as tf

from keras_jacmon.cell.step import CellStep
from keras_jacmon.cell.trajectory import UnrollInputs
from keras_jacmon.graphs.trace import Traced, chosen_device, optimized_briefly, trace
from keras_jacmon.jacobians.cell_jacobian import Assumptions
from keras_jacmon.measurement.call import measure_call
from keras_jacmon.measurement.measurable_call import MeasurableCall, SequenceTensors
from keras_jacmon.measurement.metadata import CallMetadata
from keras_jacmon.measurement.results import CallResults
from keras_jacmon.measurement.shared import Shared
from keras_jacmon.measures.selection import Selection, views_of
from keras_jacmon.model.guard import foreign_variables, put_back, shielded
from keras_jacmon.options import Options
from keras_jacmon.tensors import spec_of

if TYPE_CHECKING:
    from collections.abc import Hashable

# For models to come: a notebook makes its model and the monitor again and again. They hold no model and no weights.
_SHARED: "Shared[CompiledMeasurement]" = Shared(most=16)


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
            self._known[key] = (
                _SHARED.get((key, *self._settings()), make, _is_for_all) if _may_be_shared(call) else make()
            )
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

        weights = list(map(spec_of, call.kind.weights))
        # A step that reads nothing but what it is given leaves nothing behind.
        ordered = not call.kind.is_self_contained
        function = trace(run, [tf.TensorSpec([], tf.int32), call.specs, weights], ordered=ordered)
        foreign = foreign_variables(function.graph.graph, self._model)
        return CompiledMeasurement(function, foreign, (call.specs, weights))


def _may_be_shared(call: MeasurableCall) -> bool:
    """True if the measurement of a call may be one for other models too, which have cells of the same kind."""
    return call.kind.is_self_contained and not tf.distribute.has_strategy()


def _is_for_all(compiled: CompiledMeasurement) -> bool:
    """True unless a measurement refers to a variable, such as the seed of a dropout that is not applied."""
    return not compiled.function.refers_to_variables


def _filled_up(tensor: tf.Tensor | None, spec: tf.TensorSpec | None) -> tf.Tensor | None:
    """Returns a tensor with zeros added at the end of each axis, up to the shape of a spec."""
    if tensor is None or spec is None or tensor.shape.is_compatible_with(spec.shape):
        return tensor
    missing = [wanted - size for size, wanted in zip(tensor.shape, spec.shape, strict=True)]
    return tf.pad(tensor, [[0, count] for count in missing])
