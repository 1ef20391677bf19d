"""A cell whose registered form tells at which points its Jacobians are taken."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import tensorflow as tf
from helpers import WeightedCell

from keras_jacmon import register_jacobian

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


class WatchedCell(WeightedCell):
    """`h = tanh(x @ W + h @ U)`."""

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        new_h = tf.tanh(self.preactivation(inputs, states[0]))
        return new_h, [new_h]


@contextlib.contextmanager
def watched_points() -> Iterator[list[NDArray[Any]]]:
    """Registers the form, and collects the first feature of all points of each of its evaluations."""
    seen: list[NDArray[Any]] = []

    def form(cell: Any, inputs: Any, states: Any, view: str) -> tf.linalg.LinearOperator | None:
        if view != "hidden":
            return None
        tf.py_function(lambda x: seen.append(x.numpy()[:, 0]), [inputs], [])
        slope = 1.0 - tf.tanh(cell.preactivation(inputs, states[0])) ** 2
        transposed = tf.linalg.matrix_transpose(tf.convert_to_tensor(cell.recurrent_kernel))
        return tf.linalg.LinearOperatorFullMatrix(slope[:, :, None] * transposed)

    register_jacobian(WatchedCell, form)
    try:
        yield seen
    finally:
        register_jacobian(WatchedCell, None)
