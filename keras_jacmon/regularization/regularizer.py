"""The public regularizer: a measure of the Jacobians, a target and a strength."""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import keras

from keras_jacmon.errors import invalid_argument
from keras_jacmon.model.inputs import read_probe, read_targets
from keras_jacmon.regularization.penalty_config import PenaltyConfig
from keras_jacmon.regularization.regularized_model import RegularizedModel
from keras_jacmon.regularization.schedule import AUTO, Schedule, ScheduledNumber, schedule_from_config


@keras.saving.register_keras_serializable(package="keras_jacmon")
class JacobianRegularizer:
    """Pushes a measure of the Jacobians `ds_t/ds_{t-1}` toward a target while a model trains.

    Adds `strength * mean of (measure - target)²` to the losses of the model; the mean is over recurrent layers and over
    points of their trajectories on a probe. It is added as Keras adds a weight regularizer: to `loss`, and to
    `val_loss` too. Model, compiled loss and training code stay as they are, and a saved model contains none of it.

    Example:

    ```python
    regularizer = keras_jacmon.JacobianRegularizer(target=1.0)
    monitor = keras_jacmon.JacobianMonitor(x[:32], targets=y[:32], regularizer=regularizer)
    model.fit(x, y, epochs=10, callbacks=[monitor])
    ```

    Args:
        target: Number of at least 0 that the measure should have, or a dict of such numbers by layer, named as in
            reports; layers that are not named have no penalty. A number may also be a schedule: one of
            `keras.optimizers.schedules`, or a function from the number of batches so far. Defaults to 1.0.
        strength: Number of at least 0, or a schedule, the factor of the penalty; or `"auto"` for a factor that is
            chosen before the first batch, and again every `refresh` batches: the norm of the penalty's gradient by the
            trained weights of the recurrent layers is a tenth of that of the loss's gradient, on the probe and its
            targets. As the measure comes nearer to its target than it has been, this share falls in proportion. The
            factor is in `logs` as `jac_strength`. It needs the targets of the probe and a compiled model. Defaults to
            `"auto"`.
        measure: String, `"variance"`, `"rms_singular_value"`, `"spectral_norm"` or `"spectral_radius"`; or a
            measure of whole trajectories, whose target may be negative: `"flow"` over all steps, `"growth"` or
            `"lyapunov"`, the 8 largest exponents. XLA cannot compile the radius and the measures of trajectories: give
            `jit_compile=False` to `compile`. Defaults to `"variance"`.
        view: String, `"hidden"`, `"joint"` or `"inputs"`. For a cell with one state, the joint view is the hidden one.
            Or chosen states, such as `(0, 2)`, by position or name, as for `state_jacobian`; reports do not have them.
            Defaults to `"hidden"`.
        scale: String, `"linear"`, or `"log"` for `(log(measure) - log(target))²`, which pulls more gently at values
            that explode, and harder at values that vanish. Defaults to `"linear"`.
        side: String, `"both"`, or `"at_most"` or `"at_least"` for no penalty below or above the target. Defaults to
            `"both"`.
        states: String. `"cached"`: the penalty is taken at fixed points of the trajectory, and other points are taken
            every `refresh` batches. A batch then costs one evaluation of the cell, at `rows` points, without
            unrolling. `"fresh"`: the model runs on the probe at each batch, for its present states. Defaults to
            `"cached"`.
        through_states: Boolean, True if the gradient also flows through fresh states, and to the layers below. Defaults
            to False.
        refresh: Integer, the number of batches after which other points are taken. Defaults to 50.
        rows: Integer, the maximum number of (step, sample) points of a call, the same number of samples at each step;
            the samples rotate from refresh to refresh. If a sequence has more steps than this, the steps rotate too.
            A measure of whole trajectories takes those of `rows // steps` samples, at least one. Defaults to 128.
        vectors: Integer, the number of random vectors that multiply a block of J without structure (see `explain`) that
            has more rows than this; other vectors at each batch. On a linear scale and with both sides, the gradient
            of the penalty on the variance is unbiased. For the RMS singular value, the logarithm and one side, its
            bias falls with the number of vectors. Defaults to 16.
        seed: Integer, the seed of the random vectors. Defaults to 0.

    Raises:
        ValueError: If an argument is invalid. An argument that does not fit the model is refused when `fit` begins,
            before the first batch.
    """

    def __init__(
        self,
        target: Schedule | Mapping[str, Schedule] = 1.0,
        strength: Schedule | Literal["auto"] = AUTO,
        *,
        measure: str = "variance",
        view: str | Sequence[int | str] = "hidden",
        scale: Literal["linear", "log"] = "linear",
        side: Literal["both", "at_most", "at_least"] = "both",
        states: Literal["cached", "fresh"] = "cached",
        through_states: bool = False,
        refresh: int = 50,
        rows: int = 128,
        vectors: int = 16,
        seed: int = 0,
    ) -> None:
        self._config = PenaltyConfig(
            measure=measure,
            view=view if isinstance(view, str) else tuple(view),
            scale=scale,
            side=side,
            states=states,
            through_states=through_states,
            refresh=refresh,
            rows=rows,
            vectors=vectors,
            seed=seed,
        )
        self._strength = ScheduledNumber("strength", strength, 0.0, allows_auto=True)
        by_layer = _by_layer(target)
        if not by_layer:
            raise invalid_argument("target", "a target for at least one layer", f"target={target}")
        least = math.ulp(0.0) if scale == "log" else 0.0
        if self._config.is_over_time:
            least = -math.inf
        self._targets = {layer: ScheduledNumber("target", value, least) for layer, value in by_layer.items()}

    @property
    def strength(self) -> float:
        """The factor of the penalty; a new value holds from the next batch on, without a new trace.

        With `"auto"` it is the factor that was chosen last, and 0 before the first one.
        """
        return self._strength.value

    @strength.setter
    def strength(self, value: Schedule | Literal["auto"]) -> None:
        self._strength.set(value)

    @property
    def target(self) -> float | dict[str, float]:
        """The target, or the dict of targets; a new value of the same kind holds from the next batch on."""
        if None in self._targets:
            return self._targets[None].value
        return {str(layer): target.value for layer, target in self._targets.items()}

    @target.setter
    def target(self, value: Schedule | Mapping[str, Schedule]) -> None:
        by_layer = _by_layer(value)
        if by_layer.keys() != self._targets.keys():
            layers = [layer for layer in self._targets if layer is not None]
            expected = f"targets for the layers {layers}, as before" if layers else "a number, as before"
            raise invalid_argument("target", expected, f"target={value}")
        for layer, target in self._targets.items():
            target.set(by_layer[layer])

    def prepare(
        self,
        model: keras.Layer,
        probe: Any,
        layers: Iterable[str | keras.Layer] | str | keras.Layer | None = None,
        *,
        targets: Any = None,
    ) -> RegularizedModel:
        """Traces the penalty of a model, without attaching it.

        Args:
            model: Keras model.
            probe: The arrays that `read_probe` returned.
            layers: Names of recurrent layers, or layers. Defaults to None, for all.
            targets: The tensors that `read_targets` returned, for `strength="auto"`. Defaults to None, for none.

        Returns:
            The `RegularizedModel`.

        Raises:
            ValueError: If a layer is unknown, or the penalty cannot be computed.
        """
        return RegularizedModel(
            model,
            probe,
            layers,
            config=self._config,
            targets=self._targets,
            strength=self._strength,
            targets_of_probe=targets,
        )

    @contextlib.contextmanager
    def attached(
        self,
        model: keras.Layer,
        probe: Any,
        *,
        layers: Iterable[str | keras.Layer] | str | keras.Layer | None = None,
        targets: Any = None,
    ) -> Iterator[RegularizedModel]:
        """Adds the penalty to the losses of a model in a custom training loop, one that adds up `model.losses`.

        Example:

        ```python
        with regularizer.attached(model, x[:32], targets=y[:32]) as regularized:
            for step, (x, y) in enumerate(data):
                regularized.begin(step)
                train_step(x, y)        # a `tf.function` must be traced in here, not before
        ```

        Args:
            model: Keras model.
            probe: A batch of model inputs, as for `JacobianMonitor`.
            layers: Names of recurrent layers, or layers. Defaults to None, for all.
            targets: Targets of the probe's samples, for `strength="auto"`. Defaults to None, for none.

        Yields:
            The `RegularizedModel`. Call `begin(step)` before each batch: it follows the schedules, and every `refresh`
            batches it takes other states, and chooses a strength that is `"auto"`. `penalty()` is the present penalty,
            unscaled.

        Raises:
            ValueError: If a layer is unknown, or the penalty cannot be computed.
        """
        arrays = read_probe(probe)
        wanted = None if targets is None else read_targets(targets, arrays)
        regularized = self.prepare(model, arrays, layers, targets=wanted)
        regularized.attach()
        try:
            yield regularized
        finally:
            regularized.detach()

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments with their present values; schedules as Keras serializes them.

        A function as a schedule can be loaded again if `keras.saving.register_keras_serializable` knows it.
        """
        if None in self._targets:
            target = self._targets[None].config()
        else:
            target = {layer: target.config() for layer, target in self._targets.items()}
        return {"target": target, "strength": self._strength.config(), **dataclasses.asdict(self._config)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "JacobianRegularizer":
        """Makes a regularizer from the dict that `get_config` returned."""
        target = config["target"]
        by_layer = isinstance(target, Mapping) and "class_name" not in target
        numbers = {
            "target": {layer: schedule_from_config(value) for layer, value in target.items()}
            if by_layer
            else schedule_from_config(target),
            "strength": schedule_from_config(config["strength"]),
        }
        return cls(**(dict(config) | numbers))


def _by_layer(target: Schedule | Mapping[str, Schedule]) -> dict[str | None, Schedule]:
    """Returns the targets by layer; a target for all layers stands under None."""
    return dict(target.items()) if isinstance(target, Mapping) else {None: target}
