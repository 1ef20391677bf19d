"""Verdict on a gradient's way through a layer, and suggestions with the numbers they rest on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from keras_jacmon.report.curve import FALL, RISE, State, added, fate, growth, mean_curve, nan_mean
from keras_jacmon.report.reductions import FloatArray

# The suggested forget bias leaves this part of a cell state at the end of the sequence.
_RETAINED = 0.5

# A step stands out if the logarithm of its gain differs from the median by so much, and by so many times the median
# difference: of normal numbers, three in a million do.
_LEAST_EXCESS, _OUTLIER = math.log(1.5), 7.0

# A threshold beyond the probe is worth a word within so many times its length.
_SOON = 5

# The relative change of the last state that a step of the training may make.
_SMALL_CHANGE = 0.1

# A recurrent kernel is not suggested to be multiplied, or divided, by more.
_MOST_GAIN = 4.0


@dataclass(frozen=True)
class Verdict:
    """The fate of a gradient on its way through a layer, from the end of a sequence to its beginning.

    `print(verdict)` shows it in words.

    Attributes:
        state: `"vanishing"`, `"stable"` or `"exploding"`: the threshold that the flow meets first within the probe.
        growth: Float, nats per step: the slope of the flow's mean over the samples; -inf if nothing arrives at the
            beginning. `scalars()` has the same number.
        horizon: Float, steps after which the mean of the flow meets the threshold; inf if it does not. `scalars()` has
            the same number.
        expected_horizon: Float, steps: the horizon; if that is inf, the number of steps after which a threshold would
            be met at this growth, if there is one within five times the length of the probe.
        gain: Float, dimensionless: the rest of a gradient over each sample's whole length, geometric mean over the
            samples.
        length: Float, steps: the mean length of a sample.
        worst_step: Integer, the position in the input at which most is lost, or, of an exploding flow, most is gained;
            None if no step stands out from the others.
        worst_gain: Float, dimensionless: the gain at that step, geometric mean over the samples; None without one.
        suggestions: Tuple of sentences about possible changes, each with the measured numbers that it rests on.
        growth_of_all: Float, nats per step: the growth of a gradient that arrives at all states, also at those that are
            carried on and that the output never feels; None if there are none.
        sensitivity: Float, dimensionless: the relative change of the last state over that of the recurrent weights,
            when these change at random; their root mean square times `relative_sensitivity`. None if it was not
            measured.
        is_sensitive: Boolean, True if the state is `"stable"` and the sensitivity has exploded: it is at the upper
            threshold of the flow, 100, or above. Then a random change of the weights by 1 % of their size changes the
            last state by as much as its own size.

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
    expected_horizon: float
    gain: float
    length: float
    worst_step: int | None
    worst_gain: float | None
    suggestions: tuple[str, ...]
    growth_of_all: float | None = None
    sensitivity: float | None = None
    is_sensitive: bool = False

    def __str__(self) -> str:
        state = f"{self.state}, but sensitive to the recurrent weights" if self.is_sensitive else self.state
        head = (
            f"{state}: {self.growth:+.3g} nats per step, gain {self.gain:.3g} over {self.length:.4g} steps, "
            f"horizon {self._horizon()}"
        )
        if self.worst_step is not None:
            head += f", worst at step {self.worst_step} (gain {self.worst_gain:.3g})"
        if self.growth_of_all is not None:
            head += f"; of all states, felt or not: {self.growth_of_all:+.3g} nats per step"
        return "\n".join([head, *(f"  - {line}" for line in self.suggestions)])

    def _horizon(self) -> str:
        if math.isfinite(self.horizon):
            return f"{self.horizon:.0f} steps"
        if math.isfinite(self.expected_horizon):
            return f"beyond the sequence: at this growth {self.expected_horizon:.0f} steps"
        return "beyond the sequence"


class Verdicts(dict[str, Verdict]):
    """Verdicts by layer; whoever asks for one that is not there is told why.

    Args:
        verdicts: Mapping from layers to their verdicts.
        reasons: Mapping from the other layers to the reason why they have none.

    Attributes:
        reasons: As given.
    """

    def __init__(self, verdicts: Mapping[str, Verdict], reasons: Mapping[str, str]) -> None:
        super().__init__(verdicts)
        self.reasons = dict(reasons)

    def __missing__(self, name: str) -> Verdict:
        if name in self.reasons:
            raise KeyError(f"No verdict on layer '{name}': {self.reasons[name]}")
        raise KeyError(f"No layer '{name}' in this report. Measured: {[*self, *self.reasons]}")


def judge(
    log_gain: FloatArray,
    mask: npt.NDArray[np.bool_],
    suggestion_inputs: Mapping[str, float],
    *,
    log_gain_of_all: FloatArray | None = None,
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
            `weight_size`: the root mean square of the recurrent weights. `relative_sensitivity`: that of the last state
            to them, in all.
        log_gain_of_all: Float array like `log_gain`, of a gradient that arrives at all states, felt or not. Defaults to
            None, if the output feels all of them.
        go_backwards: Boolean, True if the layer runs from the last position of the input to the first. Defaults to
            False.
        fall: Float in (0, 1): a gain of this or less has vanished. Defaults to 0.01.
        rise: Float above 1: a gain of this or more has exploded, and so has a sensitivity. Defaults to 100.

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
    curve = mean_curve(log_gain)
    if not _is_known(log_gain, mask) or np.isnan(curve).any():
        return None
    (state, horizon), slope = fate(curve, fall, rise), float(growth(curve))
    gain, length = _whole_gain(log_gain)
    worst_step, worst_gain = _worst(_by_position(log_gain, mask, go_backwards=go_backwards), state)
    suggestions = () if state == "stable" else _suggestions(state, suggestion_inputs, length, slope)
    expected = _expected_horizon(curve, slope, fall, rise) if state == "stable" else horizon
    of_all = None if log_gain_of_all is None else float(growth(mean_curve(log_gain_of_all)))
    sensitivity = _sensitivity(suggestion_inputs)
    is_sensitive = state == "stable" and sensitivity is not None and sensitivity >= rise
    if is_sensitive:
        suggestions = _weight_suggestions(suggestion_inputs)
    return Verdict(
        state,
        slope,
        horizon,
        expected,
        gain,
        length,
        worst_step,
        worst_gain,
        suggestions,
        of_all,
        sensitivity,
        is_sensitive,
    )


def _is_known(log_gain: FloatArray, mask: npt.NDArray[np.bool_]) -> bool:
    """True if there is a sample with a step, and the flow of each such sample begins with a number."""
    known = ~np.isnan(log_gain).all(axis=0)
    return bool(known.any()) and np.array_equal(known, mask.any(axis=0))


def _whole_gain(log_gain: FloatArray) -> tuple[float, float]:
    """Returns the geometric mean of the gains over the samples' whole lengths, and the mean length."""
    lengths = (~np.isnan(log_gain)).sum(axis=0)
    known = np.flatnonzero(lengths)
    with np.errstate(over="ignore"):
        gain = np.exp(nan_mean(log_gain[lengths[known] - 1, known], axis=0))
    return float(gain), float(lengths[known].mean())


def _expected_horizon(curve: FloatArray, slope: float, fall: float, rise: float) -> float:
    """Returns the number of steps after which a curve that met no threshold would meet one; inf if that is not soon."""
    if slope == 0 or not math.isfinite(slope):
        return math.inf
    left = math.log(fall if slope < 0 else rise) - curve[-1]
    steps = math.ceil(curve.size + left / slope)
    return float(steps) if steps <= _SOON * curve.size else math.inf


def _worst(local: FloatArray, state: State) -> tuple[int | None, float | None]:
    """Returns the step that loses, or gains, more than the others, and its gain; None if no step stands out.

    Args:
        local: Float array `(time,)`, the logarithm of each step's gain by position; NaN where there is none.
        state: The state of the flow.
    """
    known = local[~np.isnan(local)]
    if not known.size:
        return None, None
    worst = int(np.nanargmax(local) if state == "exploding" else np.nanargmin(local))
    typical = np.median(known)
    with np.errstate(invalid="ignore"):
        spread = np.median(np.abs(known - typical))
        excess = abs(local[worst] - typical)
    # A step that lets nothing pass stands out anyhow.
    if math.isfinite(local[worst]) and excess <= max(_LEAST_EXCESS, _OUTLIER * spread):
        return None, None
    with np.errstate(over="ignore"):
        return worst, float(np.exp(local[worst]))


def _by_position(log_gain: FloatArray, mask: npt.NDArray[np.bool_], *, go_backwards: bool) -> FloatArray:
    """Returns each step's share of the logarithm of the gain, by its position in the input, mean over the samples.

    The step that a sample takes last is left out, unless nothing passes it: there a random direction turns into those
    that survive, and the loss is not the step's own.
    """
    gains = added(log_gain)
    gains[0, np.isfinite(gains[0])] = np.nan
    local = np.full(mask.shape, np.nan)
    for sample in range(mask.shape[1]):
        positions = np.flatnonzero(mask[:, sample])
        # Spans are counted from the step that the layer takes last.
        local[positions if go_backwards else positions[::-1], sample] = gains[: positions.size, sample]
    return nan_mean(local, axis=1)


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
        f'train with `JacobianRegularizer({gain * math.exp(-growth):.3g}, measure="rms_singular_value", view="joint")` '
        f"in a monitor that has the probe's `targets`: that is {gain:.3g} now (geometric mean) while the flow has a "
        f"gain of {math.exp(growth):.3g} in a step, and {math.exp(-growth):.3g} times as much would make that 1"
    )


def _sensitivity(inputs: Mapping[str, float]) -> float | None:
    """Returns the relative change of the last state over that of the recurrent weights; None if it is not known."""
    found = inputs.get("relative_sensitivity", math.nan) * inputs.get("weight_size", math.nan)
    return None if math.isnan(found) else found


def _weight_suggestions(inputs: Mapping[str, float]) -> tuple[str, ...]:
    """Returns the sentences for recurrent weights to which the last state is too sensitive."""
    size, relative = inputs["weight_size"], inputs["relative_sensitivity"]
    step = _SMALL_CHANGE / relative
    smaller = (
        f"train the recurrent weights with a smaller learning rate: a random change by 1 % of their size ({size:.3g}, "
        f"root mean square) changes the last state by {size * relative:.3g} % of its own, although no gradient "
        f"explodes. A change by {_SMALL_CHANGE:.0%} takes steps of {step:.2g} in each weight; a step of Adam is as "
        "large as the learning rate"
    )
    other = (
        "or reparametrize them so that equal steps change a long memory less, such as the logarithm of the time that a "
        "unit remembers (Zucchet and Orvieto, arXiv 2405.21064)"
    )
    return smaller, other
