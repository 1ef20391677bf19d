"""Verdict on a gradient's way through a layer, and suggestions with the numbers they rest on."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from keras_jacmon.report.reductions import FloatArray

State = Literal["vanishing", "stable", "exploding"]

# The gains at which a gradient has vanished, and at which it has exploded.
FALL, RISE = 0.01, 100.0

# The suggested forget bias leaves this part of a cell state at the end of the sequence.
_RETAINED = 0.5

# A recurrent kernel is not suggested to be multiplied, or divided, by more.
_MOST_GAIN = 4.0


@dataclass(frozen=True)
class Verdict:
    """The fate of a gradient on its way through a layer, from the end of a sequence to its beginning.

    `print(verdict)` shows it in words.

    Attributes:
        state: `"vanishing"`, `"stable"` or `"exploding"`: the threshold that the flow meets first, if any.
        growth: Float, nats per step: the slope of the flow's mean logarithm; -inf if nothing arrives at the beginning.
        horizon: Float, steps after which the geometric mean over the samples meets the threshold; inf if it does not.
        gain: Float, dimensionless: the rest of a gradient over each sample's whole length, geometric mean over the
            samples.
        worst_step: Integer, the position in the input at which most is lost, or, of an exploding flow, most is gained.
        worst_gain: Float, dimensionless: the gain at that step, geometric mean over the samples.
        suggestions: Tuple of sentences about possible changes, each with the measured numbers that it rests on.

    Example:

    ```python
    import keras, numpy as np, keras_jacmon

    model = keras.Sequential([keras.Input((50, 3)), keras.layers.SimpleRNN(8, name="rnn")])
    verdict = keras_jacmon.measure(model, np.ones((4, 50, 3), "float32")).verdict["rnn"]
    print(verdict)
    print(verdict.state, verdict.growth, verdict.horizon)
    ```
    """

    state: State
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
    suggestion_inputs: Mapping[str, float],
    *,
    go_backwards: bool = False,
    fall: float = FALL,
    rise: float = RISE,
) -> Verdict | None:
    """Judges a flow.

    Args:
        log_gain: Float array `(spans, samples)`, the natural logarithms of the gains over the last 1, 2, ... steps; NaN
            beyond a sample's length.
        mask: Boolean array `(time, samples)`, False at steps that are skipped.
        suggestion_inputs: Mapping of floats, all dimensionless; each may be missing. `variance`: the mean hidden
            variance. `kernel_gain`: the factor of the recurrent kernel that would bring it to 1. `forget`: the
            geometric mean of the forget gates. `step_gain`: the geometric mean of the root mean square singular values.
        go_backwards: Boolean, True if the layer runs from the last position of the input to the first. Defaults to
            False.
        fall: Float in (0, 1): a gain of this or less has vanished. Defaults to 0.01.
        rise: Float above 1: a gain of this or more has exploded. Defaults to 100.

    Returns:
        `Verdict`; None if there is no sample with a step, or NaN instead of a flow.

    Raises:
        ValueError: If not 0 < fall < 1 < rise.
    """
    if not 0 < fall < 1 < rise:
        raise ValueError(
            "Invalid value for arguments `fall` and `rise`. Expected 0 < fall < 1 < rise. Received: "
            f"fall={fall}, rise={rise}"
        )
    lengths = (~np.isnan(log_gain)).sum(axis=0)
    known = np.flatnonzero(lengths)
    curve = _mean(log_gain, axis=1)
    incomplete = not np.array_equal(known, np.flatnonzero(mask.any(axis=0)))
    if not known.size or incomplete or np.isnan(curve[: lengths.max()]).any():
        return None
    state, horizon = _fate(curve, fall, rise)
    growth = _slope(curve)
    local = _by_position(log_gain, mask, go_backwards=go_backwards)
    worst = int(np.nanargmax(local) if state == "exploding" else np.nanargmin(local))
    with np.errstate(over="ignore"):
        gain, worst_gain = np.exp([_mean(log_gain[lengths[known] - 1, known], axis=0), local[worst]])
    steps = float(lengths[known].mean())
    suggestions = () if state == "stable" else _suggestions(state, suggestion_inputs, steps, growth)
    return Verdict(state, growth, horizon, float(gain), worst, float(worst_gain), suggestions)


def _fate(curve: FloatArray, fall: float, rise: float) -> tuple[State, float]:
    """Returns the threshold that a curve of log gains over the spans 1, 2, ... meets first, and the span."""
    vanished, exploded = (_first(met) for met in (curve <= math.log(fall), curve >= math.log(rise)))
    if math.isinf(vanished) and math.isinf(exploded):
        return "stable", math.inf
    return ("vanishing", vanished) if vanished < exploded else ("exploding", exploded)


def _first(met: npt.NDArray[np.bool_]) -> float:
    """Returns the first span at which a condition is met; inf if there is none."""
    return float(np.argmax(met) + 1) if met.any() else math.inf


def _slope(curve: FloatArray) -> float:
    """Returns the least-squares slope of a curve over the spans 1, 2, ..., with 0 at span 0; -inf if it ends there."""
    if np.isneginf(curve).any():
        return -math.inf
    values = np.concatenate([[0.0], curve[np.isfinite(curve)]])
    spans = np.concatenate([[0.0], np.flatnonzero(np.isfinite(curve)) + 1.0])
    centred = spans - spans.mean()
    return float(centred @ values / (centred @ centred)) if values.size > 1 else math.nan


def _mean(values: FloatArray, axis: int) -> FloatArray:
    """Returns the mean of the values that are not NaN; NaN where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's on means of nothing, and of inf and -inf
        return np.asarray(np.nanmean(values, axis=axis))


def _by_position(log_gain: FloatArray, mask: npt.NDArray[np.bool_], *, go_backwards: bool) -> FloatArray:
    """Returns each step's share of the logarithm of the gain, by its position in the input, mean over the samples."""
    with np.errstate(invalid="ignore"):
        # From -inf on nothing is lost any more.
        added = np.diff(log_gain, axis=0, prepend=0.0)
    local = np.full(mask.shape, np.nan)
    for sample in range(mask.shape[1]):
        positions = np.flatnonzero(mask[:, sample])
        # Spans are counted from the step that the layer takes last.
        local[positions if go_backwards else positions[::-1], sample] = added[: positions.size, sample]
    return _mean(local, axis=1)


def _suggestions(state: State, inputs: Mapping[str, float], steps: float, growth: float) -> tuple[str, ...]:
    """Returns the sentences for a flow of a mean length in steps and a growth in nats per step."""
    found = [_kernel_suggestion(state, inputs), _forget_suggestion(state, inputs, steps), _held_gain(inputs, growth)]
    return tuple(sentence for sentence in found if sentence)


def _kernel_suggestion(state: State, inputs: Mapping[str, float]) -> str:
    gain = inputs.get("kernel_gain", math.nan)
    # A gain that makes a vanishing flow vanish faster, as a hidden variance above 1 would ask for, is no help. With a
    # gain far from 1 the states would differ from the measured ones.
    if not 1 / _MOST_GAIN <= gain <= _MOST_GAIN or (gain > 1) != (state == "vanishing"):
        return ""
    return (
        f"multiply the recurrent kernel by {gain:.3g}: with states and slopes of activations as they are on this "
        f"probe, that brings the variance of the hidden view from {inputs['variance']:.3g} to 1"
    )


def _forget_suggestion(state: State, inputs: Mapping[str, float], steps: float) -> str:
    forget = inputs.get("forget", math.nan)
    target = _RETAINED ** (1 / steps)
    if state != "vanishing" or not 0 < forget < target:
        return ""
    shift = math.log(target / (1 - target)) - math.log(forget / (1 - forget))
    return (
        f"raise the forget bias by {shift:.3g}: the forget gates let {forget:.3g} of the cell state through in a "
        f"step (geometric mean), so {forget**steps:.2g} in {steps:.0f}; {target:.3g} would leave {_RETAINED:.2g}"
    )


def _held_gain(inputs: Mapping[str, float], growth: float) -> str:
    gain = inputs.get("step_gain", math.nan)
    # With a larger change the states would differ from the measured ones.
    if not abs(growth) < math.log(_MOST_GAIN) or not gain > 0:
        return ""
    return (
        f'train with `JacobianRegularizer({gain * math.exp(-growth):.3g}, measure="rms_singular_value", view="joint")`:'
        f" that is {gain:.3g} now (geometric mean) while the flow has a gain of {math.exp(growth):.3g} in a step, and "
        f"{math.exp(-growth):.3g} times as much would make that 1"
    )
