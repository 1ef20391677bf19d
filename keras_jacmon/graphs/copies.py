"""Operations of a graph, copied to the present one."""

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf


def copy_operations(
    definition: Any, operations: Sequence[tf.Operation], known: Mapping[str, tf.Tensor]
) -> dict[str, tf.Tensor]:
    """Copies operations to the present graph.

    Args:
        definition: `GraphDef` of the graph that the operations stand in.
        operations: The operations, in an order in which they can be computed.
        known: By name of a tensor of that graph, its counterpart in the present graph.

    Returns:
        The counterparts of the operations' outputs, by name.
    """
    here = {operation.name for operation in operations}
    part = tf.compat.v1.GraphDef(versions=definition.versions, library=definition.library)
    part.node.extend(node for node in definition.node if node.name in here)
    for node in part.node:
        # A step that waits for what has an effect is refused anyway.
        for name in [name for name in node.input if name.startswith("^") and name[1:] not in here]:
            node.input.remove(name)
    feeds = {t.name: known[t.name] for op in operations for t in op.inputs if t.op.name not in here}
    names = [tensor.name for operation in operations for tensor in operation.outputs]
    return dict(zip(names, tf.graph_util.import_graph_def(part, feeds, names, name="inlined"), strict=True))


def capture(tensor: tf.Tensor) -> tf.Tensor:
    """Returns the tensor in the present graph, which may be the body of a loop."""
    graph = tf.compat.v1.get_default_graph()
    if getattr(tensor, "graph", None) is graph or not graph.building_function:
        return tensor
    return graph.capture(tensor)
