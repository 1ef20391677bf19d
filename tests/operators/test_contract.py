"""Laws of every operator under the contract, on matrices of a few units and without any model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tensorflow as tf

from keras_jacmon.operators.autodiff import AutodiffJacobian
from keras_jacmon.operators.block import BlockJacobian, BlockPart
from keras_jacmon.operators.factors import Diagonal, Kernel
from keras_jacmon.operators.formed import FormedJacobian, WrappedJacobian, as_jacobian_operator
from keras_jacmon.operators.structured import StructuredJacobian
from keras_jacmon.structure.index_map import IndexMap, Node
from keras_jacmon.tensors import ChosenPoints, PointRange

if TYPE_CHECKING:
    from collections.abc import Callable

    from keras_jacmon.operators.contract import JacobianOperator

UNITS = 3
H, C, PRODUCT = Node.state(0), Node.state(1), Node.product(0)


def normal(*shape: int, seed: int) -> Any:
    return np.random.default_rng(seed).normal(size=shape)


def diagonal(values: Any) -> Diagonal:
    units = np.arange(UNITS)
    return Diagonal(IndexMap(units[None], UNITS, unchanged=values is None), values and ((units, values[0]),))


def autodiff(points: int, *, independent: bool = True) -> JacobianOperator:
    """Of `tanh(x W + c)`, with an m that is not n."""
    W = tf.constant(normal(4, 2, seed=1))
    point, context = tf.constant(normal(points, 4, seed=2)), [tf.constant(normal(points, 2, seed=3))]
    return AutodiffJacobian(lambda x, c: tf.tanh(x @ W + c[0]), point, context, 2, independent=independent)


def structured(points: int) -> JacobianOperator:
    """Of two new states by two old ones: `h' = a W h + d c`, `c' = b W h + c`."""
    a, b, d = (tf.constant(normal(points, UNITS, seed=seed)) for seed in (4, 5, 6))
    return StructuredJacobian(
        points=points,
        outputs={0: UNITS, 1: UNITS},
        sources={H: UNITS, C: UNITS},
        kernels={PRODUCT: Kernel(tf.constant(normal(UNITS, UNITS, seed=7)))},
        outer={
            (0, PRODUCT): diagonal((a,)),
            (1, PRODUCT): diagonal((b,)),
            (0, C): diagonal((d,)),
            (1, C): diagonal(None),
        },
        inner={(PRODUCT, H): diagonal(None)},
        dtype=tf.float64,
    )


def chain(points: int) -> JacobianOperator:
    """Of `h' = a W (b V h)`: a product of a product."""
    a, b = (tf.constant(normal(points, UNITS, seed=seed)) for seed in (8, 9))
    second = Node.product(1)
    return StructuredJacobian(
        points=points,
        outputs={0: UNITS},
        sources={H: UNITS},
        kernels={node: Kernel(tf.constant(normal(UNITS, UNITS, seed=10))) for node in (PRODUCT, second)},
        outer={(0, second): diagonal((a,))},
        inner={(PRODUCT, H): diagonal(None), (second, PRODUCT): diagonal((b,))},
        dtype=tf.float64,
    )


def formed(points: int) -> JacobianOperator:
    return FormedJacobian(tf.constant(normal(points, 2, 4, seed=11)))


def block(points: int) -> JacobianOperator:
    """Of parts of other kinds, with a block of zeros."""
    left = FormedJacobian(tf.constant(normal(points, 5, UNITS, seed=12)))
    parts = [BlockPart(chain(points), (0,), (1,)), BlockPart(left, (0, 1), (0,))]
    return BlockJacobian(parts, [UNITS, 2], [UNITS, UNITS])


def wrapped(points: int) -> JacobianOperator:
    return as_jacobian_operator(tf.linalg.LinearOperatorDiag(tf.constant(normal(points, UNITS, seed=13))))


MAKERS: dict[str, Callable[[int], JacobianOperator]] = {
    "autodiff": autodiff,
    "structured": structured,
    "chain": chain,
    "formed": formed,
    "block": block,
    "wrapped": wrapped,
}

each_operator = pytest.mark.parametrize("name", MAKERS)
# A map over the columns of J loses the shape of what has no points at all, which no caller asks for.
each_size = pytest.mark.parametrize(
    ("name", "points"), [(name, points) for name in MAKERS for points in (5, 1, 0) if (name, points) != ("autodiff", 0)]
)


def in_graph(numbers: Callable[[], Any]) -> Any:
    """The numbers from within a graph, where operators are used."""
    return tf.nest.map_structure(lambda x: x.numpy(), tf.function(numbers, autograph=False)())


@each_size
def test_products_are_those_with_the_dense_matrix(name: str, points: int) -> None:
    def numbers() -> Any:
        J = MAKERS[name](points)
        m, n = J.shape[-2:]
        v, w = tf.constant(normal(points, n, seed=14)), tf.constant(normal(points, m, seed=15))
        columns = J.matmul(tf.eye(n, batch_shape=[points], dtype=tf.float64))
        rows = J.products(tf.eye(n, batch_shape=[points], dtype=tf.float64))
        basis = tf.broadcast_to(tf.eye(m, dtype=tf.float64)[:, None], [m, points, m])
        in_front = J.columns(basis, adjoint=True), J.columns(basis[:1], adjoint=True)
        return J.to_dense(), columns, rows, in_front, v, J.matvec(v), w, J.matvec(w, adjoint=True)

    dense, columns, rows, in_front, v, image, w, pulled = in_graph(numbers)
    np.testing.assert_allclose(columns, dense, atol=1e-12, strict=True)
    np.testing.assert_allclose(rows, np.swapaxes(dense, 1, 2), atol=1e-12, strict=True)
    np.testing.assert_allclose(in_front[0], np.swapaxes(dense, 0, 1), atol=1e-12, strict=True)
    np.testing.assert_allclose(in_front[1], np.swapaxes(dense, 0, 1)[:1], atol=1e-12, strict=True)
    np.testing.assert_allclose(image, np.einsum("bik,bk->bi", dense, v), atol=1e-12, strict=True)
    np.testing.assert_allclose(np.sum(w * image, axis=-1), np.sum(pulled * v, axis=-1), atol=1e-12, strict=True)


@each_size
def test_sums_are_those_of_the_entries(name: str, points: int) -> None:
    def numbers() -> Any:
        J = MAKERS[name](points)
        assert J.has_closed_form == (name == "structured")
        return J.to_dense(), J.entry_sum(), J.spread()

    dense, entry_sum, spread = in_graph(numbers)
    np.testing.assert_allclose(entry_sum, dense.sum(axis=(1, 2)), atol=1e-12, strict=True)
    np.testing.assert_allclose(spread, np.prod(dense.shape[1:]) * dense.var(axis=(1, 2)), atol=1e-12, strict=True)


def nearly_equal(*, before: bool, after: bool) -> StructuredJacobian:
    """The Jacobians of 64 units at 5 points, with derivatives before the kernel, after it, or neither."""
    n = 64

    def near_one(*shape: int, seed: int) -> Any:
        return (1.0 + 1e-4 * normal(*shape, seed=seed)).astype(np.float32)

    def factor(seed: int, *, varies: bool) -> Diagonal:
        units = np.arange(n)
        pieces = ((units, tf.constant(near_one(5, n, seed=seed))),) if varies else None
        return Diagonal(IndexMap(units[None], n, unchanged=not varies), pieces)

    return StructuredJacobian(
        points=5,
        outputs={0: n},
        sources={H: n},
        kernels={PRODUCT: Kernel(tf.constant(near_one(n, n, seed=18)))},
        outer={(0, PRODUCT): factor(19, varies=after)},
        inner={(PRODUCT, H): factor(20, varies=before)},
        dtype=tf.float32,
    )


@pytest.mark.parametrize("scaled", [(False, False), (True, False), (False, True), (True, True)])
def test_entries_that_are_nearly_equal_keep_their_spread(scaled: tuple[bool, bool]) -> None:
    """In single precision the difference of two sums would be zero, or less."""

    def numbers() -> Any:
        J = nearly_equal(before=scaled[0], after=scaled[1])
        return J.to_dense(), J.spread()

    dense, spread = in_graph(numbers)
    np.testing.assert_allclose(spread, 64**2 * dense.astype(np.float64).var(axis=(1, 2)), rtol=2e-3)


@pytest.mark.parametrize(("scaled", "products"), [((False, True), 0), ((True, False), 1), ((True, True), 3)])
def test_the_spread_takes_few_products_with_a_kernel(scaled: tuple[bool, bool], products: int) -> None:
    """Each takes as long as a step of the cell."""
    with tf.Graph().as_default() as graph:
        nearly_equal(before=scaled[0], after=scaled[1]).spread()
    factors = [operation.inputs for operation in graph.get_operations() if operation.type == "MatMul"]
    assert [right.shape for left, right in factors if left.shape[0] == 5].count([64, 64]) == products


@pytest.mark.parametrize("in_a_loop", [False, True])
def test_a_kernel_is_transposed_once_and_only_for_a_loop(*, in_a_loop: bool) -> None:
    matrix, vectors = normal(6, 8, seed=0), normal(3, 2, 8, seed=1)
    transposed: list[list[int]] = []

    @tf.function(autograph=False)
    def run(matrix: tf.Tensor, vectors: tf.Tensor) -> tf.Tensor:
        kernel, graph = Kernel(matrix), matrix.graph
        products = tf.map_fn(kernel.backward, vectors) if in_a_loop else kernel.backward(vectors)
        transposed.extend(op.inputs[0].shape.as_list() for op in graph.get_operations() if op.type == "Transpose")
        return products

    np.testing.assert_allclose(run(tf.constant(matrix), tf.constant(vectors)), vectors @ matrix.T, rtol=1e-5)
    assert ([6, 8] in transposed) == in_a_loop


@each_operator
def test_blocks_have_no_entry_in_common_and_make_up_the_whole(name: str) -> None:
    def numbers() -> Any:
        J = MAKERS[name](5)
        return J.to_dense(), [part.to_dense() for part in J.blocks()]

    dense, parts = in_graph(numbers)
    squares = sum((part**2).sum(axis=(1, 2)) for part in parts)
    np.testing.assert_allclose(squares, (dense**2).sum(axis=(1, 2)), atol=1e-12, strict=True)


@pytest.mark.parametrize("chosen", [[4, 0, 0], [2]])
@each_operator
def test_some_points_are_those_of_the_dense_matrices(name: str, chosen: list[int]) -> None:
    def numbers() -> Any:
        J = MAKERS[name](5)
        taken = J.take(ChosenPoints(tf.constant(chosen, tf.int32))), J.take(PointRange(1, 2))
        return J.to_dense(), [some.to_dense() for some in taken if some is not None]

    dense, taken = in_graph(numbers)
    assert bool(taken) == (name != "wrapped")
    for found, expected in zip(taken, (dense[chosen], dense[1:3]), strict=False):
        np.testing.assert_allclose(found, expected, atol=1e-12, strict=True)


@pytest.mark.parametrize("name", ["structured", "chain", "formed", "block"])
def test_no_points_can_be_taken(name: str) -> None:
    def numbers() -> Any:
        taken = MAKERS[name](5).take(ChosenPoints(tf.zeros([0], tf.int32)))
        assert taken is not None
        return taken.to_dense()

    assert in_graph(numbers).shape == (0, *MAKERS[name](5).shape[1:])


def test_points_that_depend_on_each_other_cannot_be_taken() -> None:
    part = autodiff(5, independent=False)
    assert part.take(PointRange(0, 2)) is None
    assert BlockJacobian([BlockPart(part, (0,), (0,))], [2], [4]).take(PointRange(0, 2)) is None


def test_the_blocks_of_a_structure() -> None:
    def numbers() -> Any:
        J = structured(5)
        corner = J.block(0, 1)
        assert corner is not None
        assert J.block(0, 1) is corner
        return J.to_dense(), corner.to_dense()

    dense, corner = in_graph(numbers)
    np.testing.assert_array_equal(corner, dense[:, :UNITS, UNITS:])
    assert formed(5).block(0, 0) is None


def test_a_matrix_can_be_taken_apart_and_any_other_operator_works_as_a_whole() -> None:
    matrix = tf.linalg.LinearOperatorFullMatrix(normal(5, 2, 4, seed=16))
    assert isinstance(as_jacobian_operator(matrix), FormedJacobian)
    assert isinstance(wrapped(5), WrappedJacobian)
    operator = structured(5)
    assert as_jacobian_operator(operator) is operator
