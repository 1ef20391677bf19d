"""The weights that a stabilization may change, and the best values that it has found for them."""

from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np

from keras_jacmon.model.guard import assign_all
from keras_jacmon.model.layers import RecurrentLayer
from keras_jacmon.stabilization.goals import Standing


def changeable_weights(model: keras.Layer, layers: Iterable[RecurrentLayer]) -> dict[str, list[keras.Variable]]:
    """Returns the weights of the layers that are trained, by name of the layer; a frozen layer has an empty list.

    Args:
        model: Keras model.
        layers: Iterable of its recurrent layers.
    """
    trained = {id(variable) for variable in model.trainable_variables}
    return {item.name: [v for v in item.layer.trainable_variables if id(v) in trained] for item in layers}


def are_finite(weights: Iterable[keras.Variable]) -> bool:
    """Returns True if the weights have neither NaN nor Inf, which no update mends."""
    return all(np.isfinite(keras.ops.convert_to_numpy(weight)).all() for weight in weights)


class BestWeights:
    """Keeps the best weights of a model, and puts them back.

    A standing is better than another one if it is within the tolerance and the other is not; of two that are both
    within or both not, the one with the smaller loss. None is better than the first one if its loss is larger.

    Args:
        weights: Sequence of variables.
        standing: `Standing` of their present values.

    Attributes:
        standing: The best `Standing` so far.
    """

    def __init__(self, weights: Sequence[keras.Variable], standing: Standing) -> None:
        self._weights = weights
        self._first = standing.loss
        self._values = self._present()
        self.standing = standing

    def offer(self, standing: Standing) -> None:
        """Keeps the present weights if they stand better."""
        if standing.loss <= self._first and self._rank(standing) < self._rank(self.standing):
            values = self._present()
            self._values, self.standing = values, standing

    def put_back(self) -> None:
        """Gives the weights their best values."""
        assign_all(self._weights, self._values)

    @staticmethod
    def _rank(standing: Standing) -> tuple[bool, float]:
        return not standing.is_within, standing.loss

    def _present(self) -> list[Any]:
        return [keras.ops.convert_to_numpy(weight) for weight in self._weights]
