"""The kind of a cell: its step as a graph, apart from the values of its weights."""

import collections
import dataclasses
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.cell.step import CellStep, cell_type
from keras_jacmon.graphs.traced_graph import TracedGraph
from keras_jacmon.tensors import spec_of

# Their options say how they take a step.
_OF_KERAS = (keras.layers.GRUCell, keras.layers.LSTMCell, keras.layers.SimpleRNNCell)

# Ends of the names of options that have no part in a step.
_NO_PART_OF_A_STEP = ("name", "initializer", "regularizer", "constraint")


def names_of(weights: "Sequence[keras.Variable]") -> tuple[str, ...]:
    """Returns the names of weights, as reports show them: with the name of their layer where several have one name."""
    count = collections.Counter(weight.name for weight in weights)
    return tuple(w.name if count[w.name] == 1 else "/".join(w.path.split("/")[-2:]) for w in weights)


@dataclass(frozen=True)
class CellKind:
    """The kind of a cell. Cells of equal kinds take the same step, if they are given the same weights.

    Attributes:
        key: Hashable, equal for cells of the same kind.
        weights: Tuple of the variables of Keras that the step is given as tensors.
        is_self_contained: Boolean, True if the step reads nothing but what it is given. Then equal keys mean equal
            kinds for as long as the process lives, also when the cell is gone. Defaults to False.
        key_for_any_features: Hashable, equal for kinds that differ in their number of features alone: with zeros added
            to the inputs, and to the rows of the weights that multiply them, one takes the step of the other. None, the
            default, if the inputs do more than multiply weights.
    """

    key: Hashable
    weights: "tuple[keras.Variable, ...]"
    is_self_contained: bool = False
    key_for_any_features: Hashable = None

    @classmethod
    def own(cls, cell: Any) -> "CellKind":
        """Returns a kind that no other cell has, of a cell that reads its variables itself."""
        return cls(id(cell), ())

    def values(self) -> list[tf.Tensor]:
        """Returns the present values of the weights."""
        return [tf.convert_to_tensor(weight.value) for weight in self.weights]


def cell_kind(cell: Any, states: Any, specs: Sequence[tf.TensorSpec]) -> CellKind:
    """Traces one step of a cell and finds its kind.

    The kind rests on the graph of the step and not on the configuration of the cell, which need not hold all that the
    step depends on. A cell that reads a `tf.Variable` or a tensor of its own is of the kind of cells that read the same
    object. A cell that writes to its variables, or whose step cannot be traced, is of a kind of its own, and reads its
    variables itself.

    Args:
        cell: Keras layer or other object that `keras.layers.RNN` takes as a cell.
        states: Structure of the cell's states.
        specs: Sequence of `tf.TensorSpec`, of the inputs `(batch, ...)` of one step and of its flat states.

    Returns:
        `CellKind`.
    """
    weights = tuple(cell.weights) if isinstance(cell, keras.Layer) else ()
    weight_specs = list(map(spec_of, weights))
    written: list[keras.Variable] = []

    def take_step(*tensors: tf.Tensor) -> list[tf.Tensor]:
        inputs, *others = tensors[: len(specs)]
        step = CellStep(cell, states, list(zip(weights, tensors[len(specs) :], strict=True)))
        output, new = step.with_output(inputs, others)
        written.extend(step.written())
        return [*new, *output]

    try:
        graph = TracedGraph(take_step, [*specs, *weight_specs], inline=True)
    except Exception:  # noqa: BLE001 - the measurement meets the same error and reports it
        return CellKind.own(cell)
    if written:
        return CellKind.own(cell)
    described = _described(weights)
    return CellKind(
        (cell_type(cell), described, graph.fingerprint()),
        weights,
        is_self_contained=not graph.captures,
        key_for_any_features=_key_for_any_features(cell, described, graph, graph.inputs[len(specs) :]),
    )


class CellKinds:
    """The kinds of the cells of a model, each found once; of cells of Keras with the same options one stands for all.

    Args:
        cells: Sequence of the cells, as they are when nothing observes them.
    """

    def __init__(self, cells: Sequence[Any]) -> None:
        self._options = {id(cell): _options_of(cell) for cell in cells}
        self._types = {id(cell): _types_of(cell) for cell in cells}
        self._known: dict[Hashable, CellKind] = {}

    def is_of_keras(self, cell: Any) -> bool:
        """True for a cell of Keras' own, whose output is its first state."""
        return self._options[id(cell)] != id(cell)

    def are_cast(self, cell: Any) -> bool:
        """True if the caller is in a scope of Keras that casts the weights of a cell."""
        return _types_of(cell) != self._types[id(cell)]

    def of(self, cell: Any, states: Any, specs: Sequence[tf.TensorSpec]) -> CellKind:
        """Returns the kind of a cell.

        Args:
            cell: As for `cell_kind`.
            states: As for `cell_kind`.
            specs: As for `cell_kind`.
        """
        weights = tuple(cell.weights) if isinstance(cell, keras.Layer) else ()
        structure = keras.tree.map_structure(lambda _: 0, states)
        key = (self._options.get(id(cell), id(cell)), str(structure), str(specs), _described(weights))
        if key in self._known:
            return dataclasses.replace(self._known[key], weights=weights)
        kind = cell_kind(cell, states, specs)
        # A cell that reads more than it is given may read something else the next time.
        if kind.is_self_contained:
            self._known[key] = kind
        return kind


def _types_of(cell: Any) -> list[str]:
    """Returns the types of the weights of a cell, as Keras gives them in the scope of the caller."""
    return [weight.dtype for weight in cell.weights] if isinstance(cell, keras.Layer) else []


def _options_of(cell: Any) -> "Hashable":
    """Returns what the step of a cell of Keras depends on beside its weights; of another cell, its identity."""
    if type(cell) not in _OF_KERAS or "call" in vars(cell):
        return id(cell)
    try:
        config = cell.get_config()
    except Exception:  # noqa: BLE001 - an activation may have no configuration
        return id(cell)
    options = {name: value for name, value in config.items() if not name.endswith(_NO_PART_OF_A_STEP)}
    # Different functions may have one name.
    return type(cell), str(options), id(cell.activation), id(getattr(cell, "recurrent_activation", None))


def _described(weights: "Sequence[keras.Variable]") -> tuple[tuple[Any, ...], ...]:
    """Returns names, shapes and types of weights."""
    return tuple((name, tuple(w.shape), w.dtype) for name, w in zip(names_of(weights), weights, strict=True))


def _key_for_any_features(
    cell: Any, described: Sequence[tuple[Any, ...]], graph: TracedGraph, weights: Sequence[tf.Tensor]
) -> Hashable:
    """Returns the key that kinds with other numbers of features have too; None if there can be none.

    Args:
        cell: The cell.
        described: Sequence of the names, shapes and types of its weights.
        graph: `TracedGraph` of its step.
        weights: Sequence of the tensors of the graph that stand for the weights.
    """
    inputs, names = graph.inputs[0], {weight.name for weight in weights}
    products = inputs.consumers()
    if not all(_is_product(operation, inputs, names) for operation in products):
        return None
    multiplied = {operation.inputs[1].name for operation in products}
    places = [place for place, weight in enumerate(weights) if weight.name in multiplied]
    known = {operation.name for operation in products}
    if any(operation.name not in known for place in places for operation in weights[place].consumers()):
        return None
    columns = [(n, s[1:] if place in places else s, dtype) for place, (n, s, dtype) in enumerate(described)]
    fingerprint = graph.fingerprint(of_any_shape=[inputs, *(weights[place] for place in places)])
    return cell_type(cell), tuple(columns), fingerprint


def _is_product(operation: tf.Operation, left: tf.Tensor, names: Collection[str]) -> bool:
    """True for the product of a tensor with one of the named tensors, neither of them transposed."""
    return (
        operation.type == "MatMul"
        and operation.inputs[0].name == left.name
        and operation.inputs[1].name in names
        and not (operation.get_attr("transpose_a") or operation.get_attr("transpose_b"))
    )
