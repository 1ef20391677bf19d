"""The result of a stabilization."""

from dataclasses import dataclass

from keras_jacmon.report.report import Report
from keras_jacmon.stabilization.goals import Goal


@dataclass(frozen=True)
class StabilizeResult:
    """The measures before and after a stabilization, and its way; `print(result)` shows them.

    Attributes:
        before: `Report` with the weights of the beginning: the measure at up to 32 points of a layer, and the growth.
        after: `Report` with the weights that the model has now, the best ones that were found.
        history: Dict of lists, one entry for each check, the first of them before any update: `"updates"`, the number
            of updates; `"loss"`, the mean of `(measure - target)²`; and the mean of the measure of each layer, named
            as `"lstm/joint/spectral_radius"`.
        goals: Tuple of the goals, each with a `call`, a `key` in reports, a `direction` and a `target`.
        converged: Boolean, True if each measure is within the tolerance of its target.
        notes: Tuple of strings, the sentences about goals that the method cannot reach.
        seconds: Float, the time that it took.
    """

    before: Report
    after: Report
    history: dict[str, list[float]]
    goals: tuple[Goal, ...]
    converged: bool
    notes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        state = "every layer is within the tolerance" if self.converged else "not every layer is within the tolerance"
        lines = [f"{state}, after {self.history['updates'][-1]:.0f} updates and {self.seconds:.1f} s"]
        for goal in self.goals:
            before, after = goal.value(self.before), goal.value(self.after)
            lines.append(f"  {goal.name}: {before:.3g} -> {after:.3g}, target {goal.target:.3g} ({goal.direction})")
        earlier = self.before.verdict
        for name, now in self.after.verdict.items():
            if name in earlier:
                growths = f"{earlier[name].growth:+.3g} -> {now.growth:+.3g} nats per step"
                lines.append(f"  {name}: {earlier[name].state} -> {now.state}, growth {growths}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])
