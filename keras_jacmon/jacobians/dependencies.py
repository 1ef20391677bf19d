"""Dependencies of the new states on the old ones; rejects steps with hidden state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from keras_jacmon.cell.step import CellStep
from keras_jacmon.graphs.calls import CALLS, function_graph
from keras_jacmon.graphs.trace import trace
from keras_jacmon.jacobians.views import floating_states, size
from keras_jacmon.tensors import spec_of

# Operations that call Python.
_PYTHON = frozenset({"EagerPyFunc", "PyFunc", "PyFuncStateless"})

# Beginnings of the names of operations that draw other numbers each time, and of those that draw by a seed.
_DRAWING = ("Random", "Multinomial", "TruncatedNormal", "ParameterizedTruncatedNormal", "Stateful", "RngReadAndSkip")
_SEEDED = ("StatelessRandom", "StatelessMultinomial", "StatelessTruncatedNormal", "StatelessParameterizedTruncated")

# Beginnings of the names of operations that write to a variable.
_WRITING = ("Assign", "ResourceScatter", "ResourceStridedSliceAssign")


@dataclass(frozen=True)
class Dependencies:
    """Dependencies of the new states of a cell, found in its graph.

    Attributes:
        depends: `depends[p][q]` is True if a gradient flows from new floating-point state p to old one q.
        on_inputs: True if a gradient flows from the first of the new states to the inputs.
        bytes_per_point: Memory that one evaluation of the cell with its derivative takes for each point.
        outputs: Places, among the floating-point states, of those that the output is; if it is none of them, of those
            that it is made from.
    """

    depends: tuple[tuple[bool, ...], ...]
    on_inputs: bool
    bytes_per_point: int
    outputs: tuple[int, ...]

    @property
    def carried(self) -> tuple[int, ...]:
        """Places of the floating-point states that have an influence on new states, but never on the output."""
        felt = set(self.outputs)
        while more := {q for p in felt for q, influence in enumerate(self.depends[p]) if influence} - felt:
            felt |= more
        return tuple(
            q for q, influences in enumerate(zip(*self.depends, strict=True)) if any(influences) and q not in felt
        )


def find_dependencies(step: CellStep, inputs: tf.Tensor, states: Sequence[tf.Tensor]) -> Dependencies:
    """Traces one step and its gradients, in a graph of its own that is never run.

    Args:
        step: The step of the cell.
        inputs: Tensor `(points, ...)`; only shape and type count.
        states: Flat sequence of tensors `(points, ...)`; only shapes and types count.

    Raises:
        ValueError: If a step runs Python, draws random numbers, or leaves something for the next one beside the states.
    """
    specs = [spec_of(tensor) for tensor in (inputs, *states)]
    return trace(lambda inputs, *states: ([], _dependencies(step, inputs, states)), specs, ordered=False).static


def _dependencies(step: CellStep, inputs: tf.Tensor, states: Sequence[tf.Tensor]) -> Dependencies:
    graph = tf.compat.v1.get_default_graph()
    before = len(graph.get_operations())
    floating = floating_states(states)
    old = [states[q] for q in floating]
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch([*old, *([inputs] if inputs.dtype.is_floating else [])])
        output, new = step.with_output(inputs, states)
    stepped = graph.get_operations()[before:]
    if any(operation.type in _PYTHON for operation in stepped):
        raise ValueError("Its cell runs Python at each step (`tf.py_function`), which can be differentiated only once")
    if drawn := _random_operation(stepped, new):
        raise ValueError(
            f"Its cell draws random numbers at inference too (`{drawn}`): two evaluations of a step differ, so the "
            "numbers of a report would be of different draws. Give the cell a fixed seed, or no noise at inference"
        )
    if left := _side_effect(step, stepped, new):
        raise ValueError(
            f"Its cell writes to {left}, and its next step depends on it. What is left there is no state "
            "that is handed on, and is not known at the points where derivatives are taken"
        )
    depends = [tuple(g is not None for g in tape.gradient(new[p], old)) for p in floating]
    on_inputs = inputs.dtype.is_floating and tape.gradient(new[floating[0]], inputs) is not None
    outputs = _states_of_output(tape, output, [new[p] for p in floating], old)
    sizes = [
        size(tensor) * tensor.dtype.size
        for operation in graph.get_operations()[before:]
        for tensor in operation.outputs
        if tensor.shape.rank and tensor.shape[1:].is_fully_defined() and tensor.dtype.size
    ]
    floor = 16 * sum(size(state) * state.dtype.size for state in states)
    return Dependencies(tuple(depends), on_inputs, max(sum(sizes), floor), outputs)


def _states_of_output(
    tape: tf.GradientTape, output: Sequence[tf.Tensor], new: Sequence[tf.Tensor], old: Sequence[tf.Tensor]
) -> tuple[int, ...]:
    """Returns the places of the states that the output is, or else of those that it is made from; never none."""
    if same := tuple(place for place, state in enumerate(new) if any(state is tensor for tensor in output)):
        return same
    made = [tensor for tensor in output if tensor.dtype.is_floating]
    for states in (new, old):
        found = [any(tape.gradient(tensor, state) is not None for tensor in made) for state in states]
        if any(found):
            return tuple(place for place, is_source in enumerate(found) if is_source)
    return (0,)


def _random_operation(operations: Sequence[tf.Operation], results: Sequence[tf.Tensor]) -> str | None:
    """The type of an operation that draws other numbers at another time, and that the results depend on.

    A draw with a fixed seed is a constant.
    """
    for operation in _ancestors(operations, results):
        if operation.type in CALLS or not operation.type.startswith(_DRAWING):
            seeds = list(operation.inputs)[1:] if operation.type.startswith(_SEEDED) else []
            varies = any(made.type == "ReadVariableOp" for made in _ancestors(operations, seeds))
            inside = (_random_operation(body.get_operations(), body.outputs) for body in _bodies(operation))
            found = operation.type if varies else next((found for found in inside if found), None)
        else:
            found = operation.type
        if found:
            return found
    return None


def _ancestors(operations: Sequence[tf.Operation], results: Sequence[tf.Tensor]) -> list[tf.Operation]:
    """The operations, of some, that tensors are made by."""
    here = {operation.name for operation in operations}
    found: dict[str, tf.Operation] = {}
    pending = [tensor.op for tensor in results]
    while pending:
        operation = pending.pop()
        if operation.name in here and operation.name not in found:
            found[operation.name] = operation
            pending += [tensor.op for tensor in operation.inputs]
    return list(found.values())


def _bodies(operation: tf.Operation) -> list[Any]:
    """The graphs of the functions that an operation calls: a branch, a loop or a `tf.function`."""
    names = [attribute.name for attribute in operation.op_def.attr if attribute.type == "func"]
    return [function_graph(operation.graph, operation.get_attr(name).name) for name in names]


def _side_effect(step: CellStep, operations: Sequence[tf.Operation], new: Sequence[tf.Tensor]) -> str | None:
    """A variable, in words, that a step writes to and whose old value has an influence on the new states."""
    # Of variables of Keras a scope keeps what is written, and hides what they are.
    by_handle = {id(variable._value.handle): variable.path for variable in step.written()}  # noqa: SLF001
    captures = getattr(tf.compat.v1.get_default_graph(), "captures", ())
    written = {
        id(inner): f"the variable `{by_handle[id(outer)]}`" for outer, inner in captures if id(outer) in by_handle
    }
    return _read_before_written(operations, new, written)


def _read_before_written(
    operations: Sequence[tf.Operation], results: Sequence[tf.Tensor], written: Mapping[int, str]
) -> str | None:
    """A variable, in words, that a graph, or a function that it calls, writes to and reads for its results.

    Args:
        operations: Of the graph.
        results: Tensors that they make.
        written: By identity, tensors that are known to stand for what is written to.
    """
    assigning = [operation for operation in operations if operation.type.startswith(_WRITING)]
    written = {id(operation.inputs[0]): "a `tf.Variable` of its own" for operation in assigning} | {**written}
    here, met = {operation.name for operation in operations}, set[str]()
    pending = [tensor.op for tensor in results]
    while pending:
        operation = pending.pop()
        if operation.name in met or operation.name not in here:
            continue
        met.add(operation.name)
        if operation.type in CALLS:
            (body,) = _bodies(operation)
            found = _read_before_written(body.get_operations(), body.outputs, {})
            if found is not None:
                return found
        for tensor in operation.inputs:
            if id(tensor) in written:
                return written[id(tensor)]
            pending.append(tensor.op)
    return None
