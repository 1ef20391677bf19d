"""Plans for unrolling a cell at a lower cost than by calling it at each step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import tensorflow as tf

from keras_jacmon.cell.cell_graph import CellGraph
from keras_jacmon.tensors import as_points, known_sizes


@dataclass(frozen=True)
class Sum:
    """A tensor of a cell's graph as a sum of products with matrices that all points share, and of a constant.

    The graph may reach the tensor by one product for several gates, a bias, and a split. These are passes over wide
    tensors, and each takes a fair part of the time of the product in a step.

    Attributes:
        tensor: Tensor of the graph, `(points, ...)`.
        of_inputs: Sequence of pairs of a factor and its matrix: a tensor `(points, n)` of the graph that depends on the
            inputs alone, and a tensor `(n, units of the tensor)`.
        of_states: Pair of a factor that depends on the states and its matrix; None if there is none.
        constant: Tensor `(units of the tensor,)`.
    """

    tensor: tf.Tensor
    of_inputs: Sequence[tuple[tf.Tensor, tf.Tensor]]
    of_states: tuple[tf.Tensor, tf.Tensor] | None
    constant: tf.Tensor

    def shaped(self, flat: tf.Tensor) -> tf.Tensor:
        """Reshapes values `(..., units)` to the shape that the tensor has at each point."""
        return tf.reshape(flat, [*known_sizes(flat)[:-1], *self.tensor.shape[1:]])


@dataclass(frozen=True)
class UnrollPlan:
    """A split of a cell's graph into what is computed before the first step and what is computed at each step.

    Attributes:
        graph: `CellGraph`, the cell's step.
        weights_only: Mapping by name, the values of tensors of the graph that are the same at all steps.
        inputs_only: Sequence of tensors of the graph that depend on the inputs alone, computed for all steps at once.
        sums: Sequence of `Sum`s; their products of the inputs are computed for all steps at once.
        saved: Sequence of tensors of the graph whose values at all steps are saved.
    """

    graph: CellGraph
    weights_only: Mapping[str, tf.Tensor]
    inputs_only: Sequence[tf.Tensor]
    sums: Sequence[Sum]
    saved: Sequence[tf.Tensor]

    @property
    def prepared(self) -> list[tf.Tensor]:
        """The tensors of the graph that are computed, at least in part, before the first step."""
        return [*self.inputs_only, *(part.tensor for part in self.sums)]

    def precompute(self, inputs: tf.Tensor) -> "Precomputed":
        """Computes the values that can be known before the first step.

        Args:
            inputs: Tensor `(time, batch, ...)`.
        """
        time, samples = known_sizes(inputs)[:2]
        feeds = {**self.weights_only, self.graph.step_inputs.name: as_points(inputs)}

        def by_step(points: tf.Tensor) -> tf.Tensor:
            return tf.reshape(points, [time, samples, *points.shape[1:]])

        factors = [factor for part in self.sums for factor, _ in part.of_inputs]
        replayed = iter(self.graph.replay([*self.inputs_only, *factors], feeds))
        values = {tensor.name: by_step(next(replayed)) for tensor in self.inputs_only}
        partial_sums: list[tuple[Sum, tf.Tensor]] = []
        for part in self.sums:
            products = [next(replayed) @ matrix for _, matrix in part.of_inputs]
            # TensorFlow runs the bias and the last product as one operation.
            partial = by_step(tf.nn.bias_add(reduce(tf.add, products), part.constant)) if products else part.constant
            partial_sums.append((part, partial))
        values |= {part.tensor.name: part.shaped(value) for part, value in partial_sums if part.of_states is None}
        return Precomputed(self, values, partial_sums)


@dataclass(frozen=True)
class Precomputed:
    """The values of a cell's graph that are known before its first step.

    Attributes:
        plan: `UnrollPlan` that they were computed by.
        values: Dict by name, tensors `(time, batch, ...)`, the values that depend on the inputs alone.
        partial_sums: Sequence of pairs of a `Sum` and its value without the product of the states, a tensor
            `(time, batch, units)`; `(units,)` if it is the same for all steps.
    """

    plan: UnrollPlan
    values: dict[str, tf.Tensor]
    partial_sums: Sequence[tuple[Sum, tf.Tensor]]

    def step(self, states: Sequence[tf.Tensor], t: tf.Tensor) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """Takes one step. The inputs themselves are among the values if it reads them.

        Args:
            states: Sequence of tensors `(batch, ...)`, the states before the step.
            t: Integer tensor `()`, the position of the step.

        Returns:
            List of the new states, and list of the values of the plan's `saved` tensors.
        """
        graph = self.plan.graph
        feeds = {**self.plan.weights_only, **{name: tf.gather(value, t) for name, value in self.values.items()}}
        feeds |= {tensor.name: state for tensor, state in zip(graph.states, states, strict=True)}
        # In the order of the products, since the factor of one may be made from another one.
        for part, partial in self.partial_sums:
            if part.of_states is None:
                continue
            factor, matrix = part.of_states
            (feeds[factor.name],) = graph.replay([factor], feeds)
            here = partial if partial.shape.rank == 1 else tf.gather(partial, t)
            feeds[part.tensor.name] = part.shaped(feeds[factor.name] @ matrix + here)
        results = graph.replay([*graph.new_states, *self.plan.saved], feeds)
        return results[: len(states)], results[len(states) :]
