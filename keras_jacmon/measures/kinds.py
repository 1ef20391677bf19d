"""Kinds of measures: the argument of a measure, and the form of its values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import tensorflow as tf


@dataclass(frozen=True)
class MeasureKind:
    """The argument of a measure, and the form of its values.

    Attributes:
        selectable: Boolean, True if the user asks for such a measure by name.
        over_time: Boolean, True for a function of products of Jacobians over time.
    """

    selectable: ClassVar[bool] = True
    over_time: ClassVar[bool] = False

    def dtype(self, real: tf.DType) -> tf.DType:
        """Type of the values, from the type of the Jacobians."""
        return real

    def width(self, shape: tuple[int, int]) -> int | None:  # noqa: ARG002 - of spectra only
        """Number of values at each point for Jacobians of this shape; None for a single number."""
        return None


@dataclass(frozen=True)
class PerStep(MeasureKind):
    """A function of the Jacobian of one step.

    The measure's `function` maps an operator and a `MeasureContext` to `Measured`, `(points,)`.

    Attributes:
        may_be_infinite: Boolean, True if inf is a regular value.
        of_several: Boolean, True if the function maps a list of operators, those of all views, to a list of results.
    """

    may_be_infinite: bool = False
    of_several: bool = False


@dataclass(frozen=True)
class Spectrum(MeasureKind):
    """Several values of the Jacobian of one step, the largest first.

    The measure's `function` maps an operator and a `MeasureContext` to a tensor `(points, values)`.

    Attributes:
        complex_values: Boolean, True for eigenvalues.
        count: Function from the rows and columns of J to the number of values.
    """

    complex_values: bool = False
    count: Callable[[int, int], int] = min

    def dtype(self, real: tf.DType) -> tf.DType:
        """Type of the values, from the type of the Jacobians."""
        if not self.complex_values:
            return real
        return tf.complex128 if real == tf.float64 else tf.complex64

    def width(self, shape: tuple[int, int]) -> int | None:
        """Number of values at each point for Jacobians of this shape."""
        return self.count(*shape)


@dataclass(frozen=True)
class OverTime(MeasureKind):
    """A function of products of Jacobians over time.

    Attributes:
        preset_view: String, the view of such a measure in the presets.
        reduction: Name in the report's `REDUCTIONS` of the way to one number over the samples; None for no number.
    """

    over_time: ClassVar[bool] = True
    preset_view: ClassVar[str] = "joint"

    reduction: str | None = "mean"


@dataclass(frozen=True)
class Flow(OverTime):
    """A function of the flow: `function` maps NumPy logarithms of the gains by span, `(spans, samples)`."""


@dataclass(frozen=True)
class WholeFlow(Flow):
    """A function of the flow that begins in all states; measured where some are carried and never felt."""

    selectable: ClassVar[bool] = False


@dataclass(frozen=True)
class Exponents(OverTime):
    """A function of the Lyapunov exponents: `function` maps them, `(exponents, samples)`, and the number of units.

    Attributes:
        may_be_undecided: Boolean, True if the value is NaN where too few exponents are known.
    """

    may_be_undecided: bool = False


@dataclass(frozen=True)
class Sensitivity(OverTime):
    """A function of the sensitivity of the last state to the recurrent weights.

    The measure's `function` maps `Sensitivities` to NumPy arrays, `(spans, samples)` or `(samples,)`: the values and
    their standard errors, which are None for exact values. The derivatives pass all states whatever the view; the view
    says which of the last states count.
    """

    preset_view: ClassVar[str] = "hidden"


@dataclass(frozen=True)
class SensitiveState(Sensitivity):
    """A function of `Sensitivities` that is added to every selection with a sensitivity of its view."""

    selectable: ClassVar[bool] = False


@dataclass(frozen=True)
class Loss(MeasureKind):
    """A function of the gradient of the loss by the hidden state, `(samples, time, units)`; measured with targets."""

    selectable: ClassVar[bool] = False
