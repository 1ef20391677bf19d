"""The contract of a Jacobian as a linear operator: the methods that every measure may call."""

import abc

import tensorflow as tf

from keras_jacmon.tensors import Points, swapped


class JacobianOperator(tf.linalg.LinearOperator):
    """`J[b, i, k] = d new[b, i] / d old[b, k]` at each point b, batch shape `(points,)`.

    Subclasses are final. They implement the products (`_matmul`, `_shape`, `_shape_tensor`) of
    `tf.linalg.LinearOperator` and `take`, and override what they know in a better way.
    """

    @abc.abstractmethod
    def take(self, points: Points) -> "JacobianOperator | None":
        """The operator of some of the points; None if points depend on each other, or cannot be told apart.

        Args:
            points: The points, by their indices or as a range.
        """

    def products(self, vectors: tf.Tensor, *, adjoint: bool = False) -> tf.Tensor:
        """The products with several vectors at each point, which are rows: `(points, k, n)` to `(points, k, m)`.

        Args:
            vectors: Tensor `(points, k, n)`; `(points, k, m)` for products with Jᵀ.
            adjoint: Boolean, True to multiply with Jᵀ. Defaults to False.
        """
        return tf.linalg.matrix_transpose(self.matmul(tf.linalg.matrix_transpose(vectors), adjoint=adjoint))

    def columns(self, vectors: tf.Tensor, *, adjoint: bool = False) -> tf.Tensor:
        """The products with several vectors at each point, with the axis of the vectors in front.

        Args:
            vectors: Tensor `(k, points, n)`; `(k, points, m)` for products with Jᵀ.
            adjoint: Boolean, True to multiply with Jᵀ. Defaults to False.

        Returns:
            Tensor `(k, points, m)`; `(k, points, n)` for products with Jᵀ.
        """
        return swapped(self.products(swapped(vectors), adjoint=adjoint))

    def entry_sum(self) -> tf.Tensor:
        """The sum of all entries, `(points,)`: by default from one product with Jᵀ."""
        ones = tf.ones([self.batch_shape_tensor()[0], int(self.shape[-2])], self.dtype)
        return tf.reduce_sum(self.matvec(ones, adjoint=True), axis=-1)

    @property
    def has_closed_form(self) -> bool:
        """True if `spread` forms no matrix."""
        return False

    def spread(self) -> tf.Tensor:
        """The sum of the squared distances of all entries from their mean, `(points,)`.

        Centred before squaring, since the difference of sums would cancel for entries that are nearly equal.
        """
        dense = self.to_dense()
        return tf.reduce_sum((dense - tf.reduce_mean(dense, axis=[1, 2], keepdims=True)) ** 2, axis=[1, 2])

    def blocks(self) -> list["JacobianOperator"]:
        """Operators without an entry in common that make up the whole."""
        return [self]

    def block(self, output: int, old: int) -> "JacobianOperator | None":
        """The derivative of one new state by one old state, by their positions; None if there is no structure."""
