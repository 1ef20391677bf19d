"""Functions of tensors as graphs of TensorFlow operations: traced once, then run, read, or replayed in part."""

import contextlib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import tensorflow as tf
from tensorflow.python.framework import ops as framework_ops

# Around a user's gradient TensorFlow puts two functions; some more may be found in their closures.
_MOST_WRAPPERS = 20

# Calls of a `tf.function`.
CALLS = ("PartitionedCall", "StatefulPartitionedCall")

StaticT = TypeVar("StaticT")


@dataclass(frozen=True)
class Traced(Generic[StaticT]):
    """A function of tensors as a graph, with the Python object that it returned while it was traced.

    Attributes:
        graph: The concrete function of TensorFlow. Calling it, or the `Traced` itself, runs the graph.
        static: The Python object, known before the graph runs: metadata, or whatever must live as long as the graph.
    """

    graph: Any
    static: StaticT

    def __call__(self, *tensors: Any) -> Any:
        """Runs the graph for arguments that match the specs, and returns its tensors in the traced structure."""
        return self.graph(*tensors)


def trace(function: Callable[..., tuple[Any, StaticT]], specs: Sequence[Any] = ()) -> Traced[StaticT]:
    """Traces a function of tensors once, and keeps the Python object that it returns beside them.

    The graph of a `tf.function` returns tensors only: a Python object leaves the trace by a side effect or not at all.
    That one side effect is here.

    Args:
        function: From tensors to a pair: any structure of tensors, and any Python object. It should create no
            variables, since TensorFlow would then trace it twice.
        specs: Structures of `tf.TensorSpec`, one for each argument; default none.

    Returns:
        The graph and the object. If the function raises, its error is raised and nothing is left.

    Example:

    ```python
    traced = trace(lambda x: (tf.reduce_sum(x), x.shape.rank), [tf.TensorSpec([None, 3])])
    traced.static                   # 2
    traced(tf.ones([4, 3]))         # 12.0
    ```
    """
    returned: list[StaticT] = []

    def tensors_of(*tensors: Any) -> Any:
        result, static = function(*tensors)
        returned.append(static)
        return result

    graph = tf.function(tensors_of, autograph=False).get_concrete_function(*specs)
    return Traced(graph, returned[-1])


class TracedGraph:
    """A function of tensors, traced once.

    Must live as long as what is made with `replay`: TensorFlow forgets the bodies of its loops and branches with it,
    and then crashes when it is to run them.

    Args:
        function: From tensors to any structure of tensors; or such a function that `trace` has traced.
        specs: What it is traced for.
        inline: Whether what a `tf.function` does shall stand in the graph itself, and not a call of it.

    Attributes:
        inputs: The tensors of the graph that stand for the arguments.
        outputs: What the function returned, flat.
        operations: In an order in which they can be computed.
    """

    def __init__(self, function: Callable[..., Any], specs: Sequence[tf.TensorSpec], *, inline: bool = False) -> None:
        traced = function if isinstance(function, Traced) else trace(lambda *tensors: (function(*tensors), None), specs)
        self._functions = [traced.graph]
        if inline and any(map(_is_call, self._functions[0].graph.get_operations())):
            # Not by `tf.config.run_functions_eagerly`, which holds for all threads.
            function = partial(_without_calls, self._functions[0].graph)
            self._functions.append(tf.function(function, autograph=False).get_concrete_function(*specs))
        graph = self._functions[-1].graph
        self.inputs: list[tf.Tensor] = list(graph.inputs[: len(specs)])
        # In front of the identities that wait for everything that has an effect, wanted or not.
        self.outputs: list[tf.Tensor] = [tensor.op.inputs[0] for tensor in graph.outputs]
        self.operations: list[tf.Operation] = list(graph.get_operations())
        self.captures: dict[str, tf.Tensor] = {inner.name: outer for outer, inner in graph.captures}
        self._definition = graph.as_graph_def()
        by_name = {operation.name: operation for operation in self.operations}
        self._nodes = {node.name: _bare(node, by_name[node.name]) for node in self._definition.node}

    def replay(self, fetches: Sequence[tf.Tensor], feeds: Mapping[str, tf.Tensor]) -> list[tf.Tensor]:
        """Lays out the operations that lead from some tensors of this graph to others, in the present graph.

        Args:
            fetches: Tensors of this graph.
            feeds: What to put in the place of tensors of this graph, by their names. What the function took from
                outside, such as weights, need not be given.

        Returns:
            The counterparts of the fetches.
        """
        feeds = {**self.captures, **feeds}
        wanted, consumed = self.between(feeds, fetches)
        pending = [tensor for tensor in fetches if tensor.name not in feeds]
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

    def between(self, known: Collection[str], fetches: Sequence[tf.Tensor]) -> tuple[set[str], set[str]]:
        """The names of the operations that make tensors of this graph from known ones, and of those that they take."""
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


def _is_call(operation: tf.Operation) -> bool:
    return operation.type in CALLS


def _without_calls(graph: Any, *inputs: tf.Tensor) -> list[tf.Tensor]:
    """Lays out a graph in the present one, with the operations of the functions that it calls instead of the calls."""
    known = {inner.name: tensor for inner, tensor in zip(graph.inputs, inputs, strict=False)}
    known |= {inner.name: _captured(outer) for outer, inner in graph.captures if inner.name not in known}
    definition = graph.as_graph_def()
    nodes = {node.name: node for node in definition.node}
    for is_call, run in itertools.groupby(graph.get_operations(), _is_call):
        operations = [operation for operation in run if operation.type != "Placeholder"]
        if is_call:
            for operation in operations:
                body = graph._get_function(operation.get_attr("f").name).graph  # noqa: SLF001 - there is no other way
                results = _without_calls(body, *(known[tensor.name] for tensor in operation.inputs))
                known |= {tensor.name: result for tensor, result in zip(operation.outputs, results, strict=True)}
            continue
        here = {operation.name for operation in operations}
        part = tf.compat.v1.GraphDef(versions=definition.versions, library=definition.library)
        part.node.extend(nodes[operation.name] for operation in operations)
        for node in part.node:
            # A step that waits for what has an effect is refused anyway.
            for name in [name for name in node.input if name.startswith("^") and name[1:] not in here]:
                node.input.remove(name)
        feeds = {t.name: known[t.name] for op in operations for t in op.inputs if t.op.name not in here}
        names = [tensor.name for operation in operations for tensor in operation.outputs]
        known |= zip(names, tf.graph_util.import_graph_def(part, feeds, names, name="inlined"), strict=True)
    return [known[tensor.name] for tensor in graph.outputs]


def graph_of(tensor: tf.Tensor) -> contextlib.AbstractContextManager[Any]:
    """The graph that a tensor stands in: what is made of it there is made once, and not in each turn of a loop."""
    return contextlib.nullcontext() if tf.executing_eagerly() else tensor.graph.as_default()


def has_custom_gradient(operation: tf.Operation) -> bool:
    """Returns True if the derivative may differ from the derivative of the formula, as with `tf.custom_gradient`."""
    try:
        operation.get_attr("_gradient_op_type")
    except ValueError:
        return False
    return not _is_swish(operation)


def _is_swish(operation: tf.Operation) -> bool:
    """Whether it is TensorFlow's own `silu`, whose custom gradient saves memory and is the plain one but for rounding.

    TensorFlow has no public way to the gradient of an operation. Should this one fail, `silu` is left to autodiff.
    """
    functions = [framework_ops.get_gradient_function(operation)]
    # The user's function is in a closure of TensorFlow's wrappers.
    for function in functions:
        cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_full(cell)]
        functions += [value for value in cells if callable(value) and value not in functions]
        if function.__module__ == "tensorflow.python.ops.nn_impl" and function.__qualname__.startswith("swish."):
            return True
        if len(functions) > _MOST_WRAPPERS:
            break
    return False


def _is_full(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _bare(node: Any, operation: tf.Operation) -> Any:
    """A node without wishes for a place beside another one, which may not be laid.

    And without the gradient of `silu`: it speaks of tensors of the graph that it was traced in.
    """
    node.attr.pop("_class", None)
    if "_gradient_op_type" in node.attr and not has_custom_gradient(operation):
        node.attr.pop("_gradient_op_type")
    return node


def _captured(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor in the present graph, which may be the body of a loop."""
    graph = tf.compat.v1.get_default_graph()
    if getattr(tensor, "graph", None) is graph or not graph.building_function:
        return tensor
    return graph.capture(tensor)
