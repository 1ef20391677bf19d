"""The contract of a measure: the context that it gets with the operator, and the values that it returns."""

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

import tensorflow as tf

from keras_jacmon.options import Options

# A graph may not know how many points it will get; then a large probe is assumed.
UNKNOWN_POINTS = 2**16


class Measured(NamedTuple):
    """A measure of each point.

    `value` is `(points,)`; `uncertainty`, in the same unit, is the standard error of an estimate or the bound of an
    iteration, and None for a value that is exact up to rounding.
    """

    value: tf.Tensor
    uncertainty: tf.Tensor | None


@enum.unique
class Purpose(enum.IntEnum):
    """A use of random numbers; each has a stream of its own. Other integers would change the values of the measures."""

    MOMENTS = 1
    SPECTRAL_NORM = 2
    CHECKS = 3
    SPECTRAL_RADIUS = 4
    FLOW = 5
    EXPONENTS = 6
    EIGENVALUES = 7
    SENSITIVITY = 8


@dataclass(frozen=True, eq=False)
class MeasureContext:
    """The settings of a measure for the points at hand.

    Attributes:
        options: The user's options.
        dtype: Type of the results.
        num_points: Number of all points of the call, of which the operator may hold a part; None if unknown.
        stream: Integer or scalar tensor, the number of a chunk of points; each has random numbers of its own. Defaults
            to 0.
        workspace_vectors: Maximum number of (point, vector) pairs that are multiplied at once.
    """

    options: Options = field(default_factory=Options)
    dtype: tf.DType = tf.float32
    num_points: int | None = None
    stream: tf.Tensor | int = 0
    workspace_vectors: int = 2**14

    @property
    def tolerance(self) -> float:
        """Relative tolerance of iterative measures."""
        return self.options.tolerance

    def exact(self, operator: tf.linalg.LinearOperator) -> bool:
        """True if all Jacobians together have at most `max_entries` entries, few enough to compute each one."""
        points = self.num_points or operator.shape[0] or UNKNOWN_POINTS
        return int(points * operator.shape[-2] * operator.shape[-1]) <= self.options.max_entries

    def seeds(self, purpose: Purpose, draw: tf.Tensor | int = 0) -> tf.Tensor:
        """The seed of a stateless draw: a stream of its own for each purpose, chunk of points and draw."""
        if isinstance(self.stream, int) and isinstance(draw, int):
            # Outside of the graph, which then holds a constant.
            with tf.init_scope():
                return self._seed(purpose, draw)
        return self._seed(purpose, draw)

    def _seed(self, purpose: Purpose, draw: tf.Tensor | int) -> tf.Tensor:
        seed = tf.random.experimental.stateless_fold_in([self.options.seed, purpose], self.stream)
        return tf.random.experimental.stateless_fold_in(seed, draw)
