"""The goals of a stabilization: a measure of each layer with its target, and how near a report is to them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from keras_jacmon.errors import invalid_argument, is_number
from keras_jacmon.measures.differentiable import TINY
from keras_jacmon.measures.selection import key_of
from keras_jacmon.options import ChosenStates, default_warmup, label_of
from keras_jacmon.report.arrays import FloatArray
from keras_jacmon.report.report import Report

# The directions of a gradient's way through a stack of layers; in depth it passes the view of the inputs.
TIME, DEPTH = "time", "depth"

Target = float | Mapping[str, float]
GivenView = str | ChosenStates

# The measures of products over time, which are logarithms.
GROWTH, LYAPUNOV = "growth", "lyapunov"


def targets_of(target: Target | None, measure: str) -> dict[str, float]:
    """Returns the targets by direction; a number is the target through time.

    Args:
        target: Number, or mapping from `"time"` and `"depth"` to numbers; None for the value of a layer that keeps its
            gradient.
        measure: String, the name of the measure.

    Raises:
        ValueError: If it is neither, a number is not finite, or the measure has no such values or no depth.
    """
    if target is None:
        target = 0.0 if measure in (GROWTH, LYAPUNOV) else 1.0
    by_direction = dict(target.items()) if isinstance(target, Mapping) else {TIME: target}
    known = bool(by_direction) and set(by_direction) <= {TIME, DEPTH}
    if not known or not all(is_number(value) and math.isfinite(value) for value in by_direction.values()):
        expected = 'a finite number, or a dict of numbers for "time", "depth" or both'
        raise invalid_argument("target", expected, f"target={target!r}")
    if measure not in (GROWTH, LYAPUNOV) and min(by_direction.values()) < 0:
        raise invalid_argument(
            "target", f"a number of at least 0, as the measure `{measure}` has", f"target={target!r}"
        )
    if measure in (GROWTH, LYAPUNOV) and DEPTH in by_direction:
        expected = f'a target for "time" alone, which the measure `{measure}` is of'
        raise invalid_argument("target", expected, f"target={target!r}")
    return {direction: float(value) for direction, value in by_direction.items()}


@dataclass(frozen=True)
class Goal:
    """A measure of one call of a recurrent layer, with its target.

    Attributes:
        call: String, the key of the call in reports.
        measure: String, the name of the measure.
        key: String, the key of the measure there.
        direction: String, `"time"` or `"depth"`.
        target: Float, in the unit of the measure.
    """

    call: str
    measure: str
    key: str
    direction: str
    target: float

    @property
    def name(self) -> str:
        """Its name in a history, such as `lstm/joint/spectral_radius`."""
        return f"{self.call}/{self.key}"

    def is_of(self, layer: str) -> bool:
        """Returns True if the call is the first or a further one, such as `lstm:1`, of a layer of this name."""
        return self.call == layer or self.call.removeprefix(f"{layer}:").isdecimal()

    def value(self, report: Report) -> float:
        """Returns the mean of the measure in a report of the same model; NaN if it has no value there."""
        if not self._is_of_exponents:
            return report[self.call].mean(self.key)
        exponents = self._numbers(report)
        return float(np.mean(exponents)) if exponents.size else math.nan

    def distance(self, report: Report) -> float:
        """Returns the distance of the mean from the target; of exponents the root mean square of their distances."""
        return math.sqrt(self.loss(report)) if self._is_of_exponents else abs(self.value(report) - self.target)

    def loss(self, report: Report) -> float:
        """Returns the mean over the points of `(measure - target)²`; inf if that is no number."""
        numbers = self._numbers(report).astype(np.float64)
        if self._is_of_exponents:
            # As where they are differentiated: that of a direction that is lost is no reason to lose the others.
            numbers = np.maximum(numbers, math.log(TINY))
        if not numbers.size:
            return math.inf
        with np.errstate(over="ignore", invalid="ignore"):
            loss = float(np.mean((numbers - self.target) ** 2))
        return math.inf if math.isnan(loss) else loss

    @property
    def _is_of_exponents(self) -> bool:
        return self.measure == LYAPUNOV

    def _numbers(self, report: Report) -> FloatArray:
        """The values of all points, or all exponents of the samples with a step after the first tenth."""
        layer = report[self.call]
        if not self._is_of_exponents:
            return layer.valid(self.key)
        return layer[self.key][:, layer.mask.sum(axis=0) > default_warmup(len(layer.mask))]


@dataclass(frozen=True)
class Standing:
    """The distance of a model from its goals.

    Attributes:
        loss: Float, the mean over the goals of the mean `(measure - target)²`.
        values: Dict by name of a goal, the mean of its measure.
        is_within: Boolean, True if the distance of each goal is within the tolerance.
        report: `Report` that it was read off.
    """

    loss: float
    values: dict[str, float]
    is_within: bool
    report: Report

    @classmethod
    def of(cls, report: Report, goals: Sequence[Goal], tolerance: float) -> "Standing":
        """Reads the distance off a report."""
        values = {goal.name: goal.value(report) for goal in goals}
        within = all(goal.distance(report) <= tolerance for goal in goals)
        return cls(float(np.mean([goal.loss(report) for goal in goals])), values, within, report)


def measured_keys(targets: Mapping[str, float], measure: str, view: GivenView) -> list[str]:
    """Returns the keys of the measures that a report needs for goals of these targets."""
    return [key_of(label_of(view_of(direction, view)), measure) for direction in targets]


def view_of(direction: str, view: GivenView) -> GivenView:
    """Returns the view of a direction, with the given one through time."""
    return "inputs" if direction == DEPTH else view


def goals_in(report: Report, targets: Mapping[str, float], measure: str, view: GivenView) -> list[Goal]:
    """Returns the goals for the layers of a report, where it has the measure.

    Args:
        report: `Report`, with the measures of `measured_keys`.
        targets: Mapping from directions to targets.
        measure: String, the name of the measure.
        view: String or tuple of chosen states, the view through time.

    Raises:
        ValueError: If no layer has the measure in one of the directions.
    """
    goals = []
    for direction, target in targets.items():
        for name, layer in report.items():
            # The joint view of one state is the hidden one.
            is_joint = direction == TIME and view == "joint"
            key = f"{layer.joint}{measure}" if is_joint else key_of(label_of(view_of(direction, view)), measure)
            if key in layer:
                goals.append(Goal(name, measure, key, direction, target))
        if not any(goal.direction == direction for goal in goals):
            square = ", for which a layer needs as many inputs as it has units" if measure == "spectral_radius" else ""
            expected = f"a direction in which a recurrent layer has a {measure}{square if direction == DEPTH else ''}"
            raise invalid_argument("target", expected, f"{direction!r} for the layers {list(report)}")
    return goals
