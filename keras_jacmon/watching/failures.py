"""Failures of a monitor, which end no training unless the user wants that."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from keras_jacmon.errors import message_of
from keras_jacmon.events.thinning import thin


@dataclass
class Failures:
    """The failures of a monitor: raised, or told once for each training and kept.

    Attributes:
        on_error: `"warn"` or `"raise"`.
        most: Number of sentences above which they are thinned.
        sentences: A sentence for each failure.
    """

    on_error: Literal["warn", "raise"]
    most: int
    sentences: list[str] = field(default_factory=list, init=False)
    _told: set[str] = field(default_factory=set, init=False)

    def begin(self) -> None:
        """Starts a training, in which the first failure of each kind is warned of again."""
        self._told.clear()

    def attempt(self, what: str, step: Callable[[], int], function: Callable[[], Any]) -> Any:
        """Calls the function; if it fails, raises or returns None.

        Args:
            what: String, the subject of the sentence about a failure.
            step: Callable that returns the step for this sentence.
            function: Callable without arguments.
        """
        try:
            return function()
        except Exception as error:
            if self.on_error == "raise":
                raise
            sentence = f"{what} at step {step()} failed: {message_of(error)}"
            self.sentences.append(sentence)
            thin(self.sentences, self.most)
            if what not in self._told:
                self._told.add(what)
                warnings.warn(
                    f"{sentence}\nTraining goes on. Further failures are not warned of, but kept in "
                    "`JacobianMonitor.failures`.",
                    stacklevel=3,
                )
            return None
