"""Verdict on a gradient's way through a layer, with the suggestions that were tried."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from keras_jacmon.report.arrays import FloatArray
from keras_jacmon.report.curve import FALL, RISE, State, added, fate, growth, mean_curve, nan_mean
from keras_jacmon.report.suggestion import Suggestion

# A step stands out if the logarithm of its gain differs from the median by more than log 1.5, and by more than 7 times
# the median difference: of normal numbers, three in a million do.
_LEAST_EXCESS, _OUTLIER = math.log(1.5), 7.0

# A threshold beyond the probe is named if it is met within this multiple of the probe's length.
_SOON = 5

# The relative change of the last state that a step of the training may make.
_SMALL_CHANGE = 0.1

# As `examples/temporal_order.py` shows.
_GATES_OPEN = (
    "this speaks of the gradient with the present weights: a training can learn to open the gates. If the task needs a "
    "memory of N steps, `chrono_biases(model, N)` opens them before the training"
)
_NO_GATES = (
    "this speaks of the gradient with the present weights. For a long memory without gates, a start that is stable may "
    "not last: trainings on an order over 120 steps succeeded with a suggested factor and then, while they ran, "
    "Pascanu's penalty Ω on the way of the error, as in `examples/temporal_order.py --cure suggestion+omega`"
)
_OF_VANISHING = {"LSTMCell": _GATES_OPEN, "GRUCell": _GATES_OPEN, "SimpleRNNCell": _NO_GATES}


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
        suggestions: Tuple of `Suggestion`, changes that make the verdict better, each of which was tried. Empty for a
            stable layer, and where none was found or tried: a note of the layer's report says why.
        growth_of_all: Float, nats per step: the growth of a gradient that arrives at all states, also at those that are
            carried on and that the output never feels; None if there are none.
        sensitivity: Float, dimensionless: the relative change of the last state over that of the recurrent weights,
            when these change at random; their root mean square times `relative_sensitivity`. None if it was not
            measured.
        is_sensitive: Boolean, True if the state is `"stable"` and the sensitivity has exploded: it is at the upper
            threshold of the flow, 100, or above. Then a random change of the weights by 1 % of their size changes the
            last state by as much as its own size.
        remarks: Tuple of sentences: about the training of recurrent weights to which the last state is sensitive; or,
            of an LSTM, a GRU or a `SimpleRNN` in which a gradient vanishes, about what else rescued trainings.

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
    suggestions: tuple[Suggestion, ...]
    growth_of_all: float | None = None
    sensitivity: float | None = None
    is_sensitive: bool = False
    remarks: tuple[str, ...] = ()

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
        return "\n".join([head, *(f"  - {line}" for line in self.advice)])

    @property
    def advice(self) -> tuple[str, ...]:
        """Tuple of sentences: the suggestions and the remarks."""
        return (*map(str, self.suggestions), *self.remarks)

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
    *,
    suggestions: tuple[Suggestion, ...] = (),
    relative_sensitivity: float | None = None,
    weight_size: float | None = None,
    log_gain_of_all: FloatArray | None = None,
    cell: str = "",
    go_backwards: bool = False,
    fall: float = FALL,
    rise: float = RISE,
) -> Verdict | None:
    """Judges a flow.

    Args:
        log_gain: Float array `(spans, samples)`, the natural logarithms of the gains over the last 1, 2, ... steps; NaN
            beyond a sample's length.
        mask: Boolean array `(time, samples)`, False at steps that are skipped.
        suggestions: Tuple of `Suggestion`, for a layer that is not stable. Defaults to none.
        relative_sensitivity: Float, dimensionless, of the last state to the recurrent weights, in all. Defaults to
            None, not measured.
        weight_size: Float, the root mean square of the recurrent weights. Defaults to None, not measured.
        log_gain_of_all: Float array like `log_gain`, of a gradient that arrives at all states, felt or not. Defaults to
            None, if the output feels all of them.
        cell: String, the name of the cell's class. Defaults to "", one of which nothing is known.
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
    expected = _expected_horizon(curve, slope, fall, rise) if state == "stable" else horizon
    of_all = None if log_gain_of_all is None else float(growth(mean_curve(log_gain_of_all)))
    sensitivity, remarks = _sensitivity(relative_sensitivity, weight_size)
    is_sensitive = state == "stable" and sensitivity is not None and sensitivity >= rise
    if not is_sensitive:
        remarks = (_OF_VANISHING[cell],) if cell in _OF_VANISHING and state == "vanishing" else ()
    return Verdict(
        state,
        slope,
        horizon,
        expected,
        gain,
        length,
        worst_step,
        worst_gain,
        () if state == "stable" else suggestions,
        of_all,
        sensitivity,
        is_sensitive,
        remarks,
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


def _sensitivity(relative: float | None, size: float | None) -> tuple[float | None, tuple[str, ...]]:
    """Returns the relative change of the last state over that of the recurrent weights, and sentences for a large one.

    Args:
        relative: Float, the sensitivity relative to the last state; None or NaN if it is not known.
        size: Float, the root mean square of the recurrent weights; None if it is not known.
    """
    if relative is None or size is None or math.isnan(relative * size):
        return None, ()
    step = _SMALL_CHANGE / relative if relative else math.inf
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
    return size * relative, (smaller, other)
