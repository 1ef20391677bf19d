"""A piece of computation as a graph of TensorFlow operations, to be laid out again, whole or in part."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf


class TracedGraph:
    """A function of tensors, traced once.

    Must live as long as what is made with `lay`: TensorFlow forgets the bodies of its loops and branches with it, and
    then crashes when it is to run them.

    Args:
        function: From tensors to any structure of tensors.
        specs: What it is traced for.

    Attributes:
        inputs: The tensors of the graph that stand for the arguments.
        outputs: What the function returned, flat.
        operations: In an order in which they can be computed.
    """

    def __init__(self, function: Callable[..., Any], specs: Sequence[tf.TensorSpec]) -> None:
        self._function = tf.function(function, autograph=False).get_concrete_function(*specs)
        graph = self._function.graph
        self.inputs: list[tf.Tensor] = list(graph.inputs[: len(specs)])
        # In front of the identities that wait for everything that has an effect, wanted or not.
        self.outputs: list[tf.Tensor] = [tensor.op.inputs[0] for tensor in graph.outputs]
        self.operations: list[tf.Operation] = list(graph.get_operations())
        self.captures: dict[str, tf.Tensor] = {inner.name: outer for outer, inner in graph.captures}
        self._definition = graph.as_graph_def()
        self._nodes = {node.name: _bare(node) for node in self._definition.node}

    def lay(self, fetches: Sequence[tf.Tensor], feeds: Mapping[str, tf.Tensor]) -> list[tf.Tensor]:
        """Lays out the operations that lead from some tensors of this graph to others, in the present graph.

        Args:
            fetches: Tensors of this graph.
            feeds: What to put in the place of tensors of this graph, by their names. What the function took from
                outside, such as weights, need not be given.

        Returns:
            The counterparts of the fetches.
        """
        feeds = {**self.captures, **feeds}
        wanted: set[str] = set()
        used: set[str] = set()
        consumed: set[str] = set()
        pending = [tensor for tensor in fetches if tensor.name not in feeds]
        operations = [tensor.op for tensor in pending]
        while operations:
            operation = operations.pop()
            if operation.name in wanted:
                continue
            wanted.add(operation.name)
            operations += operation.control_inputs
            operations += [tensor.op for tensor in operation.inputs if tensor.name not in feeds]
            consumed |= {tensor.name for tensor in operation.inputs if tensor.name in feeds}
        used = consumed | {tensor.name for tensor in fetches if tensor.name in feeds}
        here = {name: _captured(feeds[name]) for name in used}
        results: list[tf.Tensor] = []
        if pending:
            definition = tf.compat.v1.GraphDef(versions=self._definition.versions, library=self._definition.library)
            definition.node.extend(self._nodes[op.name] for op in self.operations if op.name in wanted)
            results = tf.graph_util.import_graph_def(
                definition, {name: here[name] for name in consumed}, [tensor.name for tensor in pending], name="copy"
            )
        made = iter(results)
        return [here[tensor.name] if tensor.name in feeds else next(made) for tensor in fetches]


def _bare(node: Any) -> Any:
    """A node without wishes for a place beside another one, which may not be laid."""
    node.attr.pop("_class", None)
    return node


def _captured(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor in the present graph, which may be the body of a loop."""
    graph = tf.compat.v1.get_default_graph()
    if getattr(tensor, "graph", None) is graph or not hasattr(graph, "capture"):
        return tensor
    return graph.capture(tensor)
