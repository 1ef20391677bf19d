"""How can a cell be unrolled at a lower cost than by calling it at each step?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import tensorflow as tf

from keras_jacmon.cell.cell_graph import CellGraph
from keras_jacmon.tensors import as_rows, known_sizes


@dataclass(frozen=True)
class Sum:
    """A tensor of a cell's graph as the sum of products with matrices that all rows share, and of a constant.

    The graph may come to it by a product for several gates, a bias, and a split: passes over wide tensors, each of
    which takes a fair part of the time of the product in a step.

    Attributes:
        tensor: In the graph, `(rows, ...)`.
        of_inputs: What is multiplied, tensors `(rows, n)` of the graph that depend on the inputs alone, each with its
            matrix `(n, units of the tensor)`.
        of_states: The same for a tensor that depends on the states; None if there is none.
        constant: `(units of the tensor,)`.
    """

    tensor: tf.Tensor
    of_inputs: Sequence[tuple[tf.Tensor, tf.Tensor]]
    of_states: tuple[tf.Tensor, tf.Tensor] | None
    constant: tf.Tensor

    def shaped(self, flat: tf.Tensor) -> tf.Tensor:
        """Values `(..., units)` with the shape that the tensor has for a row."""
        return tf.reshape(flat, [*known_sizes(flat)[:-1], *self.tensor.shape[1:]])


@dataclass(frozen=True)
class UnrollPlan:
    """What an unrolling can do besides calling the cell.

    Attributes:
        graph: The cell's step.
        fixed: Values of tensors of the graph that are the same at all steps, by name.
        hoisted: Tensors of the graph that depend on the inputs alone: computed for all steps at once.
        sums: Tensors of the graph that are computed by themselves: what depends on the inputs for all steps at once.
        kept: Tensors of the graph whose values at all steps are wanted.
    """

    graph: CellGraph
    fixed: Mapping[str, tf.Tensor]
    hoisted: Sequence[tf.Tensor]
    sums: Sequence[Sum]
    kept: Sequence[tf.Tensor]

    @property
    def prepared(self) -> list[tf.Tensor]:
        """The tensors of which something is held for all steps before the first one."""
        return [*self.hoisted, *(part.tensor for part in self.sums)]

    def beforehand(self, inputs: tf.Tensor) -> "Precomputed":
        """What can be computed before the first step, for inputs `(time, batch, ...)`."""
        time, samples = known_sizes(inputs)[:2]
        feeds = {**self.fixed, self.graph.step_inputs.name: as_rows(inputs)}

        def by_step(rows: tf.Tensor) -> tf.Tensor:
            return tf.reshape(rows, [time, samples, *rows.shape[1:]])

        factors = [factor for part in self.sums for factor, _ in part.of_inputs]
        laid = iter(self.graph.replay([*self.hoisted, *factors], feeds))
        values = {tensor.name: by_step(next(laid)) for tensor in self.hoisted}
        rests: list[tuple[Sum, tf.Tensor]] = []
        for part in self.sums:
            products = [next(laid) @ matrix for _, matrix in part.of_inputs]
            # One operation with the last product, as TensorFlow runs it.
            rest = by_step(tf.nn.bias_add(reduce(tf.add, products), part.constant)) if products else part.constant
            rests.append((part, rest))
        values |= {part.tensor.name: part.shaped(rest) for part, rest in rests if part.of_states is None}
        return Precomputed(self, values, rests)


@dataclass(frozen=True)
class Precomputed:
    """What is known of a walk before its first step.

    Attributes:
        shortcut: Says of what.
        values: By name, those of tensors that depend on the inputs alone, `(time, batch, ...)`.
        rests: The sums, without the product of the states, `(time, batch, units)`, or `(units,)` for all steps.
    """

    shortcut: UnrollPlan
    values: dict[str, tf.Tensor]
    rests: Sequence[tuple[Sum, tf.Tensor]]

    def step(
        self, inputs: tf.Tensor, states: Sequence[tf.Tensor], t: tf.Tensor
    ) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """The new states, and the values to keep, of step `t` with its inputs `(batch, ...)`."""
        shortcut, graph = self.shortcut, self.shortcut.graph
        feeds = {**shortcut.fixed, graph.step_inputs.name: inputs}
        feeds |= {name: value[t] for name, value in self.values.items()}
        feeds |= {tensor.name: state for tensor, state in zip(graph.states, states, strict=True)}
        # In the order of the products: what one multiplies may be made of another one.
        for part, rest in self.rests:
            if part.of_states is None:
                continue
            factor, matrix = part.of_states
            (feeds[factor.name],) = graph.replay([factor], feeds)
            value = feeds[factor.name] @ matrix + (rest if rest.shape.rank == 1 else rest[t])
            feeds[part.tensor.name] = part.shaped(value)
        results = graph.replay([*graph.new_states, *shortcut.kept], feeds)
        return results[: len(states)], results[len(states) :]
