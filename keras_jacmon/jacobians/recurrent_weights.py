"""The recurrent weights of a cell, and the derivatives of a step by them, point by point."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import tensorflow as tf

from keras_jacmon.cell.cell_graph import CellGraph
from keras_jacmon.cell.kind import names_of
from keras_jacmon.cell.step import CellStep
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.jacobians.views import floating_states, side_by_side
from keras_jacmon.structure.ops import OpKind, is_linear, op_of
from keras_jacmon.tensors import joined

# Operations that hand on a weight as it is.
_PASSING = ("Cast", "Identity", "ReadVariableOp")

# Branches. TensorFlow refuses to differentiate copies of one in a graph that has a derivative of it already.
_BRANCHES = ("If", "StatelessIf", "Case", "StatelessCase")

# Kinds of operations that bring several operands together without multiplying them.
_APART = (OpKind.MOVES, OpKind.COPIES, OpKind.BROADCASTS)


@dataclass(frozen=True, eq=False)
class RecurrentWeights:
    """The recurrent weights of a cell: those that multiply its states.

    In the graph of a step, an operation that is no sum takes a tensor that depends on the old states and another one
    that depends on the weight, but not on the states: the product of a state and a recurrent kernel, for example. A
    kernel for the inputs and a bias are only added to such a product. Of a step whose graph is not understood, all
    weights are taken; those that are no part of it have a derivative of zero.

    Attributes:
        step: `CellStep` with a tensor for each weight.
        places: Tuple of integers, the positions of the recurrent weights among the weights of the step.
        graph: `CellGraph` of the step; None if it is not understood.
        products: Tuple of operations of the graph, in its order: the matrix products by the recurrent weights, one for
            each weight, if nothing else takes these weights; otherwise empty. Then the derivative by a weight is the
            outer product of the factor that depends on the states and of the derivative by the product.
    """

    step: CellStep
    places: tuple[int, ...]
    graph: CellGraph | None
    products: tuple[tf.Operation, ...]

    @classmethod
    def of(cls, step: CellStep, graph: CellGraph | None) -> "RecurrentWeights":
        """Finds the recurrent weights of a step.

        Args:
            step: `CellStep`.
            graph: `CellGraph` of the step; None if it is not understood.
        """
        given = step.with_tensors()
        floating = [place for place, (_, tensor) in enumerate(given.weights) if tensor.dtype.is_floating]
        if graph is None:
            return cls(given, tuple(floating), None, ())
        inner = graph.weights
        found = _multiplying(graph, {inner[place].name: place for place in floating if place in inner})
        operations = [_product_of(graph, inner[place]) for place in found]
        order = {operation.name: position for position, operation in enumerate(graph.operations)}
        products = [operation for operation in operations if operation is not None]
        # A branch or a loop can be differentiated only once in a graph.
        whole = len(products) == len(found) and not _has_control_flow(graph)
        return cls(given, found, graph, tuple(sorted(products, key=lambda op: order[op.name])) if whole else ())

    @property
    def has_branch(self) -> bool:
        """True if the step is known to choose between branches by values."""
        return self.graph is not None and any(op.type in _BRANCHES for op in self.graph.operations)

    @property
    def may_be_vectorized(self) -> bool:
        """True if the step is known to have no control flow, which `tf.vectorized_map` gets wrong or fails on."""
        return self.graph is not None and not _has_control_flow(self.graph)

    @property
    def tensors(self) -> list[tf.Tensor]:
        """The recurrent weights."""
        return [self.step.weights[place][1] for place in self.places]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the recurrent weights, with the name of their layer where several weights have one name."""
        names = names_of([weight for weight, _ in self.step.weights])
        return tuple(names[place] for place in self.places)

    @property
    def count(self) -> int:
        """The number of entries of all recurrent weights."""
        return sum(int(tensor.shape.num_elements()) for tensor in self.tensors)

    @property
    def outputs(self) -> int:
        """The number of results of the `products` at each point."""
        return sum(int(operation.inputs[1].shape[1]) for operation in self.products)

    def size(self) -> tf.Tensor:
        """The root mean square of the entries, a float64 scalar."""
        squares = [tf.reduce_sum(tf.square(tf.cast(tensor, tf.float64))) for tensor in self.tensors]
        return tf.sqrt(tf.add_n(squares) / self.count)

    def factors(self, points: PointBatch, vectors: tf.Tensor) -> list[tuple[tf.Tensor, tf.Tensor]]:
        """The derivatives of the step by the weights as outer products, where there are `products`.

        Args:
            points: `PointBatch`.
            vectors: Tensor `(points, vectors, n)` by which the new states are multiplied.

        Returns:
            For each product a pair: the derivatives by the result, `(points, vectors, outputs)`, and the factor that
            depends on the states, `(points, operands)`. The derivative by the weight is their outer product.
        """
        new, shifts, operands = self._shifted(points)
        # A tape does not see the operations of a replay.
        found = [tf.gradients(new, shifts, v, unconnected_gradients="zero") for v in tf.unstack(vectors, axis=1)]
        return [
            (tf.stack(lefts, axis=1), operand)
            for lefts, operand in zip(zip(*found, strict=True), operands, strict=True)
        ]

    def _shifted(self, points: PointBatch) -> tuple[tf.Tensor, list[tf.Tensor], list[tf.Tensor]]:
        """Takes a step with a shift of zero added to each of the `products`.

        Returns:
            The new states side by side, the shifts, and the factors of the products that depend on the states.
        """
        if self.graph is None:
            raise RuntimeError("A step without a graph was asked for its products.")
        feeds = {self.graph.step_inputs.name: points.inputs}
        feeds |= {tensor.name: state for tensor, state in zip(self.graph.states, points.states, strict=True)}
        operands, shifts = [], []
        for operation in self.products:
            operand, matrix = self.graph.replay(list(operation.inputs), feeds)
            shift = tf.zeros([tf.shape(operand)[0], matrix.shape[1]], matrix.dtype)
            feeds[operation.outputs[0].name] = operand @ matrix + shift
            operands.append(operand)
            shifts.append(shift)
        return self._side_by_side(self.graph.replay(self.graph.new_states, feeds)), shifts, operands

    def derivatives(self, points: PointBatch, vectors: tf.Tensor, *, vectorized: bool) -> tf.Tensor:
        """The derivatives of the step by the weights, each point by itself.

        Args:
            points: `PointBatch`.
            vectors: Tensor `(points, vectors, n)` by which the new states are multiplied.
            vectorized: Boolean, True to take all points at once by `tf.vectorized_map`, which is fast, and wrong for
                some operations; see `deviation`. False to take them one by one.

        Returns:
            Tensor `(points, vectors, entries of the weights)`.

        Raises:
            ValueError: If `tf.vectorized_map` does not know an operation.
        """
        if vectorized:

            def at_point(given: tuple[tf.Tensor, list[tf.Tensor], tf.Tensor]) -> tf.Tensor:
                inputs, states, here = given
                return self._products(inputs[None], [state[None] for state in states], here[:, None])

            found = tf.vectorized_map(at_point, (points.inputs, list(points.states), vectors))
        else:
            # Each pair of a point and a vector by itself: a derivative of control flow must stand beside its only
            # evaluation.
            repeated = [tf.repeat(part, vectors.shape[1], axis=0) for part in (points.inputs, *points.states)]
            pairs = (repeated[0], repeated[1:], tf.reshape(vectors, [-1, vectors.shape[2]]))

            def at_pair(given: tuple[tf.Tensor, list[tf.Tensor], tf.Tensor]) -> tf.Tensor:
                inputs, states, here = given
                return self._products(inputs[None], [state[None] for state in states], here[None, None])[0]

            found = tf.map_fn(at_pair, pairs, fn_output_signature=vectors.dtype)
        return tf.reshape(found, [-1, vectors.shape[1], self.count])

    def _products(self, inputs: tf.Tensor, states: Sequence[tf.Tensor], vectors: tf.Tensor) -> tf.Tensor:
        """Returns the derivatives by the weights, summed over points, `(vectors, entries of the weights)`.

        Args:
            inputs: Tensor `(points, ...)`.
            states: Sequence of tensors `(points, ...)`.
            vectors: Tensor `(vectors, points, n)`.
        """
        weights = [tf.identity(tensor) for tensor in self.tensors]
        new = self._new_states(inputs, states, weights)
        found = [tf.gradients(new, weights, v, unconnected_gradients="zero") for v in tf.unstack(vectors)]
        # A gather gives a sparse gradient, and a weight in half precision one in half precision.
        return tf.stack(
            [
                joined([tf.cast(tf.reshape(tf.convert_to_tensor(part), [-1]), new.dtype) for part in parts])
                for parts in found
            ]
        )

    def _new_states(self, inputs: tf.Tensor, states: Sequence[tf.Tensor], weights: Sequence[tf.Tensor]) -> tf.Tensor:
        """Takes a step with other tensors as the recurrent weights; the new states stand side by side."""
        own = dict(zip(self.places, weights, strict=True))
        inner = {} if self.graph is None else {place: self.graph.weights[place] for place in own}
        if self.graph is None or any(tensor.dtype == tf.resource for tensor in inner.values()):
            pairs = [(weight, own.get(place, tensor)) for place, (weight, tensor) in enumerate(self.step.weights)]
            return self._side_by_side(self.step.with_weights(pairs)(inputs, states))
        feeds = {self.graph.step_inputs.name: inputs}
        feeds |= {tensor.name: state for tensor, state in zip(self.graph.states, states, strict=True)}
        feeds |= {inner[place].name: tensor for place, tensor in own.items()}
        return self._side_by_side(self.graph.replay(self.graph.new_states, feeds))

    def deviation(self, points: PointBatch, vectors: tf.Tensor, found: tf.Tensor) -> tf.Tensor:
        """Compares the `derivatives` with one backward pass of all points together.

        A sum with unlike shares finds values that are wrong, and those that belong to another point.

        Args:
            points: `PointBatch`.
            vectors: Tensor `(points, vectors, n)`, as given to `derivatives`.
            found: Tensor, the result of `derivatives`.

        Returns:
            Scalar tensor, the relative difference.
        """
        shares = 1 + tf.sqrt(tf.range(tf.shape(vectors)[0] * vectors.shape[1], dtype=vectors.dtype)) % 1
        shares = tf.reshape(shares, [-1, vectors.shape[1], 1])
        together = self._products(points.inputs, points.states, tf.reduce_sum(shares * vectors, axis=1)[None])[0]
        difference = tf.norm(tf.reduce_sum(shares * found, axis=[0, 1]) - together)
        return tf.math.divide_no_nan(difference, tf.maximum(tf.norm(shares * found), tf.norm(together)))

    @staticmethod
    def _side_by_side(new: Sequence[tf.Tensor]) -> tf.Tensor:
        return side_by_side([new[place] for place in floating_states(new)])


def _has_control_flow(graph: CellGraph) -> bool:
    """True for a branch, a loop, a map or a call of a `tf.function`."""
    return any(part.type == "func" for operation in graph.operations for part in operation.op_def.attr)


def _multiplying(graph: CellGraph, weights: dict[str, int]) -> tuple[int, ...]:
    """Returns the positions of the weights that multiply states, from the positions by name of their tensors."""
    needed = graph.between((), graph.new_states)[0]
    of_states = {graph.states[place].name for place in floating_states(graph.states)}
    of_weights = {name: {place} for name, place in weights.items()}
    found: set[int] = set()
    for operation in graph.operations:
        if operation.name not in needed or not op_of(operation).derivative:
            continue
        names = [tensor.name for tensor in operation.inputs]
        by_states = [place for place, name in enumerate(names) if name in of_states]
        by_weights = [place for place, name in enumerate(names) if name not in of_states and name in of_weights]
        if by_states and not _is_sum(operation, [*by_states, *by_weights]):
            found |= set[int]().union(*(of_weights[names[place]] for place in by_weights))
        results = [tensor.name for tensor in operation.outputs]
        if by_states:
            of_states |= set(results)
        places = set[int]().union(*(of_weights.get(name, set()) for name in names))
        if places:
            of_weights |= dict.fromkeys(results, places)
    return tuple(sorted(found))


def _is_sum(operation: tf.Operation, operands: Collection[int]) -> bool:
    """Tells if an operation adds some operands, or moves them side by side."""
    return op_of(operation).kind in _APART or is_linear(operation, operands, ())


def _product_of(graph: CellGraph, weight: tf.Tensor) -> tf.Operation | None:
    """Returns the product of points with a weight that is all that takes this weight; None if there is none."""
    needed = graph.between((), graph.new_states)[0]
    while True:
        takers = [operation for operation in weight.consumers() if operation.name in needed]
        if len(takers) != 1:
            return None
        (operation,) = takers
        if operation.type in _PASSING:
            weight = operation.outputs[0]
            continue
        if operation.type != "MatMul" or operation.get_attr("transpose_a") or operation.get_attr("transpose_b"):
            return None
        points, matrix = operation.inputs
        if matrix.name != weight.name or points.name == weight.name:
            return None
        try:
            graph.units(points)
        except NotImplementedError:
            return None
        return operation
