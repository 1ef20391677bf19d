"""Jacobians put together from operators for some of their blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import tensorflow as tf

from keras_jacmon.operators.contract import JacobianOperator
from keras_jacmon.tensors import Points


@dataclass(frozen=True)
class BlockPart:
    """Some blocks of a Jacobian.

    Attributes:
        operator: Their Jacobian, with its rows and columns in the order of `outputs` and `sources`.
        outputs: Places of the new states in the whole.
        sources: Places of the sources in the whole.
    """

    operator: JacobianOperator
    outputs: tuple[int, ...]
    sources: tuple[int, ...]


@final
class BlockJacobian(JacobianOperator):
    """The sum of parts that have no block in common; blocks in no part are zero.

    Args:
        parts: Sequence of `BlockPart`, at least one.
        output_sizes: Integers, size of each new state.
        source_sizes: Integers, size of each source.
    """

    def __init__(self, parts: Sequence[BlockPart], output_sizes: Sequence[int], source_sizes: Sequence[int]) -> None:
        parameters = {"parts": parts, "output_sizes": output_sizes, "source_sizes": source_sizes}
        super().__init__(dtype=parts[0].operator.dtype, parameters=parameters, name="block_jacobian")
        self._parts = list(parts)
        self._output_sizes, self._source_sizes = list(output_sizes), list(source_sizes)

    def _shape(self) -> tf.TensorShape:
        points = self._parts[0].operator.batch_shape
        return tf.TensorShape([*points, sum(self._output_sizes), sum(self._source_sizes)])

    def _shape_tensor(self) -> tf.Tensor:
        points = self._parts[0].operator.batch_shape_tensor()
        return tf.concat([points, [sum(self._output_sizes), sum(self._source_sizes)]], axis=0)

    def _matmul(self, x: tf.Tensor, adjoint: bool = False, adjoint_arg: bool = False) -> tf.Tensor:  # noqa: FBT001, FBT002 - as in the base class
        x = tf.linalg.adjoint(x) if adjoint_arg else x
        domain, image = (self._output_sizes, self._source_sizes)[:: 1 if adjoint else -1]
        pieces = tf.split(x, domain, axis=-2)
        sums: list[list[tf.Tensor]] = [[] for _ in image]
        for part in self._parts:
            given, made = (part.outputs, part.sources)[:: 1 if adjoint else -1]
            product = part.operator.matmul(tf.concat([pieces[k] for k in given], axis=-2), adjoint=adjoint)
            for k, piece in zip(made, tf.split(product, [image[k] for k in made], axis=-2), strict=True):
                sums[k].append(piece)
        zero = tf.zeros_like(x[..., :1, :])
        return tf.concat(
            [
                tf.add_n(found) if found else tf.repeat(zero, size, axis=-2)
                for found, size in zip(sums, image, strict=True)
            ],
            axis=-2,
        )

    def take(self, points: Points) -> "BlockJacobian | None":
        """The operator of some of the points; None if a part has none."""
        parts = []
        for part in self._parts:
            operator = part.operator.take(points)
            if operator is None:
                return None
            parts.append(BlockPart(operator, part.outputs, part.sources))
        return BlockJacobian(parts, self._output_sizes, self._source_sizes)

    def blocks(self) -> list[JacobianOperator]:
        """The operators of the parts."""
        return [part.operator for part in self._parts]
