"""Changes of verdicts from one report to the next."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from keras_jacmon.report.verdict import Verdict


@dataclass(frozen=True)
class VerdictChange:
    """The change of a layer's verdict.

    Attributes:
        layer: String, the layer's key in the report.
        old: `Verdict` before.
        new: `Verdict` now, in another state.
    """

    layer: str
    old: Verdict
    new: Verdict

    def sentence(self, step: int) -> str:
        """Returns the change in a line.

        Args:
            step: Integer, the iteration count of the optimizer.
        """
        horizon = "beyond the sequence" if math.isinf(self.new.horizon) else f"{self.new.horizon:.0f}"
        return f"step {step:,}: {self.layer} {self.old.state} -> {self.new.state} (horizon {horizon})"


@dataclass
class VerdictHistory:
    """The newest verdict of each layer, to be compared with the next one."""

    _newest: dict[str, Verdict] = field(default_factory=dict)

    def update(self, verdicts: Mapping[str, Verdict]) -> list[VerdictChange]:
        """Takes the verdicts of a report, and returns those that changed their state.

        Args:
            verdicts: Mapping from layers to verdicts. A layer that is missing keeps the verdict that it had.
        """
        changes = [
            VerdictChange(name, self._newest[name], verdict)
            for name, verdict in verdicts.items()
            if name in self._newest and self._newest[name].state != verdict.state
        ]
        self._newest |= verdicts
        return changes
