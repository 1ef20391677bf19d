"""How far the Jacobians of a model's recurrent layers are from where they should be, as a term of a loss."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_jacmon.jacobians.checks import CheckResults
from keras_jacmon.model.distribution import own_variable
from keras_jacmon.model.guard import foreign_variables, put_back, shielded
from keras_jacmon.model.layers import RecurrentLayer
from keras_jacmon.model.recording import RecurrentCall, record_calls
from keras_jacmon.regularization.call_penalty import CallPenalty, PenaltyConfig


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
        aim: PenaltyConfig,
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
            refreshed = self._traced()
        notes, changed = [], False
        for key, (checks, left_out) in refreshed.items():
            note = self.calls[key].refute(checks.floats())
            if note is not None:
                notes.append(f"Layer `{key}`: {note}")
                changed = True
            if (left_out := int(left_out)) and key not in self._told:
                self._told.add(key)
                notes.append(
                    f"Layer `{key}`: at {left_out} points of its trajectory the penalty is not finite. Such points "
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

    def _refresh(self) -> dict[str, tuple[CheckResults, tf.Tensor]]:
        names = {id(item.layer): item.name for item in self._layers}
        refreshed = {}
        with shielded(self._model):
            for recorded in self._recorded(self._layers):
                name = names[id(recorded.layer)]
                self.names |= dict.fromkeys([name, recorded.name])
                if recorded.name not in self.calls and not self._add(recorded, name):
                    continue
                with _naming(recorded.name):
                    refreshed[recorded.name] = self.calls[recorded.name].refresh(recorded)
        return refreshed

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
