"""Does what the Jacobians of some rows rest on hold there?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import tensorflow as tf

from keras_jacmon.jacobians.cell_jacobian import Assumptions, CellJacobian
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.jacobians.views import View, floating_states, side_by_side, size
from keras_jacmon.tensors import joined, known_sizes

# What is tested: how far a structure is from autodiff, the values of rows that are put together from those among other
# rows, and products with J from those with Jᵀ; and how large the derivatives of rows by other rows are.
STRUCTURE_RESIDUAL, DEPENDENCE, PRODUCTS, INFLUENCE = TESTS = ("certificate", "dependence", "products", "influence")

# Relative. Rounding in float32 leaves about 1e-6, and of the influence nothing.
TOLERANCE = {STRUCTURE_RESIDUAL: 1e-3, DEPENDENCE: 1e-3, PRODUCTS: 1e-3, INFLUENCE: 1e-6}

# A gain of a step is known up to so many roundings of one: `1 - tanh²` of a unit that saturates is little else.
_ROUNDINGS = 16


@dataclass(frozen=True)
class Diagnosis:
    """What follows from a test that failed.

    Attributes:
        trust: What may still be relied on; None if there is no Jacobian.
        reason: What is not as it was taken to be.
        consequence: How the Jacobian is taken instead.
    """

    trust: Assumptions | None
    reason: str
    consequence: str = ""


def diagnose(worst: Mapping[str, float], trust: Assumptions) -> Diagnosis | None:
    """What follows from the results of tests, for what was relied on; None if nothing does."""
    # Not the other way round: NaN refutes too.
    failed = [name for name in TESTS if name in worst and not worst[name] <= TOLERANCE[name]]

    def differ(name: str) -> str:
        return f"(relative difference {worst[name]:.2g}, allowed is {TOLERANCE[name]:.0e})"

    if not trust.independent and INFLUENCE in failed:
        return Diagnosis(
            None, "The new states of a sample depend on the old states of others, so it has no Jacobian of its own"
        )
    for name in (DEPENDENCE, INFLUENCE):
        if name in failed:
            return Diagnosis(
                replace(trust, independent=False),
                f"what its cell makes of a sample depends on the other samples of the batch {differ(name)}",
                "It is measured by autodiff, step by step,",
            )
    if STRUCTURE_RESIDUAL in failed:
        return Diagnosis(
            replace(trust, structure=False),
            f"the structure of its Jacobian differs from autodiff {differ(STRUCTURE_RESIDUAL)}",
            "It is measured by autodiff",
        )
    if PRODUCTS in failed:
        return Diagnosis(
            replace(trust, products=False),
            f"products with its Jacobian, by the tape applied twice, differ from those with its transpose "
            f"{differ(PRODUCTS)}",
            "The Jacobian is formed for them",
        )
    return None


def examine_rows(
    jacobian: CellJacobian, views: Sequence[str], rows: PointBatch, new_states: Sequence[tf.Tensor], seed: tf.Tensor
) -> dict[str, tf.Tensor]:
    """Tests at some rows, by stepping the cell itself there, and by its gradient.

    Each result is the largest of the rows but for one in 200 (see `largest`), a scalar:

    - `CERTIFICATE`, if there is a structure that was found, or a registered form: how far it is from the derivative of
      the cell, `‖J w - (J w by autodiff)‖ / ‖J w by autodiff‖`, for each new state and, in turns, each old one, so that
      no block hides behind larger ones.
    - `PRODUCTS`, if products with J are made by the tape applied twice: how far they are from those with Jᵀ, by
      `w · J g = ‖g‖` with `g = Jᵀ w / ‖Jᵀ w‖`, block by block too.
    - `DEPENDENCE`, if rows are independent by proof: how far the new states of these rows by themselves are from those
      that the cell gave them among others, relative to their size. Otherwise see `examine_independence`.

    Args:
        jacobian: Of a cell.
        views: Those that are measured.
        rows: Some rows; a whole step if rows are not independent.
        new_states: Their new states in the trajectory.
        seed: For random vectors w.
    """
    floating = floating_states(rows.states)
    stepped: tf.Tensor | None = None
    found: dict[str, list[tf.Tensor]] = {}
    for view, operator in jacobian.certified(views, rows):
        # Of all new states where that is safe, so that the cell is stepped once for this and the test below.
        wide = jacobian.stepped_with(view)
        reference = jacobian.reference(wide, rows)
        # Jᵀ takes a product with the transposed kernel, which TensorFlow transposes each time.
        adjoint = reference.forward is None
        if reference.forward is None:
            reference = jacobian.reference(view, rows)
        elif list(wide.news) == floating:
            stepped = reference.forward[0]
        begin, end = _sizes(view, rows)[:: 1 if adjoint else -1]
        w = in_turns(_normal(rows, sum(begin), seed, operator.dtype), begin)
        ours, expected = (J.matvec(w, adjoint=adjoint) for J in (operator, reference))
        if not adjoint:
            parts = dict(zip(wide.news, tf.split(expected, _sizes(wide, rows)[0], axis=-1), strict=True))
            expected = joined([parts[p] for p in view.news])
        differences = relative_differences(ours, expected, end, _rounding(w))
        found.setdefault(STRUCTURE_RESIDUAL, []).append(differences)
    for view, J in jacobian.by_tape_twice(views, rows):
        news, olds = _sizes(view, rows)
        w = in_turns(_normal(rows, sum(news), seed, J.dtype), news)
        g = in_turns(J.matvec(w, adjoint=True), olds, every=len(news))
        norm = tf.norm(g, axis=-1, keepdims=True)
        image = tf.reduce_sum(w * J.matvec(tf.math.divide_no_nan(g, norm)), axis=-1, keepdims=True)
        # Nothing is known along a gradient that overflows.
        image = tf.where(tf.math.is_finite(norm), image, norm)
        found.setdefault(PRODUCTS, []).append(relative_differences(image, norm, [1], _rounding(w)))
    if jacobian.row_by_row:
        if stepped is None:
            stepped = _of(jacobian.step(rows.inputs, rows.states), floating)
        sizes = [size(rows.states[p]) for p in floating]
        found[DEPENDENCE] = [relative_differences(stepped, _of(new_states, floating), sizes)]
    if not found:
        return {}
    worst = largest(tf.stack([tf.reduce_max(tf.concat(parts, axis=0), axis=0) for parts in found.values()]))
    return dict(zip(found, tf.unstack(worst), strict=True))


def examine_independence(
    jacobian: CellJacobian, views: Sequence[str], rows: PointBatch, new_states: Sequence[tf.Tensor], seed: tf.Tensor
) -> dict[str, tf.Tensor]:
    """Tests whether each row of a step is a function of the same row of inputs and states, where that is not proven.

    Points of all steps and samples are put together for the derivatives, which is right only then. No row is forgiven:
    a branch may be taken at a single step.

    Args:
        jacobian: Of a cell.
        views: Those that are measured.
        rows: Some rows, or those of a whole step.
        new_states: Their new states in the trajectory.
        seed: For random vectors.

    Returns:
        Scalars: `DEPENDENCE`, how far the new states of these rows by themselves are from those among others; and
        `INFLUENCE`, the largest norm of a product with Jᵀ where the vector is zero, relative to the largest one of the
        rows where it is not.
    """
    chosen = [View.of(name, rows.states) for name in views]
    news = sorted({new for view in chosen for new in view.news})
    olds = sorted({old for view in chosen for old in view.olds})
    # Of their own: one tensor may serve as two states.
    inputs, states = tf.identity(rows.inputs), [tf.identity(state) for state in rows.states]
    sources = [*(states[q] for q in olds), *([inputs] if any(not view.olds for view in chosen) else [])]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(sources)
        new = jacobian.step(inputs, states)
        measured = _of(new, news)
    count = known_sizes(inputs)[0]
    speaks = tf.argsort(tf.random.stateless_uniform([count], seed)) < (count + 1) // 2
    w = _normal(rows, int(measured.shape[1]), seed, measured.dtype) * tf.cast(speaks[:, None], measured.dtype)
    gradients = tape.gradient(measured, sources, output_gradients=w, unconnected_gradients="zero")
    norms = tf.norm(side_by_side(list(map(tf.convert_to_tensor, gradients))), axis=-1)
    zero = tf.zeros([], norms.dtype)
    # Zero times infinity is the network's own.
    norms = tf.where(tf.math.is_finite(norms), norms, zero)
    silent, loud = (tf.reduce_max(tf.where(which, norms, zero)) for which in (~speaks, speaks))
    floating = floating_states(states)
    sizes = [size(states[p]) for p in floating]
    differences = relative_differences(_of(new, floating), _of(new_states, floating), sizes)
    return {DEPENDENCE: tf.reduce_max(differences), INFLUENCE: tf.where(silent > 0, silent / loud, zero)}


def _of(states: Sequence[tf.Tensor], chosen: Sequence[int]) -> tf.Tensor:
    return side_by_side([states[p] for p in chosen])


def _sizes(view: View, rows: PointBatch) -> tuple[list[int], list[int]]:
    """Those of the new states of a view and of its old ones, or the inputs."""
    olds = [size(rows.states[q]) for q in view.olds] or [size(rows.inputs)]
    return [size(rows.states[p]) for p in view.news], olds


def _normal(rows: PointBatch, n: int, seed: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Random vectors `(rows, n)`."""
    return tf.random.stateless_normal([rows.count, n], seed, dtype=dtype)


def _rounding(w: tf.Tensor) -> tf.Tensor:
    """What is no error of a product with these vectors, `(rows,)`."""
    return _ROUNDINGS * np.finfo(w.dtype.as_numpy_dtype).eps * tf.norm(w, axis=-1)


# Far below the least state or gradient that training could use.
_NEGLIGIBLE = 1e-30


# A single row may differ by itself, so that a part must be tested in more than one.
_LEAST_TURNS = 4


# One row in so many may differ.
_ROWS_FOR_AN_OUTLIER = 200


def in_turns(vectors: tf.Tensor, sizes: Sequence[int], every: int = 1) -> tf.Tensor:
    """Vectors `(rows, n)` with one of some parts in each row, and zero for the others; of few rows with all parts.

    Args:
        vectors: As they are with all parts.
        sizes: Of the parts.
        every: The turn goes to the next part after so many rows.
    """
    if len(sizes) == 1:
        return vectors
    rows = vectors.shape[0] or tf.shape(vectors)[0]
    part = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    few = rows < _LEAST_TURNS * len(sizes) * every
    turn = tf.equal(tf.expand_dims(tf.range(rows) // every % len(sizes), axis=1), part) | few
    return tf.where(turn, vectors, tf.zeros([], vectors.dtype))


def relative_differences(
    found: tf.Tensor, expected: tf.Tensor, sizes: Sequence[int], negligible: tf.Tensor | float = _NEGLIGIBLE
) -> tf.Tensor:
    """How far each part of vectors is from the one expected, relative to the latter.

    Infinite where one of the two is finite and the other is not. Where both are NaN or infinite they agree: that is the
    network's own.

    Args:
        found: `(rows, n)`.
        expected: `(rows, n)`.
        sizes: Of the parts that the vectors are made of.
        negligible: Errors whose norm is not above this are none, `(rows,)` or a number.

    Returns:
        `(parts, rows)`.
    """
    parts = tf.split(tf.stack([found - expected, expected, found]) ** 2, sizes, axis=-1)
    norms = tf.sqrt(tf.stack([tf.reduce_sum(part, axis=-1) for part in parts], axis=1))
    error, of_expected, of_found = tf.unstack(norms)
    zero, infinite = tf.zeros([], norms.dtype), tf.constant(np.inf, norms.dtype)
    relative = tf.where(error <= negligible, zero, error / of_expected)
    one, other = tf.math.is_finite(of_expected), tf.math.is_finite(of_found)
    return tf.where(one & other, relative, tf.where(one | other, infinite, zero))


def largest(differences: tf.Tensor) -> tf.Tensor:
    """The largest of some differences `(..., rows)`, but for one row in 200, or a single one of fewer, `(...,)`.

    Where a unit stands at the kink of a ReLU or the step of a rounding, the side that it is on is up to rounding
    errors, so that in rare rows a right structure differs. A wrong one differs in all of them.
    """
    rows = tf.shape(differences)[-1]
    outliers = tf.maximum(tf.minimum(tf.maximum(rows // _ROWS_FOR_AN_OUTLIER, 1), rows - 1), 0)
    # The zero is for no rows at all.
    padded = tf.pad(differences, [[0, 0]] * (differences.shape.rank - 1) + [[0, 1]])
    return tf.math.top_k(padded, outliers + 1).values[..., -1]
