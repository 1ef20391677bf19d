"""A matrix that all rows share."""

import contextlib
import functools
from typing import Any

import tensorflow as tf


class Kernel:
    """A kernel of products `y @ matrix`.

    Args:
        matrix: `(units in, units out)`.
    """

    def __init__(self, matrix: tf.Tensor) -> None:
        self.matrix = matrix

    @functools.cached_property
    def transposed(self) -> tf.Tensor:
        """`(units out, units in)`, made once where the matrix stands.

        `tf.matmul(..., transpose_b=True)` transposes each time that it is run, which takes longer than the product of
        some tens of rows.
        """
        with graph_of(self.matrix):
            return tf.transpose(self.matrix)

    def scaled(self, gain: float) -> "Kernel":
        """The kernel times a number."""
        return Kernel(gain * self.matrix)


def graph_of(kernel: tf.Tensor) -> contextlib.AbstractContextManager[Any]:
    """The graph that a kernel stands in: what is made of kernels alone is made once, and not for each chunk of rows."""
    return contextlib.nullcontext() if tf.executing_eagerly() else kernel.graph.as_default()
