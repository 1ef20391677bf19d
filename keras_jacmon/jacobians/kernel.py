"""A matrix that all rows share."""

import functools

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from keras_jacmon.jacobians.diagonal import take
from keras_jacmon.probe.graph import graph_of


class Kernel:
    """A kernel of products `y @ matrix`.

    Args:
        matrix: `(units in, units out)`.
    """

    def __init__(self, matrix: tf.Tensor) -> None:
        self.matrix = matrix
        self._columns: dict[bytes, tf.Tensor] = {}

    @functools.cached_property
    def transposed(self) -> tf.Tensor:
        """`(units out, units in)`, made once where the matrix stands.

        `tf.matmul(..., transpose_b=True)` transposes each time that it is run, which takes longer than the product of
        some tens of rows.
        """
        with graph_of(self.matrix):
            return tf.transpose(self.matrix)

    def rows(self, units: npt.NDArray[np.int64]) -> "Kernel":
        """The kernel with some of its rows, zero where the index is -1; itself if these are all."""
        if np.array_equal(units, np.arange(self.matrix.shape[0])):
            return self
        with graph_of(self.matrix):
            return Kernel(take(self.matrix, units, axis=0))

    def columns(self, units: npt.NDArray[np.int64]) -> tf.Tensor:
        """Some columns of the matrix, zero where the index is -1; the same tensor each time."""
        key = units.tobytes()
        if key not in self._columns:
            with graph_of(self.matrix):
                self._columns[key] = take(self.matrix, units)
        return self._columns[key]

    def scaled(self, gain: float) -> "Kernel":
        """The kernel times a number."""
        return Kernel(gain * self.matrix)
