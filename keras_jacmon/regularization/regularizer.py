"""Holds a measure of the Jacobians where the user wants it, while a model trains."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from keras_jacmon.measures.differentiable import DIFFERENTIABLE
from keras_jacmon.measures.kinds import PerStep
from keras_jacmon.measures.registry import KEYS
from keras_jacmon.model.building import build
from keras_jacmon.model.distribution import check_distribution, check_outside_of_scopes, own_variable
from keras_jacmon.model.inputs import fit_probe, read_probe
from keras_jacmon.model.layers import RecurrentLayer, find_recurrent_layers, select_layers
from keras_jacmon.options import VIEWS
from keras_jacmon.regularization.call_penalty import PenaltyConfig
from keras_jacmon.regularization.loss_terms import LossTerms
from keras_jacmon.regularization.model_penalty import ModelPenalty

# A number, or what gives one from the number of the batch.
Schedule = float | Callable[[int], Any]


@keras.saving.register_keras_serializable(package="keras_jacmon")
class JacobianRegularizer:
    """Pushes a measure of the Jacobians `ds_t/ds_{t-1}` toward a target while a model trains.

    Adds `strength * mean of (measure - target)²`, the mean over recurrent layers and over points of their trajectories
    on a probe, to the losses of the model, as a weight regularizer of Keras is added: to `loss`, and to `val_loss` too.
    Model, compiled loss and training code stay as they are, and nothing of it is in a saved model.

    Example:

    ```python
    regularizer = keras_jacmon.JacobianRegularizer(target=1.0, strength=1e-2)
    monitor = keras_jacmon.JacobianMonitor(x[:32], regularizer=regularizer)
    model.fit(x, y, epochs=10, callbacks=[monitor])
    ```

    Args:
        target: Where the measure should be: a number of at least 0, or by layer, named as in reports; layers that are
            not named have no penalty then.
        strength: What the penalty is multiplied by, at least 0. Either of both may be a schedule: of
            `keras.optimizers.schedules`, or a function of the number of batches so far.
        measure: `"variance"`, `"rms_singular_value"` or `"spectral_norm"`.
        view: `"hidden"`, `"joint"` or `"inputs"`. A cell with one state has no joint view of its own.
        scale: `"linear"`, or `"log"` for `(log(measure) - log(target))²`, which pulls more gently at values that
            explode, and harder at those that vanish.
        side: `"both"`, or `"at_most"` or `"at_least"` for no penalty below or above the target.
        states: `"cached"`: the penalty is taken at points of the trajectory that are taken anew every `refresh`
            batches, so that a batch costs one evaluation of the cell, at `rows` points, and no unrolling. `"fresh"`:
            the model runs on the probe in each step, for the states of that moment.
        through_states: Whether the gradient also flows through the fresh states, to the layers below as well.
        refresh: So many batches later other points are taken.
        rows: The most (step, sample) of a call at once, in every step the same number of samples; which ones they are
            goes round. Of a longer sequence that goes for the steps as well.
        vectors: A Jacobian, or a block of one, that has no structure (see `explain`) and more rows than this is
            multiplied by so many random vectors, others at each batch. On a linear scale and with both sides, the
            gradient of the variance's penalty is unbiased. For the RMS singular value, the logarithm and one side it is
            so up to terms that fall with the number of vectors.
        seed: Integer, for random vectors.

    Raises:
        ValueError: If an argument is invalid; what depends on the model when `fit` begins, before the first batch.
    """

    def __init__(
        self,
        target: Schedule | Mapping[str, Schedule] = 1.0,
        strength: Schedule = 1e-2,
        *,
        measure: str = "variance",
        view: str = "hidden",
        scale: Literal["linear", "log"] = "linear",
        side: Literal["both", "at_most", "at_least"] = "both",
        states: Literal["cached", "fresh"] = "cached",
        through_states: bool = False,
        refresh: int = 50,
        rows: int = 128,
        vectors: int = 16,
        seed: int = 0,
    ) -> None:
        _check_measure(measure)
        choices: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
            ("view", view, VIEWS),
            ("scale", scale, ("linear", "log")),
            ("side", side, ("both", "at_most", "at_least")),
            ("states", states, ("cached", "fresh")),
            ("through_states", through_states, (True, False)),
        )
        for name, choice, known in choices:
            if choice not in known:
                raise _invalid(name, f"one of {list(known)}", choice)
        for name, number, least in (("refresh", refresh, 1), ("rows", rows, 1), ("vectors", vectors, 2)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise _invalid(name, f"an integer of at least {least}", number)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise _invalid("seed", "an integer", seed)
        if through_states and states != "fresh":
            expected = "False with `states='cached'`, whose states are constants"
            raise _invalid("through_states", expected, through_states)
        self._aim = PenaltyConfig(measure, view, scale, side, states, bool(through_states), rows, vectors, seed)
        self._refresh = refresh
        self._strength = _Setting("strength", strength, 0.0)
        self._least = math.ulp(0.0) if scale == "log" else 0.0
        by_layer: dict[str | None, Schedule] = dict(target.items()) if isinstance(target, Mapping) else {None: target}
        if not by_layer:
            raise _invalid("target", "a target for at least one layer", target)
        self._targets = {layer: _Setting("target", value, self._least) for layer, value in by_layer.items()}

    @property
    def strength(self) -> float:
        """What the penalty is multiplied by; a new value holds from the next batch on, without tracing anew."""
        return self._strength.value

    @strength.setter
    def strength(self, value: Schedule) -> None:
        self._strength.set(value)

    @property
    def target(self) -> float | dict[str, float]:
        """Where the measure should be; a new value, or by layer as before, holds from the next batch on."""
        if None in self._targets:
            return self._targets[None].value
        return {str(layer): setting.value for layer, setting in self._targets.items()}

    @target.setter
    def target(self, value: Schedule | Mapping[str, Schedule]) -> None:
        by_layer: dict[str | None, Schedule] = dict(value.items()) if isinstance(value, Mapping) else {None: value}
        if by_layer.keys() != self._targets.keys():
            layers = [layer for layer in self._targets if layer is not None]
            expected = f"targets for the layers {layers}, as before" if layers else "a number, as before"
            raise _invalid("target", expected, value)
        for layer, setting in self._targets.items():
            setting.set(by_layer[layer])

    @contextlib.contextmanager
    def attached(
        self,
        model: keras.Layer,
        probe: Any,
        *,
        layers: Iterable[str | keras.Layer] | str | keras.Layer | None = None,
    ) -> "Iterator[RegularizedModel]":
        """Holds a model in a training loop of one's own, one that adds up `model.losses`.

        Example:

        ```python
        with regularizer.attached(model, x[:32]) as held:
            for step, (x, y) in enumerate(data):
                held.begin(step)
                train_step(x, y)        # a `tf.function` must be traced in here, not before
        ```

        Args:
            model: The model.
            probe: A batch of model inputs, as for `JacobianMonitor`.
            layers: Names of recurrent layers, or layers; None for all.

        Yields:
            The `HeldModel`: `begin(step)` before each batch follows the schedules and takes other states every
            `refresh` batches; `penalty()` is the present one, unscaled.

        Raises:
            ValueError: As for the class, of what depends on the model.
        """
        held = RegularizedModel(self, model, read_probe(probe), layers)
        held.attach()
        try:
            yield held
        finally:
            held.detach()

    def get_config(self) -> dict[str, Any]:
        """The arguments, with the values of this moment; schedules as Keras serializes them.

        A function as a schedule comes back if `keras.saving.register_keras_serializable` knows it.
        """
        if None in self._targets:
            target = self._targets[None].config()
        else:
            target = {layer: setting.config() for layer, setting in self._targets.items()}
        aim = self._aim
        return {
            "target": target,
            "strength": self._strength.config(),
            "measure": aim.measure,
            "view": aim.view,
            "scale": aim.scale,
            "side": aim.side,
            "states": aim.states,
            "through_states": aim.through_states,
            "refresh": self._refresh,
            "rows": aim.rows,
            "vectors": aim.vectors,
            "seed": aim.seed,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "JacobianRegularizer":
        """Makes one from what `get_config` returned."""
        config = dict(config)
        target = config["target"]
        by_layer = isinstance(target, Mapping) and "class_name" not in target
        config["target"] = {k: _schedule(v) for k, v in target.items()} if by_layer else _schedule(target)
        config["strength"] = _schedule(config["strength"])
        return cls(**config)

    def _follow_schedules(self, step: int) -> None:
        for setting in (self._strength, *self._targets.values()):
            setting.follow(step)

    def _target_of(self, call: str, layer: str) -> tf.Variable | None:
        for name in (call, layer, None):
            if name in self._targets:
                return self._targets[name].variable
        return None


class RegularizedModel:
    """A model whose losses have the penalty of a `JacobianRegularizer` in them, while it is attached.

    Args:
        regularizer: The regularizer.
        model: The model.
        probe: What `read_probe` returned.
        layers: Names of recurrent layers, or layers; None for all.

    Raises:
        ValueError: If a layer is unknown, or the penalty cannot be computed.
    """

    def __init__(
        self,
        regularizer: JacobianRegularizer,
        model: keras.Layer,
        probe: Any,
        layers: Iterable[str | keras.Layer] | str | keras.Layer | None,
    ) -> None:
        self._regularizer = regularizer
        check_distribution(model)
        check_outside_of_scopes()
        build(model, probe)
        found = select_layers(find_recurrent_layers(model), layers)
        trained = {id(variable) for variable in model.trainable_variables}
        holders: dict[int, keras.Variable] = {}
        for item in found:
            own = [variable for variable in item.layer.trainable_variables if id(variable) in trained]
            if own:
                holders[id(item.layer)] = own[0]
            else:
                warnings.warn(f"Layer `{item.name}` has no weight that is trained, so it has no penalty.", stacklevel=4)
        self._penalty = ModelPenalty(
            model,
            fit_probe(model, probe),
            [item for item in found if id(item.layer) in holders],
            regularizer._aim,  # noqa: SLF001 - two classes of one file
            regularizer._target_of,  # noqa: SLF001
        )
        self._check_calls(found, required=layers is not None)
        self._warn(self._penalty.notes)
        strength = regularizer._strength.variable  # noqa: SLF001

        def term(call: Callable[[], tf.Tensor]) -> Callable[[], tf.Tensor]:
            def scaled() -> tf.Tensor:
                value = call()
                return tf.cast(strength, value.dtype) * value

            return scaled

        calls = self._penalty.calls.values()
        self._attachment = LossTerms(model, [(holders[id(call.layer)], term(call)) for call in calls])
        self._refreshed: int | None = None

    def attach(self) -> None:
        """Puts the penalty into the losses of the model, also in the middle of `fit`."""
        self._refreshed = None
        self._attachment.attach()

    def detach(self) -> None:
        """Takes it out."""
        self._attachment.detach()

    def begin(self, step: int) -> None:
        """Says which batch is the next one: schedules are followed, and other states taken if it is time.

        Args:
            step: Counts the batches.
        """
        self._regularizer._follow_schedules(step)  # noqa: SLF001
        self._penalty.begin(step)
        if self._refreshed is None or not 0 <= step - self._refreshed < self._regularizer._refresh:  # noqa: SLF001
            self._refreshed = step
            notes, changed = self._penalty.refresh()
            self._warn(notes)
            if changed:
                self._attachment.trace_anew()

    def announce(self) -> None:
        """Says, in `fit`, that a batch begins, of training or of validation."""
        self._attachment.announce()

    def penalty(self) -> float:
        """The penalty with the weights of this moment, not scaled by the strength."""
        return self._penalty()

    def _check_calls(self, found: Iterable[RecurrentLayer], *, required: bool) -> None:
        """Says which layers cannot be held; an error if the user asked for one of them, or none is left."""
        targets = [layer for layer in self._regularizer._targets if layer is not None]  # noqa: SLF001
        names = list(dict.fromkeys([*(item.name for item in found), *self._penalty.names]))
        unknown = [layer for layer in targets if layer not in names]
        if unknown:
            raise _invalid("target", f"targets for recurrent layers out of {names}", unknown)
        unmeasured = self._penalty.unmeasured
        reasons = "; ".join(f"layer `{name}`: {reason}" for name, reason in unmeasured.items())
        if unmeasured and (required or unmeasured.keys() & targets or not self._penalty.calls):
            raise _invalid("layers", "recurrent layers that the model calls on the probe", reasons)
        if unmeasured:
            self._warn([f"Some recurrent layers have no penalty. {reasons}"])

    @staticmethod
    def _warn(notes: Iterable[str]) -> None:
        for note in notes:
            warnings.warn(note, stacklevel=4)


class _Setting:
    """A number that graphs read and that can be changed, by hand or by a schedule, without tracing them anew."""

    def __init__(self, name: str, value: Schedule, least: float) -> None:
        self._name, self._least = name, least
        self._schedule: Callable[[int], Any] | None = None
        self.variable = own_variable(0.0)
        self.value = 0.0
        self.set(value)

    def set(self, value: Schedule) -> None:
        self._assign(value(0) if callable(value) else value)
        self._schedule = value if callable(value) else None

    def follow(self, step: int) -> None:
        if self._schedule is not None:
            self._assign(self._schedule(step))

    def _assign(self, value: Any) -> None:
        self.value = self._checked(value)
        self.variable.assign(np.float32(self.value))

    def config(self) -> Any:
        return self.value if self._schedule is None else keras.saving.serialize_keras_object(self._schedule)

    def _checked(self, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not (math.isfinite(number) and number >= self._least):
            expected = "a positive number, since it has a logarithm" if self._least else "a number of at least 0"
            raise _invalid(self._name, expected, value)
        return number


def _check_measure(name: str) -> None:
    if name in DIFFERENTIABLE:
        return
    known = {measure.name: measure for _, measure in KEYS.values()}
    expected = f"a measure with one value for each step and sample and a derivative: {list(DIFFERENTIABLE)}"
    if name in known and not isinstance(known[name].kind, PerStep):
        raise _invalid("measure", expected, f"{name!r}, which has no such value")
    raise _invalid("measure", expected, repr(name))


def _schedule(config: Any) -> Any:
    return keras.saving.deserialize_keras_object(config) if isinstance(config, Mapping) else config


def _invalid(name: str, expected: str, received: Any) -> ValueError:
    return ValueError(f"Invalid value for argument `{name}`. Expected {expected}. Received: {name}={received}")
