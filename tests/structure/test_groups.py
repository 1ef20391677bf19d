"""Structure behind reductions over groups of units, constant orders of units, and sparse kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import FEATURES, FunctionCell, normal
from structure_laws import assert_structured_as_autodiff, double_precision, structured_blocks

from keras_jacmon.cell.cell_graph import CellGraph
from keras_jacmon.cell.step import CellStep
from keras_jacmon.structure.index_map import Node
from keras_jacmon.structure.interpreter import find_structure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with double_precision():
        yield


def both(cell: Any, h: Any) -> Any:
    return tf.concat([h @ cell.U, h @ cell.V], axis=-1)


ORDER = tf.constant([2, 0, 3, 1])
# TensorFlow keeps constants of more than 128 entries outside of a graph.
LONG_ORDER = tf.constant(np.random.default_rng(0).permutation(200))
SPARSE = tf.sparse.from_dense(tf.constant(np.triu(normal(4, 4, seed=1)), tf.float64))
# One entry stands twice; the sum of both counts.
DOUBLED = tf.SparseTensor([[0, 1], [0, 1], [2, 3], [3, 0]], tf.constant([1.0, 2.0, -1.0, 0.5], tf.float64), [4, 4])


def of_weights(cell: Any) -> tf.SparseTensor:
    return tf.SparseTensor(SPARSE.indices, tf.gather_nd(cell.U, SPARSE.indices), SPARSE.dense_shape)


dense_with_sparse = tf.sparse.sparse_dense_matmul

STRUCTURED: dict[str, Callable[[Any, Any, Any], Any]] = {
    "maxout": lambda c, x, h: x + 0.5 * tf.reduce_max(tf.reshape(both(c, h), [-1, 4, 2]), axis=-1),
    "keras_max": lambda c, x, h: x + keras.ops.max(keras.ops.reshape(both(c, h), (-1, 2, 4)), axis=1),
    "minimum_with_axes_kept": lambda c, x, h: tf.tanh(
        x + tf.reshape(tf.reduce_min(tf.reshape(both(c, h), [-1, 4, 2]), axis=2, keepdims=True), [-1, 4])
    ),
    "product": lambda c, x, h: tf.tanh(x + tf.reduce_prod(tf.reshape(both(c, h), [-1, 2, 4]), axis=-2)),
    "sums_of_the_state": lambda c, x, h: tf.tanh(
        x + h @ c.U + tf.pad(tf.reduce_sum(tf.reshape(h, [-1, 2, 2]), axis=1), [[0, 0], [0, 2]])
    ),
    "mean_of_all": lambda c, x, h: tf.tanh(x + tf.reduce_mean(tf.sin(h), axis=-1, keepdims=True) @ c.U[:1]),
    "keras_take": lambda c, x, h: keras.ops.take(tf.tanh(x + h @ c.U), ORDER, axis=-1),
    "inverse_order": lambda c, x, h: tf.gather(tf.tanh(x + h @ c.U), tf.math.invert_permutation(ORDER), axis=-1),
    "order_by_sorting": lambda c, x, h: tf.gather(tf.tanh(x + h @ c.U), tf.argsort(ORDER), axis=-1),
    "long_order": lambda c, x, h: tf.gather(tf.tanh(x + h @ c.U), tf.argsort(LONG_ORDER[:4]), axis=-1),
    "sorted": lambda c, x, h: tf.sort(tf.tanh(x + h @ c.U), axis=-1),
    "sorted_state": lambda c, x, h: tf.tanh(x + keras.ops.sort(h, axis=-1)) - tf.sort(h, direction="DESCENDING") @ c.U,
    "rolled": lambda c, x, h: tf.roll(tf.tanh(x + h @ c.U), tf.reduce_sum(ORDER), axis=-1) + 0.1 * h,
    "sparse_kernel": lambda _, x, h: tf.tanh(x + tf.transpose(dense_with_sparse(SPARSE, h, adjoint_b=True))),
    "sparse_kernel_of_a_transposed_state": lambda _, x, h: tf.tanh(
        x + tf.transpose(dense_with_sparse(SPARSE, tf.transpose(h), adjoint_a=True))
    ),
    "state_first": lambda c, x, h: tf.tanh(x + dense_with_sparse(h @ c.U, DOUBLED)),
    "sparse_kernel_of_weights": lambda c, x, h: tf.tanh(x + dense_with_sparse(h, of_weights(c))),
}


def built(function: Any, units: int = 4) -> Any:
    cell = FunctionCell(function, units)
    cell.build((1, FEATURES))
    return cell


@pytest.mark.fast
@pytest.mark.parametrize("name", STRUCTURED)
def test_the_structure_is_found_and_is_autodiff(name: str) -> None:
    cell = built(STRUCTURED[name])
    x, h = (tf.constant(normal(7, n), tf.float64) for n in (FEATURES, 4))
    assert set(assert_structured_as_autodiff(cell, x, [h], 1e-10).values()) == {None}
    assert find_structure(CellGraph(CellStep(cell, [h]), x, [h])).point_by_point


def test_units_made_from_many_units_have_no_closed_form_and_are_right() -> None:
    cell = built(lambda c, x, h: tf.tanh(x + tf.reduce_max(h @ c.U, axis=-1, keepdims=True) @ c.V[:1]), units=20)
    x, h = (tf.constant(normal(2, n), tf.float64) for n in (FEATURES, 20))
    assert set(assert_structured_as_autodiff(cell, x, [h], 1e-10).values()) == {None}


def test_an_order_that_may_change_is_no_structure() -> None:
    order = tf.Variable([2, 0, 3, 1], trainable=False)
    cell = built(lambda c, x, h: tf.gather(tf.tanh(x + h @ c.U), order, axis=-1))
    h = tf.zeros((3, 4), tf.float64)
    structure = find_structure(CellGraph(CellStep(cell, [h]), tf.zeros((3, FEATURES), tf.float64), [h]))
    assert "Gather" in str(structure.reason(0, Node.state(0)))


@pytest.mark.fast
def test_the_reason_is_what_the_cell_says_and_not_the_lines_of_keras_around_it() -> None:
    def knowing_its_rows(cell: Any, x: Any, h: Any) -> Any:
        if x.shape[0] is None:
            raise ValueError("this cell must know its rows")
        return tf.tanh(x + h @ cell.U)

    x, h = (tf.constant(normal(7, n), tf.float64) for n in (FEATURES, 4))
    with pytest.raises(NotImplementedError, match=r"^it cannot be .* number of points: this cell must know its rows$"):
        structured_blocks(built(knowing_its_rows), x, [h])
