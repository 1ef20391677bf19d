"""The checks of a stabilization, kept and shown in the progress bar of Keras."""

import keras

from keras_jacmon.stabilization.goals import Standing


class History:
    """Collects the checks, and moves the progress bar.

    Args:
        steps: Integer, maximum number of updates.
        verbose: Integer, 0 for no progress bar.

    Attributes:
        values: Dict of lists, as in `StabilizeResult.history`.
    """

    def __init__(self, steps: int, verbose: int) -> None:
        self.values: dict[str, list[float]] = {"updates": [], "loss": []}
        self._steps = steps
        self._bar = keras.utils.Progbar(steps, unit_name="update", stateful_metrics=["loss"]) if verbose else None

    def add(self, updates: int, standing: Standing) -> None:
        """Adds a check.

        Args:
            updates: Integer, number of updates before it.
            standing: Its `Standing`.
        """
        for name, value in {"updates": updates, "loss": standing.loss, **standing.values}.items():
            self.values.setdefault(name, []).append(value)
        if self._bar is not None and updates:
            self._bar.update(updates, [("loss", standing.loss)], finalize=updates == self._steps)

    def close(self) -> None:
        """Ends the line of the progress bar, if there are fewer updates than it was made for."""
        updates = self.values["updates"][-1]
        if self._bar is not None and updates < self._steps:
            self._bar.update(int(updates), finalize=True)
