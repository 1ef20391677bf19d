"""The spectral norm: the largest singular value of a Jacobian, and its right singular vectors."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_jacmon.measures.context import MeasureContext, Measured, Purpose
from keras_jacmon.measures.singular_values import largest_singular_value
from keras_jacmon.measures.solver_inputs import normalised
from keras_jacmon.operators.contract import JacobianOperator
from keras_jacmon.operators.formed import as_jacobian_operator
from keras_jacmon.tensors import ChosenPoints, take

# Random matrices of 128 x 128 need at most about 25 steps for 1e-2 and 30 for 1e-3. The residual of a
# point that has not converged after this number of steps shows it.
MAX_STEPS = 96

# A small residual says that some singular value is near. With fewer steps it is not the largest one at more than
# one point in a hundred, where the random start vector happens to be almost orthogonal to its singular vector.
LEAST_STEPS = 12

# Up to this number of columns J is formed: that is as cheap as the iteration.
EXACT_SIZE = 32

# The small problem that decides if a point has converged costs as much as some products with J.
STEPS_BETWEEN_CHECKS = 2


def spectral_norms(operators: Sequence[tf.linalg.LinearOperator], context: MeasureContext) -> list[Measured]:
    """The largest singular value at each point of several operators, the worst-case gain of one step. Dimensionless.

    Up to 32 columns from the whole J. Above, by Golub-Kahan-Lanczos bidiagonalisation with one-sided
    reorthogonalisation, of at least 12 steps, until at each point the residual of the leading singular triplet is at
    most half of `tolerance` times its value. All large operators share one iteration.

    Args:
        operators: The Jacobians, each of batch shape `(points,)`; their sizes may differ.
        context: `MeasureContext`; `tolerance` is relative, and the start vector comes from `seed`.

    Returns:
        Of each operator the value `(points,)`. The uncertainty is None if the value is exact up to rounding, otherwise
        the residual norm `(points,)`: some singular value is at most the residual away from the value.
        That it is the largest one is very likely, but no theorem: of 5,000 random matrices and LSTM steps with 64 and
        256 units, in one of two hundred it was another one, at most 5 % below the largest.

    References:
        G. H. Golub, W. Kahan, "Calculating the singular values and pseudo-inverse of a matrix", 1965.
        H. D. Simon, H. Zha, "Low-rank matrix approximation using the Lanczos bidiagonalization process with
        applications", 2000: that to reorthogonalise one side is enough.
    """
    large = [as_jacobian_operator(operator) for operator in operators if not _is_small(operator)]
    iterated = iter(_iterated_norms(_Stack(large), context) if large else [])
    return [
        Measured(largest_singular_value(operator), None) if _is_small(operator) else next(iterated)
        for operator in operators
    ]


def _is_small(operator: tf.linalg.LinearOperator) -> bool:
    return int(operator.shape[-1]) <= EXACT_SIZE


def _iterated_norms(stack: "_Stack", context: MeasureContext) -> list[Measured]:
    value, residual = _lanczos(stack, context, with_vectors=False)
    return list(map(Measured, stack.split(value), stack.split(residual)))


class LeadingSingularVectors(NamedTuple):
    """The largest singular value at each point, with its right singular vector.

    Attributes:
        value: Tensor `(points,)`, the largest singular values.
        residual: Tensor `(points,)`, the residual norms, as the uncertainty of `spectral_norms`.
        vectors: Tensor `(points, n)`, right singular vectors.
    """

    value: tf.Tensor
    residual: tf.Tensor
    vectors: tf.Tensor


def leading_singular_vectors(operator: tf.linalg.LinearOperator, context: MeasureContext) -> LeadingSingularVectors:
    """The largest singular values as `spectral_norms` finds them for large matrices, with right singular vectors.

    Args:
        operator: The Jacobians, batch shape `(points,)`.
        context: As for `spectral_norms`.

    Returns:
        Values, residuals and vectors; vectors of length one, or zero for matrices that are not finite.
    """
    value, residual, vectors = _lanczos(_Stack([as_jacobian_operator(operator)]), context, with_vectors=True)
    finite = tf.reduce_all(tf.math.is_finite(vectors), axis=-1, keepdims=True)
    return LeadingSingularVectors(value, residual, tf.where(finite, vectors, tf.zeros_like(vectors)))


class _Stack:
    """Operators as a single one: the points of all of them, with rows and columns of zeros for the smaller ones.

    Args:
        operators: Sequence of operators.
        counts: Sequence of integers, the number of points of each; None for those that the operators have.
    """

    def __init__(self, operators: Sequence[JacobianOperator], counts: Sequence[tf.Tensor] | None = None) -> None:
        self._operators = operators
        self._counts = counts or [operator.shape[0] or operator.batch_shape_tensor()[0] for operator in operators]
        self.points = sum(self._counts[1:], start=self._counts[0])
        self.rows, self.columns = (max(int(J.shape[axis]) for J in operators) for axis in (-2, -1))
        self.dtype = operators[0].dtype

    def matvec(self, vectors: tf.Tensor, *, adjoint: bool = False) -> tf.Tensor:
        """Products with vectors `(all points, n)`, n columns or rows of the largest operator."""
        images = [
            J.matvec(_resized(part, int(J.shape[-2 if adjoint else -1])), adjoint=adjoint)
            for J, part in zip(self._operators, self.split(vectors), strict=True)
        ]
        return self._joined(images, self.columns if adjoint else self.rows)

    def starts(self, seed: tf.Tensor) -> tf.Tensor:
        """Random vectors `(all points, n)` of length one."""
        normal = [
            tf.random.stateless_normal([count, int(J.shape[-1])], seed, dtype=self.dtype)
            for J, count in zip(self._operators, self._counts, strict=True)
        ]
        return normalised(self._joined(normal, self.columns))[0]

    def take(self, points: tf.Tensor) -> "_Stack | None":
        """The stack of some points, by indices in ascending order; None if the points of an operator stay together."""
        ends = list(itertools.accumulate(self._counts))
        owners = [tf.cast(points >= end, tf.int32) for end in ends[:-1]]
        parts = tf.dynamic_partition(points, tf.add_n(owners), len(ends)) if owners else [points]
        parts = [parts[0], *(part - end for part, end in zip(parts[1:], ends[:-1], strict=True))]
        taken = [J.take(ChosenPoints(part)) for J, part in zip(self._operators, parts, strict=True)]
        return None if None in taken else _Stack([J for J in taken if J], [tf.size(part) for part in parts])

    def split(self, tensor: tf.Tensor) -> list[tf.Tensor]:
        """The parts of a tensor `(all points, ...)` that belong to each operator."""
        return [tensor] if len(self._operators) == 1 else tf.split(tensor, self._counts)

    def _joined(self, parts: list[tf.Tensor], size: int) -> tf.Tensor:
        parts = [_resized(part, size) for part in parts]
        return parts[0] if len(parts) == 1 else tf.concat(parts, axis=0)


def _resized(vectors: tf.Tensor, size: int) -> tf.Tensor:
    """Vectors `(points, n)` with another n: without their last entries, or with zeros after them."""
    n = int(vectors.shape[-1])
    return take(vectors, np.arange(size)) if size <= n else tf.pad(vectors, [[0, 0], [0, size - n]])


def _lanczos(stack: _Stack, context: MeasureContext, *, with_vectors: bool) -> tuple[tf.Tensor, ...]:
    """Values and residuals `(points,)`, and right singular vectors `(points, n)` if they are wanted."""
    squarings = math.ceil(math.log2(1 / max(context.tolerance, 1e-6))) + 4

    def some_steps(steps: tf.Tensor, active: tf.Tensor, progress: "_Progress", found: tuple[tf.Tensor, ...]) -> Any:
        here = stack.take(active)
        progress = _advance(here or stack, progress, steps)
        places = tf.expand_dims(active, axis=1)
        before = [tf.gather_nd(array, places) for array in found]
        # Where an invariant subspace has been found, rounding may blur the residual. NaN compares as better: it stays.
        now = _leading_values(progress, squarings, with_vectors=with_vectors)
        is_worse = now[1] > before[1]
        best = [tf.where(is_worse, old, new) for old, new in zip(before, now, strict=True)]
        found = tuple(tf.tensor_scatter_nd_update(array, places, new) for array, new in zip(found, best, strict=True))
        # Half: what still changes after the whole tolerance is often the second singular value giving way to the first.
        # A NaN compares as finished: such a point never gets better.
        going = tf.squeeze(best[1] > context.tolerance / 2 * best[0], axis=1)
        if here is None:
            going = tf.fill(tf.shape(going), tf.reduce_any(going))
        left = tf.squeeze(tf.where(going), axis=1)
        return steps + STEPS_BETWEEN_CHECKS, tf.gather(active, left), progress.take(left), found

    start = _Progress.start(stack, stack.starts(context.seeds(Purpose.SPECTRAL_NORM)))
    # There is nothing yet: zeros.
    found = (start.beta, start.beta + np.inf, *([tf.zeros_like(start.v)] if with_vectors else []))
    *_, found = tf.while_loop(
        lambda steps, active, *_: (steps <= MAX_STEPS) & (tf.size(active) > 0),
        some_steps,
        (tf.constant(LEAST_STEPS), tf.range(stack.points), start, found),
        shape_invariants=(
            tf.TensorShape([]),
            tf.TensorShape([None]),
            _Progress.shapes(stack),
            tuple(array.shape for array in found),
        ),
    )
    return tf.squeeze(found[0], axis=1), tf.squeeze(found[1], axis=1), *found[2:]


class _Progress(NamedTuple):
    """The state of the bidiagonalisation `J V = U B`.

    Attributes:
        u: Tensor `(points, m)`, the last left vector.
        v: Tensor `(points, n)`, the last right vector.
        beta: Tensor `(points, 1)`, the entry of B that belongs to the next left vector.
        alphas: Tensor `(points, steps)`, the diagonal of B.
        betas: Tensor `(points, steps)`, the entries above the diagonal, after a zero.
        basis: Tensor `(points, steps, n)`, the right vectors before v.
    """

    u: tf.Tensor
    v: tf.Tensor
    beta: tf.Tensor
    alphas: tf.Tensor
    betas: tf.Tensor
    basis: tf.Tensor

    @classmethod
    def start(cls, stack: _Stack, v: tf.Tensor) -> "_Progress":
        u, beta, none, basis = (
            tf.zeros([stack.points, *sizes], v.dtype) for sizes in ([stack.rows], [1], [0], [0, stack.columns])
        )
        return cls(u, v, beta, none, none, basis)

    @staticmethod
    def shapes(stack: _Stack) -> "_Progress":
        m, n = stack.rows, stack.columns
        shapes = ([None, m], [None, n], [None, 1], [None, None], [None, None], [None, None, n])
        return _Progress(*map(tf.TensorShape, shapes))

    def take(self, points: tf.Tensor) -> "_Progress":
        return _Progress(*map(ChosenPoints(points).of, self))


def _advance(stack: _Stack, progress: _Progress, steps: tf.Tensor) -> _Progress:
    """Continues the bidiagonalisation until it has some number of steps."""

    def step(*state: tf.Tensor) -> tuple[tf.Tensor, ...]:
        u, v, beta, alphas, betas, basis = state
        basis = tf.concat([basis, tf.expand_dims(v, axis=1)], axis=1)
        betas = tf.concat([betas, beta], axis=1)
        u, alpha = normalised(stack.matvec(v) - beta * u, _noise(alphas))
        alphas = tf.concat([alphas, alpha], axis=1)
        following = _orthogonal(stack.matvec(u, adjoint=True) - alpha * v, basis)
        v, beta = normalised(following, _noise(alphas))
        return u, v, beta, alphas, betas, basis

    return _Progress(
        *tf.while_loop(
            lambda *state: tf.shape(state[3])[1] < steps,
            step,
            tuple(progress),
            shape_invariants=tuple(_Progress.shapes(stack)),
        )
    )


def _orthogonal(vectors: tf.Tensor, basis: tf.Tensor) -> tf.Tensor:
    """Vectors `(points, n)` without their projections on the vectors of a basis `(points, steps, n)`."""
    rows = tf.expand_dims(vectors, axis=1)
    # Of a vector that has become much shorter, what is left may be rounding: twice is enough (Kahan, Parlett).
    for _ in range(2):
        # Written with the vectors on the left, which is twice as fast as `tf.linalg.matvec`.
        rows -= tf.matmul(rows, basis, transpose_b=True) @ basis
    return tf.squeeze(rows, axis=1)


def _noise(alphas: tf.Tensor) -> tf.Tensor:
    """The norm below which all is rounding: in an invariant subspace, noise must not become a direction."""
    # Of no alphas at all the maximum is -inf, and nothing is below that.
    return 10 * np.finfo(alphas.dtype.as_numpy_dtype).eps * tf.reduce_max(alphas, axis=1, keepdims=True)


def _leading_values(progress: _Progress, squarings: int, *, with_vectors: bool) -> tuple[tf.Tensor, ...]:
    """The leading singular value of the whole matrix, and its right vector, as far as the upper bidiagonal B knows it.

    With `A V = U B` and `Aᵀ U = V Bᵀ + β v eᵀ`, a unit vector p and `q = Bᵀ p / θ`, `θ = ‖Bᵀ p‖`, the triplet
    (θ, U p, V q) has the residuals `B q - θ p` and `β p_k`. p is the leading eigenvector of the small `B Bᵀ`, found by
    squaring that matrix: batched eigensolvers refuse NaN and take longer than the products with J.

    Returns:
        Value and residual `(points, 1)`, and right singular vectors `(points, n)` if they are wanted.
    """
    # The entry above the diagonal in the first column, which there is not, is the first of the betas.
    bidiagonal = tf.linalg.diag(tf.stack([progress.betas, progress.alphas], axis=1), k=(0, 1))
    gram = tf.matmul(bidiagonal, bidiagonal, transpose_b=True)
    # The largest entry of a positive semidefinite matrix is on its diagonal. If it is 1, the entries after two
    # squarings are k³ at most, and after four k¹⁵, which only half precision cannot hold.
    at_once = 2 if gram.dtype.size <= tf.float16.size else 4
    power = gram
    for squaring in range(squarings):
        if squaring % at_once == 0:
            power = tf.math.divide_no_nan(power, tf.reduce_max(power, axis=[1, 2], keepdims=True))
        power = power @ power
    # As a row, for the matrix is symmetric.
    chosen = tf.argmax(tf.linalg.diag_part(power), axis=-1)
    p, _ = normalised(tf.gather(power, tf.expand_dims(chosen, axis=1), batch_dims=1))
    image = p @ gram
    square = tf.reduce_sum(p * image, axis=-1, keepdims=True)
    value = tf.sqrt(square)
    inner = tf.math.divide_no_nan(tf.norm(image - square * p, axis=-1, keepdims=True), value)
    residual = tf.sqrt(tf.square(tf.squeeze(inner, axis=2)) + tf.square(progress.beta * p[:, :, -1]))
    if not with_vectors:
        return tf.squeeze(value, axis=2), residual
    vectors = tf.math.divide_no_nan(p @ bidiagonal, value) @ progress.basis
    return tf.squeeze(value, axis=2), residual, tf.squeeze(vectors, axis=1)
