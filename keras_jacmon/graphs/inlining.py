"""A graph laid out in another one, with operations instead of calls of functions."""

import itertools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.framework import ops as framework_ops

from keras_jacmon.graphs.calls import CALLS, function_graph, has_custom_gradient
from keras_jacmon.graphs.constants import constant_value
from keras_jacmon.graphs.copies import capture, copy_operations
from keras_jacmon.graphs.trace import trace
from keras_jacmon.tensors import spec_of

# Maximum number of entries of a sparse kernel that is written as a dense one.
_MOST_ENTRIES = 2**24

# The name under which TensorFlow finds the gradient of the copies of custom gradients, and their rules by key.
_GRADIENT = "KerasJacmonCustomGradient"
_RULES: "weakref.WeakValueDictionary[int, GradientRule]" = weakref.WeakValueDictionary()
_KEYS = itertools.count()


class GradientRule:
    """The gradient of an operation of `tf.custom_gradient`, traced once.

    Args:
        graph: Graph that the operation stands in.
        operation: Operation `IdentityN` of that graph.

    Attributes:
        key: Integer, unique.
        saved: List of the tensors of the graph that the gradient takes beside those of the outputs.

    Raises:
        NotImplementedError: If it takes tensors of another graph, or if the operation has several results.
    """

    def __init__(self, graph: Any, operation: tf.Operation) -> None:
        function = framework_ops.get_gradient_function(operation)
        specs = list(map(spec_of, operation.outputs))

        def differentiate(*seeds: tf.Tensor) -> tuple[list[tf.Tensor], list[bool]]:
            gradients = function(operation, *seeds)
            return [g for g in gradients if g is not None], [g is not None for g in gradients]

        self._traced = trace(differentiate, specs)
        self.saved = [outer for outer, _ in self._traced.graph.graph.captures if getattr(outer, "graph", None) is graph]
        others = [outer for outer, _ in self._traced.graph.graph.captures if not any(outer is t for t in self.saved)]
        used_later = any(tensor.consumers() for tensor in operation.outputs[1:])
        if used_later or any(map(tf.is_symbolic_tensor, others)):
            raise NotImplementedError
        self.key = next(_KEYS)
        _RULES[self.key] = self

    def gradients(self, seeds: Sequence[tf.Tensor], saved: Sequence[tf.Tensor]) -> list[tf.Tensor | None]:
        """Lays out the gradient in the present graph.

        Args:
            seeds: Sequence of tensors, the gradients by the outputs of the operation.
            saved: Sequence of tensors, the counterparts of the `saved` ones.

        Returns:
            List of the gradients by the operands of the operation; None for those that have none.
        """
        graph = self._traced.graph.graph
        counterparts = {id(tensor): here for tensor, here in zip(self.saved, saved, strict=True)}
        captured = [counterparts[id(o)] if id(o) in counterparts else capture(o) for o, _ in graph.captures]
        found, _ = lay_out(graph, *seeds, *captured)
        made = iter(found)
        return [next(made) if is_there else None for is_there in self._traced.static]


@tf.RegisterGradient(_GRADIENT)
def _custom_gradient(operation: tf.Operation, *seeds: tf.Tensor | None) -> list[tf.Tensor | None]:
    """The gradient of a copy of an operation of `tf.custom_gradient`, from the operands of the copy alone."""
    *operands, key = operation.inputs
    rule = _RULES[int(tf.get_static_value(key))]
    count = len(operands) - len(rule.saved)
    given = [tf.zeros_like(x) if seed is None else seed for x, seed in zip(operands[:count], seeds, strict=False)]
    return [*rule.gradients(given, operands[count:]), *[None] * (len(rule.saved) + 1)]


@dataclass(frozen=True, eq=False)
class CustomGradient:
    """An operation of a graph with a gradient of its own.

    Attributes:
        operation: Operation `IdentityN` of the graph; the first output is the result.
        rule: The gradient, which must live as long as the operation.
        seed: Tensor of the graph like the result, all ones.
        slopes: Mapping by position of an operand, the gradient by it for this seed: a tensor of the graph, which
            nothing else takes.
    """

    operation: tf.Operation
    rule: GradientRule
    seed: tf.Tensor
    slopes: Mapping[int, tf.Tensor]


def lay_out(graph: Any, *inputs: tf.Tensor) -> tuple[list[tf.Tensor], list[CustomGradient]]:
    """Lays out a graph in the present one, with operations instead of calls of functions.

    Custom gradients are rewritten so that they need no tensor of the first graph.

    Args:
        graph: Graph of a function.
        *inputs: Tensors to use in place of its inputs, the first ones at least; what it captures may be left out.

    Returns:
        List of the counterparts of the graph's outputs, and list of the custom gradients.
    """
    known = {inner.name: tensor for inner, tensor in zip(graph.inputs, inputs, strict=False)}
    known |= {inner.name: capture(outer) for outer, inner in graph.captures if inner.name not in known}
    definition, gradients = graph.as_graph_def(), list[CustomGradient]()
    for plain, run in itertools.groupby(graph.get_operations(), is_plain):
        operations = [operation for operation in run if operation.type != "Placeholder"]
        if plain:
            known |= copy_operations(definition, operations, known)
            continue
        for operation in operations:
            results, found = _rule_of(operation)(graph, operation, known)
            known |= {tensor.name: result for tensor, result in zip(operation.outputs, results, strict=True)}
            gradients += found
    return [known[tensor.name] for tensor in graph.outputs], gradients


def is_plain(operation: tf.Operation) -> bool:
    """Tells if an operation is laid out as it is."""
    return _rule_of(operation) is None


def _rule_of(operation: tf.Operation) -> Any:
    """Returns the function that lays out an operation in another way; None if it is laid out as it is."""
    if operation.type in CALLS:
        return _without_call
    if operation.type == "IdentityN" and has_custom_gradient(operation):
        return _with_gradient
    if operation.type == "TopKV2" and operation.inputs[1].op.type != "Const":
        return _with_constant_size
    return _with_dense_kernel if _transposes(operation, "SparseTensorDenseMatMul") else None


def _without_call(
    graph: Any, call: tf.Operation, known: Mapping[str, tf.Tensor]
) -> tuple[list[tf.Tensor], list[CustomGradient]]:
    """Lays out the body of a called function in the present graph.

    Args:
        graph: Graph that the call stands in.
        call: The call, an operation of that graph.
        known: By name of a tensor of that graph, its counterpart in the present graph.

    Returns:
        As for `lay_out`, the counterparts of the call's outputs.
    """
    body = function_graph(graph, call.get_attr("f").name)
    results, gradients = lay_out(body, *(known[tensor.name] for tensor in call.inputs))
    # A function that was differentiated has more outputs, those that its derivative takes.
    return results[: len(call.outputs)], gradients


def _with_gradient(
    graph: Any, operation: tf.Operation, known: Mapping[str, tf.Tensor]
) -> tuple[list[tf.Tensor], list[CustomGradient]]:
    """Lays out an operation of `tf.custom_gradient`, with a gradient that takes all that it needs from the operation.

    The user's gradient refers to tensors of the graph that it was traced in. They become operands of the copy, so that
    the copy can be copied again.

    Args:
        graph: Graph that the operation stands in.
        operation: Operation `IdentityN` of that graph, from results and arguments to the same.
        known: By name of a tensor of that graph, its counterpart in the present graph.

    Returns:
        As for `lay_out`, the counterparts of the operation's outputs. If the gradient cannot be traced there is no
        `CustomGradient`.
    """
    operands = [known[tensor.name] for tensor in operation.inputs]
    try:
        rule = GradientRule(graph, operation)
    except Exception:  # noqa: BLE001 - the user's gradient; autodiff takes over
        copies = copy_operations(graph.as_graph_def(), [operation], known)
        return [copies[tensor.name] for tensor in operation.outputs], []
    saved = [known[tensor.name] for tensor in rule.saved]
    seed = tf.ones_like(operands[0])
    slopes = enumerate(rule.gradients([seed, *map(tf.zeros_like, operands[1:])], saved))
    with tf.compat.v1.get_default_graph().gradient_override_map({"IdentityN": _GRADIENT}):
        results = tf.identity_n([*operands, *saved, tf.constant(rule.key, tf.int64)])
    of_arguments = {k: slope for k, slope in slopes if slope is not None}
    # Whoever reads an argument behind the operation reads the argument.
    return [results[0], *operands[1:]], [CustomGradient(results[0].op, rule, seed, of_arguments)]


def _with_constant_size(
    graph: Any, operation: tf.Operation, known: Mapping[str, tf.Tensor]
) -> tuple[list[tf.Tensor], list[CustomGradient]]:
    """Lays out an operation that sorts with the number of units as a constant, so that its shape is known.

    Args:
        graph: Graph that the operation stands in.
        operation: Operation `TopKV2` of that graph.
        known: By name of a tensor of that graph, its counterpart in the present graph.

    Returns:
        As for `lay_out`. The operation as it is if the number is not known.
    """
    values, size = operation.inputs
    count = constant_value(size)
    if count is None:
        copies = copy_operations(graph.as_graph_def(), [operation], known)
        return [copies[tensor.name] for tensor in operation.outputs], []
    return list(tf.math.top_k(known[values.name], int(count), sorted=operation.get_attr("sorted"))), []


def _with_dense_kernel(
    graph: Any, operation: tf.Operation, known: Mapping[str, tf.Tensor]
) -> tuple[list[tf.Tensor], list[CustomGradient]]:
    """Lays out a product with a sparse kernel as one with a dense kernel.

    TensorFlow takes the sparse factor first alone, so that the points are the last axis of the result, which is
    transposed then. The structure of such a product could not be seen.

    Args:
        graph: Graph that the operation stands in.
        operation: Operation `Transpose` of that graph, of the result of `SparseTensorDenseMatMul`.
        known: By name of a tensor of that graph, its counterpart in the present graph.

    Returns:
        As for `lay_out`. The operation as it is if the kernel is complex, large, or of unknown size.
    """
    sparse = operation.inputs[0].op
    indices, values, shape, factor = sparse.inputs
    sizes = constant_value(shape)
    adjoint, points_last = sparse.get_attr("adjoint_a"), not sparse.get_attr("adjoint_b")
    y = factor.op.inputs[0] if points_last and _transposes(factor.op) else factor
    if sizes is None or np.prod(sizes) > _MOST_ENTRIES or not values.dtype.is_floating or (points_last and y is factor):
        return [copy_operations(graph.as_graph_def(), [operation], known)[operation.outputs[0].name]], []
    # Entries that stand twice are added up, as they are in the product.
    kernel = tf.scatter_nd(known[indices.name], known[values.name], tf.constant(sizes, indices.dtype))
    return [tf.matmul(known[y.name], kernel, transpose_b=not adjoint)], []


def _transposes(operation: tf.Operation, made_by: str | None = None) -> bool:
    """Tells if an operation transposes a matrix, made by an operation of some type if it is given."""
    if operation.type != "Transpose" or made_by not in (None, operation.inputs[0].op.type):
        return False
    permutation = tf.get_static_value(operation.inputs[1])
    return permutation is not None and list(permutation) == [1, 0]
