"""One step of a cell as a graph of TensorFlow operations."""

import math
from collections.abc import Sequence

import tensorflow as tf

from keras_jacmon.cell.step import CellStep
from keras_jacmon.traced_graph import TracedGraph

# Stateful operations that only read.
_READERS = ("Placeholder", "ReadVariableOp", "ResourceGather")

# The number of rows in the copy of the graph whose shapes are looked at; no shape of a network is likely to have it.
ROWS = 8191


class CellGraph(TracedGraph):
    """The operations between a cell's inputs and old states and its new states, for any number of rows.

    What a `tf.function` in the cell does stands in the graph itself, and is seen.

    Args:
        step: The cell's step.
        inputs: `(rows, ...)`; only shape and type count.
        states: Flat, each `(rows, ...)`.

    Attributes:
        step_inputs: The inputs.
        states: The old states.
        new_states: The new ones.
        shapes: By tensor, the shape for `ROWS` rows; None where TensorFlow cannot tell.

    Raises:
        NotImplementedError: If the step cannot be seen through; the message says why.
    """

    def __init__(self, step: CellStep, inputs: tf.Tensor, states: Sequence[tf.Tensor]) -> None:
        specs = [tf.TensorSpec([None, *t.shape[1:]], t.dtype) for t in (inputs, *states)]
        try:
            super().__init__(lambda inputs, *states: step(inputs, states), specs, inline=True)
        except Exception as error:
            raise NotImplementedError(f"it cannot be traced for any number of rows ({type(error).__name__})") from error
        self.step_inputs, *self.states = self.inputs
        self.new_states = self.outputs
        for operation in self.operations:
            if operation.op_def.is_stateful and operation.type not in _READERS:
                raise NotImplementedError(f"its operation `{operation.type}` may do something else each time it runs")
        self._names = {id(weight.value.handle): weight.name for weight in getattr(step.cell, "weights", ())}
        self.shapes = self._static_shapes()

    def source_of(self, tensor: tf.Tensor) -> str:
        """Returns the names of the weights that a tensor is made from, if it depends on no input and no state."""
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
        """Returns the shape of a tensor without the rows.

        Raises:
            NotImplementedError: If the first axis is not known to be that of the rows.
        """
        shape = self.shapes.get(tensor.name)
        if shape is None or None in shape or not shape or shape[0] != ROWS:
            raise NotImplementedError
        return tuple(int(size) for size in shape[1:] if size is not None)

    def size(self, tensor: tf.Tensor) -> int:
        """Returns the number of units of a tensor, per row; raises as `units` does."""
        return math.prod(self.units(tensor))

    def _static_shapes(self) -> dict[str, tuple[int | None, ...] | None]:
        with tf.Graph().as_default():
            feeds = {t.name: tf.compat.v1.placeholder(t.dtype, [ROWS, *t.shape[1:]]) for t in self.inputs}
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
