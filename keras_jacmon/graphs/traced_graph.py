"""A function of tensors, traced once, that can be read and replayed in part."""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import tensorflow as tf

from keras_jacmon.graphs.calls import has_custom_gradient
from keras_jacmon.graphs.copies import capture
from keras_jacmon.graphs.inlining import CustomGradient, is_plain, lay_out
from keras_jacmon.graphs.trace import Traced, trace


class TracedGraph:
    """A function of tensors, traced once.

    It must live as long as all tensors that `replay` returned: with it TensorFlow forgets the bodies of its loops and
    branches, and crashes when it runs them afterwards.

    Args:
        function: Function from tensors to any structure of tensors; or a `Traced` one.
        specs: Sequence of `tf.TensorSpec`, one for each argument.
        inline: Boolean, True to replace each call of a `tf.function` by the operations of that function. Defaults to
            False.

    Attributes:
        inputs: List of the tensors of the graph that stand for the arguments.
        outputs: List of the tensors that the function returned, flat.
        operations: List of the operations, in an order in which they can be computed.
        captures: Dict by name of a tensor of the graph, the outside tensor that it stands for, such as a weight.
        custom_gradients: Dict by name of an operation with a gradient of its own, its `CustomGradient`; empty unless
            the functions are laid out inline.
    """

    def __init__(self, function: Callable[..., Any], specs: Sequence[tf.TensorSpec], *, inline: bool = False) -> None:
        traced = function if isinstance(function, Traced) else trace(lambda *tensors: (function(*tensors), None), specs)
        self._traced: list[Traced[Any]] = [traced]
        self.custom_gradients: dict[str, CustomGradient] = {}
        if inline and not all(map(is_plain, traced.graph.graph.get_operations())):
            # Not by `tf.config.run_functions_eagerly`, which holds for all threads.
            laid_out = trace(partial(lay_out, traced.graph.graph), specs)
            self._traced.append(laid_out)
            self.custom_gradients = {gradient.operation.name: gradient for gradient in laid_out.static}
        graph = self._traced[-1].graph.graph
        self.inputs: list[tf.Tensor] = list(graph.inputs[: len(specs)])
        # Without the last identities, which wait for every operation that has an effect.
        self.outputs: list[tf.Tensor] = [tensor.op.inputs[0] for tensor in graph.outputs]
        self.operations: list[tf.Operation] = list(graph.get_operations())
        self.captures: dict[str, tf.Tensor] = {inner.name: outer for outer, inner in graph.captures}
        self._definition = graph.as_graph_def()
        by_name = {operation.name: operation for operation in self.operations}
        # In their scopes, whose names tell where an operation that fails is.
        scopes = [operation.name.rpartition("/") for operation in self.operations]
        self._aliases = {
            operation.name: f"{scope}{slash}{k}_{operation.type}"
            for k, (operation, (scope, slash, _)) in enumerate(zip(self.operations, scopes, strict=True))
        }
        self._nodes = {node.name: self._renamed(_bare(node, by_name[node.name])) for node in self._definition.node}

    def replay(self, fetches: Sequence[tf.Tensor], feeds: Mapping[str, tf.Tensor]) -> list[tf.Tensor]:
        """Copies to the present graph the operations that lead from the fed tensors of this graph to the fetched ones.

        Args:
            fetches: Sequence of tensors of this graph.
            feeds: Mapping by name of a tensor of this graph, the tensor to use in its place. The `captures` need not be
                given.

        Returns:
            List of the counterparts of the fetches.
        """
        feeds = {**self.captures, **feeds}
        wanted, consumed = self.between(feeds, fetches)
        pending = [tensor for tensor in fetches if tensor.name not in feeds]
        used = consumed | {tensor.name for tensor in fetches if tensor.name in feeds}
        here = {name: capture(feeds[name]) for name in used}
        results: list[tf.Tensor] = []
        if pending:
            definition = tf.compat.v1.GraphDef(versions=self._definition.versions, library=self._definition.library)
            definition.node.extend(self._nodes[op.name] for op in self.operations if op.name in wanted)
            given = {self._alias(name): here[name] for name in consumed}
            results = tf.graph_util.import_graph_def(
                definition, given, [self._alias(tensor.name) for tensor in pending], name="copy"
            )
        made = iter(results)
        return [here[tensor.name] if tensor.name in feeds else next(made) for tensor in fetches]

    def _renamed(self, node: Any) -> Any:
        """Gives a node, and the nodes that it takes, names that TensorFlow can number in any way and keep apart.

        It numbers what a branch returns for its derivative, `add_2_0` for example, and two such names may be equal.
        """
        node.name = self._aliases[node.name]
        node.input[:] = list(map(self._alias, node.input))
        return node

    def _alias(self, name: str) -> str:
        """Returns the name in a copy of an operation, a tensor or a control input."""
        sign, bare = ("^", name[1:]) if name.startswith("^") else ("", name)
        operation, *output = bare.split(":")
        return ":".join([sign + self._aliases[operation], *output])

    def fingerprint(self, of_any_shape: Collection[tf.Tensor] = ()) -> Hashable:
        """Returns what the graph computes, as a value: graphs with equal fingerprints compute the same.

        The names of the operations are left out. A loop, a branch or a custom gradient has a name of its own in each
        trace, so that a graph with one of them equals no other graph; nor do graphs that read different objects.

        Args:
            of_any_shape: Collection of the inputs of the graph whose shapes are left out. Defaults to none of them.
        """
        shapeless = {tensor.op.name for tensor in of_any_shape}
        places = {tensor.name: place for place, tensor in enumerate(t for op in self.operations for t in op.outputs)}
        order = {operation.name: place for place, operation in enumerate(self.operations)}
        nodes = [
            (
                operation.type,
                tuple(places[tensor.name] for tensor in operation.inputs),
                tuple(order[control.name] for control in operation.control_inputs),
                _attributes(self._nodes[operation.name], but="shape" if operation.name in shapeless else ""),
            )
            for operation in self.operations
        ]
        captures = [(places[inner], id(outer)) for inner, outer in self.captures.items()]
        return tuple(nodes), tuple(captures), tuple(places[tensor.name] for tensor in self.outputs)

    def between(self, known: Collection[str], fetches: Sequence[tf.Tensor]) -> tuple[set[str], set[str]]:
        """Finds the operations that make tensors of this graph from known ones.

        Args:
            known: Collection of the names of the known tensors.
            fetches: Sequence of tensors of this graph.

        Returns:
            Tuple of two sets: the names of the operations, and the names of the known tensors that they take.
        """
        wanted: set[str] = set()
        consumed: set[str] = set()
        operations = [tensor.op for tensor in fetches if tensor.name not in known]
        while operations:
            operation = operations.pop()
            if operation.name in wanted:
                continue
            wanted.add(operation.name)
            operations += operation.control_inputs
            operations += [tensor.op for tensor in operation.inputs if tensor.name not in known]
            consumed |= {tensor.name for tensor in operation.inputs if tensor.name in known}
        return wanted, consumed


def _bare(node: Any, operation: tf.Operation) -> Any:
    """Removes from a node what holds only in the graph that it was traced in, and returns it.

    These are the placement beside another node, which may not be copied, and the custom gradient of `silu`, which
    refers to tensors of that graph.
    """
    node.attr.pop("_class", None)
    if "_gradient_op_type" in node.attr and not has_custom_gradient(operation):
        node.attr.pop("_gradient_op_type")
    return node


def _attributes(node: Any, *, but: str) -> tuple[tuple[str, bytes], ...]:
    """Returns the attributes of a node, without the name that an argument has in Python and another one."""
    left_out = {"_user_specified_name", but}
    return tuple(
        (name, value.SerializeToString(deterministic=True))
        for name, value in sorted(node.attr.items())
        if name not in left_out
    )
