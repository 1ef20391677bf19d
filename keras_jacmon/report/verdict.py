"""Does a gradient survive the sequence, and what could be done? Plain NumPy."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]

# A gradient that has fallen to this has vanished, and one that has grown to that has exploded.
FALL, RISE = 0.01, 100.0

# So much of a cell state shall be left at the end of the sequence, where the forget bias is spoken of.
_RETAINED = 0.5

# A recurrent kernel is not suggested to be multiplied, or divided, by more.
_MOST_GAIN = 4.0


@dataclass(frozen=True)
class Verdict:
    """What becomes of a gradient on its way through a layer, from the end of a sequence to its beginning.

    Attributes:
        state: `"vanishing"`, `"stable"` or `"exploding"`: which threshold the flow meets first, if any.
        growth: In nats per step, the slope of the flow's mean logarithm; -inf if nothing arrives at the beginning.
        horizon: After so many steps the geometric mean over the samples meets the threshold; inf if it does not.
        gain: What is left of a gradient over each sample's whole length, geometric mean over the samples.
        worst_step: The position in the input at which most is lost, or, of an exploding flow, most is gained.
        worst_gain: The gain at that step, geometric mean over the samples.
        suggestions: What could be done, in sentences; each from numbers that were measured.
    """

    state: Literal["vanishing", "stable", "exploding"]
    growth: float
    horizon: float
    gain: float
    worst_step: int
    worst_gain: float
    suggestions: tuple[str, ...]

    def __str__(self) -> str:
        where = "beyond the sequence" if math.isinf(self.horizon) else f"{self.horizon:.0f} steps"
        head = f"{self.state}: {self.growth:+.3g} nats per step, horizon {where}, worst at step {self.worst_step}"
        return "\n".join([f"{head} (gain {self.worst_gain:.3g})", *(f"  - {line}" for line in self.suggestions)])


def judge(
    log_gain: FloatArray,
    mask: npt.NDArray[np.bool_],
    facts: Mapping[str, float],
    *,
    go_backwards: bool = False,
    fall: float = FALL,
    rise: float = RISE,
) -> Verdict | None:
    """The verdict on a flow.

    Args:
        log_gain: Natural logarithms of the gains by span, `(spans, samples)`, NaN beyond a sample's length.
        mask: `(time, samples)`, False at steps that are skipped.
        facts: What suggestions are computed from: `variance`, `kernel_gain`, `forget`, `step_gain`; those that are
            known.
        go_backwards: Whether the layer runs from the last position of the input to the first.
        fall: A gain of this or less has vanished.
        rise: A gain of this or more has exploded.

    Returns:
        The verdict; None if there is no sample with a step, or NaN instead of a flow.

    Raises:
        ValueError: If not 0 < fall < 1 < rise.
    """
    if not 0 < fall < 1 < rise:
        raise ValueError(
            "Invalid value for arguments `fall` and `rise`. Expected 0 < fall < 1 < rise. Received: "
            f"fall={fall}, rise={rise}"
        )
    lengths = (~np.isnan(log_gain)).sum(axis=0)
    known = lengths > 0
    if not known.any() or not np.array_equal(np.flatnonzero(known), np.flatnonzero(mask.any(axis=0))):
        return None
    ends = _mean(log_gain[lengths[known] - 1, np.flatnonzero(known)], axis=0)
    curve = _mean(log_gain, axis=1)
    if np.isnan(curve[: lengths.max()]).any():
        return None
    vanished, exploded = (_first(met) for met in (curve <= math.log(fall), curve >= math.log(rise)))
    state: Literal["vanishing", "stable", "exploding"] = "stable"
    if min(vanished, exploded) < math.inf:
        state = "vanishing" if vanished < exploded else "exploding"
    local = _by_position(log_gain, mask, go_backwards=go_backwards)
    worst = int(np.nanargmax(local) if state == "exploding" else np.nanargmin(local))
    with np.errstate(over="ignore"):
        gain, worst_gain = np.exp([ends, local[worst]])
    steps = float(lengths[known].mean())
    return Verdict(
        state,
        _slope(curve),
        min(vanished, exploded),
        float(gain),
        worst,
        float(worst_gain),
        () if state == "stable" else _suggestions(state, facts, steps, _slope(curve)),
    )


def _slope(curve: FloatArray) -> float:
    """Of a curve over the spans 1, 2, ..., through 0 at span 0, by least squares; -inf if it ends there."""
    if np.isneginf(curve).any():
        return -math.inf
    values = np.concatenate([[0.0], curve[np.isfinite(curve)]])
    spans = np.concatenate([[0.0], np.flatnonzero(np.isfinite(curve)) + 1.0])
    centred = spans - spans.mean()
    return float(centred @ values / (centred @ centred)) if values.size > 1 else math.nan


def _first(met: npt.NDArray[np.bool_]) -> float:
    """The first span at which a condition is met; inf if there is none."""
    return float(np.argmax(met) + 1) if met.any() else math.inf


def _mean(values: FloatArray, axis: int) -> FloatArray:
    """The mean without NaN; NaN where there is nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's on means of nothing, and of inf and -inf
        return np.asarray(np.nanmean(values, axis=axis))


def _by_position(log_gain: FloatArray, mask: npt.NDArray[np.bool_], *, go_backwards: bool) -> FloatArray:
    """What each step adds to the logarithm of the gain, by its position in the input, mean over the samples."""
    with np.errstate(invalid="ignore"):
        # From -inf on nothing is lost any more.
        added = np.diff(log_gain, axis=0, prepend=0.0)
    local = np.full(mask.shape, np.nan)
    for sample in range(mask.shape[1]):
        positions = np.flatnonzero(mask[:, sample])
        # Spans are counted from the step that the layer takes last.
        local[positions if go_backwards else positions[::-1], sample] = added[: positions.size, sample]
    return _mean(local, axis=1)


def _suggestions(state: str, facts: Mapping[str, float], steps: float, growth: float) -> tuple[str, ...]:
    found = []
    gain = facts.get("kernel_gain", math.nan)
    # A gain that makes a vanishing flow vanish faster, as a hidden variance above 1 would ask for, is no help; and with
    # one far from 1 the states would not be those of this probe any more.
    if 1 / _MOST_GAIN <= gain <= _MOST_GAIN and (gain > 1) == (state == "vanishing"):
        found.append(
            f"multiply the recurrent kernel by {gain:.3g}: with states and slopes of activations as they are on this "
            f"probe, that brings the variance of the hidden view from {facts['variance']:.3g} to 1"
        )
    forget = facts.get("forget", math.nan)
    target = _RETAINED ** (1 / steps)
    if state == "vanishing" and 0 < forget < target:
        shift = math.log(target / (1 - target)) - math.log(forget / (1 - forget))
        found.append(
            f"raise the forget bias by {shift:.3g}: the forget gates let {forget:.3g} of the cell state through in a "
            f"step (geometric mean), so {forget**steps:.2g} in {steps:.0f}; {target:.3g} would leave {_RETAINED:.2g}"
        )
    step_gain = facts.get("step_gain", math.nan)
    needed = step_gain * math.exp(-growth) if abs(growth) < math.log(_MOST_GAIN) else math.nan
    if needed > 0:
        found.append(
            f'train with `JacobianRegularizer({needed:.3g}, measure="rms_singular_value", view="joint")`: that is '
            f"{step_gain:.3g} now (geometric mean) while the flow has a gain of {math.exp(growth):.3g} in a step, and "
            f"{math.exp(-growth):.3g} times as much would make that 1"
        )
    return tuple(found)
