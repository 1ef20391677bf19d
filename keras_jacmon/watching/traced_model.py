"""Measurement and penalty of a model, traced anew when the model has changed."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import keras

from keras_jacmon.errors import UnmeasurableError
from keras_jacmon.measurement.plan import MeasurementPlan
from keras_jacmon.meter import JacobianMeter
from keras_jacmon.regularization.regularized_model import RegularizedModel
from keras_jacmon.regularization.regularizer import JacobianRegularizer
from keras_jacmon.report.report import Report
from keras_jacmon.watching.preparation import PreparationLine


@dataclass
class TracedModel:
    """Meter and penalty of the model that a monitor watches.

    Attributes:
        plan: `MeasurementPlan`, the probe, the layers and the measures.
        regularizer: `JacobianRegularizer` for the measured layers; None without a penalty.
        strict: Boolean, True to raise if no layer of a model can be measured, False to warn.
        verbose: Boolean, True to say at once what is being prepared, False where it takes long.
        meter: `JacobianMeter` of the model; None before the first model, and if it cannot be measured.
        regularized: `RegularizedModel`; None without a regularizer, and before the first model.
    """

    plan: MeasurementPlan
    regularizer: JacobianRegularizer | None
    strict: bool
    verbose: bool
    meter: JacobianMeter | None = field(default=None, init=False)
    regularized: RegularizedModel | None = field(default=None, init=False)
    _traced_for: list[Any] = field(default_factory=list, init=False)

    @property
    def has_model(self) -> bool:
        """Boolean, True once a model was given, also one that cannot be measured."""
        return bool(self._traced_for)

    def is_of(self, model: keras.Model) -> bool:
        """Returns True if the model is the one that was traced, and has not changed since."""
        return _same(self._traced_for, _identity(model))

    def prepare(self, model: keras.Model) -> None:
        """Traces the measurement and the penalty of a model."""
        self.meter = self.regularized = None
        # Until it is known that it can be measured.
        self._traced_for = [model]
        line = PreparationLine()
        with line.shown(at_once=self.verbose):
            meter = self._meter_of(model, line)
            if self.regularizer is not None:
                line.begin("the penalty")
                self.regularized = self.regularizer.prepare(
                    model, self.plan.probe, self.plan.layers, targets=self.plan.targets
                )
        self.meter = meter
        # Building a model may have made variables.
        self._traced_for = _identity(model)

    def report(self, meter: JacobianMeter, *, slow: bool, suggestions: bool) -> Report:
        """Returns a new report, with the targets of the regularizer if there is one.

        Args:
            meter: `JacobianMeter` of the model.
            slow: Boolean, True to include the slow measures.
            suggestions: Boolean, True to try changes of layers that are not stable.
        """
        report = meter(slow=slow, suggestions=suggestions)
        return report if self.regularized is None else self.regularized.with_targets(report)

    def let_go(self) -> None:
        """Takes the penalty out of the losses of the model."""
        if self.regularized is not None:
            self.regularized.detach()

    def _meter_of(self, model: keras.Model, line: PreparationLine) -> JacobianMeter | None:
        """Returns the meter; None, with a warning, if no layer can be measured and the user named none."""
        try:
            return JacobianMeter.of_plan(model, self.plan, line.begin)
        except UnmeasurableError as error:
            if self.strict or self.plan.layers is not None:
                raise
            warnings.warn(f"The monitor measures nothing, and the training goes on. {error}", stacklevel=5)
            return None


def _identity(model: keras.Model) -> list[Any]:
    """Returns the objects that a measurement depends on: if one of them is replaced, it must be traced anew."""
    # Each `compile` makes a new one, and Keras traces the model anew then too.
    loss = getattr(model, "_compile_loss", None)
    return [model, loss, *model.variables, None, *model.trainable_variables]


def _same(left: list[Any], right: list[Any]) -> bool:
    """Returns True if two lists have the same objects; `==` of variables compares their values."""
    return len(left) == len(right) and all(one is other for one, other in zip(left, right, strict=True))
