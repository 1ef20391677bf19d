"""Sentences to the user about the reports of a training."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from keras_jacmon.report.changes import VerdictChange, VerdictHistory
from keras_jacmon.report.report import Report
from keras_jacmon.report.verdict import Verdict


@dataclass
class Announcements:
    """Printed reports, verdicts that change, and warnings that come once in a training.

    Attributes:
        verbose: 0 or 1; 1 prints each report and each change of a verdict.
        on_verdict_change: The user's function, called as `f(step, layer, old, new)`; None for none.
    """

    verbose: int
    on_verdict_change: Callable[[int, str, Verdict, Verdict], Any] | None
    _verdicts: VerdictHistory = field(default_factory=VerdictHistory, init=False)
    _told: set[str] = field(default_factory=set, init=False)

    def begin(self) -> None:
        """Starts a training, in which each warning may come again."""
        self._told = set()

    def forget(self) -> None:
        """Forgets the verdicts, which are those of another model."""
        self._verdicts = VerdictHistory()

    def changes(self, report: Report) -> list[VerdictChange]:
        """Returns the verdicts that are others than those of the report before."""
        return self._verdicts.update(report.verdict)

    def tell(self, report: Report, changes: Sequence[VerdictChange], step: int, attempt: Callable[..., Any]) -> None:
        """Tells the user of a report.

        Args:
            report: `Report`, the measurement.
            changes: Sequence of `VerdictChange`, the verdicts that are others than before.
            step: Integer, the iteration count of the optimizer.
            attempt: Callable `attempt(what, function, *args)` that keeps a failure from ending the training.
        """
        for change in changes:
            if self.verbose:
                attempt("Printing a verdict", print, f"\n{change.sentence(step)}")
            if self.on_verdict_change is not None:
                arguments = (step, change.layer, change.old, change.new)
                attempt("Calling `on_verdict_change`", self.on_verdict_change, *arguments)
        if self.verbose:
            # Not every terminal knows all characters, and a pipe may be closed.
            attempt("Printing the report", print, f"\nJacobians at step {step}\n{report}")
        self._warn_of_values(report, step)

    def warn_once(self, what: str, sentence: str) -> None:
        """Warns, unless this training was warned of it before.

        Args:
            what: String, the key under which it is remembered.
            sentence: String, the warning.
        """
        if what not in self._told:
            self._told.add(what)
            warnings.warn(sentence, stacklevel=3)

    def _warn_of_values(self, report: Report, step: int) -> None:
        """Warns once of each layer without a value, and of each one with values that are not finite."""
        for name, layer in report.layers.items():
            if not layer.mask.any():
                self.warn_once(
                    name,
                    f"Layer `{name}` skips all steps of the probe, which are masked: there is nothing to measure, and "
                    "its values are NaN. Give a probe with steps that are not masked.",
                )
            counts = layer.nonfinite()
            if counts:
                found = ", ".join(f"{count} of `{key}`" for key, count in counts.items())
                self.warn_once(
                    name,
                    f"Layer `{name}` has NaN or Inf in its Jacobians at step {step}: {found}. They are logged as they "
                    "are; later ones of this layer are not warned of.",
                )
