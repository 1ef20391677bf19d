"""A function of tensors as a graph, traced once."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import tensorflow as tf
from tensorflow.core.protobuf import config_pb2, rewriter_config_pb2
from tensorflow.python.eager import context
from tensorflow.python.framework import op_callbacks

StaticT = TypeVar("StaticT")

# Passes of TensorFlow's graph optimizer that take a good part of a first run, and make no later run faster; the second
# time with one that has nothing to do without a GPU.
_IDLE_PASSES = ("constant_folding", "shape_optimization", "implementation_selector")
_IDLE_WITHOUT_GPU = (*_IDLE_PASSES, "layout_optimizer")


@dataclass(frozen=True)
class Traced(Generic[StaticT]):
    """A function of tensors as a graph, with the Python object that it returned while it was traced.

    Attributes:
        graph: Concrete function of TensorFlow. Calling it, or the `Traced` itself, runs the graph.
        static: Python object, known before the graph runs: metadata, or an object that must live as long as the graph.
    """

    graph: Any
    static: StaticT

    @property
    def refers_to_variables(self) -> bool:
        """True if the graph refers to variables beside its arguments, and cannot be used when they are gone."""
        return any(outer.dtype == tf.resource for outer, _ in self.graph.graph.captures)

    def __call__(self, *tensors: Any) -> Any:
        """Runs the graph for arguments that match the specs, and returns its tensors in the traced structure."""
        with unchecked():
            return self.graph(*tensors)


def trace(
    function: Callable[..., tuple[Any, StaticT]],
    specs: Sequence[Any] = (),
    *,
    inline: bool = True,
    ordered: bool = True,
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
        ordered: Boolean, False for a function in which nothing has an effect. TensorFlow then does not look at each
            operation for effects to put in order, which takes a tenth of the trace. Defaults to True.

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
        attributes = {"_noinline": not inline, "_disable_acd": not ordered}
        chosen = {name: True for name, is_chosen in attributes.items() if is_chosen}
        graph = tf.function(tensors_of, autograph=False, experimental_attributes=chosen).get_concrete_function(*specs)
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


@contextlib.contextmanager
def optimized_briefly() -> Iterator[None]:
    """Has TensorFlow optimize a graph once and not twice at its first run, without idle passes, in this thread.

    Not for a model with layers in half precision: other passes round it in other places, and these layers would receive
    other inputs than in a training. All other settings are those of the user. TensorFlow has no public way to choose
    settings for one function.
    """
    present = context.context()
    chosen = present.function_call_options
    config = config_pb2.ConfigProto.FromString(chosen.config_proto_serialized)
    passes = config.graph_options.rewrite_options
    passes.meta_optimizer_iterations = rewriter_config_pb2.RewriterConfig.ONE
    passes.memory_optimization = rewriter_config_pb2.RewriterConfig.NO_MEM_OPT
    passes.disable_tfg_optimizer = True
    for name in _IDLE_PASSES if tf.config.list_logical_devices("GPU") else _IDLE_WITHOUT_GPU:
        setattr(passes, name, rewriter_config_pb2.RewriterConfig.OFF)
    present.function_call_options = context.FunctionCallOptions(chosen.executor_type, config)
    try:
        yield
    finally:
        present.function_call_options = chosen


def chosen_device() -> str | None:
    """Returns the device of the scopes of `tf.device` around the caller, which a trace writes into its operations."""
    device: str | None = context.context().device_name
    return device


def graph_of(tensor: tf.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which operations are added to the graph of a tensor.

    In the body of a loop, an operation on a tensor from outside is so computed once and not in each turn.
    """
    return contextlib.nullcontext() if tf.executing_eagerly() else tensor.graph.as_default()
