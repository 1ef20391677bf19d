"""Numbers of the newest reports that go into the `logs` of each epoch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from keras_jacmon.report.chosen import names_in_logs
from keras_jacmon.report.report import Report

# Their keys in the logs and their tags in TensorBoard.
PENALTY, STRENGTH = "jac_penalty", "jac_strength"


@dataclass
class LogValues:
    """Newest value of each number in the logs.

    Attributes:
        chosen: `"auto"`, `"all"`, names of measures, or None for none.
    """

    chosen: str | tuple[str, ...] | None
    _scalars: dict[str, float] = field(default_factory=dict, init=False)
    _added: dict[str, float] = field(default_factory=dict, init=False)

    def begin(self) -> None:
        """Starts a training, in which no value of the one before is shown."""
        self._scalars, self._added = {}, {}

    def take(self, report: Report) -> None:
        """Takes the values of a report; those that it has not stay as they are."""
        self._scalars |= report.scalars(names_in_logs(self.chosen, report))

    def forget(self) -> None:
        """Makes all values NaN: old ones under a new epoch would be wrong, and `CSVLogger` wants the same keys."""
        self._scalars = dict.fromkeys(self._scalars, float("nan"))

    def add_to(self, logs: dict[str, Any], of_regularizer: Mapping[str, float], name: str | None) -> set[str]:
        """Adds the values to the logs of an epoch, and returns the keys that had a value of another's.

        Args:
            logs: Dict that Keras hands from callback to callback.
            of_regularizer: Mapping from keys to the numbers of a regularizer; empty without one.
            name: String, the name of the monitor, which stands before each key; None for no name.
        """
        values = {**self._scalars, **of_regularizer}
        # A training loop may hand on one dict at each epoch.
        replaced = {key for key in logs if key not in self._added or logs[key] is not self._added[key]}
        self._added = values if name is None else {f"{name}_{key}": value for key, value in values.items()}
        logs.update(self._added)
        return replaced & self._added.keys()
