"""What a measure is given beside the operator, and what it gives back."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import tensorflow as tf

# The parts of a step's Jacobian that are measured, see `state_jacobian`.
VIEWS = ("hidden", "joint", "inputs")

# A graph may not know how many rows it will get; then a large probe is assumed.
UNKNOWN_ROWS = 2**16


class Measured(NamedTuple):
    """A measure of each row.

    `value` is `(rows,)`; `uncertainty`, in the same unit, is the standard error of an estimate or the bound of an
    iteration, and None for a value that is exact up to rounding.
    """

    value: tf.Tensor
    uncertainty: tf.Tensor | None


@dataclass(frozen=True, eq=False)
class Memory:
    """What an iterative measure may start from: the vectors of the last time, zero the first time.

    Attributes:
        vectors: Those of all rows, `(places, n)`.
        places: Where those of the rows at hand are, `(rows,)`.
    """

    vectors: tf.Variable
    places: tf.Tensor

    def recall(self) -> tf.Tensor:
        """The vectors of the rows at hand, `(rows, n)`."""
        return tf.gather(self.vectors, self.places)

    def keep(self, vectors: tf.Tensor) -> None:
        """Puts others in their place; zero for one that is not finite, so that the next time starts anew."""
        finite = tf.reduce_all(tf.math.is_finite(vectors), axis=-1, keepdims=True)
        vectors = tf.where(finite, vectors, tf.zeros_like(vectors))
        self.vectors.scatter_nd_update(self.places[:, None], vectors)

    def take(self, rows: tf.Tensor) -> "Memory":
        """The memory of some of the rows at hand."""
        return Memory(self.vectors, tf.gather(self.places, rows))


@dataclass(frozen=True, eq=False)
class Options:
    """What the measures may cost, and how exact they must be.

    Attributes:
        seed: For random vectors.
        tolerance: Relative, of iterative measures.
        max_entries: Up to so many entries of J, over all rows, its moments are exact.
        max_rows: Expensive measures are taken at so many rows at most; None for all.
        spectra: Whole spectra are taken at so many rows at most.
        flow_vectors: Random vectors for each sample, for the flow.
        exact_flow: Whether the flow is the spectral norm of the products, and no estimate from random vectors.
        exponents: So many Lyapunov exponents, at most.
        warmup: Steps that do not count for them; None for a tenth of the sequence.
        qr_every: Steps between two QRs.
        rows: All the rows there are, if the operator holds some of them.
        stream: Tells the random numbers of one chunk of rows from those of another.
        dtype: Of the results.
        vectors: The most (row, vector) pairs that are multiplied at once.
        memory: What the measure may start from, if anything.
    """

    seed: int = 0
    tolerance: float = 1e-2
    max_entries: int = 2**26
    max_rows: int | None = None
    spectra: int = 16
    flow_vectors: int = 3
    exact_flow: bool = False
    exponents: int = 8
    warmup: int | None = None
    qr_every: int = 1
    rows: int | None = None
    stream: tf.Tensor | int = 0
    dtype: tf.DType = tf.float32
    vectors: int = 2**14
    memory: Memory | None = None

    def exact(self, operator: tf.linalg.LinearOperator) -> bool:
        """Whether the entries of all Jacobians together are few enough to be looked at one by one."""
        rows = self.rows or operator.shape[0] or UNKNOWN_ROWS
        return int(rows * operator.shape[-2] * operator.shape[-1]) <= self.max_entries

    def for_part(self, index: int, samples: int, of: int) -> "Options":
        """Those of a part of a probe, so many of its samples: what is taken of all of it is shared out."""

        def share(number: int) -> int:
            return max(1, number * samples // of)

        # As exact as the whole would be: entries and rows are in proportion to the samples.
        return dataclasses.replace(
            self,
            seed=self.seed + index,
            max_entries=self.max_entries * samples // of,
            max_rows=None if self.max_rows is None else share(self.max_rows),
            spectra=share(self.spectra),
        )

    def seeds(self, purpose: int, draw: tf.Tensor | int = 0) -> tf.Tensor:
        """The seed of a stateless draw: a stream of its own for each purpose, chunk of rows and draw."""
        seed = tf.random.experimental.stateless_fold_in([self.seed, purpose], self.stream)
        return tf.random.experimental.stateless_fold_in(seed, draw)
