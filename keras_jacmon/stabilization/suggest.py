"""Changes of a layer that make its verdict better: each is tried and measured before it is suggested."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_jacmon.errors import invalid_argument
from keras_jacmon.meter import JacobianMeter
from keras_jacmon.model.inputs import read_probe
from keras_jacmon.model.layers import RecurrentLayer, find_recurrent_layers, select_layers
from keras_jacmon.report.verdict import Verdict
from keras_jacmon.stabilization.best_weights import changeable_weights
from keras_jacmon.stabilization.goals import TIME
from keras_jacmon.stabilization.rescale import KERNELS, MOST_GAIN
from keras_jacmon.stabilization.secant import Secant

# Measurements of a change, and the growth, in nats per step, at which no better one is looked for.
_ROUNDS, _ENOUGH = 8, 0.003

# The names of Keras for what is changed.
_KERNEL, _BIAS = KERNELS[TIME], "bias"

# The slope of the growth over the shift of a bias, for gates that are three quarters open; and the largest step.
_GATE_SLOPE, _MOST_SHIFT = 0.25, 2.0

# The position of the gate that keeps the state, in the biases of Keras' cells. A subclass may use its gates otherwise.
_KEEPING_GATES = {keras.layers.LSTMCell: 1, keras.layers.GRUCell: 0}


@dataclass(frozen=True)
class Suggestion:
    """A change of the weights of one layer, with the growth that was measured when it was tried.

    Attributes:
        layer: String, the name of the layer in reports.
        weight: String, `"recurrent_kernel"` for a factor, or `"bias"` for a shift of the gate that keeps the state.
        amount: Float, the factor or the shift.
        growth: Float, nats per step, of the layer as it is.
        predicted: Float, nats per step, of the layer after the change, if nothing else is changed.
        state: String, the verdict on the layer as it is.
        predicted_state: String, the verdict after the change.
    """

    layer: str
    weight: str
    amount: float
    growth: float
    predicted: float
    state: str
    predicted_state: str

    def __str__(self) -> str:
        if self.weight == _KERNEL:
            change = f"multiply the recurrent kernel of `{self.layer}` by {self.amount:.4g}"
        else:
            change = f"add {self.amount:.4g} to the bias of the gates of `{self.layer}` that keep the state"
        return (
            f"{change}: growth {self.growth:+.3g} -> {self.predicted:+.3g} nats per step, {self.state} -> "
            f"{self.predicted_state}, as measured on this probe"
        )

    def apply(self, model: keras.Layer) -> None:
        """Changes the weights of a model.

        Args:
            model: Keras model, the one that was measured or one with the same layers.

        Raises:
            ValueError: If it has no such layer, or the layer no such weight that is trained.
        """
        (item,) = select_layers(find_recurrent_layers(model), self.layer)
        change = _Change.of(item, changeable_weights(model, [item])[item.name], self.weight)
        if change is None:
            expected = f"a model whose layer `{self.layer}` has a `{self.weight}` that is trained"
            raise invalid_argument("model", expected, f"model={model.name}")
        change.set(math.log(self.amount) if self.weight == _KERNEL else self.amount)


class _Change:
    """A change of one weight by a number: a factor, by its logarithm, or a shift.

    Args:
        weight: The variable.
        gate: Slice of the last axis that is shifted; None for a factor.
    """

    def __init__(self, weight: Any, gate: slice | None) -> None:
        self._weight, self._gate = weight, gate
        self._before = keras.ops.convert_to_numpy(weight).copy()

    @classmethod
    def of(cls, item: RecurrentLayer, weights: Sequence[keras.Variable], name: str) -> "_Change | None":
        """Returns the change of the weight of this name; None if the layer has none."""
        found = [weight for weight in weights if weight.name == name]
        if len(found) != 1:
            return None
        if name == _KERNEL:
            return cls(found[0], None)
        place = None if item.adapter else _KEEPING_GATES.get(type(item.layer.cell))
        if place is None:
            return None
        units = item.layer.cell.units
        return cls(found[0], slice(place * units, (place + 1) * units))

    def secant(self) -> Secant:
        """Returns the way to look for the number at which the growth is zero."""
        return Secant(1.0, math.log(MOST_GAIN)) if self._gate is None else Secant(_GATE_SLOPE, _MOST_SHIFT)

    def set(self, number: float) -> None:
        """Changes the weight that it was made with; 0 for no change."""
        if self._gate is None:
            self._weight.assign(self._before * np.exp(number).astype(self._before.dtype))
            return
        value = self._before.copy()
        # Of the two rows of a GRU's bias, which are added, the first one.
        np.atleast_2d(value)[0, self._gate] += number
        self._weight.assign(value)


def suggest(
    model: keras.Layer,
    probe: Any,
    *,
    layers: Iterable[str | keras.Layer] | str | keras.Layer | None = None,
    seed: int = 0,
) -> dict[str, tuple[Suggestion, ...]]:
    """Finds changes that make a vanishing or exploding layer better, by trying them.

    Tried are a factor of the recurrent kernel, and for `LSTM` and `GRU` a shift of the bias of the gates that keep the
    state. Each number is found by the secant method, from up to 8 measurements with the states that the network then
    has; the weights are put back, also if the call is interrupted. So what a suggestion predicts comes true, and none
    makes a verdict worse.

    Example:

    ```python
    import keras, numpy as np, keras_jacmon

    model = keras.Sequential([keras.Input((60, 3)), keras.layers.SimpleRNN(8, name="rnn"), keras.layers.Dense(1)])
    probe = np.random.default_rng(0).normal(size=(4, 60, 3))
    for suggestion in keras_jacmon.suggest(model, probe)["rnn"]:
        print(suggestion)
    ```

    Args:
        model: Keras model, compiled or not.
        probe: A batch of model inputs, as for `JacobianMeter`.
        layers: Names of recurrent layers, or layers. Defaults to None, all of them.
        seed: Integer, the seed of the random vectors. Defaults to 0.

    Returns:
        Dict by layer of tuples of `Suggestion`, first those that make it stable, and a bias before a kernel; empty for
        a layer that is stable, or that none of the changes makes better.

    Raises:
        ValueError: As for `JacobianMeter`.
    """
    meter = JacobianMeter(model, read_probe(probe), layers=layers, measures=["joint/growth"], seed=seed)
    found = select_layers(find_recurrent_layers(model), layers)
    trained = changeable_weights(model, found)
    verdicts = meter().verdict
    suggestions: dict[str, tuple[Suggestion, ...]] = {}
    for item in found:
        verdict = verdicts.get(item.name)
        tried = []
        if verdict is not None and verdict.state != "stable":
            changes = {name: _Change.of(item, trained[item.name], name) for name in (_BIAS, _KERNEL)}
            tried = [
                _tried(meter, item.name, name, change, verdict)
                for name, change in changes.items()
                if change is not None
            ]
        helpful = [suggestion for suggestion in tried if suggestion is not None]
        # A larger kernel makes states chaotic before it makes them last; so of two that help, the bias comes first.
        suggestions[item.name] = tuple(sorted(helpful, key=lambda s: s.predicted_state != "stable"))
    return suggestions


def _tried(meter: JacobianMeter, layer: str, name: str, change: _Change, before: Verdict) -> Suggestion | None:
    """Looks for the best number of a change, and puts the weight back; None if no number helps."""
    secant, number, growth = change.secant(), 0.0, before.growth
    best, best_rank = None, _rank(before.state, before.growth)
    try:
        for _ in range(_ROUNDS):
            number += secant.step(growth)
            change.set(number)
            verdict = meter().verdict.get(layer)
            growth = math.nan if verdict is None else verdict.growth
            if verdict is None or not _rank(verdict.state, growth) < best_rank:
                continue
            amount = math.exp(number) if name == _KERNEL else number
            best = Suggestion(layer, name, amount, before.growth, growth, before.state, verdict.state)
            best_rank = _rank(verdict.state, growth)
            if abs(growth) < _ENOUGH:
                break
    finally:
        change.set(0.0)
    return best


def _rank(state: str, growth: float) -> tuple[bool, float]:
    """Sorts verdicts: stable ones first, and those with a growth near zero."""
    return state != "stable", abs(growth)
