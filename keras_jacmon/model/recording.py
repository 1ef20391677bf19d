"""Recording of the recurrent calls that a model makes on the probe."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.errors import message_of
from keras_jacmon.graphs.trace import trace
from keras_jacmon.graphs.traced_graph import TracedGraph
from keras_jacmon.model.adapted_cell import AdaptedCall
from keras_jacmon.model.internals import tensors_in, training_argument
from keras_jacmon.model.layers import RecurrentLayer
from keras_jacmon.model.masks import made_step_by_step
from keras_jacmon.model.observing import call_names, in_graph, shadowing
from keras_jacmon.model.packing import real_form
from keras_jacmon.tensors import spec_of


@dataclass(frozen=True)
class RecurrentCall:
    """One call of a recurrent layer.

    Attributes:
        name: String, the key of the call in reports.
        layer: `keras.layers.RNN`, or a layer with a registered recurrence.
        cell: The cell of the layer, or the `AdaptedCell` of its recurrence.
        inputs: Tensor `(batch, time, ...)`, the sequence.
        states: Structure of tensors `(batch, ...)`, the initial states as the cell takes them.
        mask: Boolean tensor `(batch, time)`, False at the steps to skip; None without a mask.
        is_stepped_by_hand: Boolean, True if the model also calls the cell outside of the layer. Defaults to False.
        go_backwards: Boolean, True if the steps run from the last position of the inputs to the first.
        has_lost_mask: Boolean, True if the layer below received a mask and this one did not. Defaults to False.
        returned: Tensor that a layer with a registered recurrence returned, `(batch, time, ...)` or, of the last step
            alone, `(batch, ...)`. Defaults to None, for `keras.layers.RNN`.
    """

    name: str
    layer: keras.Layer
    cell: Any
    inputs: tf.Tensor
    states: Any
    mask: tf.Tensor | None
    go_backwards: bool
    is_stepped_by_hand: bool = False
    has_lost_mask: bool = False
    returned: tf.Tensor | None = None


@dataclass(frozen=True)
class Recording:
    """The recurrent calls that the model made on the probe.

    Attributes:
        calls: Tuple of `RecurrentCall`s in their order. The first call of a layer has the name of the layer; the next
            ones are `layer:1`, `layer:2`, ...
        unmeasured: Dict by layer name, the reason why a layer has no call that can be measured.
        graph: `TracedGraph` of the model; must live as long as the calls.
    """

    calls: tuple[RecurrentCall, ...]
    unmeasured: dict[str, str]
    graph: TracedGraph


# Of a layer and its `inner_loop`, a function that does the same.
LoopOf = Callable[[keras.layers.RNN, Callable[..., Any]], Callable[..., Any]]


def record_calls(
    model: keras.Layer, inputs: Any, layers: Sequence[RecurrentLayer], loop_of: LoopOf = lambda _, loop: loop
) -> Recording:
    """Runs the model on the probe, inside the graph that is being traced, and records its recurrent calls.

    A call is recorded where Keras calls the `inner_loop` of the layer. Its arguments are the sequence as the cell sees
    it, the initial states as tensors (from a stateful layer, from the caller, or zeros) and the mask. Of a layer with a
    registered recurrence these are what its adapter returns for the arguments of its `call`.

    Only the operations that these arguments depend on are replayed in the graph. The layers after the last recurrent
    one, for instance, are left out.

    Args:
        model: Built Keras model.
        inputs: Structure of tensors `(batch, ...)`, the probe as the model takes it.
        layers: Sequence of the layers to record.
        loop_of: Function that says what to call in place of the loop of a layer. Defaults to the loop itself.

    Returns:
        `Recording`.
    """
    observable = {position: item for position, item in enumerate(layers) if item.adapter or _has_inner_loop(item)}

    def run(*flat: tf.Tensor) -> tuple[list[list[tf.Tensor]], _Recorder]:
        recorder = _Recorder(tf.compat.v1.get_default_graph(), loop_of)
        with shadowing(model, observable, recorder), _watching(observable.values(), recorder):
            model(keras.tree.pack_sequence_as(inputs, list(flat)), **training_argument(model))
        recorder.leave_out_unmeasurable()
        return [_tensors(call) for call in recorder.calls], recorder

    flat = keras.tree.flatten(inputs)
    specs = list(map(spec_of, flat))
    traced = trace(run, specs)
    graph, recorder = TracedGraph(traced, specs), traced.static
    replayed = iter(graph.replay(graph.outputs, dict(zip([i.name for i in graph.inputs], flat, strict=True))))
    names = call_names(call.name for call in recorder.calls)
    calls = tuple(
        _with_tensors(name, call, replayed, is_stepped_by_hand=id(call.cell) in recorder.stepped_by_hand)
        for name, call in zip(names, recorder.calls, strict=True)
    )
    recorded = {call.name for call in recorder.calls}
    unmeasured = {item.name: _reason(item, recorder) for item in layers if item.name not in recorded}
    return Recording(calls, unmeasured, graph)


class _Recorder:
    """Records the recurrent calls in one graph, and the layers that are called in others.

    Args:
        graph: `tf.Graph`, in which calls can be observed.
        loop_of: Function that says what to call there in place of the loop of a layer.

    Attributes:
        calls: List of calls in their order, each with the name of its layer.
        hidden: Set of the names of layers that are called inside another graph.
        stepped_by_hand: Set of the identities of cells that are called outside of their layers.
        masked: Set of the names of tensors, the sequences that calls with a mask have made.
        changed: Dict by layer name, the names of attributes of its cell, of layers that are left out: their cells used
            other tensors of the model, and hold none any more.
        refused: Dict by layer name, the reason why its registered recurrence cannot be used.
    """

    def __init__(self, graph: tf.Graph, loop_of: LoopOf) -> None:
        self._graph, self._loop_of = graph, loop_of
        self.calls: list[RecurrentCall] = []
        self.hidden: set[str] = set()
        self.stepped_by_hand: set[int] = set()
        self.masked: set[str] = set()
        self.changed: dict[str, list[str]] = {}
        self.refused: dict[str, str] = {}
        self._is_adapting = False
        self._inside = 0
        # By layer name, the attributes of cells that use tensors of the model beside their inputs and states.
        self._attributes: dict[str, list[str]] = {}

    def inner_loop(
        self, item: RecurrentLayer, loop: Callable[..., Any], inputs: tf.Tensor, states: Any, mask: Any, **kwargs: Any
    ) -> Any:
        if inputs.graph is self._graph:
            # Read now: the states of a stateful layer are variables, which the model changes when it runs.
            initial = keras.tree.map_structure(lambda state: tf.identity(tf.convert_to_tensor(state)), states)
            steps = _as_mask(mask)
            lost = steps is None and made_step_by_step(inputs, self.masked)
            cell, backwards = item.layer.cell, item.layer.go_backwards
            self.calls.append(
                RecurrentCall(item.name, item.layer, cell, inputs, initial, steps, backwards, has_lost_mask=lost)
            )
            loop = self._loop_of(item.layer, loop)
        else:
            self.hidden.add(item.name)
        given = [tf.convert_to_tensor(x) for x in keras.tree.flatten([inputs, states, mask]) if x is not None]
        # A variable, such as a state or a counter, that an earlier call has written to holds a tensor of the graph.
        given += [v.value for v in item.layer.variables if tf.is_symbolic_tensor(v.value)]
        older = {operation.name for operation in self._graph.get_operations()}
        attributes = tensors_in(item.layer.cell)
        self._inside += 1
        try:
            last, sequence, new = loop(inputs, states, mask, **kwargs)
        finally:
            self._inside -= 1
        if inputs.graph is self._graph and mask is not None:
            self.masked.add(sequence.name)
        if self._uses_others(older, given):
            self._attributes[item.name] = attributes
        return last, sequence, new

    def call(self, item: RecurrentLayer, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a layer with a registered recurrence, and records what its adapter says of the call."""
        returned = call(*args, **kwargs)
        if item.adapter is None or self._is_adapting:
            # The adapter of an outer layer calls this one.
            return returned
        if not in_graph(self._graph, (args, kwargs)):
            self.hidden.add(item.name)
            return returned
        self._is_adapting = True
        try:
            adapted = AdaptedCall.of(item.layer, item.adapter, args, kwargs)
            self.calls.append(_adapted_call(item, adapted, returned))
        except Exception as error:  # noqa: BLE001 - of any kind that a user's adapter may raise
            self.refused[item.name] = message_of(error).splitlines()[0]
        finally:
            self._is_adapting = False
        return returned

    def _uses_others(self, older: set[str], given: list[tf.Tensor]) -> bool:
        """Tells if operations that are not among the older ones use tensors of older ones, beside those given."""
        # What the graph captured from outside, such as a weight or a constant, is there at any time.
        known = {id(tensor) for tensor in [*given, *(inner for _, inner in self._graph.captures)]}
        # A state that a policy casts where it is read.
        known |= {id(tensor.op.inputs[0]) for tensor in given if tensor.op.type == "Cast"}
        new = [operation for operation in self._graph.get_operations() if operation.name not in older]
        return any(t.op.name in older and id(t) not in known for operation in new for t in operation.inputs)

    def leave_out_unmeasurable(self) -> None:
        """Drops the calls of layers whose adapter failed at one of them, and of cells that step otherwise now.

        These are cells that used other tensors of the model, and hold none any more. A cell that still holds them is
        refused when its step is traced.
        """
        self.calls = [call for call in self.calls if call.name not in self.refused]
        cells = {call.name: call.cell for call in self.calls}
        self.changed = {
            name: attributes
            for name, attributes in self._attributes.items()
            if name in cells and not tensors_in(cells[name])
        }
        self.calls = [call for call in self.calls if call.name not in self.changed]

    def step(self, cell: keras.Layer) -> None:
        """Takes note of a call of a cell."""
        if not self._inside:
            self.stepped_by_hand.add(id(cell))


@contextlib.contextmanager
def _watching(layers: Iterable[RecurrentLayer], recorder: _Recorder) -> Iterator[None]:
    """Shadows `call` on the cells of layers, so that the recorder sees each step."""

    def shadow(cell: keras.Layer, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            recorder.step(cell)
            return original(*args, **kwargs)

        return call

    held = [item.layer.cell for item in layers if item.adapter is None]
    cells = {id(cell): cell for cell in held if isinstance(cell, keras.Layer)}
    # A cell whose `call` is an attribute of its own keeps it.
    watched = [cell for cell in cells.values() if "call" not in vars(cell)]
    try:
        for cell in watched:
            vars(cell)["call"] = shadow(cell, cell.call)
        yield
    finally:
        for cell in watched:
            vars(cell).pop("call", None)


def _adapted_call(item: RecurrentLayer, adapted: AdaptedCall, returned: Any) -> RecurrentCall:
    return RecurrentCall(
        item.name,
        item.layer,
        adapted.cell,
        adapted.inputs,
        adapted.states,
        adapted.mask,
        adapted.go_backwards,
        returned=real_form(tf.convert_to_tensor(keras.tree.flatten(returned)[0])),
    )


def _has_inner_loop(item: RecurrentLayer) -> bool:
    return type(item.layer).inner_loop.__module__.startswith("keras.")


def _reason(item: RecurrentLayer, recorder: _Recorder) -> str:
    """Returns the reason why no call of a layer was recorded."""
    if item.name in recorder.refused:
        return f"the recurrence that is registered for it cannot be used: {recorder.refused[item.name]}"
    if not item.adapter and not _has_inner_loop(item):
        return (
            f"its class {type(item.layer).__name__} overrides `inner_loop`, so how it steps its cell is not known; "
            "`keras_jacmon.register_recurrence` can say it"
        )
    if item.name in recorder.changed:
        attributes = ", ".join(f"`{name}`" for name in recorder.changed[item.name])
        return (
            f"its cell {type(item.layer.cell).__name__} uses tensors of the model that are neither its inputs nor its "
            f"states{f', set on it as {attributes}' if attributes else ''}, and that it holds no more when the model "
            "has run"
        )
    if item.name in recorder.hidden:
        return (
            "it is called inside a graph of its own (a loop, `vectorized_map` or `tf.function`), "
            "where its states cannot be observed"
        )
    return "it is not called when the model runs on the probe"


def _tensors(call: RecurrentCall) -> list[tf.Tensor]:
    optional = [tensor for tensor in (call.mask, call.returned) if tensor is not None]
    return [call.inputs, *keras.tree.flatten(call.states), *optional]


def _with_tensors(
    name: str, call: RecurrentCall, tensors: Iterator[tf.Tensor], *, is_stepped_by_hand: bool
) -> RecurrentCall:
    """Returns the call with a name of its own and with other tensors, in the order of `_tensors`."""
    return replace(
        call,
        name=name,
        inputs=next(tensors),
        states=keras.tree.map_structure(lambda _: next(tensors), call.states),
        mask=None if call.mask is None else next(tensors),
        returned=None if call.returned is None else next(tensors),
        is_stepped_by_hand=is_stepped_by_hand,
    )


def _as_mask(mask: Any) -> tf.Tensor | None:
    flat = [leaf for leaf in keras.tree.flatten(mask) if leaf is not None]
    if not flat:
        return None
    mask = tf.cast(flat[0], tf.bool)
    return tf.reshape(mask, tf.shape(mask)[:2])
