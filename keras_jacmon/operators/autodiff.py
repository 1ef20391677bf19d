"""Jacobians by automatic differentiation of any function of a batch of points."""

import contextlib
from collections.abc import Callable
from typing import final

import tensorflow as tf

from keras_jacmon.graphs.trace import trace
from keras_jacmon.operators.contract import JacobianOperator
from keras_jacmon.operators.formed import FormedJacobian
from keras_jacmon.tensors import Points, known_sizes, spec_of, swapped

Product = Callable[[tf.Tensor], tf.Tensor]

# The errors by which TensorFlow says that a gradient has no gradient.
_NOT_TWICE = (NotImplementedError, LookupError, TypeError, ValueError)

# Maximum number of points, repeated for each vector, that are evaluated without a graph, in less time than it takes to
# trace one.
_EAGER_POINTS = 4096


@final
class AutodiffJacobian(JacobianOperator):
    """`J[b, i, k] = d function(x)[b, i] / d x[b, k]` at one point for each `b`, by automatic differentiation.

    Nothing of size `(i, k)` is formed unless `to_dense` is called, which takes one derivative pass per row of J and
    `4 * points * i * k` bytes.

    Products with `Jᵀ` are one backward pass. Products with `J` are the tape applied twice: the gradient
    `g(u) = Jᵀ u` is linear in `u`, so the derivative of `g` along `v` is `J v`. `tf.autodiff.ForwardAccumulator` would
    be the direct way, but it differentiates straight through a `tf.custom_gradient` as if it were not there, so its
    `J v` is not the derivative that training uses; and it knows no `tf.map_fn`. Where the tape cannot be applied
    twice (`tf.recompute_grad`), J is formed and multiplied. Where it can but gives something else (TensorFlow takes
    the second derivative of a max-pooling for zero, and a gradient that is clipped is not linear), only a test can
    tell; see `formed`.

    Args:
        function: Maps points `(points, n)` and the context to `(points, m)`, each point by itself.
        point: Tensor `(points, n)`, at which the function is differentiated.
        context: List of tensors `(points, ...)`, held constant.
        range_dimension: Integer, m.
        independent: Boolean, True if each value of the function depends on the same point alone. Otherwise points are
            never repeated, and products hold for all points changing together. Defaults to True.
        for_many: Boolean, True to evaluate the function now, once for products with many vectors. Defaults to True.
        twice: Boolean, True if the tape may be applied twice. Defaults to True.
        vectorized: Boolean, True to take products with several vectors by `tf.vectorized_map`, which is fast, and wrong
            for some operations (a roll along a negative axis): only a test can tell. False to take them one by one.
            Defaults to False.

    References:
        The forward product from two backward ones: J. Townsend, "A new trick for calculating Jacobian vector
        products", 2017.
    """

    def __init__(
        self,
        function: Callable[[tf.Tensor, list[tf.Tensor]], tf.Tensor],
        point: tf.Tensor,
        context: list[tf.Tensor],
        range_dimension: int,
        *,
        independent: bool = True,
        for_many: bool = True,
        twice: bool = True,
        vectorized: bool = False,
    ) -> None:
        parameters = {
            "function": function,
            "point": point,
            "context": context,
            "range_dimension": range_dimension,
            "independent": independent,
            "for_many": for_many,
            "twice": twice,
            "vectorized": vectorized,
        }
        super().__init__(dtype=point.dtype, parameters=parameters, name="autodiff_jacobian")
        self._function = function
        self._point = point
        self._context = context
        self._range_dimension = range_dimension
        self._independent = independent
        self._twice, self._vectorized = twice, vectorized
        self._products: tuple[Product, Product] | None = None
        self._products = self._linearised() if for_many and not tf.executing_eagerly() else None

    def _shape(self) -> tf.TensorShape:
        return tf.TensorShape([self._point.shape[0], self._range_dimension, self._point.shape[1]])

    def _shape_tensor(self) -> tf.Tensor:
        return tf.stack([tf.shape(self._point)[0], self._range_dimension, self._point.shape[1]])

    def _matmul(self, x: tf.Tensor, adjoint: bool = False, adjoint_arg: bool = False) -> tf.Tensor:  # noqa: FBT001, FBT002 - as in the base class
        x = tf.linalg.adjoint(x) if adjoint_arg else x
        if x.shape[-1] == 1:
            return tf.expand_dims(self._matvec(tf.squeeze(x, axis=-1), adjoint=adjoint), axis=-1)
        return tf.transpose(self.columns(tf.transpose(x, [2, 0, 1]), adjoint=adjoint), [1, 2, 0])

    def _matvec(self, x: tf.Tensor, adjoint: bool = False) -> tf.Tensor:  # noqa: FBT001, FBT002 - as in the base class
        return self._product(adjoint=adjoint)(x)

    def products(self, vectors: tf.Tensor, *, adjoint: bool = False) -> tf.Tensor:
        """The products with rows."""
        return swapped(self.columns(swapped(vectors), adjoint=adjoint))

    @property
    def is_vectorized(self) -> bool:
        """True if products with several vectors are taken by `tf.vectorized_map`, wherever it knows the operations."""
        return self._vectorized and self._products is not None

    def take(self, points: Points) -> "AutodiffJacobian | None":
        """The operator of some of the points; None if points depend on each other."""
        if not self._independent:
            return None
        point, *context = [points.of(t) for t in (self._point, *self._context)]
        return self._at(point, context)

    def _at(self, point: tf.Tensor, context: list[tf.Tensor]) -> "AutodiffJacobian":
        """The Jacobian of the same function at other points."""
        return AutodiffJacobian(
            self._function, point, context, self._range_dimension, twice=self._twice, vectorized=self._vectorized
        )

    def columns(self, vectors: tf.Tensor, *, adjoint: bool = False) -> tf.Tensor:
        """The products with several vectors: as derivatives have them, so that nothing is turned about."""
        if tf.executing_eagerly():
            return self._columns_eagerly(vectors, adjoint=adjoint)
        if self.is_vectorized:
            # The derivative is taken once, with an axis for the columns in front. Some operations are not known to it.
            with contextlib.suppress(ValueError):
                products = tf.vectorized_map(self._product(adjoint=adjoint), vectors)
                # Of no points at all it may lose the number of units.
                units = self._point.shape[1] if adjoint else self._range_dimension
                return tf.reshape(products, [*known_sizes(vectors)[:2], units])
        if self._products or not self._independent:
            return tf.map_fn(self._product(adjoint=adjoint), vectors)
        # `vectorized_map` fails on some derivatives of control flow, so the points are repeated instead.
        return self._columns_of_copies(vectors, adjoint=adjoint)

    def _columns_eagerly(self, vectors: tf.Tensor, *, adjoint: bool) -> tf.Tensor:
        """As `columns`, in a graph if that is worth tracing one for a single use."""
        if self._independent and vectors.shape[0] * vectors.shape[1] <= _EAGER_POINTS:
            return self._columns_of_copies(vectors, adjoint=adjoint)

        def multiply(vectors: tf.Tensor) -> tuple[tf.Tensor, None]:
            here = AutodiffJacobian(**self.parameters)
            return here.columns(vectors, adjoint=adjoint), None

        return trace(multiply, [spec_of(vectors)])(vectors)

    def _columns_of_copies(self, vectors: tf.Tensor, *, adjoint: bool) -> tf.Tensor:
        """As `columns`, by a single product at the points, repeated for each column."""
        columns, points = tf.shape(vectors)[0], tf.shape(vectors)[1]
        point, *context = [tf.tile(t, [columns] + [1] * (t.shape.rank - 1)) for t in (self._point, *self._context)]
        product = self._at(point, context).matvec(
            tf.reshape(vectors, [columns * points, vectors.shape[2]]), adjoint=adjoint
        )
        return tf.reshape(product, [columns, points, product.shape[1]])

    def _to_dense(self) -> tf.Tensor:
        identity = tf.eye(self._range_dimension, batch_shape=[tf.shape(self._point)[0]], dtype=self.dtype)
        return tf.linalg.matrix_transpose(self._matmul(identity, adjoint=True))

    def formed(self) -> "FormedJacobian":
        """J as matrices, for products with both J and Jᵀ."""
        return FormedJacobian(self._formed_by_rows())

    def _formed_by_rows(self) -> tf.Tensor:
        """J from its rows, one at a time: only one derivative is in memory at once."""
        m, points = self._range_dimension, tf.shape(self._point)[0]
        basis = tf.broadcast_to(tf.eye(m, dtype=self.dtype)[:, None], [m, points, m])

        def row(vectors: tf.Tensor) -> tf.Tensor:
            # The function is evaluated here and not outside, for the derivative of control flow.
            return self._pull()(vectors)

        return tf.transpose(tf.map_fn(row, basis, parallel_iterations=1), [1, 0, 2])

    def _linearised(self) -> tuple[Product, Product] | None:
        """Both products, with the function evaluated here: a loop that calls them does not evaluate it again.

        None if the function has control flow, whose derivative must stand in the graph of its evaluation.
        """
        graph = tf.compat.v1.get_default_graph()
        before = len(graph.get_operations())
        products = self._push(), self._pull()
        has_control_flow = any(_calls_a_function(operation) for operation in graph.get_operations()[before:])
        return None if has_control_flow else products

    def _product(self, *, adjoint: bool) -> Product:
        if self._products:
            return self._products[adjoint]
        return self._pull() if adjoint else self._push()

    def _pull(self) -> Product:
        """The product with Jᵀ: (points, m) -> (points, n)."""
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(self._point)
            value = self._function(self._point, self._context)
        return lambda vectors: _gradient(tape, value, self._point, vectors)

    def _push(self) -> Product:
        """The product with J: (points, n) -> (points, m)."""
        if self._twice:
            with contextlib.suppress(*_NOT_TWICE):
                product = self._forward()
                # Some gradients have none of their own, which TensorFlow does not say before it is asked.
                product(self._point)
                return product
        dense = self._formed_by_rows()
        return lambda vectors: tf.linalg.matvec(dense, vectors)

    def pulled(self, vectors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The function's value, and the product of Jᵀ with vectors `(points, m)`."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(self._point)
            value = self._function(self._point, self._context)
        return value, _gradient(tape, value, self._point, vectors)

    def _forward(self) -> Product:
        """The product with J, by the tape applied twice; raises where that cannot be."""
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as outer:
            with tf.GradientTape(watch_accessed_variables=False) as inner:
                inner.watch(self._point)
                value = self._function(self._point, self._context)
            covector = tf.zeros_like(value)
            outer.watch(covector)
            pulled = _gradient(inner, value, self._point, covector)
        return lambda vectors: _gradient(outer, pulled, covector, vectors)


def _calls_a_function(operation: tf.Operation) -> bool:
    """True for a branch, a loop, a map or a call of a `tf.function`."""
    return any(attribute.type == "func" for attribute in operation.op_def.attr)


def _gradient(tape: tf.GradientTape, value: tf.Tensor, source: tf.Tensor, vectors: tf.Tensor) -> tf.Tensor:
    gradient = tape.gradient(value, source, output_gradients=vectors, unconnected_gradients="zero")
    # A gather inside the cell gives a sparse gradient.
    gradient = tf.convert_to_tensor(gradient)
    # Some gradients lose it.
    gradient.set_shape(source.shape)
    return gradient
