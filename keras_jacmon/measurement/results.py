"""Typed results of a call, as they leave the graph and before the report is assembled."""

from typing import NamedTuple

import tensorflow as tf

from keras_jacmon.jacobians.diagnosis import CheckResults
from keras_jacmon.jacobians.recurrent_weights import RecurrentWeights
from keras_jacmon.measures.flow import FlowPlan
from keras_jacmon.options import ViewName


class MeasuredArray(NamedTuple):
    """The values of one quantity.

    Attributes:
        value: Tensor `(points,)`, `(points, values)`, `(exponents, samples)` or `(samples,)`, by the measure's kind.
        uncertainty: Tensor of the shape of `value`, real; zero if there is none.
        is_exact: Boolean scalar, True if there is no uncertainty.
    """

    value: tf.Tensor
    uncertainty: tf.Tensor
    is_exact: tf.Tensor

    @classmethod
    def of(cls, value: tf.Tensor, uncertainty: tf.Tensor | None = None) -> "MeasuredArray":
        """Makes an array of values; they are exact if there is no uncertainty."""
        if uncertainty is None:
            return cls(value, tf.zeros_like(tf.math.real(value)), tf.constant(True))  # noqa: FBT003 - positional only
        return cls(value, uncertainty, tf.constant(False))  # noqa: FBT003


class PlannedFlow(NamedTuple):
    """A flow to be measured.

    Attributes:
        view: String, the view whose Jacobians are multiplied.
        plan: The vectors that the flow begins with.
    """

    view: ViewName
    plan: FlowPlan


class PlannedSensitivity(NamedTuple):
    """The sensitivity of the last state to be measured.

    Attributes:
        weights: The recurrent weights; None if there are none, or if they cannot be told.
        missing: String, the reason why there are none; empty if there are.
        plans: Tuple of the vectors at the last state, one for each view.
    """

    weights: RecurrentWeights | None
    missing: str
    plans: tuple[FlowPlan, ...] = ()


class SensitivityResults(NamedTuple):
    """The sensitivity of the last state to the recurrent weights.

    Attributes:
        numbers: Float64 tensor `(time, 2, samples)`; see `measures.sensitivity`.
        state_norm: Float64 tensor `(samples,)`, the norm of the last state.
        weight_size: Float64 scalar, the root mean square of the entries of the weights.
    """

    numbers: tf.Tensor
    state_norm: tf.Tensor
    weight_size: tf.Tensor


class CallResults(NamedTuple):
    """The results of one call.

    Attributes:
        mask: Boolean `(time, batch)`, False at the steps that the layer skips.
        sampled: Boolean `(time, batch)`, True where expensive measures were taken; None for everywhere.
        spectra_at: Integer `(points, 2)`, step and sample of each spectrum; None without spectra.
        checks: Results of the checks of the assumptions.
        arrays: The values of each quantity, in the order of `CallMetadata.quantities`.
        flows: For each flow, in the order of `CallMetadata.flows`, its numbers `(time, numbers, samples)`.
        sensitivities: For each view, in the order of `PlannedSensitivity.plans`.
    """

    mask: tf.Tensor
    sampled: tf.Tensor | None
    spectra_at: tf.Tensor | None
    checks: CheckResults
    arrays: tuple[MeasuredArray, ...]
    flows: tuple[tf.Tensor, ...] = ()
    sensitivities: tuple[SensitivityResults, ...] = ()
