"""One step of a cell as a graph of TensorFlow operations."""

import math
from collections.abc import Sequence

import tensorflow as tf

from keras_jacmon.cell.step import CellStep
from keras_jacmon.errors import message_of
from keras_jacmon.graphs.traced_graph import TracedGraph

# Operations that TensorFlow counts as stateful although they only read.
_READERS = ("Placeholder", "ReadVariableOp", "ResourceGather")

# Beginning of the names of operations that write to a variable.
_WRITERS = "Assign"

# Number of points in the copy of the graph that shows the shapes; no other axis of a network is likely to be as long.
_POINTS = 8191


class CellGraph(TracedGraph):
    """The operations between a cell's inputs and old states and its new states, for any number of points.

    Calls of a `tf.function` in the cell are replaced by its operations.

    Args:
        step: `CellStep`, the cell's step.
        inputs: Tensor `(points, ...)`; only shape and type count.
        states: Sequence of tensors `(points, ...)`, the flat states; only shapes and types count.

    Attributes:
        step_inputs: Tensor of the graph `(points, ...)`, the inputs.
        states: List of tensors of the graph `(points, ...)`, the old states.
        new_states: List of tensors of the graph `(points, ...)`, the new states.
        weights: Dict by position among the cell's weights, the tensor of the graph that stands for a weight; of the
            weights that the step reads.
        shapes: Dict by name of a tensor, its shape in a copy of the graph for a fixed number of points; None where
            TensorFlow does not know the rank.

    Raises:
        NotImplementedError: If the step cannot be analysed; the message says why.
    """

    def __init__(self, step: CellStep, inputs: tf.Tensor, states: Sequence[tf.Tensor]) -> None:
        specs = [tf.TensorSpec([None, *t.shape[1:]], t.dtype) for t in (inputs, *states)]
        try:
            super().__init__(lambda inputs, *states: step(inputs, states), specs, inline=True)
        except Exception as error:
            reason = message_of(error).splitlines()[0]
            raise NotImplementedError(f"it cannot be traced for any number of points: {reason}") from error
        self.step_inputs, *self.states = self.inputs
        self.new_states = self.outputs
        needed = self.between((), self.new_states)[0]
        for operation in self.operations:
            # A cell may count its calls: what is written there is not read for the new states, and need not be.
            idle = operation.type.startswith(_WRITERS) and operation.name not in needed
            if operation.op_def.is_stateful and operation.type not in _READERS and not idle:
                raise NotImplementedError(f"its operation `{operation.type}` may do something else each time it runs")
        weights = [(weight, weight.value) for weight in getattr(step.cell, "weights", ())]
        # In a scope of Keras the value of a variable may be a tensor.
        read = [(weight, v.handle if isinstance(v, tf.Variable) else v) for weight, v in weights]
        self._names = {id(tensor): weight.name for weight, tensor in [*read, *step.weights]}
        inner = {id(outer): name for name, outer in self.captures.items()}
        by_name = {tensor.name: tensor for operation in self.operations for tensor in operation.outputs}
        self.weights = {
            place: by_name[inner[id(tensor)]]
            for place, (_, tensor) in enumerate(step.weights or read)
            if id(tensor) in inner
        }
        self.shapes = self._static_shapes()

    def source_of(self, tensor: tf.Tensor) -> str:
        """Describes in words the weights that a tensor is made from, for one that depends on no input and no state."""
        names: dict[str, None] = {}
        operations: set[str] = set()
        pending = [tensor]
        while pending:
            tensor = pending.pop()
            if tensor.name in self.captures:
                names[self._names.get(id(self.captures[tensor.name]), tensor.op.name.split("/")[0])] = None
            elif tensor.op.type != "Const":
                operations.add(tensor.op.type)
                pending.extend(tensor.op.inputs)
        if not names:
            return "a constant"
        listed = ", ".join(f"`{name}`" for name in names)
        if operations <= {"ReadVariableOp", "Cast", "Identity"}:
            return listed
        parts = {"ReadVariableOp", "Cast", "Identity", "Slice", "Split", "SplitV", "StridedSlice"}
        return f"a part of {listed}" if operations <= parts else f"a function of {listed}"

    def units(self, tensor: tf.Tensor) -> tuple[int, ...]:
        """Returns the shape of a tensor without its first axis, the points.

        Raises:
            NotImplementedError: If the first axis is not known to hold the points.
        """
        shape = self.shapes.get(tensor.name)
        if shape is None or None in shape or not shape or shape[0] != _POINTS:
            raise NotImplementedError
        return tuple(int(size) for size in shape[1:] if size is not None)

    def size(self, tensor: tf.Tensor) -> int:
        """Returns the number of units of a tensor at each point; raises as `units` does."""
        return math.prod(self.units(tensor))

    def _static_shapes(self) -> dict[str, tuple[int | None, ...] | None]:
        with tf.Graph().as_default():
            feeds = {t.name: tf.compat.v1.placeholder(t.dtype, [_POINTS, *t.shape[1:]]) for t in self.inputs}
            for operation in self.operations:
                for tensor in operation.outputs:
                    if tensor.name in self.captures or operation.type in _READERS[1:]:
                        feeds.setdefault(tensor.name, tf.compat.v1.placeholder(tensor.dtype, tensor.shape))
            tensors = [tensor for op in self.operations for tensor in op.outputs if tensor.dtype != tf.resource]
            copies = self.replay(tensors, feeds)
        return {
            tensor.name: None if copy.shape.rank is None else tuple(copy.shape)
            for tensor, copy in zip(tensors, copies, strict=True)
        }
