"""What the suggestions of a verdict are computed from, measured with everything else."""

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

# Not in the registry: nobody asks for them by name.
WITHOUT, OPPOSITE, FORGET = "variance_without_kernels", "variance_with_opposite_kernels", "log_forget"


def with_advice(selection: Selection, *, forgets: bool) -> Selection:
    """The selection, and what suggestions need, where there will be a verdict.

    Args:
        selection: What the user selected.
        forgets: Whether the diagonal of the second state's block, by itself, is a forget gate.
    """
    judged = "joint" if "joint" in views_of(selection) else "hidden"
    if judged not in views_of(of_kind(selection, Flow)):
        return selection
    added = []
    if KEYS["variance"] in selection:
        added += [Quantity("hidden", _helper(WITHOUT, _at(0.0))), Quantity("hidden", _helper(OPPOSITE, _at(-1.0)))]
    if forgets and judged == "joint":
        added.append(Quantity("joint", _helper(FORGET, _log_forget)))
    return (*selection, *added)


def facts(helpers: Mapping[str, Any], variances: Any, gains: Any) -> dict[str, float]:
    """What suggestions are made from.

    With the kernels of the hidden block multiplied by g, at the states that were visited, `J = D + g K`, and the
    variance of its entries is a polynomial of second degree in g: three values tell it.

    Args:
        helpers: By name, the values of the measured rows.
        variances: The hidden `variance` of these rows; empty if it was not measured.
        gains: The `rms_singular_value` of all states; empty if it was not measured.

    Returns:
        `variance`, the mean of the hidden variance; `kernel_gain`, the gain that would bring it to 1; `forget`, the
        geometric mean of the forget gates; `step_gain`, that of the gains. Those that are known.
    """
    found: dict[str, float] = {}
    if WITHOUT in helpers and np.size(variances):
        now, without, opposite = (float(np.mean(x)) for x in (variances, helpers[WITHOUT], helpers[OPPOSITE]))
        found = {"variance": now, "kernel_gain": _gain(without, (now - opposite) / 2, (now + opposite) / 2 - without)}
    if np.size(gains):
        with np.errstate(divide="ignore", invalid="ignore"):
            found["step_gain"] = float(np.exp(np.mean(np.log(gains))))
    if np.size(helpers.get(FORGET, ())):
        found["forget"] = float(np.exp(np.mean(helpers[FORGET])))
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _gain(constant: float, linear: float, square: float) -> float:
    """The positive g with `constant + linear g + square g² = 1`; NaN if there is none."""
    if not all(map(math.isfinite, (constant, linear, square))) or square <= 0:
        return math.nan
    inside = linear**2 - 4 * square * (constant - 1)
    gain = (-linear + math.sqrt(inside)) / (2 * square) if inside >= 0 else math.nan
    return gain if gain > 0 else math.nan


def _helper(name: str, function: Callable[[JacobianOperator, MeasureContext], Measured]) -> Measure:
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
