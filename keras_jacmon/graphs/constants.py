"""Tensors of a graph that are made from constants alone."""

from typing import Any

import numpy as np
import tensorflow as tf

from keras_jacmon.graphs.calls import CALLS
from keras_jacmon.graphs.copies import capture, copy_operations
from keras_jacmon.graphs.trace import trace


def constant_value(tensor: tf.Tensor) -> Any:
    """Returns the value of a tensor of a traced graph that is made from constants alone; None for any other.

    Tensors from outside that have a value count as constants, and sizes too; variables do not.
    """
    value = tf.get_static_value(tensor)
    if value is not None:
        return value
    outside = {
        inner.name: outer
        for outer, inner in tensor.graph.captures
        if not tf.is_symbolic_tensor(outer) and outer.dtype != tf.resource
    }
    shapes: dict[str, list[int | None]] = {}
    operations: set[str] = set()
    pending = [tensor]
    while pending:
        part = pending.pop()
        if part.op.type == "Shape" and part.op.inputs[0].shape.rank is not None:
            shapes[part.name] = part.op.inputs[0].shape.as_list()
        elif part.name not in outside:
            if part.op.op_def.is_stateful or part.op.type in CALLS:
                return None
            operations.add(part.op.name)
            pending += part.op.inputs
    ordered = [operation for operation in tensor.graph.get_operations() if operation.name in operations]
    taken = {part.name for operation in ordered for part in operation.inputs} | {tensor.name}

    def compute(open_size: int) -> tf.Tensor:
        sizes = {name: [open_size if n is None else n for n in shape] for name, shape in shapes.items()}
        known = {name: capture(value) for name, value in outside.items() if name in taken}
        known |= {name: tf.constant(shape, tf.int32) for name, shape in sizes.items()}
        return {**known, **copy_operations(tensor.graph.as_graph_def(), ordered, known)}[tensor.name]

    with tf.init_scope():
        # Sizes that are open count as known where nothing depends on them.
        one, other = trace(lambda: ([compute(2), compute(3)], None))()
        return one.numpy() if np.array_equal(one, other) else None
