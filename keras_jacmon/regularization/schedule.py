"""Numbers that traced graphs read, changed by hand or by a schedule without a new trace."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import keras
import numpy as np

from keras_jacmon.errors import invalid_argument
from keras_jacmon.model.distribution import own_variable

# A number, or a function from the number of batches so far to one.
Schedule = float | Callable[[int], Any]

# In place of a number: it is chosen while the model trains.
AUTO: Literal["auto"] = "auto"


class ScheduledNumber:
    """A number in a variable, which follows a schedule if there is one.

    Args:
        name: String, the argument that it comes from.
        value: A number, or a callable from the number of batches so far to a number; or `"auto"`.
        least: Number, the smallest value that is valid.
        allows_auto: Boolean, True if `"auto"` is valid. Defaults to False.

    Attributes:
        value: Float, the number; 0 with `"auto"` until one is chosen.
        is_auto: Boolean, True if the number is chosen by `choose`.
        variable: `tf.Variable` with the number, a float32 scalar, for graphs.

    Raises:
        ValueError: If the value is not a finite number of at least `least`.
    """

    def __init__(
        self, name: str, value: Schedule | Literal["auto"], least: float, *, allows_auto: bool = False
    ) -> None:
        self._name, self._least = name, least
        self._allows_auto, self.is_auto = allows_auto, False
        self._schedule: Callable[[int], Any] | None = None
        self.variable = own_variable(0.0)
        self.value = 0.0
        self.set(value)

    def set(self, value: Schedule | Literal["auto"]) -> None:
        """Takes a new number, or a new schedule at its beginning; `"auto"` keeps the number until one is chosen."""
        is_auto = self._allows_auto and isinstance(value, str) and value == AUTO
        if not is_auto:
            self._assign(value(0) if callable(value) else value)
        self.is_auto = is_auto
        self._schedule = value if callable(value) else None

    def choose(self, value: float) -> None:
        """Takes a number that was chosen for `"auto"`."""
        self._assign(value)

    def follow(self, step: int) -> None:
        """Takes the value that the schedule has after `step` batches."""
        if self._schedule is not None:
            self._assign(self._schedule(step))

    def config(self) -> Any:
        """Returns the number, or `"auto"`, or the schedule as Keras serializes it."""
        if self.is_auto:
            return AUTO
        return self.value if self._schedule is None else keras.saving.serialize_keras_object(self._schedule)

    def _assign(self, value: Any) -> None:
        self.value = self._checked(value)
        self.variable.assign(np.float32(self.value))

    def _checked(self, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not (math.isfinite(number) and number >= self._least):
            expected = {0.0: "a number of at least 0", -math.inf: "a finite number"}.get(
                self._least, "a positive number, since it has a logarithm"
            )
            expected += ", or 'auto'" if self._allows_auto else ""
            raise invalid_argument(self._name, expected, f"{self._name}={value}")
        return number


def schedule_from_config(config: Any) -> Any:
    """Makes the number, `"auto"` or the schedule that `ScheduledNumber.config` returned."""
    return keras.saving.deserialize_keras_object(config) if isinstance(config, Mapping) else config
