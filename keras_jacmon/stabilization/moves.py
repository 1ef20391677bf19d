"""The variables of an optimizer that change weights: copies of the weights, or moves relative to their size."""

from collections.abc import Sequence
from typing import Protocol

import keras
import tensorflow as tf

# The least scale of the entries of a kernel: one of zeros can move too.
_LEAST_SCALE = 1e-3


class Moves(Protocol):
    """The variables of an optimizer, and the weights that follow them.

    Attributes:
        variables: List of variables.
    """

    variables: list[keras.Variable]

    def gradients(self, by_weights: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the derivatives by the variables, from those by the weights."""

    def follow(self) -> None:
        """Gives the weights the values that the variables stand for."""


class Copies:
    """Copies of weights: the optimizer changes the weights as it does in a training.

    Weights may be mirrored or of half precision. A copy is neither.

    Args:
        weights: Sequence of variables.

    Attributes:
        variables: List of the copies.
    """

    def __init__(self, weights: Sequence[keras.Variable]) -> None:
        self._weights = weights
        self.variables = list(map(_copy_of, weights))

    def gradients(self, by_weights: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the derivatives by the variables, from those by the weights."""
        return [tf.cast(slope, copy.dtype) for slope, copy in zip(by_weights, self.variables, strict=True)]

    def follow(self) -> None:
        """Gives the weights the values of the copies."""
        for weight, copy in zip(self._weights, self.variables, strict=True):
            weight.assign(copy)


class RelativeMoves:
    """A gain and shifts of each weight, `weight <- exp(gain) weight + scale shifts`, after each update zero again.

    The gain moves all eigenvalues at once, where the derivative of a radius by single entries moves the leading one
    and leaves the others where they are. The scale of a kernel is the root mean square of its entries, so that an
    update of the same size is the same relative change for each layer (Adafactor); the scale of a bias is 1.

    Args:
        weights: Sequence of variables.

    Attributes:
        variables: List of the gains and the shifts.

    References:
        N. Shazeer, M. Stern, "Adafactor: adaptive learning rates with sublinear memory cost", 2018.
    """

    def __init__(self, weights: Sequence[keras.Variable]) -> None:
        self._weights = weights
        self._copies = list(map(_copy_of, weights))
        self._gains = [keras.Variable(0.0, dtype=copy.dtype) for copy in self._copies]
        self._shifts = [keras.Variable(tf.zeros(copy.shape), dtype=copy.dtype) for copy in self._copies]
        self.variables = [*self._gains, *self._shifts]

    def gradients(self, by_weights: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the derivatives by the variables, from those by the weights."""
        pairs = [(tf.cast(slope, copy.dtype), copy) for slope, copy in zip(by_weights, self._copies, strict=True)]
        by_gains = [tf.reduce_sum(slope * copy) for slope, copy in pairs]
        return [*by_gains, *(slope * _scale(copy) for slope, copy in pairs)]

    def follow(self) -> None:
        """Moves the weights by what the optimizer made of zero."""
        for weight, copy, gain, shifts in zip(self._weights, self._copies, self._gains, self._shifts, strict=True):
            moved = tf.exp(gain) * copy + _scale(copy) * shifts
            copy.assign(moved if weight.constraint is None else weight.constraint(moved))
            weight.assign(copy)
            for variable in (gain, shifts):
                variable.assign(tf.zeros(variable.shape, variable.dtype))


def _scale(weight: keras.Variable) -> tf.Tensor:
    """The scale of the entries of a weight."""
    values = tf.convert_to_tensor(weight)
    if values.shape.rank <= 1:
        return tf.ones([], values.dtype)
    return tf.maximum(tf.sqrt(tf.reduce_mean(values**2)), _LEAST_SCALE)


def _copy_of(weight: keras.Variable) -> keras.Variable:
    dtype = "float64" if weight.dtype == "float64" else "float32"
    copy = keras.Variable(keras.ops.convert_to_numpy(weight), dtype=dtype)
    copy.constraint = weight.constraint
    return copy
