"""Checks of the assumptions that the Jacobians rest on, at points of the trajectory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_jacmon.jacobians.cell_jacobian import Assumptions, CellJacobian
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.jacobians.views import View, floating_states, side_by_side, size
from keras_jacmon.operators.formed import WrappedJacobian
from keras_jacmon.tensors import known_sizes


class CheckResults(NamedTuple):
    """The results of the checks: scalars, each a relative difference that is 0 where its check does not apply.

    Attributes:
        structure_residual: Distance of a structured Jacobian, or of a registered form, from autodiff.
        products: Distance of the products with J from those with Jᵀ.
        columns: Distance of products with several vectors at once from those with one vector.
        dependence: Distance of the new states of some points from those that the cell gave them among others.
        influence: Size of the derivatives of a point by other points of its step.
    """

    structure_residual: tf.Tensor | float
    products: tf.Tensor | float
    columns: tf.Tensor | float
    dependence: tf.Tensor | float
    influence: tf.Tensor | float

    @classmethod
    def zero(cls, dtype: tf.DType) -> "CheckResults":
        """The results of no check at all."""
        nothing = tf.zeros([], dtype)
        return cls(*[nothing] * len(cls._fields))

    def worst(self, other: "CheckResults") -> "CheckResults":
        """The larger of both results of each check, or NaN if one of them is NaN."""
        return CheckResults(
            *(tf.where(tf.math.is_nan(b) | (b > a), b, a) for a, b in zip(self, other, strict=True)),
        )

    def floats(self) -> "CheckResults":
        """The results as numbers of Python."""
        return CheckResults(*map(float, self))


# Relative. Rounding in float32 leaves about 1e-6, and of the influence nothing.
TOLERANCES = CheckResults(structure_residual=1e-3, products=1e-3, columns=1e-3, dependence=1e-3, influence=1e-6)

# The gain of a step is known up to this many roundings of 1: `1 - tanh²` of a unit that saturates is little else.
_ROUNDINGS = 16

# Far below the least state or gradient that training could use.
_NEGLIGIBLE = 1e-30

# A single point may differ by itself, so a block must be checked at several of them.
_LEAST_TURNS = 4

# The multiples of a vector that are multiplied at once; different ones, so that columns that are mixed up are noticed.
_MULTIPLES = (1.0, -2.0, 3.0)

# One point in this number of points may differ.
_POINTS_PER_OUTLIER = 200


@dataclass(frozen=True)
class Diagnosis:
    """The consequence of a check that failed.

    Attributes:
        assumptions: The assumptions that remain; None if there is no Jacobian.
        reason: The assumption that does not hold, in words.
        consequence: The way in which the Jacobian is taken instead, in words.
    """

    assumptions: Assumptions | None
    reason: str
    consequence: str = ""


def diagnose(results: CheckResults, assumptions: Assumptions) -> Diagnosis | None:
    """Finds the assumption that fails.

    Args:
        results: Numbers of Python.
        assumptions: The assumptions that the Jacobians rested on.

    Returns:
        The diagnosis of the most important check that failed; None if no check failed.
    """
    # Not the other way round: NaN fails too.
    failed = {
        name: f"(relative difference {result:.2g}, allowed is {tolerance:.0e})"
        for name, result, tolerance in zip(CheckResults._fields, results, TOLERANCES, strict=True)
        if not result <= tolerance
    }
    if not assumptions.independent and "influence" in failed:
        return Diagnosis(
            None, "The new states of a sample depend on the old states of others, so it has no Jacobian of its own"
        )
    difference = failed.get("dependence", failed.get("influence"))
    if assumptions.independent and difference is not None:
        return Diagnosis(
            replace(assumptions, independent=False),
            f"what its cell makes of a sample depends on the other samples of the batch {difference}",
            "It is measured by autodiff, step by step,",
        )
    if "structure_residual" in failed:
        return Diagnosis(
            replace(assumptions, structure=False),
            f"the structure of its Jacobian differs from autodiff {failed['structure_residual']}",
            "It is measured by autodiff",
        )
    if "products" in failed:
        return Diagnosis(
            replace(assumptions, products=False),
            f"products with its Jacobian, by the tape applied twice, differ from those with its transpose "
            f"{failed['products']}",
            "The Jacobian is formed for them",
        )
    if "columns" in failed:
        return Diagnosis(
            replace(assumptions, products=False),
            "products of its Jacobian with several vectors at once, by `tf.vectorized_map`, differ from those with one "
            f"vector {failed['columns']}",
            "The Jacobian is formed by one gradient for each unit",
        )
    return None


def check_points(
    jacobian: CellJacobian, views: Sequence[str], points: PointBatch, new_states: Sequence[tf.Tensor], seed: tf.Tensor
) -> CheckResults:
    """Checks the assumptions behind the Jacobians at some points, by stepping the cell there and by its gradient.

    Each result is the largest of the points but for one in 200 (see `largest`):

    - `structure_residual`, if a structure was found or a form is registered:
      `‖Jᵀ w - (Jᵀ w by autodiff)‖ / ‖Jᵀ w by autodiff‖`, for each old state and, in turns, each new one, so that no
      block is hidden by larger ones.
    - `products`, if products with J are made by the tape applied twice: `|w · J g - ‖g‖| / ‖g‖` with
      `g = Jᵀ w / ‖Jᵀ w‖`, block by block too.
    - `columns`, for those of them that use `tf.vectorized_map`: `‖J W - (J w for each w)‖ / ‖J w for each w‖`, with J
      and with Jᵀ.
    - `dependence`, if points are independent by proof. Otherwise see `check_independence`.

    Args:
        jacobian: The Jacobians of the cell.
        views: The views that are measured.
        points: The points; all points of a step if points are not independent.
        new_states: Their new states in the trajectory.
        seed: Tensor `(2,)`, seed of the random vectors w.
    """
    of_structure, stepped = _structure_differences(jacobian, views, points, seed)
    of_products, of_columns = _product_differences(jacobian, views, points, seed)
    of_new_states = []
    floating = floating_states(points.states)
    if jacobian.point_by_point:
        if stepped is None:
            stepped = _beside(jacobian.step(points.inputs, points.states), floating)
        sizes = [size(points.states[p]) for p in floating]
        of_new_states = [relative_differences(stepped, _beside(new_states, floating), sizes)]
    none = tf.zeros([points.count], points.states[floating[0]].dtype)
    by_check = [
        tf.reduce_max(tf.concat(differences, axis=0), axis=0) if differences else none
        for differences in (of_structure, of_products, of_columns, of_new_states)
    ]
    structure_residual, products, columns, dependence = tf.unstack(largest(tf.stack(by_check)))
    return CheckResults(structure_residual, products, columns, dependence, influence=tf.zeros([], none.dtype))


def _structure_differences(
    jacobian: CellJacobian, views: Sequence[str], points: PointBatch, seed: tf.Tensor
) -> tuple[list[tf.Tensor], tf.Tensor | None]:
    """Differences of the structured operators from autodiff, each `(blocks, points)`; the new states if they are known.

    The new states are all floating-point ones, side by side.
    """
    floating = floating_states(points.states)
    differences: list[tf.Tensor] = []
    stepped: tf.Tensor | None = None
    for view, operator in jacobian.certified(views, points):
        outputs, sources = _sizes(view, points)
        w = in_turns(_normal(points, sum(outputs), seed, operator.dtype), outputs)
        # By Jᵀ, since a product with J takes the tape twice, with twice as many operations.
        new, expected = jacobian.reference(view, points).pulled(w)
        stepped = new if list(view.outputs) == floating else stepped
        ours = operator.matvec(w, adjoint=True)
        differences.append(relative_differences(ours, expected, sources, _rounding(w)))
        if isinstance(operator, WrappedJacobian):
            # Somebody else's products with several vectors, and the matrices that are made by them.
            differences.append(column_differences(operator, w, ours, adjoint=True))
    return differences, stepped


def _product_differences(
    jacobian: CellJacobian, views: Sequence[str], points: PointBatch, seed: tf.Tensor
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Differences of the operators by autodiff, each `(1, points)`.

    Returns:
        The differences of the products with J from those with Jᵀ, and of products with several vectors at once from
        those with one.
    """
    of_products, of_columns = [], []
    for view, J in jacobian.by_tape_twice(views, points):
        outputs, sources = _sizes(view, points)
        w = in_turns(_normal(points, sum(outputs), seed, J.dtype), outputs)
        pulled = J.matvec(w, adjoint=True)
        g = in_turns(pulled, sources, every=len(outputs))
        norm = tf.norm(g, axis=-1, keepdims=True)
        unit = tf.math.divide_no_nan(g, norm)
        pushed = J.matvec(unit)
        image = tf.reduce_sum(w * pushed, axis=-1, keepdims=True)
        # Nothing is known along a gradient that overflows.
        image = tf.where(tf.math.is_finite(norm), image, norm)
        of_products.append(relative_differences(image, norm, [1], _rounding(w)))
        if J.is_vectorized:
            of_columns += [column_differences(J, w, pulled, adjoint=True), column_differences(J, unit, pushed)]
    return of_products, of_columns


def column_differences(
    J: tf.linalg.LinearOperator, vectors: tf.Tensor, products: tf.Tensor, *, adjoint: bool = False
) -> tf.Tensor:
    """Differences of the products with several multiples of vectors at once from the products known, `(1, points)`."""
    multiples = tf.constant(_MULTIPLES, vectors.dtype)
    found, expected = J.matmul(vectors[..., None] * multiples, adjoint=adjoint), products[..., None] * multiples
    width = len(_MULTIPLES) * int(products.shape[-1])
    found, expected = (tf.reshape(x, [-1, width]) for x in (found, expected))
    return relative_differences(found, expected, [width], _rounding(vectors))


def check_independence(
    jacobian: CellJacobian, views: Sequence[str], points: PointBatch, new_states: Sequence[tf.Tensor], seed: tf.Tensor
) -> CheckResults:
    """Checks that each point's new states are a function of the same point alone, where there is no proof.

    Points of all steps and samples are put together for the derivatives, which is right only then. No point is
    forgiven: a branch may be taken at a single step.

    Args:
        jacobian: The Jacobians of the cell.
        views: The views that are measured.
        points: Some points, or all points of a step.
        new_states: Their new states in the trajectory.
        seed: Tensor `(2,)`, seed of the random vectors.

    Returns:
        `dependence`, and `influence`: the largest norm of a product with Jᵀ at points where the vector is zero,
        relative to the largest norm at the other points. The other results are 0.
    """
    chosen = [View.of(name, points.states) for name in views]
    outputs = sorted({new for view in chosen for new in view.outputs})
    old = sorted({source.position for view in chosen for source in view.sources if source.is_state})
    by_inputs = any(not source.is_state for view in chosen for source in view.sources)
    # Of their own: one tensor may serve as two states.
    inputs, states = tf.identity(points.inputs), [tf.identity(state) for state in points.states]
    sources = [*(states[q] for q in old), *([inputs] if by_inputs else [])]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(sources)
        new = jacobian.step(inputs, states)
        measured = _beside(new, outputs)
    count = known_sizes(inputs)[0]
    speaks = tf.argsort(tf.random.stateless_uniform([count], seed)) < (count + 1) // 2
    w = _normal(points, int(measured.shape[1]), seed, measured.dtype) * tf.cast(speaks[:, None], measured.dtype)
    gradients = tape.gradient(measured, sources, output_gradients=w, unconnected_gradients="zero")
    norms = tf.norm(side_by_side(list(map(tf.convert_to_tensor, gradients))), axis=-1)
    zero = tf.zeros([], norms.dtype)
    # Zero times infinity is the network's own.
    norms = tf.where(tf.math.is_finite(norms), norms, zero)
    silent, loud = (tf.reduce_max(tf.where(which, norms, zero)) for which in (~speaks, speaks))
    floating = floating_states(states)
    sizes = [size(states[p]) for p in floating]
    differences = relative_differences(_beside(new, floating), _beside(new_states, floating), sizes)
    return CheckResults(
        structure_residual=zero,
        products=zero,
        columns=zero,
        dependence=tf.reduce_max(differences),
        influence=tf.where(silent > 0, silent / loud, zero),
    )


def _beside(states: Sequence[tf.Tensor], chosen: Sequence[int]) -> tf.Tensor:
    """The states at some positions, side by side."""
    return side_by_side([states[p] for p in chosen])


def _sizes(view: View, points: PointBatch) -> tuple[list[int], list[int]]:
    """The sizes of the new states of a view, and of its old states or the inputs."""
    sources = [size(points.states[s.position] if s.is_state else points.inputs) for s in view.sources]
    return [size(points.states[p]) for p in view.outputs], sources


def _normal(points: PointBatch, n: int, seed: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Random vectors `(points, n)`."""
    return tf.random.stateless_normal([points.count, n], seed, dtype=dtype)


def _rounding(w: tf.Tensor) -> tf.Tensor:
    """The rounding error of a product with these vectors, `(points,)`."""
    return _ROUNDINGS * np.finfo(w.dtype.as_numpy_dtype).eps * tf.norm(w, axis=-1)


def in_turns(vectors: tf.Tensor, sizes: Sequence[int], every: int = 1) -> tf.Tensor:
    """Vectors with one of their parts at each point and zero for the others, or with all parts if points are few.

    Args:
        vectors: Tensor `(points, n)`, with all parts.
        sizes: Sizes of the parts, together n.
        every: Integer, number of points after which the turn goes to the next part. Defaults to 1.
    """
    if len(sizes) == 1:
        return vectors
    count = vectors.shape[0] or tf.shape(vectors)[0]
    part = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    few = count < _LEAST_TURNS * len(sizes) * every
    turn = tf.equal(tf.expand_dims(tf.range(count) // every % len(sizes), axis=1), part) | few
    return tf.where(turn, vectors, tf.zeros([], vectors.dtype))


def relative_differences(
    found: tf.Tensor, expected: tf.Tensor, sizes: Sequence[int], negligible: tf.Tensor | float = _NEGLIGIBLE
) -> tf.Tensor:
    """The distance of each part of the vectors from the expected part, relative to the norm of the expected part.

    Infinite where one of the two is finite and the other is not. Where both are NaN or infinite they agree: that is the
    network's own.

    Args:
        found: Tensor `(points, n)`.
        expected: Tensor `(points, n)`.
        sizes: Sizes of the parts that the vectors are made of.
        negligible: Norm up to which an error counts as none, `(points,)` or a number.

    Returns:
        `(parts, points)`.
    """
    parts = tf.split(tf.stack([found - expected, expected, found]) ** 2, sizes, axis=-1)
    norms = tf.sqrt(tf.stack([tf.reduce_sum(part, axis=-1) for part in parts], axis=1))
    error, of_expected, of_found = tf.unstack(norms)
    zero, infinite = tf.zeros([], norms.dtype), tf.constant(np.inf, norms.dtype)
    relative = tf.where(error <= negligible, zero, error / of_expected)
    one, other = tf.math.is_finite(of_expected), tf.math.is_finite(of_found)
    return tf.where(one & other, relative, tf.where(one | other, infinite, zero))


def largest(differences: tf.Tensor) -> tf.Tensor:
    """The largest of some differences `(..., points)`, but for one point in 200, or a single one of fewer, `(...,)`.

    Where a unit stands at the kink of a ReLU or the step of a rounding, rounding errors decide on which side it is, so
    that a right structure differs at rare points. A wrong one differs at all of them.
    """
    count = tf.shape(differences)[-1]
    outliers = tf.maximum(tf.minimum(tf.maximum(count // _POINTS_PER_OUTLIER, 1), count - 1), 0)
    # The zero is for no points at all.
    padded = tf.pad(differences, [[0, 0]] * (differences.shape.rank - 1) + [[0, 1]])
    return tf.math.top_k(padded, outliers + 1).values[..., -1]
