"""The secant method with bounded steps, for numbers that are expensive to measure."""

import math

# A kernel is not multiplied, or divided, by more in a round: the states move with it.
MOST_GAIN = 4.0

# The measured slope counts as far as it is in this range, as multiples of the expected one.
_SLOPES = 0.2, 2.0


class Secant:
    """Looks for the argument at which a number is zero; where the number moved away from zero, it goes half way back.

    Args:
        slope: Float above 0, the slope that is expected; the first step is taken with it.
        most: Float above 0, the largest step.
    """

    def __init__(self, slope: float, most: float) -> None:
        self._slope, self._most = slope, most
        self._last: tuple[float, float] | None = None

    def step(self, number: float) -> float:
        """Returns the change of the argument for the next round.

        Args:
            number: Float, the present number; inf and -inf ask for the largest step, and NaN, as after an overflow, for
                less.
        """
        number = math.inf if math.isnan(number) else number
        change = min(max(self._change(number), -self._most), self._most)
        self._last = change, number
        return change

    def _change(self, number: float) -> float:
        if self._last is None or not self._last[0]:
            return -number / self._slope
        before, earlier = self._last
        if abs(number) > abs(earlier):
            return -before / 2
        slope = (number - earlier) / before
        if slope < 0:
            # Beyond an extremum, as where activations saturate: nearer to zero is nearer to the extremum.
            return before
        least, most = (bound * self._slope for bound in _SLOPES)
        return -number / min(max(slope, least), most) if math.isfinite(slope) else -number / self._slope
