"""Measures that the suggestions of a verdict are computed from, added to the measures that the user selected."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from keras_jacmon.measures.context import MeasureContext, Measured
from keras_jacmon.measures.kinds import Flow, SuggestionInput
from keras_jacmon.measures.moments import variance
from keras_jacmon.measures.registry import KEYS, Measure, Quantity, Selection, of_kind, views_of
from keras_jacmon.operators.contract import JacobianOperator

# Names of measures that are not in the registry: nobody asks for them.
WITHOUT, OPPOSITE, FORGET = "variance_without_kernels", "variance_with_opposite_kernels", "log_forget"


def with_suggestion_measures(selection: Selection, *, forgets: bool) -> Selection:
    """Adds the measures that suggestions need, where there will be a verdict.

    Args:
        selection: What the user selected.
        forgets: True if the diagonal of the second state's block, by itself, is a forget gate.
    """
    judged = "joint" if "joint" in views_of(selection) else "hidden"
    if judged not in views_of(of_kind(selection, Flow)):
        return selection
    added = []
    if KEYS["variance"] in selection:
        added += [
            Quantity("hidden", _suggestion_measure(WITHOUT, _at(0.0))),
            Quantity("hidden", _suggestion_measure(OPPOSITE, _at(-1.0))),
        ]
    if forgets and judged == "joint":
        added.append(Quantity("joint", _suggestion_measure(FORGET, _log_forget)))
    return (*selection, *added)


def suggestion_inputs(values: Mapping[str, Any], variances: Any, gains: Any) -> dict[str, float]:
    """Computes the numbers that suggestions are made from.

    With the kernels of the hidden block multiplied by g, at the states that were visited, `J = D + g K`, and the
    variance of its entries is a polynomial of second degree in g: three values tell it.

    Args:
        values: By name of the added measures, their values at the measured points.
        variances: The hidden `variance` of these points; empty if it was not measured.
        gains: The `rms_singular_value` of all states; empty if it was not measured.

    Returns:
        `variance`, the mean of the hidden variance; `kernel_gain`, the gain that would bring it to 1; `forget`, the
        geometric mean of the forget gates; `step_gain`, the geometric mean of the gains. Unknown numbers are left out.
    """
    found: dict[str, float] = {}
    if WITHOUT in values and np.size(variances):
        now, without, opposite = (float(np.mean(x)) for x in (variances, values[WITHOUT], values[OPPOSITE]))
        found = {"variance": now, "kernel_gain": _gain(without, (now - opposite) / 2, (now + opposite) / 2 - without)}
    if np.size(gains):
        with np.errstate(divide="ignore", invalid="ignore"):
            found["step_gain"] = float(np.exp(np.mean(np.log(gains))))
    if np.size(values.get(FORGET, ())):
        found["forget"] = float(np.exp(np.mean(values[FORGET])))
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _gain(constant: float, linear: float, square: float) -> float:
    """The positive g with `constant + linear g + square g² = 1`; NaN if there is none."""
    if not all(map(math.isfinite, (constant, linear, square))) or square <= 0:
        return math.nan
    inside = linear**2 - 4 * square * (constant - 1)
    gain = (-linear + math.sqrt(inside)) / (2 * square) if inside >= 0 else math.nan
    return gain if gain > 0 else math.nan


def _suggestion_measure(name: str, function: Callable[[JacobianOperator, MeasureContext], Measured]) -> Measure:
    return Measure(name, SuggestionInput(), function, definition="", unit="", reference="", reading="", cost="standard")


def _at(gain: float) -> Callable[[JacobianOperator, MeasureContext], Measured]:
    def function(operator: JacobianOperator, context: MeasureContext) -> Measured:
        scaled = operator.scaled_kernels(gain)
        return _unknown(operator) if scaled is None else Measured(variance(scaled, context).value, None)

    return function


def _log_forget(operator: JacobianOperator, context: MeasureContext) -> Measured:  # noqa: ARG001 - as every measure
    block = operator.block(1, 1)
    if block is None:
        return _unknown(operator)
    # A diagonal matrix times ones is its diagonal.
    gates = block.matvec(tf.ones([operator.batch_shape_tensor()[0], int(block.shape[-1])], operator.dtype))
    return Measured(tf.reduce_mean(tf.math.log(tf.abs(gates)), axis=-1), None)


def _unknown(operator: JacobianOperator) -> Measured:
    return Measured(tf.fill([operator.batch_shape_tensor()[0]], tf.constant(math.nan, operator.dtype)), None)
