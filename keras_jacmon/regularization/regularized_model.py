"""A model with a penalty on its Jacobians among its losses."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.errors import invalid_argument, sentence
from keras_jacmon.model.building import build
from keras_jacmon.model.distribution import check_distribution, check_outside_of_scopes
from keras_jacmon.model.inputs import fit_probe
from keras_jacmon.model.layers import RecurrentLayer, check_model, find_recurrent_layers, select_layers
from keras_jacmon.regularization.auto_strength import AutoStrength
from keras_jacmon.regularization.loss_terms import LossTerms, Term
from keras_jacmon.regularization.model_penalty import ModelPenalty
from keras_jacmon.regularization.penalty_config import PenaltyConfig
from keras_jacmon.regularization.schedule import ScheduledNumber
from keras_jacmon.report.report import Report


class RegularizedModel:
    """A model whose losses include a penalty on its Jacobians, while it is attached.

    Args:
        model: Keras model.
        probe: The arrays that `read_probe` returned.
        layers: Names of recurrent layers, or layers; None for all.
        config: `PenaltyConfig`, the settings of the penalty.
        targets: Dict from the name of a layer or a call to its target; the key None is the target of all others.
        strength: `ScheduledNumber`, the factor of the penalty.
        targets_of_probe: Tensors, the targets of the probe's samples; None if they are not known.

    Raises:
        ValueError: If a layer is unknown, or the penalty or its strength cannot be computed.
    """

    def __init__(
        self,
        model: keras.Layer,
        probe: Any,
        layers: Iterable[str | keras.Layer] | str | keras.Layer | None,
        *,
        config: PenaltyConfig,
        targets: Mapping[str | None, ScheduledNumber],
        strength: ScheduledNumber,
        targets_of_probe: Any,
    ) -> None:
        check_model(model)
        check_distribution(model)
        check_outside_of_scopes("`fit`, or `attached`, of a model with a `JacobianRegularizer`")
        if not config.suits_xla and getattr(model, "compiled", False) and model.jit_compile and not model.run_eagerly:
            raise invalid_argument(
                "measure",
                "a measure that XLA can differentiate, or a model compiled with `jit_compile=False`",
                f"measure={config.measure} for the model `{model.name}`",
            )
        build(model, probe)
        found = select_layers(find_recurrent_layers(model), layers)
        carriers = _trained_weights(model, found)
        self._numbers = (strength, *targets.values())
        self._model, self._config, self._strength = model, config, strength
        self._inputs, self._targets_of_probe = fit_probe(model, probe), targets_of_probe
        self._refreshed: int | None = None
        self._penalty = ModelPenalty(
            model,
            self._inputs,
            [item for item in found if id(item.layer) in carriers],
            config,
            {name: target.variable for name, target in targets.items()},
        )
        self._check_targets(found, [name for name in targets if name is not None])
        self._check_calls(required=layers is not None, targets=targets.keys())
        _warn(self._penalty.notes)
        self._terms = LossTerms(
            model,
            [(carriers[id(call.layer)], _scaled(call, strength.variable)) for call in self._penalty.calls.values()],
        )
        self._auto = self._auto_strength() if strength.is_auto else None

    def attach(self, *, to_fit: bool = False) -> None:
        """Puts the penalty into the losses of the model, unless it is there; also in the middle of `fit`.

        Args:
            to_fit: Boolean, True if it is taken out when the present `fit` is left. Defaults to False.
        """
        self._terms.attach(to_fit=to_fit)

    def detach(self) -> None:
        """Takes the penalty out of the losses."""
        self._refreshed = None
        self._terms.detach()

    def begin(self, step: int) -> None:
        """Prepares the next batch: follows the schedules, and takes other states every `refresh` batches.

        Args:
            step: Integer, the number of batches so far.
        """
        for number in self._numbers:
            number.follow(step)
        self._penalty.begin(step)
        is_due = self._strength.is_auto and self._auto is None
        if self._refreshed is None or not 0 <= step - self._refreshed < self._config.refresh:
            self._refreshed = step
            notes, changed = self._penalty.refresh()
            _warn(notes)
            if changed:
                self._terms.trace_anew()
            is_due = self._strength.is_auto
        if is_due:
            self._choose_strength()

    @property
    def is_used(self) -> bool:
        """Boolean, True if a training has read the losses of the model with the penalty, or there is no penalty."""
        return self._terms.is_used or not self._penalty.calls

    @property
    def strength(self) -> float | None:
        """Float, the strength that was chosen last; None if it is not chosen but given."""
        return self._strength.value if self._strength.is_auto else None

    @property
    def trace_count(self) -> int:
        """Integer, number of traced penalties: one for each kind of call, one more for a check that failed."""
        return self._penalty.trace_count

    def penalty(self) -> float:
        """Returns the penalty with the present weights, not scaled by the strength."""
        return self._penalty()

    def with_targets(self, report: Report) -> Report:
        """Returns a report of the model with the targets of this moment.

        Args:
            report: `Report`.
        """
        layers = dict(report.layers)
        for name, call in self._penalty.calls.items():
            layer = layers.get(name)
            key = None if layer is None else self._config.key(layer.joint)
            if layer is not None and key in layer.values:
                layers[name] = dataclasses.replace(layer, targets={key: call.target})
        return Report(layers)

    def _choose_strength(self) -> None:
        self._auto = self._auto or self._auto_strength()
        scale = 1.0 if self._config.scale == "log" else abs(self._penalty.typical_target)
        chosen = self._auto(scale) if self._penalty.calls else None
        if chosen is not None:
            self._strength.choose(chosen)

    def _auto_strength(self) -> AutoStrength:
        """Traces the gradient of the loss, which a strength is chosen by."""
        if self._targets_of_probe is None or not getattr(self._model, "compiled", False):
            raise invalid_argument(
                "strength",
                "a number, or 'auto' for a compiled model and with `targets` beside the probe, since 'auto' compares "
                "the penalty with the loss: `JacobianMonitor(x, targets=y, regularizer=...)`",
                f"strength='auto' for the model `{self._model.name}`, "
                + ("which is not compiled" if self._targets_of_probe is not None else "without targets"),
            )
        layers = {id(call.layer): call.layer for call in self._penalty.calls.values()}
        weights = [weight for layer in layers.values() for weight in layer.trainable_variables]
        with self._terms.left_out():
            return AutoStrength(self._model, self._inputs, self._targets_of_probe, weights, self._penalty.value)

    def _check_targets(self, found: Sequence[RecurrentLayer], targets: Sequence[str]) -> None:
        """Refuses targets for layers that the model does not have."""
        names = list(dict.fromkeys([*(item.name for item in found), *self._penalty.names]))
        unknown = [name for name in targets if name not in names]
        if unknown:
            raise invalid_argument("target", f"targets for recurrent layers out of {names}", f"target={unknown}")

    def _check_calls(self, *, required: bool, targets: Iterable[str | None]) -> None:
        """Names the layers without a penalty; an error if the user asked for one of them, or none is left."""
        unmeasured = self._penalty.unmeasured
        if not unmeasured:
            return
        reasons = "; ".join(f"layer `{name}`: {reason}" for name, reason in unmeasured.items())
        if required or not unmeasured.keys().isdisjoint(targets):
            argument = "layers" if required else "target"
            raise invalid_argument(argument, "recurrent layers that the model calls on the probe", reasons)
        if not self._penalty.calls:
            raise ValueError(f"No recurrent layer of the model can have a penalty. {sentence(reasons)}")
        _warn([f"Some recurrent layers have no penalty. {sentence(reasons)}"])


def _trained_weights(model: keras.Layer, found: Iterable[RecurrentLayer]) -> dict[int, keras.Variable]:
    """Returns the first trained weight of each layer, by the layer's identity; warns of layers without one."""
    trained = {id(variable) for variable in model.trainable_variables}
    first = {}
    for item in found:
        own = [variable for variable in item.layer.trainable_variables if id(variable) in trained]
        if own:
            first[id(item.layer)] = own[0]
        else:
            _warn([f"Layer `{item.name}` has no weight that is trained, so it has no penalty."])
    return first


def _scaled(penalty: Callable[[], tf.Tensor], strength: tf.Variable) -> Term:
    """Returns a term: the penalty times its strength."""

    def term() -> tf.Tensor:
        value = penalty()
        return tf.cast(strength, value.dtype) * value

    return term


def _warn(notes: Iterable[str]) -> None:
    for note in notes:
        warnings.warn(note, stacklevel=4)
