"""Rescaling: kernels are multiplied by a number each, found by the secant method on logarithmic scales."""

import math
from collections.abc import Mapping, Sequence

import keras
import numpy as np

from keras_jacmon.errors import invalid_argument
from keras_jacmon.measurement.secant import MOST_GAIN, Secant
from keras_jacmon.stabilization.goals import DEPTH, GROWTH, TIME, Goal, Standing

# The names that Keras gives the kernels of its cells, for each direction.
KERNELS = {TIME: "recurrent_kernel", DEPTH: "kernel"}

# The power of the gain in the measure of a linear cell, where it is not 1.
_DEGREES = {"variance": 2.0}


class Rescale:
    """Multiplies the kernels of each layer by what the measure asks, round by round.

    Args:
        weights: Mapping by layer, the weights that may change.
        goals: Mapping by layer, its goals.
        measure: String, the name of the measure.

    Raises:
        ValueError: If a layer has no kernel of the expected name, or a target is not positive.
    """

    def __init__(
        self, weights: Mapping[str, Sequence[keras.Variable]], goals: Mapping[str, Sequence[Goal]], measure: str
    ) -> None:
        self._kernels = []
        for layer, of_layer in goals.items():
            for direction in dict.fromkeys(goal.direction for goal in of_layer):
                chosen = [goal for goal in of_layer if goal.direction == direction]
                kernels = [weight for weight in weights[layer] if weight.name == KERNELS[direction]]
                if not kernels or (measure != GROWTH and chosen[0].target <= 0):
                    expected = '"gradient" for a target of 0 or less, and for a layer without a weight that is named '
                    raise invalid_argument("method", f"{expected}`{KERNELS[direction]}`", f"'rescale' for `{layer}`")
                self._kernels.append(_Kernel(kernels, chosen, measure))

    def advance(self, standing: Standing, updates: int) -> None:  # noqa: ARG002 - one round is one update
        """Multiplies each kernel once."""
        for kernel in self._kernels:
            kernel.advance(standing.values)


class _Kernel:
    """The kernels of a layer in one direction.

    Args:
        weights: Sequence of variables; all are multiplied by the same numbers.
        goals: Sequence of the goals that they serve, one for each call of the layer.
        measure: String, the name of the measure.
    """

    def __init__(self, weights: Sequence[keras.Variable], goals: Sequence[Goal], measure: str) -> None:
        self._weights, self._goals, self._is_logarithm = weights, goals, measure == GROWTH
        self._log_target = self._log(goals[0].target)
        self._secant = Secant(_DEGREES.get(measure, 1.0), math.log(MOST_GAIN))

    def advance(self, values: Mapping[str, float]) -> None:
        """Multiplies the kernels.

        Args:
            values: Mapping by name of a goal, the present measure.
        """
        value = float(np.mean([values[goal.name] for goal in self._goals]))
        factor = math.exp(self._secant.step(self._log(value) - self._log_target))
        for weight in self._weights:
            weight.assign(weight * factor)

    def _log(self, value: float) -> float:
        """The logarithm of a measure; the growth is one already."""
        if self._is_logarithm:
            return value
        return -math.inf if value <= 0 else math.log(value)
