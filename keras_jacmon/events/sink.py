"""Sink: the contract of what receives the reports of a training."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from keras_jacmon.report.report import Report


class Sink(Protocol):
    """Receives each report of a training, such as an event file or a database does."""

    def write(
        self, report: Report, step: int, scalars: Mapping[str, float] | None = None, sentences: Sequence[str] = ()
    ) -> None:
        """Writes a report.

        Args:
            report: `Report`, the measurement.
            step: Integer, the step of the report: the iteration count of the optimizer, or the epoch.
            scalars: Dict of further numbers by name; None for no others. Defaults to None.
            sentences: Sequence of strings, one for each verdict that changed. Defaults to none.

        Raises:
            OSError: If it cannot be written now. A later report may be.
        """

    def close(self) -> None:
        """Releases what is open at the end of a training; a later `write` opens it again.

        Raises:
            OSError: If that fails.
        """
