"""Functions of tensors as TensorFlow graphs: traced once, then run, read, or replayed in part."""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context
from tensorflow.python.framework import op_callbacks
from tensorflow.python.framework import ops as framework_ops

# TensorFlow wraps a user's gradient in two functions; their closures may hold a few more.
_MOST_WRAPPERS = 20

# Maximum number of entries of a sparse kernel that is written as a dense one.
_MOST_ENTRIES = 2**24

# Calls of a `tf.function`.
CALLS = ("PartitionedCall", "StatefulPartitionedCall")

StaticT = TypeVar("StaticT")


# The name under which TensorFlow finds the gradient of the copies of custom gradients, and their rules by key.
_GRADIENT = "KerasJacmonCustomGradient"
_RULES: "weakref.WeakValueDictionary[int, _GradientRule]" = weakref.WeakValueDictionary()
_KEYS = itertools.count()


@dataclass(frozen=True)
class Traced(Generic[StaticT]):
    """A function of tensors as a graph, with the Python object that it returned while it was traced.

    Attributes:
        graph: Concrete function of TensorFlow. Calling it, or the `Traced` itself, runs the graph.
        static: Python object, known before the graph runs: metadata, or an object that must live as long as the graph.
    """

    graph: Any
    static: StaticT

    def __call__(self, *tensors: Any) -> Any:
        """Runs the graph for arguments that match the specs, and returns its tensors in the traced structure."""
        with unchecked():
            return self.graph(*tensors)


def trace(
    function: Callable[..., tuple[Any, StaticT]], specs: Sequence[Any] = (), *, inline: bool = True
) -> Traced[StaticT]:
    """Traces a function of tensors once, and keeps the Python object that it returns beside them.

    The graph of a `tf.function` returns tensors only, so a Python object can leave the trace only by a side effect.
    This function holds that one side effect.

    Args:
        function: Function from tensors to a pair: any structure of tensors, and any Python object. It should create no
            variables, since TensorFlow would then trace it twice.
        specs: Sequence of structures of `tf.TensorSpec`, one for each argument. Defaults to `()`.
        inline: Boolean, False for a graph that others call several times, and that TensorFlow then optimizes once and
            not once for each call. Defaults to True.

    Returns:
        `Traced`, the graph and the object. If the function raises, its error is raised.

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

    with unchecked():
        attributes = {} if inline else {"_noinline": True}
        graph = tf.function(tensors_of, autograph=False, experimental_attributes=attributes).get_concrete_function(
            *specs
        )
    return Traced(graph, returned[-1])


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Suspends the functions that TensorFlow calls for each operation, in this thread.

    `tf.debugging.enable_check_numerics` puts an assertion behind each operation. NaN and Inf are regular values here:
    at masked steps, of a flow that has ended, of weights that explode. And a step with assertions in it has no
    structure any more. TensorFlow has no public way to suspend them.
    """
    suspended = list(context.context().op_callbacks)
    for callback in suspended:
        op_callbacks.remove_op_callback(callback)
    try:
        yield
    finally:
        for callback in suspended:
            op_callbacks.add_op_callback(callback)


def chosen_device() -> str | None:
    """Returns the device of the scopes of `tf.device` around the caller, which a trace writes into its operations."""
    device: str | None = context.context().device_name
    return device


class _GradientRule:
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
        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in operation.outputs]

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
        captured = [counterparts[id(o)] if id(o) in counterparts else _captured(o) for o, _ in graph.captures]
        found, _ = _laid_out(graph, *seeds, *captured)
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
    rule: _GradientRule
    seed: tf.Tensor
    slopes: Mapping[int, tf.Tensor]


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
        if inline and not all(map(_is_plain, traced.graph.graph.get_operations())):
            # Not by `tf.config.run_functions_eagerly`, which holds for all threads.
            laid_out = trace(partial(_laid_out, traced.graph.graph), specs)
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
        self._aliases = {operation.name: f"{k}_{operation.type}" for k, operation in enumerate(self.operations)}
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
        here = {name: _captured(feeds[name]) for name in used}
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

    def fingerprint(self) -> Hashable:
        """Returns what the graph computes, as a value: graphs with equal fingerprints compute the same.

        The names of the operations are left out. A loop, a branch or a custom gradient has a name of its own in each
        trace, so that a graph with one of them equals no other graph; nor do graphs that read different objects.
        """
        places = {tensor.name: place for place, tensor in enumerate(t for op in self.operations for t in op.outputs)}
        order = {operation.name: place for place, operation in enumerate(self.operations)}
        nodes = [
            (
                operation.type,
                tuple(places[tensor.name] for tensor in operation.inputs),
                tuple(order[control.name] for control in operation.control_inputs),
                _attributes(self._nodes[operation.name]),
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


def _laid_out(graph: Any, *inputs: tf.Tensor) -> tuple[list[tf.Tensor], list[CustomGradient]]:
    """Lays out a graph in the present one, with operations instead of calls of functions.

    Custom gradients become such that need no tensor of the first graph.

    Args:
        graph: Graph of a function.
        *inputs: Tensors to use in place of its inputs, the first ones at least; what it captures may be left out.

    Returns:
        List of the counterparts of the graph's outputs, and list of the custom gradients.
    """
    known = {inner.name: tensor for inner, tensor in zip(graph.inputs, inputs, strict=False)}
    known |= {inner.name: _captured(outer) for outer, inner in graph.captures if inner.name not in known}
    definition, gradients = graph.as_graph_def(), list[CustomGradient]()
    for is_plain, run in itertools.groupby(graph.get_operations(), _is_plain):
        operations = [operation for operation in run if operation.type != "Placeholder"]
        if is_plain:
            known |= _copy_of(definition, operations, known)
            continue
        for operation in operations:
            results, found = _rule_of(operation)(graph, operation, known)
            known |= {tensor.name: result for tensor, result in zip(operation.outputs, results, strict=True)}
            gradients += found
    return [known[tensor.name] for tensor in graph.outputs], gradients


def _is_plain(operation: tf.Operation) -> bool:
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


def _without_call(
    graph: Any, call: tf.Operation, known: Mapping[str, tf.Tensor]
) -> tuple[list[tf.Tensor], list[CustomGradient]]:
    """Lays out the body of a called function in the present graph.

    Args:
        graph: Graph that the call stands in.
        call: The call, an operation of that graph.
        known: By name of a tensor of that graph, its counterpart in the present graph.

    Returns:
        As for `_laid_out`, the counterparts of the call's outputs.
    """
    body = function_graph(graph, call.get_attr("f").name)
    results, gradients = _laid_out(body, *(known[tensor.name] for tensor in call.inputs))
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
        As for `_laid_out`, the counterparts of the operation's outputs. If the gradient cannot be traced there is no
        `CustomGradient`.
    """
    operands = [known[tensor.name] for tensor in operation.inputs]
    try:
        rule = _GradientRule(graph, operation)
    except Exception:  # noqa: BLE001 - the user's gradient; autodiff takes over
        copies = _copy_of(graph.as_graph_def(), [operation], known)
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
        As for `_laid_out`. The operation as it is if the number is not known.
    """
    values, size = operation.inputs
    count = constant_value(size)
    if count is None:
        copies = _copy_of(graph.as_graph_def(), [operation], known)
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
        As for `_laid_out`. The operation as it is if the kernel is complex, large, or of unknown size.
    """
    sparse = operation.inputs[0].op
    indices, values, shape, factor = sparse.inputs
    sizes = constant_value(shape)
    adjoint, points_last = sparse.get_attr("adjoint_a"), not sparse.get_attr("adjoint_b")
    y = factor.op.inputs[0] if points_last and _transposes(factor.op) else factor
    if sizes is None or np.prod(sizes) > _MOST_ENTRIES or not values.dtype.is_floating or (points_last and y is factor):
        return [_copy_of(graph.as_graph_def(), [operation], known)[operation.outputs[0].name]], []
    # Entries that stand twice are added up, as they are in the product.
    kernel = tf.scatter_nd(known[indices.name], known[values.name], tf.constant(sizes, indices.dtype))
    return [tf.matmul(known[y.name], kernel, transpose_b=not adjoint)], []


def _transposes(operation: tf.Operation, made_by: str | None = None) -> bool:
    """Tells if an operation transposes a matrix, made by an operation of some type if it is given."""
    if operation.type != "Transpose" or made_by not in (None, operation.inputs[0].op.type):
        return False
    permutation = tf.get_static_value(operation.inputs[1])
    return permutation is not None and list(permutation) == [1, 0]


def _copy_of(
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
        known = {name: _captured(value) for name, value in outside.items() if name in taken}
        known |= {name: tf.constant(shape, tf.int32) for name, shape in sizes.items()}
        return {**known, **_copy_of(tensor.graph.as_graph_def(), ordered, known)}[tensor.name]

    with tf.init_scope():
        # Sizes that are open count as known where nothing depends on them.
        one, other = trace(lambda: ([compute(2), compute(3)], None))()
        return one.numpy() if np.array_equal(one, other) else None


def graph_of(tensor: tf.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which operations are added to the graph of a tensor.

    In the body of a loop, an operation on a tensor from outside is so computed once and not in each turn.
    """
    return contextlib.nullcontext() if tf.executing_eagerly() else tensor.graph.as_default()


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


def _bare(node: Any, operation: tf.Operation) -> Any:
    """Removes from a node what holds only in the graph that it was traced in, and returns it.

    These are the placement beside another node, which may not be copied, and the custom gradient of `silu`, which
    refers to tensors of that graph.
    """
    node.attr.pop("_class", None)
    if "_gradient_op_type" in node.attr and not has_custom_gradient(operation):
        node.attr.pop("_gradient_op_type")
    return node


def _attributes(node: Any) -> tuple[tuple[str, bytes], ...]:
    """Returns the attributes of a node, without the name that an argument has in Python."""
    attributes = {name: value.SerializeToString(deterministic=True) for name, value in node.attr.items()}
    attributes.pop("_user_specified_name", None)
    return tuple(sorted(attributes.items()))


def _captured(tensor: tf.Tensor) -> tf.Tensor:
    """Returns the tensor in the present graph, which may be the body of a loop."""
    graph = tf.compat.v1.get_default_graph()
    if getattr(tensor, "graph", None) is graph or not graph.building_function:
        return tensor
    return graph.capture(tensor)
