"""Progress bar of Keras for a measurement that takes its time."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import keras


@dataclass
class MeasurementProgress:
    """Shows a bar of seconds while a measurement runs, out of those that the one before took.

    Attributes:
        tick: Float, the seconds after which the bar appears and moves on. Defaults to 1.0.
    """

    tick: float = 1.0
    _lasted: dict[bool, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def shown(self, *, slow: bool, visible: bool) -> Iterator[None]:
        """Shows the bar inside of the context, if that takes longer than a tick.

        Args:
            slow: Boolean, True for a measurement with the slow measures.
            visible: Boolean, False to measure the time alone.
        """
        done = threading.Event()
        bar = threading.Thread(target=self._show, args=(done, self._lasted.get(slow)), daemon=True)
        begin = time.monotonic()
        if visible:
            bar.start()
        try:
            yield
        finally:
            done.set()
            if visible:
                bar.join()
            self._lasted[slow] = time.monotonic() - begin

    def _show(self, done: threading.Event, expected: float | None) -> None:
        if done.wait(self.tick):
            return
        # An output that is closed ends no training.
        with contextlib.suppress(Exception):
            # Two at least: Keras draws a bar that is full as one that has ended.
            target = None if expected is None else max(2, round(expected / self.tick))
            bar = keras.utils.Progbar(target, unit_name="second of measuring")
            ticks = 1
            while not done.is_set():
                bar.update(ticks if target is None else min(ticks, target - 1), finalize=False)
                done.wait(self.tick)
                ticks += 1
            bar.update(target or ticks, finalize=True)
