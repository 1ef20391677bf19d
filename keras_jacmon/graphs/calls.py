"""Operations that call a function or have a gradient of their own."""

from typing import Any

import tensorflow as tf
from tensorflow.python.framework import ops as framework_ops

# Calls of a `tf.function`.
CALLS = ("PartitionedCall", "StatefulPartitionedCall")

# TensorFlow wraps a user's gradient in two functions; their closures may hold a few more.
_MOST_WRAPPERS = 20


def function_graph(graph: Any, name: str) -> Any:
    """Returns the graph of a function that an operation calls.

    Args:
        graph: Graph that the operation stands in. A branch that is differentiated twice is known to a graph around it
            alone.
        name: String, the name of the function.
    """
    while (function := graph._get_function(name)) is None:  # noqa: SLF001 - there is no other way
        graph = graph.outer_graph
    return function.graph


def has_custom_gradient(operation: tf.Operation) -> bool:
    """Returns True if the derivative may differ from the derivative of the formula, as with `tf.custom_gradient`."""
    try:
        operation.get_attr("_gradient_op_type")
    except ValueError:
        return False
    return not _is_swish(operation)


def _is_swish(operation: tf.Operation) -> bool:
    """Tells if the operation is TensorFlow's own `silu`.

    Its custom gradient saves memory and equals the gradient of the formula up to rounding. TensorFlow has no public way
    to the gradient of an operation. If this one fails, `silu` is left to autodiff.
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
