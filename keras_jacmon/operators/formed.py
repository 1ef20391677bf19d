"""Jacobians that are matrices already, and any other linear operator under the contract."""

from typing import final

import tensorflow as tf

from keras_jacmon.operators.contract import JacobianOperator
from keras_jacmon.tensors import Points


@final
class FormedJacobian(JacobianOperator):
    """The matrices themselves.

    Args:
        matrices: Tensor `(points, m, n)`.
    """

    def __init__(self, matrices: tf.Tensor) -> None:
        super().__init__(dtype=matrices.dtype, parameters={"matrices": matrices}, name="formed_jacobian")
        self._matrices = matrices

    def _shape(self) -> tf.TensorShape:
        return self._matrices.shape

    def _shape_tensor(self) -> tf.Tensor:
        return tf.shape(self._matrices)

    def _matmul(self, x: tf.Tensor, adjoint: bool = False, adjoint_arg: bool = False) -> tf.Tensor:  # noqa: FBT001, FBT002 - as in the base class
        return tf.matmul(self._matrices, x, adjoint_a=adjoint, adjoint_b=adjoint_arg)

    def _to_dense(self) -> tf.Tensor:
        return self._matrices

    def take(self, points: Points) -> "FormedJacobian":
        """The matrices of some of the points."""
        return FormedJacobian(points.of(self._matrices))


@final
class WrappedJacobian(JacobianOperator):
    """Any linear operator, used by its products alone.

    Args:
        operator: `tf.linalg.LinearOperator` with batch shape `(points,)`.
    """

    def __init__(self, operator: tf.linalg.LinearOperator) -> None:
        super().__init__(dtype=operator.dtype, parameters={"operator": operator}, name="wrapped_jacobian")
        self._operator = operator

    def _shape(self) -> tf.TensorShape:
        return self._operator.shape

    def _shape_tensor(self) -> tf.Tensor:
        return self._operator.shape_tensor()

    def _matmul(self, x: tf.Tensor, adjoint: bool = False, adjoint_arg: bool = False) -> tf.Tensor:  # noqa: FBT001, FBT002 - as in the base class
        return self._operator.matmul(x, adjoint=adjoint, adjoint_arg=adjoint_arg)

    def _matvec(self, x: tf.Tensor, adjoint: bool = False) -> tf.Tensor:  # noqa: FBT001, FBT002 - as in the base class
        return self._operator.matvec(x, adjoint=adjoint)

    def take(self, points: Points) -> None:
        """None: an operator works as a whole."""


def as_jacobian_operator(operator: tf.linalg.LinearOperator) -> JacobianOperator:
    """Returns any linear operator of batch shape `(points,)` under the contract."""
    if isinstance(operator, JacobianOperator):
        return operator
    if isinstance(operator, tf.linalg.LinearOperatorFullMatrix):
        return FormedJacobian(operator.to_dense())
    return WrappedJacobian(operator)
