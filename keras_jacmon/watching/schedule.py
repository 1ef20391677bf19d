"""Rhythm of the measurements of a training, and the steps that it counts."""

from dataclasses import dataclass, field
from typing import Literal

import keras


@dataclass
class MeasurementSchedule:
    """The batches of a training, and the batches after which there is a measurement.

    Attributes:
        every: Number of batches between two measurements, or `"epoch"`.
        slow_every: Number of measurements from one with the slow measures to the next.
        start: Iteration count of the optimizer before the first batch; None before that.
        done: Number of batches of this training so far.
    """

    every: Literal["epoch"] | int
    slow_every: int
    start: int | None = field(default=None, init=False)
    done: int = field(default=0, init=False)
    _batch: int = field(default=-1, init=False)
    _measured_at: int | None = field(default=None, init=False)
    _measured_slow: bool = field(default=True, init=False)
    _measured_last: bool = field(default=False, init=False)
    _measurements: int = field(default=0, init=False)

    def begin(self) -> None:
        """Starts a new count."""
        self.start, self.done, self._batch = None, 0, -1
        self._measured_at, self._measured_slow, self._measured_last, self._measurements = None, True, False, 0

    def begin_epoch(self) -> None:
        """Follows the numbering of Keras, which counts batches from 0 in each epoch."""
        self._batch = -1

    @property
    def is_measured(self) -> bool:
        """Boolean, True if there is a measurement after the last batch."""
        return self._measured_at == self.done

    def is_due_after(self, batch: int) -> bool:
        """Counts the batches up to the given one, and returns True if a measurement is due."""
        # `batch` is the last of the `steps_per_execution` batches that have just been run.
        before = (self.start or 0) + self.done
        self.done += batch - self._batch
        self._batch = batch
        return self.every != "epoch" and ((self.start or 0) + self.done) // self.every > before // self.every

    def is_due_after_epoch(self) -> bool:
        """Returns True if a measurement is due after the epoch that has just ended."""
        by_hand = self._batch < 0
        if by_hand:
            # A loop that calls no hooks of batches may have trained nevertheless.
            self._measured_at = None
        return (by_hand or self.every == "epoch") and not self.is_measured

    def is_due_at_end(self, *, needs_trials: bool) -> bool:
        """Returns True if the last batch is not measured yet, with the slow measures and with what the end asks for.

        Args:
            needs_trials: Boolean, True if changes of a layer are to be tried at the end, which only a measurement that
                is known to be the last one does.
        """
        is_complete = self._measured_slow and (self._measured_last or not needs_trials)
        return self._measurements > 0 and not (self.is_measured and is_complete)

    def next_is_slow(self, *, last: bool, has_slow: bool) -> bool:
        """Counts the next measurement, and returns True if it includes the slow measures."""
        slow = last or self._measurements % self.slow_every == 0
        self._measured_at, self._measured_slow, self._measured_last = self.done, slow or not has_slow, last
        self._measurements += 1
        return slow

    def step(self, model: keras.Model) -> int:
        """Returns the optimizer's iteration count, or the batches seen if a custom `train_step` does not use it."""
        start, iterations = self.start or 0, iterations_of(model)
        if iterations is None or (iterations == start and self.done >= 2 * batches_per_iteration(model)):
            return start + self.done
        return iterations


def iterations_of(model: keras.Model) -> int | None:
    """Returns the iteration count of the optimizer; None without an optimizer."""
    iterations = getattr(getattr(model, "optimizer", None), "iterations", None)
    return None if iterations is None else int(keras.ops.convert_to_numpy(iterations))


def batches_per_iteration(model: keras.Model) -> int:
    """Returns the number of batches whose gradients the optimizer accumulates for one iteration."""
    return getattr(getattr(model, "optimizer", None), "gradient_accumulation_steps", None) or 1
