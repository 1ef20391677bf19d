"""The pass of a model on the probe: what its recurrent layers receive, and how the loss feels their states."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_jacmon.cell.outputs import differing
from keras_jacmon.cell.step import half_precision_layers
from keras_jacmon.errors import invalid_argument, message_of
from keras_jacmon.graphs.trace import Traced, optimized_briefly, trace
from keras_jacmon.measurement.loops import record_with_shared_loops
from keras_jacmon.measurement.measurable_call import MeasurableCall, SequenceTensors
from keras_jacmon.measurement.recorded_calls import RecordedCalls, RecordedTensors
from keras_jacmon.measures.registry import MEASURES
from keras_jacmon.model.guard import foreign_put_back, shielded
from keras_jacmon.model.inputs import hint_at_slip
from keras_jacmon.model.layers import RecurrentLayer
from keras_jacmon.model.loss_gradient import LossGradients, loss_gradients
from keras_jacmon.tensors import spec_of


class ModelPass(NamedTuple):
    """A pass of a model on the probe.

    Attributes:
        sequences: Dict by name of a call, what the layer receives.
        loss_gradients: Dict by name of a call, the norms of the gradient of the loss; empty without targets.
        refusals: Dict by name of a call, the reason why its registered recurrence is not that of its layer.
    """

    sequences: dict[str, SequenceTensors]
    loss_gradients: dict[str, tf.Tensor]
    refusals: dict[str, str]


class RecordedModel:
    """The pass of a model on the probe, traced once.

    Args:
        model: Keras model or layer, built.
        layers: Recurrent layers to record.
        inputs: Structure of tensors `(batch, ...)`, the probe.
        targets: Structure of tensors `(batch, ...)`, or None for no gradient of the loss.
    """

    def __init__(self, model: keras.Layer, layers: Sequence[RecurrentLayer], inputs: Any, targets: Any) -> None:
        self._model, self._layers = model, layers
        self._inputs = keras.tree.flatten(inputs)
        self._structure = keras.tree.map_structure(lambda _: 0, inputs)
        self._targets = targets
        self._has_half_precision = bool(half_precision_layers(model))
        self._recording = trace(self._record, _specs(self._inputs))
        self._loss = None if targets is None else trace(self._differentiate_loss, _specs(self._tensors()))

    @property
    def calls(self) -> list[MeasurableCall]:
        """The recorded calls of the layers."""
        return self._recording.static.calls

    @property
    def unmeasured(self) -> Mapping[str, str]:
        """Reasons why some layers have no recorded call, by name of the layer."""
        return self._recording.static.recording.unmeasured

    def refusals(self) -> dict[str, str]:
        """Returns the reasons why registered recurrences cannot be used now, by name of the call."""
        static = self._recording.static
        if all(call.returned is None for call in static.recording.calls):
            return {}
        _, differences = self._run(self._recording, self._inputs)
        return static.refusals | differing(differences)

    def __call__(self) -> ModelPass:
        """Runs the model with the weights of this moment."""
        sequences, differences = self._run(self._recording, self._inputs)
        names = [call.name for call in self.calls]
        norms = {} if self._loss is None else self._run(self._loss, self._tensors())
        return ModelPass(dict(zip(names, sequences, strict=True)), norms, differing(differences))

    def _tensors(self) -> list[tf.Tensor]:
        return [*self._inputs, *keras.tree.flatten(self._targets)]

    def _run(self, traced: Traced[Any], tensors: Sequence[tf.Tensor]) -> Any:
        """Runs a traced function of the model, and puts back the variables that Keras does not know."""
        optimization = contextlib.nullcontext() if self._has_half_precision else optimized_briefly()
        with foreign_put_back(traced.graph.graph, self._model), optimization:
            return traced(*tensors)

    def _record(self, *inputs: tf.Tensor) -> tuple[RecordedTensors, RecordedCalls]:
        """Records the calls of the model on the probe, in the graph that is being traced."""
        with shielded(self._model):
            try:
                packed = keras.tree.pack_sequence_as(self._structure, list(inputs))
                recording, kinds = record_with_shared_loops(self._model, packed, self._layers)
            except Exception as error:
                raise self._refusal(inputs, error) from error
            return RecordedCalls.of(recording, kinds)

    def _differentiate_loss(self, *tensors: tf.Tensor) -> tuple[dict[str, tf.Tensor], LossGradients]:
        """Returns the norms of the gradient of the loss, by name of the call, in the graph that is being traced."""
        inputs, targets = tensors[: len(self._inputs)], tensors[len(self._inputs) :]
        with shielded(self._model):
            loss = self._gradients_of_loss(
                keras.tree.pack_sequence_as(self._structure, list(inputs)),
                keras.tree.pack_sequence_as(self._targets, list(targets)),
            )
        return {name: MEASURES["loss_gradient"].function(gradient) for name, gradient in loss.by_call.items()}, loss

    def _gradients_of_loss(self, inputs: Any, targets: Any) -> LossGradients:
        measured = {call.layer for call in self._recording.static.calls}
        layers = {position: item for position, item in enumerate(self._layers) if item.layer in measured}
        # With the losses that layers add, such as activity regularizers; those of weights look for these in the scope.
        weights = [(weight, tf.convert_to_tensor(weight.value)) for weight in self._model.trainable_variables]
        with keras.StatelessScope(state_mapping=weights, collect_losses=True):
            return loss_gradients(self._model, inputs, targets, layers)

    def _refusal(self, inputs: Sequence[tf.Tensor], error: Exception) -> ValueError:
        shapes = [tuple(tensor.shape) for tensor in inputs]
        fixed = {
            item.name: int(keras.tree.flatten(item.layer.states)[0].shape[0])
            for item in self._layers
            if item.adapter is None and item.layer.stateful and item.layer.states is not None
        }
        expected = "a batch that the model can be called on"
        for name, samples in fixed.items():
            if samples != inputs[0].shape[0]:
                expected = f"a batch of {samples} samples, as the stateful layer `{name}` was built for"
        hint = hint_at_slip(keras.tree.pack_sequence_as(self._structure, list(inputs)))
        return invalid_argument("probe", expected, f"shapes {shapes}{hint}. The model says: {message_of(error)}")


def _specs(tensors: Sequence[tf.Tensor]) -> list[tf.TensorSpec]:
    return list(map(spec_of, tensors))
