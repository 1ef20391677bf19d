"""Derivatives of gradients that TensorFlow has none for, since a penalty on Jacobians needs them."""

import contextlib
import functools
from typing import Any

import tensorflow as tf


@functools.cache
def register_second_derivatives() -> None:
    """Registers the derivatives that TensorFlow lacks, unless somebody else has; an operation that has one keeps it.

    TensorFlow knows one registry for a process. What it held before stays as it is.
    """
    # That one is there already.
    with contextlib.suppress(KeyError):
        tf.RegisterGradient("SoftsignGrad")(_softsign_grad)


def _softsign_grad(operation: Any, upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The derivatives by g and x of `g / (1 + |x|)²`, which is TensorFlow's gradient of `softsign`."""
    g, x = operation.inputs
    base = 1 + tf.abs(x)
    return upstream / base**2, -2 * upstream * g * tf.sign(x) / base**3
