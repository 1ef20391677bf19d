"""Laws of the operator of `state_jacobian`, each held for every cell and every view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    BY_ID,
    Case,
    CounterCell,
    FunctionCell,
    LinearCell,
    StraightThroughCell,
    each_case,
    make_step,
    normal,
    soak_but,
    step_jacobians,
)
from recurrences import LOOPS, Loop, make_cell_step

from keras_jacmon import state_jacobian
from keras_jacmon.operators.autodiff import AutodiffJacobian

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOLERANCE: Any = {"rtol": 1e-5, "atol": 1e-6}
SOME_CELLS = ("lstm", "while_loop", "conv_lstm_1d", "counter")


# Eager products of loops take long; inside a graph they are below, and in `test_every_cell_equals_the_loop`.
@each_case(soak={"while_loop", "map_fn", "conv_lstm_2d", "stacked_seed_cell_simple_rnn"})
def test_the_laws_of_an_operator(case: Case) -> None:
    cell, inputs, states = make_step(case)
    jacobians, _ = step_jacobians(cell, inputs, states)
    for view, expected in jacobians.items():
        J = state_jacobian(cell, inputs, states, view=view)
        assert isinstance(J, tf.linalg.LinearOperator)
        assert tuple(J.shape) == expected.shape
        assert J.dtype == tf.float32
        np.testing.assert_allclose(J.to_dense().numpy(), expected, **TOLERANCE, strict=True)
        assert_products(J, expected)
        # The hidden view is a block of the joint one.
        if view == "joint":
            assert_products_with_basis_vectors(J, expected)


@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_the_laws_of_an_operator_of_a_registered_recurrence(loop: Loop) -> None:
    cell, inputs, states = make_cell_step(loop)
    jacobians, _ = step_jacobians(cell, inputs, states)
    for view, expected in jacobians.items():
        J = state_jacobian(cell, inputs, states, view=view)
        np.testing.assert_allclose(J.to_dense().numpy(), expected, **TOLERANCE, strict=True)
        assert_products(J, expected)


def assert_products(J: Any, expected: NDArray[np.floating[Any]]) -> None:
    """Hold products with several vectors at once, and the adjoint, which moves to the other side of a dot product."""
    rows, new, old = expected.shape
    U, V = normal(rows, new, 5, seed=1), normal(rows, old, 5, seed=2)
    forward, backward = J.matmul(V).numpy(), J.matmul(U, adjoint=True).numpy()
    np.testing.assert_allclose(forward, expected @ V, **TOLERANCE, strict=True)
    np.testing.assert_allclose(backward, np.swapaxes(expected, -2, -1) @ U, **TOLERANCE, strict=True)
    np.testing.assert_allclose(
        np.sum(U * forward, axis=1), np.sum(backward * V, axis=1), rtol=1e-4, atol=1e-5, strict=True
    )


def assert_products_with_basis_vectors(J: Any, expected: NDArray[np.floating[Any]]) -> None:
    rows, new, old = expected.shape
    columns = J.matmul(tf.eye(old, batch_shape=[rows])).numpy()
    np.testing.assert_allclose(columns, expected, **TOLERANCE, strict=True)
    transposed = J.matmul(tf.eye(new, batch_shape=[rows]), adjoint=True).numpy()
    np.testing.assert_allclose(transposed, np.swapaxes(expected, -2, -1), **TOLERANCE, strict=True)
    # Single vectors go another way: the last column, and the last row.
    column = J.matvec(tf.one_hot(tf.fill((rows,), old - 1), old))
    np.testing.assert_allclose(column.numpy(), expected[:, :, -1], **TOLERANCE, strict=True)
    row = J.matvec(tf.one_hot(tf.fill((rows,), new - 1), new), adjoint=True)
    np.testing.assert_allclose(row.numpy(), expected[:, -1], **TOLERANCE, strict=True)


# That of all cells is in a graph in `test_every_cell_equals_the_loop`; the other views are blocks of the same operator.
@pytest.mark.parametrize("case_id", soak_but({"lstm", "while_loop"}, SOME_CELLS))
def test_the_operator_works_inside_a_graph(case_id: str) -> None:
    cell, inputs, states = make_step(BY_ID[case_id])
    expected = step_jacobians(cell, inputs, states, ["joint"])[0]["joint"]
    u, v = normal(*expected.shape[:2], seed=1), normal(expected.shape[0], expected.shape[2], seed=2)

    @tf.function
    def graph(inputs: Any, states: Any) -> tuple[Any, Any, Any]:
        J = state_jacobian(cell, inputs, states, view="joint")
        return J.to_dense(), J.matvec(v), J.matvec(u, adjoint=True)

    dense, forward, backward = graph(inputs, states)
    np.testing.assert_allclose(dense.numpy(), expected, **TOLERANCE, strict=True)
    np.testing.assert_allclose(forward.numpy(), np.einsum("bik,bk->bi", expected, v), **TOLERANCE, strict=True)
    np.testing.assert_allclose(backward.numpy(), np.einsum("bik,bi->bk", expected, u), **TOLERANCE, strict=True)


def test_a_graph_without_a_known_number_of_rows() -> None:
    cell, inputs, states = make_step(BY_ID["lstm"], rows=5)
    expected = step_jacobians(cell, inputs, states)[0]["joint"]

    @tf.function(input_signature=[tf.TensorSpec((None, 2)), [tf.TensorSpec((None, 4)), tf.TensorSpec((None, 4))]])
    def graph(inputs: Any, states: Any) -> Any:
        return state_jacobian(cell, inputs, states, view="joint").to_dense()

    np.testing.assert_allclose(graph(inputs, states).numpy(), expected, **TOLERANCE, strict=True)


def test_one_row() -> None:
    cell, inputs, states = make_step(BY_ID["gru_reset_after"], rows=1)
    for view, expected in step_jacobians(cell, inputs, states)[0].items():
        dense = state_jacobian(cell, inputs, states, view=view).to_dense().numpy()
        np.testing.assert_allclose(dense, expected, **TOLERANCE, strict=True)


def test_orientation_of_a_2x2_cell() -> None:
    # h_t = h_{t-1} @ U, so d h_t[i] / d h_{t-1}[k] = U[k, i]; d h_t[i] / d x_t[k] = W[k, i] (2 new, 3 old).
    cell = LinearCell([[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    inputs, states = tf.zeros((1, 3)), [tf.zeros((1, 2))]
    hidden = state_jacobian(cell, inputs, states)
    one_zero = np.array([[1.0, 0.0]], np.float32)
    np.testing.assert_array_equal(hidden.to_dense().numpy(), np.array([[[1, 3], [2, 4]]], np.float32), strict=True)
    np.testing.assert_array_equal(hidden.matvec(one_zero).numpy(), np.array([[1, 2]], np.float32), strict=True)
    adjoint = hidden.matvec(one_zero, adjoint=True)
    np.testing.assert_array_equal(adjoint.numpy(), np.array([[1, 3]], np.float32), strict=True)
    through_inputs = state_jacobian(cell, inputs, states, view="inputs").to_dense()
    np.testing.assert_array_equal(through_inputs.numpy(), np.array([[[1, 3, 5], [2, 4, 6]]], np.float32), strict=True)


def test_the_default_view_is_hidden() -> None:
    cell, inputs, states = make_step(BY_ID["lstm"])
    assert tuple(state_jacobian(cell, inputs, states).shape) == (3, 4, 4)


def test_states_of_the_joint_view_stand_in_their_order() -> None:
    cell, inputs, states = make_step(BY_ID["unequal_states"])
    hidden = state_jacobian(cell, inputs, states).to_dense().numpy()
    joint = state_jacobian(cell, inputs, states, view="joint").to_dense().numpy()
    np.testing.assert_allclose(joint[:, :3, :3], hidden, **TOLERANCE, strict=True)
    # m_t = m_{t-1} / 2 + ...
    np.testing.assert_allclose(joint[:, 3:, 3:], np.tile(0.5 * np.eye(5, dtype=np.float32), (3, 1, 1)), atol=1e-6)


def test_a_custom_gradient_is_respected() -> None:
    # A rounded state has derivative zero almost everywhere; the custom gradient says 2 (1 - tanh²) Uᵀ, here 2 at h = 0.
    cell = StraightThroughCell(2)
    inputs, states = tf.zeros((1, 1)), [tf.zeros((1, 2))]
    cell(inputs, states)
    cell.recurrent_kernel.assign([[1.0, 2.0], [3.0, 4.0]])
    J = state_jacobian(cell, inputs, states)
    np.testing.assert_allclose(J.to_dense().numpy(), np.array([[[2, 6], [4, 8]]], np.float32), rtol=1e-6, strict=True)
    forward = J.matvec(np.array([[1.0, 0.0]], np.float32))
    np.testing.assert_allclose(forward.numpy(), np.array([[2, 4]], np.float32), rtol=1e-6, strict=True)


@pytest.mark.parametrize("known", [True, False])
def test_no_points_at_all(known: bool) -> None:  # noqa: FBT001 - pytest passes it by name
    kernel = tf.constant(normal(3, 5))

    def products(point: Any) -> list[Any]:
        J = AutodiffJacobian(lambda x, _: tf.tanh(x @ kernel), point, [], 5, vectorized=True)
        columns = [tf.zeros([tf.shape(point)[0], units, 4]) for units in (3, 5)]
        return [J.to_dense(), J.matmul(columns[0]), J.matmul(columns[1], adjoint=True)]

    graph = tf.function(products, [tf.TensorSpec([0 if known else None, 3])], autograph=False)
    assert [tuple(product.shape) for product in graph(tf.zeros([0, 3]))] == [(0, 5, 3), (0, 5, 4), (0, 3, 4)]


@pytest.mark.parametrize("counter_first", [False, True], ids=["counter_last", "counter_first"])
def test_an_integer_state_is_no_part_of_the_jacobian(*, counter_first: bool) -> None:
    cell = CounterCell(4, counter_first=counter_first)
    inputs, h, count = normal(3, 2), tf.convert_to_tensor(normal(3, 4)), tf.fill((3, 1), 2)
    states = [count, h] if counter_first else [h, count]
    cell(inputs, states)
    expected = step_jacobians(cell, inputs, states)[0]["hidden"]
    for view in ("hidden", "joint"):
        dense = state_jacobian(cell, inputs, states, view=view).to_dense()
        np.testing.assert_allclose(dense.numpy(), expected, **TOLERANCE, strict=True)


@pytest.mark.parametrize("view", ["hidden", "joint"])
def test_one_tensor_for_both_states(view: str) -> None:
    # The tape must not add up the derivatives with respect to both.
    cell, inputs, (h, _) = make_step(BY_ID["lstm"])
    expected = step_jacobians(cell, inputs, [h, h])[0][view]
    J = state_jacobian(cell, inputs, [h, h], view=view)
    np.testing.assert_allclose(J.to_dense().numpy(), expected, **TOLERANCE, strict=True)
    v = normal(3, expected.shape[2])
    np.testing.assert_allclose(J.matvec(v).numpy(), np.einsum("bik,bk->bi", expected, v), **TOLERANCE, strict=True)


def test_double_precision() -> None:
    cell = keras.layers.GRUCell(4, dtype="float64")
    inputs, states = tf.constant(normal(3, 2), tf.float64), [tf.constant(normal(3, 4), tf.float64)]
    cell(inputs, states)
    dense = state_jacobian(cell, inputs, states).to_dense()
    np.testing.assert_allclose(
        dense.numpy(), step_jacobians(cell, inputs, states)[0]["hidden"], rtol=1e-12, strict=True
    )


def test_a_cell_without_weights_yet_gets_them() -> None:
    cell = keras.layers.LSTMCell(4)
    J = state_jacobian(cell, normal(3, 2), [normal(3, 4), normal(3, 4)])
    expected = step_jacobians(cell, normal(3, 2), [tf.constant(normal(3, 4))] * 2)[0]["hidden"]
    assert len(cell.weights) == 3
    np.testing.assert_allclose(J.to_dense().numpy(), expected, **TOLERANCE, strict=True)


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("make", [keras.layers.LSTMCell, keras.layers.SimpleRNNCell])
def test_dropout_is_off_and_leaves_nothing_behind(make: Any, in_graph: bool) -> None:  # noqa: FBT001 - pytest passes it by name
    cell = make(4, dropout=0.5, recurrent_dropout=0.5, seed=3)
    inputs, states = normal(3, 2), [normal(3, 4, seed=k) for k in range(len(keras.tree.flatten(cell.state_size)))]
    cell.build((None, 2))
    before = cell.seed_generator.state.numpy()

    def twice() -> list[Any]:
        J = state_jacobian(cell, inputs, states)
        return [J.to_dense(), J.to_dense()]

    first, second = tf.function(twice, autograph=False)() if in_graph else twice()
    np.testing.assert_array_equal(cell.seed_generator.state.numpy(), before, strict=True)
    assert {getattr(cell, name, None) for name in ("_dropout_mask", "_recurrent_dropout_mask")} == {None}
    without = make(4)
    without.build((None, 2))
    without.set_weights([weight.numpy() for weight in cell.trainable_weights])
    expected = step_jacobians(without, inputs, states, ["hidden"])[0]["hidden"]
    for found in (first, second):
        np.testing.assert_allclose(found.numpy(), expected, **TOLERANCE, strict=True)


def test_a_loop_over_steps_traces_no_graphs() -> None:
    traced: list[bool] = []

    def step(cell: Any, x: Any, h: Any) -> Any:
        traced.append(not tf.executing_eagerly())
        return tf.tanh(x + h @ cell.U)

    cell = FunctionCell(step, 65)
    for count in (1, 2, 3):
        J = state_jacobian(cell, normal(2, 3), [normal(2, 65)])
        dense = J.to_dense().numpy()
        assert not any(traced), count
    # With many points and units a graph takes less time than it takes to trace.
    many = state_jacobian(cell, np.tile(normal(2, 3), (32, 1)), [np.tile(normal(2, 65), (32, 1))]).to_dense().numpy()
    assert any(traced)
    np.testing.assert_allclose(many, np.tile(dense, (32, 1, 1)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        dense, step_jacobians(cell, normal(2, 3), [normal(2, 65)], ["hidden"])[0]["hidden"], rtol=1e-5, atol=1e-6
    )


def test_an_unknown_view_is_named() -> None:
    cell, inputs, states = make_step(BY_ID["lstm"])
    with pytest.raises(ValueError, match=r"^Invalid value for argument `view`\. Expected .*Received: view='hiden'$"):
        state_jacobian(cell, inputs, states, view="hiden")
