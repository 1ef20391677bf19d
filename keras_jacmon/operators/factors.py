"""Factors of a structured Jacobian: diagonals, kernels and permutations."""

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from keras_jacmon.graphs.trace import graph_of
from keras_jacmon.structure.index_map import IndexMap
from keras_jacmon.tensors import ChosenPoints, Points, joined, known_sizes, take, take_each, total


@dataclass(frozen=True)
class Diagonal:
    """An elementwise way from a base (a source or a product) to a target (a new state or the operand of a product).

    Attributes:
        link: `IndexMap` from the units of the base to the units of the target.
        pieces: Pairs of units of the base and their derivatives `(points, units)`, each unit in one pair; None if all
            derivatives are one.
    """

    link: IndexMap
    pieces: tuple[tuple[npt.NDArray[np.int64], tf.Tensor], ...] | None

    @functools.cached_property
    def values(self) -> tf.Tensor | None:
        """The derivatives, `(points, units of the base)`; None if all are one."""
        if self.pieces is None:
            return None
        units = np.concatenate([known for known, _ in self.pieces])
        parts = [derivatives for _, derivatives in self.pieces]
        with graph_of(parts[0]):
            return take(joined(parts), np.argsort(units))

    def at(self, units: npt.NDArray[np.int64]) -> tf.Tensor | None:
        """The derivatives of some units of the base, zero where the index is -1; None if all are one."""
        for known, derivatives in self.pieces or ():
            if np.array_equal(known, units):
                return derivatives
        return None if self.values is None else take(self.values, units)

    def take(self, points: Points) -> "Diagonal":
        """The diagonal at some of the points."""
        if self.pieces is None:
            return self
        if isinstance(points, ChosenPoints):
            # Few, as a rule: what they have is put together, and not what all points have.
            values = Diagonal(self.link, tuple((units, points.of(part)) for units, part in self.pieces)).values
        else:
            values = points.of(self.values)
        # Of all units together, as products with vectors need them.
        return Diagonal(self.link, ((np.arange(self.link.node_size), values),))

    def forward(self, tangent: tf.Tensor) -> tf.Tensor:
        """The change of the target for a change of the base, both `(points, ..., units)`."""
        known = [units.tolist() for units, _ in self.pieces or ()]
        if len(known) > 1 and tangent.shape[0] == 1 and all(slot.tolist() in known for slot in self.link.slots):
            # Shared by all points, it is smaller than the derivatives, which need not be put together.
            ways = zip(map(self.at, self.link.slots), take_each(tangent, self.link.slots), strict=True)
            return total([_beside(derivatives, part) * part for derivatives, part in ways])
        scaled = tangent if self.values is None else _beside(self.values, tangent) * tangent
        return total(take_each(scaled, self.link.slots))

    def row_sums(self, dtype: tf.DType) -> tf.Tensor:
        """The sums of its rows, `(points, units of the target)`, or `(1, ...)` if all derivatives are one."""
        values = tf.ones([1, self.link.node_size], dtype) if self.values is None else self.values
        return total(take_each(values, self.link.slots))

    def backward(self, cotangent: tf.Tensor) -> tf.Tensor:
        """The transpose of `forward`."""
        pulled = take(cotangent, self.link.targets)
        return pulled if self.values is None else _beside(self.values, cotangent) * pulled


@dataclass(frozen=True)
class SplitDiagonal:
    """A way on which a unit of the base reaches several units of the target, or that leads from or to complex numbers.

    Attributes:
        parts: Tuple of diagonals between the same base and target, whose sum is the way. The real and the imaginary
            part of a complex number are two units beside each other.
    """

    parts: tuple[Diagonal, ...]

    def take(self, points: Points) -> "SplitDiagonal":
        """The way at some of the points."""
        return SplitDiagonal(tuple(part.take(points) for part in self.parts))

    def forward(self, tangent: tf.Tensor) -> tf.Tensor:
        """The change of the target for a change of the base, both `(points, ..., units)`."""
        return total([part.forward(tangent) for part in self.parts])

    def backward(self, cotangent: tf.Tensor) -> tf.Tensor:
        """The transpose of `forward`."""
        return total([part.backward(cotangent) for part in self.parts])


def _beside(values: tf.Tensor, vectors: tf.Tensor) -> tf.Tensor:
    """Values `(points, units)` shaped to go with vectors `(points, ..., units)`."""
    return values if vectors.shape.rank == values.shape.rank else tf.expand_dims(values, axis=1)


class Kernel:
    """A kernel of products `y @ matrix`.

    Args:
        matrix: Tensor `(units in, units out)`.
    """

    def __init__(self, matrix: tf.Tensor) -> None:
        self.matrix = matrix
        self._columns: dict[bytes, tf.Tensor] = {}

    @functools.cached_property
    def transposed(self) -> tf.Tensor:
        """`(units out, units in)`, made once in the graph of the matrix.

        `tf.matmul(..., transpose_b=True)` transposes each time that it is run, which takes longer than the product for
        some tens of points.
        """
        with graph_of(self.matrix):
            return tf.transpose(self.matrix)

    def forward(self, vectors: tf.Tensor) -> tf.Tensor:
        """Vectors `(points, ..., units in)` times the matrix, `(points, ..., units out)`."""
        return _times(vectors, self.matrix)

    def backward(self, vectors: tf.Tensor) -> tf.Tensor:
        """The transpose of `forward`."""
        if not tf.executing_eagerly() and vectors.graph is self.matrix.graph:
            # Not in a loop, it is run once, as a rule for a few points, which are transposed sooner than the matrix.
            *leading, units = known_sizes(vectors)
            product = tf.matmul(self.matrix, tf.reshape(vectors, [-1, units]), transpose_b=True)
            return tf.reshape(tf.transpose(product), [*leading, self.matrix.shape[0]])
        return _times(vectors, self.transposed)

    def take(self, points: Points) -> "Kernel":  # noqa: ARG002 - as `Order.take`
        """The kernel at some of the points, where it is the same."""
        return self

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


@dataclass(frozen=True)
class Order:
    """A permutation of the units at each point, in place of a kernel.

    Attributes:
        places: Integer tensor `(points, units)`, the place from which each unit is taken.
    """

    places: tf.Tensor

    def forward(self, vectors: tf.Tensor) -> tf.Tensor:
        """Vectors `(points, ..., units)` in this order."""
        return self._taken(vectors, self.places)

    def backward(self, vectors: tf.Tensor) -> tf.Tensor:
        """The transpose of `forward`, which is its inverse."""
        return self._taken(vectors, tf.argsort(self.places, axis=-1))

    def take(self, points: Points) -> "Order":
        """The order at some of the points."""
        return Order(points.of(self.places))

    @staticmethod
    def _taken(vectors: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
        if vectors.shape[0] == 1:
            # The same vectors for all points.
            vectors = tf.repeat(vectors, tf.shape(places)[0], axis=0)
        return tf.gather(vectors, places, axis=-1, batch_dims=1)


def _times(vectors: tf.Tensor, matrix: tf.Tensor) -> tf.Tensor:
    """Products of vectors `(points, ..., units)` with a matrix, as one product of two matrices."""
    *leading, units = vectors.shape
    if len(leading) == 1:
        return vectors @ matrix
    flat = tf.reshape(vectors, [-1, units]) @ matrix
    return tf.reshape(flat, [*known_sizes(vectors)[:-1], flat.shape[-1]])
