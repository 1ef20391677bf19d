"""The Jacobians of a sequence, one step of all samples at a time."""

from collections.abc import Callable
from dataclasses import dataclass

import tensorflow as tf

from keras_jacmon.operators.formed import as_jacobian_operator
from keras_jacmon.tensors import with_shape


@dataclass(frozen=True)
class Steps:
    """The steps of a sequence with their Jacobians, for the measures of products over time.

    Attributes:
        time: Number of steps, a scalar.
        at: From the index of a step, a scalar, in the order in which the cell runs, to the operator of all samples at
            that step, batch shape `(samples,)`.
        mask: `(time, samples)`, False where a step is skipped, so that its Jacobian is the identity; None for no mask.
        samples: Number of samples, a scalar.
        size: Units n of the square Jacobians.
        dtype: Type of the operators.
        every: Makes the operator of all points, all samples of the first step first, which derivatives need; None where
            there are none. Defaults to None.
    """

    time: int | tf.Tensor
    at: Callable[[tf.Tensor], tf.linalg.LinearOperator]
    mask: tf.Tensor | None
    samples: int | tf.Tensor
    size: int
    dtype: tf.DType
    every: Callable[[], tf.linalg.LinearOperator] | None = None

    def multiply(self, t: tf.Tensor, vectors: tf.Tensor, *, adjoint: bool = False) -> tf.Tensor:
        """Products of the Jacobians of a step with vectors `(samples, vectors, n)`; a skipped step changes nothing.

        Args:
            t: Index of the step.
            vectors: Tensor `(samples, vectors, n)`. The vectors of a sample are rows.
            adjoint: True to multiply with Jᵀ. Defaults to False.
        """
        products = as_jacobian_operator(self.at(t)).products(vectors, adjoint=adjoint)
        images = with_shape(products, vectors.shape)
        return images if self.mask is None else tf.where(self.mask[t][:, None, None], images, vectors)

    def valid(self, t: tf.Tensor) -> tf.Tensor:
        """Boolean `(samples,)`, True for the samples that take the step and do not skip it."""
        return tf.ones([self.samples], tf.bool) if self.mask is None else self.mask[t]
