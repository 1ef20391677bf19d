"""Trials of changed weights: the search for the change that makes the verdict on a call better."""

import contextlib
import enum
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_jacmon.measurement.measurable_call import MeasurableCall
from keras_jacmon.measurement.secant import MOST_GAIN, Secant
from keras_jacmon.model.guard import assign_all
from keras_jacmon.report.suggestion import Suggestion, WeightChange
from keras_jacmon.report.verdict import Verdict

# Measurements of a change.
_ROUNDS = 8

# A change that leaves the verdict as it is must bring the growth to this share, at most.
_MUCH_BETTER = 0.5

# The slope of the growth over the shift of a bias, for gates that are three quarters open; and the largest step.
_GATE_SLOPE, _MOST_SHIFT = 0.25, 2.0

# The position of the gate that keeps the state, in the biases of Keras' cells. A subclass may use its gates otherwise.
_KEEPING_GATES = {keras.layers.LSTMCell: 1, keras.layers.GRUCell: 0}

# The name of Keras for the weights that multiply states, where the graph of a step does not tell which ones do.
_RECURRENT_KERNEL = "recurrent_kernel"


class Trials(enum.Enum):
    """The place where changed weights are tried.

    Attributes:
        NONE: Nowhere.
        ON_COPIES: On copies of the weights that the measurement is given, so that no variable is assigned.
        ON_MODEL: On the model, whose weights are put back, where copies do not reach the cell.
    """

    NONE = 0
    ON_COPIES = 1
    ON_MODEL = 2


def why_not_on_copies(call: MeasurableCall, others: Sequence[MeasurableCall]) -> str:
    """Returns the reason why copies of the weights do not show what a change would do; `""` if they do.

    Args:
        call: The call.
        others: Sequence of all measured calls, with or without this one.
    """
    if not call.kind.weights:
        return "its step reads its variables, and not copies of them"
    own = set(map(id, call.kind.weights))
    if any(id(weight) in own for other in others if other is not call for weight in _weights_of(other)):
        return "its weights act in several calls, which may feed each other"
    return ""


def changes_of(call: MeasurableCall, places: Sequence[int] | None, model: keras.Layer) -> list[WeightChange]:
    """Returns the changes of a call's trained weights that are worth a trial, none of them with an amount yet.

    First the bias of the gates that keep the state, then the weights that multiply the states.

    Args:
        call: The call.
        places: Sequence of integers, the positions of the weights that multiply the states among those of its kind;
            None if they are not known.
        model: Keras model.
    """
    trained, paths = set(map(id, model.trainable_variables)), Counter(v.path for v in model.trainable_variables)
    gate = _KEEPING_GATES.get(type(call.cell))
    found: list[tuple[list[Any], tuple[int, ...]]] = [(_recurrent_weights(call, places), ())]
    if gate is not None and call.cell.use_bias:
        units = call.cell.units
        found.insert(0, ([call.cell.bias], (gate * units, (gate + 1) * units)))
    return [
        WeightChange(tuple(weight.path for weight in weights), 0.0, entries)
        for weights, entries in found
        if weights and all(id(weight) in trained and paths[weight.path] == 1 for weight in weights)
    ]


def search(
    layer: str, changes: Sequence[WeightChange], before: Verdict, verdict_with: Callable[[WeightChange], Verdict | None]
) -> tuple[Suggestion, ...]:
    """Looks for the amount of each change, until one makes the layer stable.

    Args:
        layer: String, the name of the call.
        changes: Sequence of `WeightChange`, in the order in which they are tried.
        before: `Verdict` on the weights as they are.
        verdict_with: Callable that measures a change.

    Returns:
        Tuple of `Suggestion`, the best first. Each one makes the verdict better.
    """
    found: list[Suggestion] = []
    for change in changes:
        suggestion = _best_of(layer, change, before, verdict_with)
        if suggestion is not None:
            found.append(suggestion)
            if suggestion.predicted_state == "stable":
                break
    return tuple(sorted(found, key=_rank))


def copies_with(call: MeasurableCall, change: WeightChange) -> list[tf.Tensor]:
    """Returns the values of a call's weights, of which those that change are changed copies."""
    return [
        tf.convert_to_tensor(change.applied(value.numpy())) if weight.path in change.weights else value
        for weight, value in zip(call.kind.weights, call.kind.values(), strict=True)
    ]


@contextlib.contextmanager
def applied(model: keras.Layer, change: WeightChange) -> Iterator[None]:
    """Changes the weights of a model, and puts them back at the end of the context."""
    weights = change.weights_in(model.trainable_variables)
    before = [np.array(keras.ops.convert_to_numpy(weight)) for weight in weights]
    try:
        for weight, value in zip(weights, before, strict=True):
            weight.assign(change.applied(value))
        yield
    finally:
        assign_all(weights, before)


def _weights_of(call: MeasurableCall) -> Sequence[Any]:
    return call.kind.weights or call.layer.weights


def _recurrent_weights(call: MeasurableCall, places: Sequence[int] | None) -> list[Any]:
    """Returns the weights that multiply the states of a call."""
    if places is None:
        return [weight for weight in _weights_of(call) if weight.name == _RECURRENT_KERNEL]
    return [call.kind.weights[place] for place in places]


def _best_of(
    layer: str, change: WeightChange, before: Verdict, verdict_with: Callable[[WeightChange], Verdict | None]
) -> Suggestion | None:
    """Looks for the best amount of a change by the secant method; None if none helps."""
    is_factor = not change.entries
    secant = Secant(1.0, math.log(MOST_GAIN)) if is_factor else Secant(_GATE_SLOPE, _MOST_SHIFT)
    number, growth = 0.0, before.growth
    best: Suggestion | None = None
    for _ in range(_ROUNDS):
        number += secant.step(growth)
        tried = replace(change, amount=math.exp(number) if is_factor else number)
        verdict = verdict_with(tried)
        growth = math.nan if verdict is None else verdict.growth
        if verdict is None or not _helps(verdict, before):
            continue
        offer = Suggestion(layer, tried, before.growth, growth, before.state, verdict.state)
        if best is None or _rank(offer) < _rank(best):
            best = offer
        # The gain over the whole probe is between 1/e and e.
        if abs(growth) * verdict.length < 1:
            break
    return best


def _helps(after: Verdict, before: Verdict) -> bool:
    """True for a verdict that is stable, or the same one and much better."""
    if after.state == "stable":
        return True
    is_much_better = abs(after.growth) <= _MUCH_BETTER * abs(before.growth) and after.horizon >= before.horizon
    return after.state == before.state and is_much_better


def _rank(suggestion: Suggestion) -> tuple[bool, float]:
    """Sorts suggestions: first those that make the layer stable, and those with a growth near zero."""
    return suggestion.predicted_state != "stable", abs(suggestion.predicted)
