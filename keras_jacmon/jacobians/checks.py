"""Checks of the assumptions that the Jacobians rest on, at points of the trajectory."""

from collections.abc import Sequence

import tensorflow as tf

from keras_jacmon.jacobians.cell_jacobian import CellJacobian
from keras_jacmon.jacobians.comparison import column_differences, in_turns, largest, relative_differences, rounding
from keras_jacmon.jacobians.diagnosis import CheckResults
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.jacobians.views import View, floating_states, side_by_side, size
from keras_jacmon.operators.formed import WrappedJacobian
from keras_jacmon.options import ViewName
from keras_jacmon.tensors import known_sizes


def check_points(
    jacobian: CellJacobian,
    views: Sequence[ViewName],
    points: PointBatch,
    new_states: Sequence[tf.Tensor],
    seed: tf.Tensor,
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
    none = tf.zeros([], points.states[floating[0]].dtype)
    by_check = (of_structure, of_products, of_columns, of_new_states)
    made = [tf.reduce_max(tf.concat(of, axis=0) if of[1:] else of[0], axis=0) for of in by_check if of]
    found = iter(tf.unstack(largest(tf.stack(made))) if made else [])
    structure, products, columns, dependence = (next(found) if of else none for of in by_check)
    return CheckResults(
        structure_residual=structure,
        products=products,
        columns=columns,
        dependence=dependence,
        # It belongs to `check_independence`.
        influence=none,
        influence_of_inputs=none,
    )


def _structure_differences(
    jacobian: CellJacobian, views: Sequence[ViewName], points: PointBatch, seed: tf.Tensor
) -> tuple[list[tf.Tensor], tf.Tensor | None]:
    """Differences of the structured operators from autodiff, each `(blocks, points)`; the new states if they are known.

    The new states are all floating-point ones, side by side.
    """
    floating = floating_states(points.states)
    differences: list[tf.Tensor] = []
    stepped: tf.Tensor | None = None
    for view, operator in jacobian.without_autodiff(views, points):
        outputs, sources = _sizes(view, points)
        w = in_turns(_normal(points, sum(outputs), seed, operator.dtype), outputs, points.count)
        # By Jᵀ, since a product with J takes the tape twice, with twice as many operations.
        new, expected = jacobian.reference(view, points).pulled(w)
        stepped = new if list(view.outputs) == floating else stepped
        ours = operator.matvec(w, adjoint=True)
        differences.append(relative_differences(ours, expected, sources, rounding(w)))
        if isinstance(operator, WrappedJacobian):
            # Somebody else's products with several vectors, and the matrices that are made by them.
            differences.append(column_differences(operator, w, ours, adjoint=True))
    return differences, stepped


def _product_differences(
    jacobian: CellJacobian, views: Sequence[ViewName], points: PointBatch, seed: tf.Tensor
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Differences of the operators by autodiff, each `(1, points)`.

    Returns:
        The differences of the products with J from those with Jᵀ, and of products with several vectors at once from
        those with one.
    """
    of_products, of_columns = [], []
    for view, J in jacobian.by_tape_twice(views, points):
        outputs, sources = _sizes(view, points)
        w = in_turns(_normal(points, sum(outputs), seed, J.dtype), outputs, points.count)
        pulled = J.matvec(w, adjoint=True)
        g = in_turns(pulled, sources, points.count, every=len(outputs))
        norm = tf.norm(g, axis=-1, keepdims=True)
        unit = tf.math.divide_no_nan(g, norm)
        pushed = J.matvec(unit)
        image = tf.reduce_sum(w * pushed, axis=-1, keepdims=True)
        # Nothing is known along a gradient that overflows.
        image = tf.where(tf.math.is_finite(norm), image, norm)
        of_products.append(relative_differences(image, norm, [1], rounding(w)))
        if J.is_vectorized:
            of_columns += [column_differences(J, w, pulled, adjoint=True), column_differences(J, unit, pushed)]
    return of_products, of_columns


def check_independence(
    jacobian: CellJacobian,
    views: Sequence[ViewName],
    points: PointBatch,
    new_states: Sequence[tf.Tensor],
    seed: tf.Tensor,
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
        `dependence`, and `influence` and `influence_of_inputs`: the largest norm of a product with Jᵀ at points where
        the vector is zero, relative to the largest norm at the other points. The other results are 0.
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
    gradients = list(map(tf.convert_to_tensor, gradients))
    zero = tf.zeros([], measured.dtype)
    floating = floating_states(states)
    sizes = [size(states[p]) for p in floating]
    differences = relative_differences(_beside(new, floating), _beside(new_states, floating), sizes)
    return CheckResults(
        structure_residual=zero,
        products=zero,
        columns=zero,
        dependence=tf.reduce_max(differences),
        influence=_influence(gradients[: len(old)], speaks, zero),
        influence_of_inputs=_influence(gradients[len(old) :], speaks, zero),
    )


def _influence(gradients: Sequence[tf.Tensor], speaks: tf.Tensor, zero: tf.Tensor) -> tf.Tensor:
    """The largest norm of gradients at points that are silent, relative to the largest one at those that speak."""
    if not gradients:
        return zero
    norms = tf.norm(side_by_side(gradients), axis=-1)
    # Zero times infinity is the network's own.
    norms = tf.where(tf.math.is_finite(norms), norms, zero)
    silent, loud = (tf.reduce_max(tf.where(which, norms, zero)) for which in (~speaks, speaks))
    return tf.where(silent > 0, silent / loud, zero)


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
