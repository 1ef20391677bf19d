"""A Jacobian put together from operators for some of its blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf


@dataclass(frozen=True)
class BlockPart:
    """Some blocks of a Jacobian.

    Attributes:
        operator: Their Jacobian, with its rows and columns in the order of `news` and `sources`; one with `take`.
        news: Which new states, by their place in the whole.
        sources: Which sources, by their place in the whole.
    """

    operator: Any
    news: tuple[int, ...]
    sources: tuple[int, ...]


class BlockJacobian(tf.linalg.LinearOperator):
    """The sum of parts that have no block in common; blocks in no part are zero.

    Args:
        parts: At least one.
        new_sizes: PointBatch of each new state.
        source_sizes: Columns of each source.
    """

    def __init__(self, parts: Sequence[BlockPart], new_sizes: Sequence[int], source_sizes: Sequence[int]) -> None:
        parameters = {"parts": parts, "new_sizes": new_sizes, "source_sizes": source_sizes}
        super().__init__(dtype=parts[0].operator.dtype, parameters=parameters, name="block_jacobian")
        self._parts = list(parts)
        self._new_sizes, self._source_sizes = list(new_sizes), list(source_sizes)

    def _shape(self) -> tf.TensorShape:
        rows = self._parts[0].operator.batch_shape
        return tf.TensorShape([*rows, sum(self._new_sizes), sum(self._source_sizes)])

    def _shape_tensor(self) -> tf.Tensor:
        rows = self._parts[0].operator.batch_shape_tensor()
        return tf.concat([rows, [sum(self._new_sizes), sum(self._source_sizes)]], axis=0)

    def _matmul(self, x: tf.Tensor, adjoint: bool = False, adjoint_arg: bool = False) -> tf.Tensor:  # noqa: FBT001, FBT002 - as in the base class
        x = tf.linalg.adjoint(x) if adjoint_arg else x
        domain, image = (self._new_sizes, self._source_sizes)[:: 1 if adjoint else -1]
        pieces = tf.split(x, domain, axis=-2)
        sums: list[list[tf.Tensor]] = [[] for _ in image]
        for part in self._parts:
            given, made = (part.news, part.sources)[:: 1 if adjoint else -1]
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

    def take(self, rows: tf.Tensor | slice) -> "BlockJacobian | None":
        """The operator of the rows with these indices `(k,)`, or of a slice; None if those of a part are dependent."""
        parts = []
        for part in self._parts:
            operator = part.operator.take(rows)
            if operator is None:
                return None
            parts.append(BlockPart(operator, part.news, part.sources))
        return BlockJacobian(parts, self._new_sizes, self._source_sizes)

    def blocks(self) -> list[Any]:
        """Operators without a block in common that make up the whole."""
        return [part.operator for part in self._parts]
