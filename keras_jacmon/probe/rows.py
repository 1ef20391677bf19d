"""Tensors `(time, batch, ...)` as rows, and their sizes."""

import tensorflow as tf


def as_rows(tensor: tf.Tensor) -> tf.Tensor:
    """(time, batch, ...) -> (time * batch, ...)."""
    time, batch, *rest = known_sizes(tensor)
    return tf.reshape(tensor, [time * batch, *rest])


def known_sizes(tensor: tf.Tensor) -> list[int | tf.Tensor]:
    """The size of each axis: a number where it is known before the graph runs."""
    return [tf.shape(tensor)[axis] if size is None else size for axis, size in enumerate(tensor.shape)]
