"""The penalty on a model: the mean of the penalties on the calls of its recurrent layers."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_jacmon.cell.outputs import differing
from keras_jacmon.cell.trajectory import UnrollInputs
from keras_jacmon.graphs.trace import Traced, trace
from keras_jacmon.measurement.loops import record_with_shared_loops
from keras_jacmon.measurement.measurable_call import MeasurableCall, SequenceTensors
from keras_jacmon.measurement.recorded_calls import RecordedCalls, RecordedTensors
from keras_jacmon.model.distribution import own_variable
from keras_jacmon.model.guard import foreign_put_back, shielded
from keras_jacmon.model.layers import RecurrentLayer
from keras_jacmon.model.recording import Recording, record_calls
from keras_jacmon.regularization.call_penalty import CallPenalty
from keras_jacmon.regularization.compiled_penalty import CompiledPenalties
from keras_jacmon.regularization.penalty_config import PenaltyConfig
from keras_jacmon.regularization.second_derivatives import register_second_derivatives


class ModelPenalty:
    """The mean of the penalties on the calls of a model's recurrent layers.

    Args:
        model: A built Keras model.
        inputs: The tensors of the probe, in the structure that the model takes.
        layers: Sequence of the layers to penalize; each has a weight that is trained.
        config: `PenaltyConfig`.
        targets: Dict from the key of a call, or the name of its layer, to a scalar variable; the one under None is the
            target of all others.

    Attributes:
        calls: Dict from the key of a call to its `CallPenalty`.
        names: List of the keys of calls and the names of their layers, with or without a penalty.
        unmeasured: Dict by layer name, the reason why a layer has no call with a penalty.
        notes: List of sentences on assumptions that did not hold when it was made.

    Raises:
        ValueError: If a penalty cannot be computed, or has no gradient by any weight.
    """

    def __init__(
        self,
        model: keras.Model,
        inputs: Any,
        layers: Sequence[RecurrentLayer],
        config: PenaltyConfig,
        targets: Mapping[str | None, tf.Variable],
    ) -> None:
        self._model, self._inputs, self._layers, self._config, self._targets = model, inputs, layers, config, targets
        self._turn, self._step = own_variable(-1), own_variable(0)
        # Calls with a note already that they have no penalty, or that points of theirs are left out.
        self._told_of_none: set[str] = set()
        self._told_of_some: set[str] = set()
        self.calls: dict[str, CallPenalty] = {}
        register_second_derivatives()
        self._compiled = CompiledPenalties(model, config)
        self._recording: Traced[RecordedCalls] = trace(partial(self._record, layers))
        layer_names = {id(item.layer): item.name for item in layers}
        for call in self._recording.static.calls:
            target = self._target_of(call.name, layer_names[id(call.layer)])
            if target is not None:
                with _naming(call.name):
                    self.calls[call.name] = self._penalty_on(call, target)
        self.names = [
            name for call in self._recording.static.calls for name in (layer_names[id(call.layer)], call.name)
        ]
        self.unmeasured = self._recording.static.recording.unmeasured
        for penalty in self.calls.values():
            penalty.share = 1.0 / len(self.calls)
        self.notes, _ = self.refresh()
        for key, penalty in self.calls.items():
            if penalty.holds:
                _check_gradient(key, penalty)

    @property
    def trace_count(self) -> int:
        """Integer, number of traced penalties: one for each kind of call, one more for a check that failed."""
        return len(self._compiled)

    def refresh(self) -> tuple[list[str], bool]:
        """Takes other points of the trajectories, with the present weights.

        Returns:
            A list of sentences on assumptions that do not hold, and a boolean: True if Jacobians are taken in another
            way from now on. Every graph that contains a penalty must then be traced anew.

        Raises:
            ValueError: If a registered recurrence is not that of its layer.
        """
        self._turn.assign_add(1)
        with foreign_put_back(self._recording.graph.graph, self._model):
            sequences, differences = self._recording()
        for key, reason in (self._recording.static.refusals | differing(differences)).items():
            with _naming(key):
                raise ValueError(f"The reason: {reason}")
        names = [call.name for call in self._recording.static.calls]
        by_name = dict(zip(names, sequences, strict=True))
        results = {key: call.refresh(by_name[key]) for key, call in self.calls.items() if call.holds}
        notes, changed = [], False
        for key, result in results.items():
            note = self.calls[key].refute(result.checks.floats())
            if note is not None:
                notes.append(f"Layer `{key}`: {note}")
                changed = True
            if not int(result.valid) and key not in self._told_of_none:
                self._told_of_none.add(key)
                notes.append(
                    f"Layer `{key}`: all steps of the probe are masked, or its states are not finite, so it has no "
                    "penalty. Give a probe with steps that are not masked."
                )
            left_out = int(result.left_out)
            if left_out and key not in self._told_of_some:
                self._told_of_some.add(key)
                notes.append(
                    f"Layer `{key}`: at {left_out} points of its trajectory the penalty is not finite. Such points "
                    "are left out; later ones of this layer are not warned of."
                )
        return notes, changed

    @property
    def typical_target(self) -> float:
        """Float, the mean target of the calls."""
        return float(np.mean([call.target for call in self.calls.values()]))

    def value(self) -> tf.Tensor:
        """Returns the penalty with the present weights, a scalar that a tape can differentiate."""
        return tf.add_n([call() for call in self.calls.values()])

    def begin(self, step: int) -> None:
        """Prepares the batch after `step` batches: other random vectors, and fresh states at other points."""
        # An array: TensorFlow keeps a copy of every Python number on the device, for ever.
        self._step.assign(np.int32(step))
        if self._config.states == "fresh":
            self._turn.assign_add(1)

    def __call__(self) -> float:
        """Returns the penalty with the present weights."""
        return sum(call.to_log() for call in self.calls.values())

    def _record(self, layers: Sequence[RecurrentLayer]) -> tuple[RecordedTensors, RecordedCalls]:
        """Records the calls of some layers on the probe, in the graph that is being traced."""
        with shielded(self._model):
            return RecordedCalls.of(*record_with_shared_loops(self._model, self._inputs, layers))

    def _target_of(self, call: str, layer: str) -> tf.Variable | None:
        """Returns the target of a call: its own, or the target of its layer, or the target of all others."""
        key = next((key for key in (call, layer) if key in self._targets), None)
        return self._targets.get(key)

    def _penalty_on(self, call: MeasurableCall, target: tf.Variable) -> CallPenalty:
        owner: Any = self._model if self._config.through_states else call.layer
        layers = [item for item in self._layers if item.layer is call.layer]

        def record() -> tuple[SequenceTensors, Recording]:
            with shielded(self._model):
                recording = record_calls(self._model, self._inputs, layers)
                found = UnrollInputs.of(next(known for known in recording.calls if known.name == call.name))
            tensors: SequenceTensors = (found.inputs, found.states, found.mask)
            if not self._config.through_states:
                # Otherwise the model would be differentiated in vain.
                tensors = tf.nest.map_structure(lambda x: None if x is None else tf.stop_gradient(x), tensors)
            return tensors, recording

        return CallPenalty(
            self._config,
            self._model,
            call,
            self._compiled,
            target=target,
            weights=owner.trainable_variables,
            record=record,
            turn=self._turn,
            step=self._step,
        )


def _check_gradient(key: str, call: CallPenalty) -> None:
    """Checks before a training that a penalty has a gradient.

    Raises:
        ValueError: If it has none.
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
    """Names the call in an error that is raised in its penalty."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"The Jacobians of layer `{key}` cannot be regularized; name the other layers in `layers` to leave it out. "
            f"{error}"
        ) from error
