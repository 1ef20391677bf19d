"""One line that says what is being prepared, layer by layer, before a training begins."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class PreparationLine:
    """Names each part of a preparation as it begins, in one printed line, once the user has waited for a while.

    Attributes:
        patience: Float, the seconds after which the line appears. Defaults to 5.0.
    """

    patience: float = 5.0
    _names: list[str] = field(default_factory=list, init=False)
    _printed: int = field(default=0, init=False)
    _is_shown: bool = field(default=False, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @contextlib.contextmanager
    def shown(self, *, at_once: bool) -> Iterator[None]:
        """Shows the line inside of the context.

        Args:
            at_once: Boolean, True to show it from the first part on, False if the context takes longer than `patience`.
        """
        self._names, self._printed, self._is_shown = [], 0, at_once
        timer = threading.Timer(self.patience, self._show)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            with self._lock:
                # A timer that has run out meanwhile finds nothing to print.
                self._is_shown = False
                if self._printed:
                    _print(".\n")

    def begin(self, name: str) -> None:
        """Takes note of a part that begins, and prints it if the line is shown.

        Args:
            name: String, the layer or the other part, as it is to be printed.
        """
        with self._lock:
            self._names.append(name)
            self._catch_up()

    def _show(self) -> None:
        with self._lock:
            self._is_shown = bool(self._names)
            self._catch_up()

    def _catch_up(self) -> None:
        """Prints the names that were not printed yet."""
        if not self._is_shown:
            return
        head = "" if self._printed else "JacobianMonitor prepares its measurement of "
        new = ", ".join(self._names[self._printed :])
        _print(head + (", " if self._printed and new else "") + new)
        self._printed = len(self._names)


def _print(text: str) -> None:
    # An output that is closed ends no training.
    with contextlib.suppress(Exception):
        sys.stdout.write(text)
        sys.stdout.flush()
