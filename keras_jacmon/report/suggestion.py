"""Suggestions: changes of the weights of a layer that were tried before they are made."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_jacmon.errors import invalid_argument


@dataclass(frozen=True)
class WeightChange:
    """A change of weights by one number: a factor, or a shift of some entries.

    Attributes:
        weights: Tuple of strings, the paths of the variables, as Keras names them.
        amount: Float, the factor, or the shift.
        entries: Tuple of two integers for a shift: the first of the shifted entries along the last axis, and the first
            one after them. Empty for a factor. Defaults to `()`.
    """

    weights: tuple[str, ...]
    amount: float
    entries: tuple[int, ...] = ()

    def applied(self, value: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Returns the changed value of one of the weights.

        Args:
            value: Array, its present value. It stays as it is.
        """
        if not self.entries:
            return np.asarray(value * np.asarray(self.amount, value.dtype))
        changed = value.copy()
        # Of the two rows of a GRU's bias, which are added, the first one.
        np.atleast_2d(changed)[0, slice(*self.entries)] += np.asarray(self.amount, value.dtype)
        return changed

    def weights_in(self, variables: Sequence[Any]) -> list[Any]:
        """Returns the variables with the paths of the weights, in the order of the variables."""
        return [variable for variable in variables if variable.path in self.weights]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the weights, with the name of their layer where several have one name."""
        count = Counter(path.rpartition("/")[2] for path in self.weights)
        parts = [path.split("/") for path in self.weights]
        return tuple(part[-1] if count[part[-1]] == 1 else "/".join(part[-2:]) for part in parts)


@dataclass(frozen=True)
class Suggestion:
    """A change of the weights of one layer, with the growth that was measured when it was tried.

    `print(suggestion)` says it in a sentence.

    Attributes:
        layer: String, the key of the layer in the report.
        change: `WeightChange`.
        growth: Float, nats per step, of the layer as it is.
        predicted: Float, nats per step, of the layer after the change, if nothing else is changed.
        state: String, the verdict on the layer as it is: `"vanishing"` or `"exploding"`.
        predicted_state: String, the verdict after the change.

    Example:

    ```python
    import keras, numpy as np, keras_jacmon

    model = keras.Sequential([keras.Input((60, 3)), keras.layers.LSTM(8, name="lstm")])
    probe = np.random.default_rng(0).normal(size=(4, 60, 3))
    suggestion = keras_jacmon.measure(model, probe).verdict["lstm"].suggestions[0]
    print(suggestion)
    suggestion.apply(model)
    print(suggestion.predicted, keras_jacmon.measure(model, probe).verdict["lstm"].growth)
    ```
    """

    layer: str
    change: WeightChange
    growth: float
    predicted: float
    state: str
    predicted_state: str

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "Suggestion":
        """Returns the suggestion that `dataclasses.asdict` made a dict of.

        Raises:
            TypeError: If fields are missing, unknown or of another type.
        """
        if not isinstance(record, Mapping) or not isinstance(record.get("change"), Mapping):
            raise TypeError(f"a suggestion is a dict with a change, not {record!r}")
        change = WeightChange(**record["change"])
        found = cls(**{**record, "change": WeightChange(tuple(change.weights), change.amount, tuple(change.entries))})
        numbers = (found.growth, found.predicted, change.amount, *change.entries)
        words = (found.layer, found.state, found.predicted_state, *change.weights)
        if not all(isinstance(n, (int, float)) for n in numbers) or not all(isinstance(w, str) for w in words):
            raise TypeError(f"a suggestion of numbers and text was expected, not {record}")
        return found

    def __str__(self) -> str:
        names, amount = " and ".join(f"`{name}`" for name in self.change.names), self.change.amount
        if self.change.entries:
            first, end = self.change.entries
            what = f"add {amount:.4g} to the entries {first} to {end - 1} of {names}, the gates that keep the state,"
        else:
            what = f"multiply {names} by {amount:.4g}"
        states = self.state if self.state == self.predicted_state else f"{self.state} -> {self.predicted_state}"
        return (
            f"{what} in layer `{self.layer}`: growth {self.growth:+.3g} -> {self.predicted:+.3g} nats per step, "
            f"{states}, as tried on this probe"
        )

    def apply(self, model: Any) -> None:
        """Changes the weights of a model.

        Args:
            model: Keras model, the one that was measured or one with the same layers.

        Raises:
            ValueError: If it does not have these weights, once each and trained.
        """
        found = self.change.weights_in(model.trainable_variables)
        if len(found) != len(self.change.weights):
            names = ", ".join(f"`{path}`" for path in self.change.weights)
            raise invalid_argument("model", f"a model with the weights {names}, once each and trained", model.name)
        values = [self.change.applied(np.asarray(variable)) for variable in found]
        for variable, value in zip(found, values, strict=True):
            variable.assign(value)
