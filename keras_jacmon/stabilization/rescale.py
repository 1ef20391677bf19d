"""Rescaling: the kernels of gates are multiplied by numbers, found by the secant method on logarithmic scales."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np

from keras_jacmon.errors import invalid_argument
from keras_jacmon.measurement.secant import MOST_GAIN, Secant
from keras_jacmon.report.arrays import FloatArray
from keras_jacmon.stabilization.goals import DEPTH, GROWTH, TIME, Goal, Standing

# The names that Keras gives the kernels of its cells, for each direction.
KERNELS = {TIME: "recurrent_kernel", DEPTH: "kernel"}

# The power of the gain in the measure of a linear cell, where it is not 1.
_DEGREES = {"variance": 2.0}


# The gain with which each gate is tried.
_TRIAL = 1.1


class Rescale:
    """Multiplies the kernels of each layer by what the measure asks, gate by gate, round by round.

    Before the first round each gate of a gated cell is tried with a gain of 1.1. A round multiplies a gate by a power
    of one number, which is the larger the more the measure follows the gate. A layer whose measure would stay above
    its target without any kernel, as the radius of an LSTM stays near its forget gates, is left as it is.

    Args:
        weights: Mapping by layer, the weights that may change.
        goals: Mapping by layer, its goals.
        measure: String, the name of the measure.
        tolerance: Float, the distance from a target that is near enough.
        measured: Callable that measures the model, and returns its `Standing`.

    Attributes:
        notes: List of sentences about the layers that are left as they are.

    Raises:
        ValueError: If a layer has no kernel of the expected name, or a target is not positive.
    """

    def __init__(
        self,
        weights: Mapping[str, Sequence[keras.Variable]],
        goals: Mapping[str, Sequence[Goal]],
        measure: str,
        tolerance: float,
        measured: Callable[[], Standing],
    ) -> None:
        self._measure, self._tolerance, self._measured, self._are_tried = measure, tolerance, measured, False
        self._kernels: list[_Kernel] = []
        self.notes: list[str] = []
        for layer, of_layer in goals.items():
            for direction in dict.fromkeys(goal.direction for goal in of_layer):
                chosen = [goal for goal in of_layer if goal.direction == direction]
                kernels = [weight for weight in weights[layer] if weight.name == KERNELS[direction]]
                if not kernels:
                    expected = '"gradient" for a layer without a trained weight that is named '
                    raise invalid_argument("method", f"{expected}`{KERNELS[direction]}`", f"'rescale' for `{layer}`")
                if measure != GROWTH and chosen[0].target <= 0:
                    raise invalid_argument("method", '"gradient" for a target of 0', "'rescale', which multiplies")
                self._add(kernels, chosen, _gates(weights[layer]))

    def _add(self, weights: Sequence[keras.Variable], goals: Sequence[Goal], gates: int) -> None:
        """Adds the kernels of a layer, together with those of the layers before that share one, as by a common cell."""
        shared = [kernel for kernel in self._kernels if kernel.shares_with(weights)]
        self._kernels = [kernel for kernel in self._kernels if kernel not in shared]
        together = {id(weight): weight for part in (*(kernel.weights for kernel in shared), weights) for weight in part}
        goals = [*(goal for kernel in shared for goal in kernel.goals), *goals]
        gates = gates if all(kernel.gates == gates for kernel in shared) else 1
        self._kernels.append(_Kernel(list(together.values()), goals, self._measure, gates))

    def advance(self, standing: Standing, updates: int) -> bool:  # noqa: ARG002 - one round is one update
        """Multiplies each kernel once."""
        if not self._are_tried:
            self._leave_out_zeros(standing)
            self._leave_out_of_reach(standing)
            self._try_gates(standing)
            self._are_tried = True
        for kernel in self._kernels:
            kernel.advance(standing.values)
        return bool(self._kernels)

    def _leave_out_zeros(self, standing: Standing) -> None:
        """Leaves out the kernels whose measure is zero at all points, which no factor changes."""
        for kernel in [kernel for kernel in self._kernels if kernel.is_zero(standing.values)]:
            self._kernels.remove(kernel)
            goal, name = kernel.goals[0], KERNELS[kernel.goals[0].direction]
            self.notes.append(
                f"`{goal.call}` stays as it is: the {self._measure} of its Jacobians is "
                f"{standing.values[goal.name]:g}, which no factor of its `{name}` changes, as where all units are dead "
                "or the kernel is zero."
            )
            warnings.warn(self.notes[-1], stacklevel=6)

    def _leave_out_of_reach(self, standing: Standing) -> None:
        """Leaves out the kernels whose measure stays above its target without them."""
        above = [kernel for kernel in self._kernels if kernel.excess(standing.values) > self._tolerance]
        if not above:
            return
        before = [kernel.multiplied(np.full(kernel.gates, -math.inf)) for kernel in above]
        values = self._measured().values
        for kernel, kept in zip(above, before, strict=True):
            kernel.put_back(kept)
            if kernel.excess(values) > self._tolerance:
                self._kernels.remove(kernel)
                self._say_out_of_reach(kernel, values)

    def _say_out_of_reach(self, kernel: "_Kernel", values: Mapping[str, float]) -> None:
        goal, name = kernel.goals[0], KERNELS[kernel.goals[0].direction]
        self.notes.append(
            f"`{goal.call}` stays as it is: with a `{name}` of zeros its {self._measure} would still be "
            f"{values[goal.name]:.3g}, since the state has a way past the kernel, such as gates that keep it. No "
            f"factor of the kernel brings it to {goal.target:.3g}. Weights of those gates do, which "
            '`method="gradient"` changes.'
        )
        warnings.warn(self.notes[-1], stacklevel=7)

    def _try_gates(self, standing: Standing) -> None:
        """Finds out how the measures follow each gate, with all layers in one measurement."""
        gated = [kernel for kernel in self._kernels if kernel.gates > 1]
        for gate in range(max((kernel.gates for kernel in gated), default=0)):
            tried = [kernel for kernel in gated if gate < kernel.gates]
            before = [kernel.multiplied(np.eye(kernel.gates)[gate] * math.log(_TRIAL)) for kernel in tried]
            values = self._measured().values
            for kernel, kept in zip(tried, before, strict=True):
                kernel.learn(gate, standing.values, values)
                kernel.put_back(kept)


class _Kernel:
    """The kernels of a layer in one direction.

    Args:
        weights: Sequence of variables; all are multiplied by the same numbers.
        goals: Sequence of the goals that they serve, one for each call of the layer.
        measure: String, the name of the measure.
        gates: Integer, number of the gates, whose kernels stand side by side.

    Attributes:
        weights: The variables.
        goals: The goals.
        gates: Integer, number of the gates.
    """

    def __init__(self, weights: Sequence[keras.Variable], goals: Sequence[Goal], measure: str, gates: int) -> None:
        self.weights, self.goals, self._is_logarithm, self.gates = weights, goals, measure == GROWTH, gates
        self._log_target = self._log(goals[0].target)
        self._secant = Secant(_DEGREES.get(measure, 1.0), math.log(MOST_GAIN))
        self._slopes = np.ones(gates)

    def advance(self, values: Mapping[str, float]) -> None:
        """Multiplies the kernels.

        Args:
            values: Mapping by name of a goal, the present measure.
        """
        step = self._secant.step(self._log_of(values) - self._log_target)
        slopes, total = self._slopes, np.sum(self._slopes)
        # All gates together do with these powers what they do with the power 1, by the least change of all.
        follows = np.all(np.isfinite(slopes)) and total > 0
        powers = np.clip(slopes * total / np.sum(slopes**2), -1, 2) if follows else np.ones(self.gates)
        self.multiplied(step * powers)

    def multiplied(self, log_gains: FloatArray) -> list[FloatArray]:
        """Multiplies each gate by the exponential of a number, `(gates,)`, and returns the kernels before."""
        before = [keras.ops.convert_to_numpy(weight) for weight in self.weights]
        for weight, value in zip(self.weights, before, strict=True):
            gains = np.repeat(np.exp(log_gains), value.shape[-1] // self.gates).astype(value.dtype)
            weight.assign(value * gains if weight.constraint is None else weight.constraint(value * gains))
        return before

    def put_back(self, values: Sequence[FloatArray]) -> None:
        """Gives the kernels earlier values."""
        for weight, value in zip(self.weights, values, strict=True):
            weight.assign(value)

    def learn(self, gate: int, before: Mapping[str, float], values: Mapping[str, float]) -> None:
        """Keeps the power of a gate in the measure, from the values before and with the gain of a trial."""
        self._slopes[gate] = (self._log_of(values) - self._log_of(before)) / math.log(_TRIAL)

    def shares_with(self, weights: Sequence[keras.Variable]) -> bool:
        """Returns True if one of some variables is among the kernels."""
        return any(weight is known for weight in weights for known in self.weights)

    def is_zero(self, values: Mapping[str, float]) -> bool:
        """Returns True if the measure is zero at all points; of growth, if nothing is left of a gradient."""
        return self._log_of(values) == -math.inf

    def excess(self, values: Mapping[str, float]) -> float:
        """Returns the distance of the measure from its target, above 0 if it is larger."""
        return self._mean(values) - self.goals[0].target

    def _mean(self, values: Mapping[str, float]) -> float:
        return float(np.mean([values[goal.name] for goal in self.goals]))

    def _log_of(self, values: Mapping[str, float]) -> float:
        return self._log(self._mean(values))

    def _log(self, value: float) -> float:
        """The logarithm of a measure; the growth is one already."""
        if self._is_logarithm:
            return value
        return -math.inf if value <= 0 else math.log(value)


def _gates(weights: Sequence[keras.Variable]) -> int:
    """Returns the number of gates in each recurrent kernel `(units, gates * units)`.

    It is 1 for kernels of other shapes, and for several kernels with different numbers of gates, as of a stack of cells
    of different kinds: they are then multiplied as a whole.
    """
    shapes = [weight.shape[-2:] for weight in weights if weight.name == KERNELS[TIME]]
    counts = {columns // units if columns % units == 0 else 1 for units, columns in shapes}
    return counts.pop() if len(counts) == 1 else 1
