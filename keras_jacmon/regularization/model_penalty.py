"""The penalty on a model: the mean of the penalties on the calls of its recurrent layers."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_jacmon.jacobians.cell_jacobian import CellJacobian
from keras_jacmon.model.distribution import own_variable
from keras_jacmon.model.guard import foreign_variables, put_back, shielded
from keras_jacmon.model.layers import RecurrentLayer
from keras_jacmon.model.recording import Recording, RecurrentCall, record_calls
from keras_jacmon.regularization.call_penalty import CallPenalty, RefreshResult
from keras_jacmon.regularization.penalty_config import PenaltyConfig
from keras_jacmon.regularization.second_derivatives import register_second_derivatives
from keras_jacmon.traced_graph import Traced, trace


@dataclass(frozen=True)
class _Calls:
    """The calls of a model, known when its refresh is traced.

    Attributes:
        penalties: Dict from the key of a call to its penalty.
        names: List of the keys of calls and the names of their layers, with or without a penalty.
        recording: The recorded calls; must live as long as the graph.
        jacobians: List of their Jacobians; must live as long as the graph.
    """

    penalties: dict[str, CallPenalty]
    names: list[str]
    recording: Recording
    jacobians: list[CellJacobian]


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
        # Calls with a note already that some of their points are left out.
        self._told: set[str] = set()
        self.calls: dict[str, CallPenalty] = {}
        register_second_derivatives()
        self._traced = self._trace()
        self.calls = self._traced.static.penalties
        self.names = self._traced.static.names
        self.unmeasured = self._traced.static.recording.unmeasured
        for call in self.calls.values():
            call.share = 1.0 / len(self.calls)
        self.notes, _ = self.refresh()
        for key, call in self.calls.items():
            if call.holds:
                _check_gradient(key, call)

    def refresh(self) -> tuple[list[str], bool]:
        """Takes other points of the trajectories, with the present weights.

        Returns:
            A list of sentences on assumptions that do not hold, and a boolean: True if Jacobians are taken in another
            way from now on. Every graph that contains a penalty must then be traced anew.
        """
        self._turn.assign_add(1)
        own = [variable for call in self.calls.values() for variable in call.variables]
        with put_back(foreign_variables(self._traced.graph.graph, self._model, own)):
            results: dict[str, RefreshResult] = self._traced()
        notes, changed = [], False
        for key, result in results.items():
            note = self.calls[key].refute(result.checks.floats())
            if note is not None:
                notes.append(f"Layer `{key}`: {note}")
                changed = True
            if not int(result.valid) and key not in self._told:
                self._told.add(key)
                notes.append(
                    f"Layer `{key}`: all steps of the probe are masked, or its states are not finite, so it has no "
                    "penalty. Give a probe with steps that are not masked."
                )
            left_out = int(result.left_out)
            if left_out and key not in self._told:
                self._told.add(key)
                notes.append(
                    f"Layer `{key}`: at {left_out} points of its trajectory the penalty is not finite. Such points "
                    "are left out; later ones of this layer are not warned of."
                )
        if changed:
            self._traced = self._trace()
        return notes, changed

    def begin(self, step: int) -> None:
        """Prepares the batch after `step` batches: other random vectors, and fresh states at other points."""
        # Of numbers of Python TensorFlow keeps a copy on the device, for ever.
        self._step.assign(np.int32(step))
        if self._config.states == "fresh":
            self._turn.assign_add(1)

    def __call__(self) -> float:
        """Returns the penalty with the present weights."""
        return sum(call.to_log() for call in self.calls.values())

    def _trace(self) -> Traced[_Calls]:
        return trace(self._refresh)

    def _refresh(self) -> tuple[dict[str, RefreshResult], _Calls]:
        layer_names = {id(item.layer): item.name for item in self._layers}
        results: dict[str, RefreshResult] = {}
        penalties: dict[str, CallPenalty] = {}
        jacobians = []
        with shielded(self._model):
            recording = record_calls(self._model, self._inputs, self._layers)
            for call in recording.calls:
                target = self._target_of(call.name, layer_names[id(call.layer)])
                if target is None:
                    continue
                with _naming(call.name):
                    penalties[call.name] = self.calls.get(call.name) or self._penalty_on(call, target)
                    results[call.name], jacobian = penalties[call.name].refresh(call)
                jacobians.append(jacobian)
        names = [name for call in recording.calls for name in (layer_names[id(call.layer)], call.name)]
        return results, _Calls(penalties, names, recording, jacobians)

    def _target_of(self, call: str, layer: str) -> tf.Variable | None:
        """Returns the target of a call: its own, or the target of its layer, or the target of all others."""
        key = next((key for key in (call, layer) if key in self._targets), None)
        return self._targets.get(key)

    def _penalty_on(self, call: RecurrentCall, target: tf.Variable) -> CallPenalty:
        owner: Any = self._model if self._config.through_states else call.layer
        layers = [item for item in self._layers if item.layer is call.layer]

        def record() -> Recording:
            with shielded(self._model):
                return record_calls(self._model, self._inputs, layers)

        return CallPenalty(
            self._config,
            self._model,
            call,
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
