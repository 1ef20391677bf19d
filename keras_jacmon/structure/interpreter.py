"""The search for the structure of a cell's Jacobian: follows the units of states and inputs through the cell's graph.

There is one rule for each kind of operation. A rule that does not understand a use of an operation raises
`NotImplementedError`; whatever that operation depends on is then unstructured, with the error as the reason.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from keras_jacmon.cell.cell_graph import CellGraph
from keras_jacmon.graphs.calls import has_custom_gradient
from keras_jacmon.graphs.constants import constant_value
from keras_jacmon.structure.custom_gradients import acts_unit_by_unit
from keras_jacmon.structure.independence import independent_tensors
from keras_jacmon.structure.index_map import Node, separated
from keras_jacmon.structure.movers import Labels
from keras_jacmon.structure.ops import OpKind, keeps_points, move, op_of, passes_unchanged
from keras_jacmon.structure.structure import Origin, Product, Structure

# Maximum number of units of one node that a unit is made from; with more of them it counts as unstructured.
_MOST_SLOTS = 64

# Maximum number of units that a unit of one node reaches, and of sets of units in which it reaches one each. Each set
# takes a backward pass of its own.
_MOST_USES, _MOST_SETS = 2, 4

# Maximum number of entries of a kernel that is not a plain matrix and has to be written as one.
_MOST_ENTRIES = 2**24


@dataclass(frozen=True)
class _Call:
    """One operation of a cell's graph, as a rule sees it.

    Attributes:
        graph: `CellGraph`, the cell's step.
        operation: Operation of that graph.
        products: Sequence of the products before it.
        operands: Mapping by position, the origins of all operands that states or inputs have an influence on.
    """

    graph: CellGraph
    operation: tf.Operation
    products: Sequence[Product]
    operands: Mapping[int, Origin]

    @property
    def known(self) -> dict[int, Origin]:
        """The operands that have a derivative by a state or by the inputs."""
        return {k: origin for k, origin in self.operands.items() if origin.sources}

    def sources_of(self, node: Node) -> frozenset[Node]:
        """Returns the states and inputs that a node depends on."""
        return self.products[node.position].sources if node.is_product else frozenset([node])

    def describe(self, node: Node) -> str:
        """Describes a node in words."""
        if node.is_product:
            return f"the product with {self.products[node.position].kernel}"
        return f"state {node.position}" if node.is_state else "the inputs"


@dataclass(frozen=True)
class _Outcome:
    """The origin of each output of an operation, and the product that it adds to the structure, if it is one."""

    origins: Sequence[Origin]
    product: Product | None = None


_Rule = Callable[[_Call], _Outcome]


def find_structure(graph: CellGraph) -> Structure:
    """Finds the structure of a cell's Jacobian.

    Args:
        graph: `CellGraph`, the cell's step.

    Returns:
        `Structure`.

    Raises:
        NotImplementedError: If the shape of a state is not known for any number of points.
    """
    origins = {graph.step_inputs.name: _source(Node.inputs(), graph.step_inputs)}
    origins |= {state.name: _source(Node.state(q), state) for q, state in enumerate(graph.states)}
    products: list[Product] = []
    for operation in graph.operations:
        operands = {k: origins[t.name] for k, t in enumerate(operation.inputs) if t.name in origins}
        if not operands:
            continue
        outcome = _outcome(_Call(graph, operation, products, operands))
        products += [outcome.product] if outcome.product else []
        depends_on_state = any(origin.depends_on_state for origin in operands.values())
        for tensor, origin in zip(operation.outputs, outcome.origins, strict=True):
            found = Origin() if _non_differentiable(tensor) else origin
            origins[tensor.name] = dataclasses.replace(found, depends_on_state=depends_on_state)
    return Structure(graph, tuple(products), origins, independent_tensors(graph))


def _source(node: Node, tensor: tf.Tensor) -> Origin:
    """Returns the origin of a state or of the inputs."""
    if not tensor.dtype.is_floating:
        return Origin(depends_on_state=node.is_state)
    whole = _whole(tuple(int(size) for size in tensor.shape[1:]))
    return Origin({node: whole}, frozenset([node]), frozenset([node]), depends_on_state=node.is_state)


def _outcome(call: _Call) -> _Outcome:
    """Applies the rule for an operation."""
    operation, row, known = call.operation, op_of(call.operation), call.known
    # A tensor without a derivative has no sources, but it is no constant either.
    if not known or not row.derivative or all(map(_non_differentiable, operation.outputs)):
        return _Outcome([Origin()] * len(operation.outputs))
    rule = _custom_gradient if has_custom_gradient(operation) else _RULES.get(row.kind, _refused)
    try:
        return rule(call)
    except NotImplementedError as error:
        name = _name_of(operation)
        which = "" if name == operation.type else f" (operation `{name}`)"
        reason = str(error) or f"`{operation.type}` mixes units or points{which}"
        return _Outcome([_unstructured(known.values(), reason)] * len(operation.outputs))


def _name_of(operation: tf.Operation) -> str:
    """Returns the name of an operation without its scopes: equal cells share a graph, and have other names."""
    return str(operation.name.rpartition("/")[2])


def _refused(_: _Call) -> _Outcome:
    """The rule for operations that have no structure."""
    raise NotImplementedError


def _custom_gradient(call: _Call) -> _Outcome:
    """The rule for operations with a gradient of their own: the slopes are those of the gradient, unit by unit."""
    operation = call.operation
    gradient = call.graph.custom_gradients.get(operation.name)
    if gradient is None:
        raise NotImplementedError(f"`{_name_of(operation)}` has a gradient of its own")
    # The result itself, and what the gradient takes beside the arguments, lead to no derivative.
    known = {k: origin for k, origin in call.known.items() if k in gradient.slopes}
    units = call.graph.units(operation.outputs[0])
    same = all(call.graph.units(operation.inputs[k]) == units for k in known)
    if not same or not acts_unit_by_unit(call.graph, gradient, known):
        raise NotImplementedError(
            f"`{_name_of(operation)}` has a gradient of its own, which mixes units or is not linear"
        )
    found = _merged(dataclasses.replace(call, operands=known), operation.outputs[0])
    return _Outcome([found, *[Origin()] * (len(operation.outputs) - 1)])


def _copied(call: _Call) -> _Outcome:
    """The rule for operations that return their operands."""
    return _Outcome([call.known.get(k, Origin()) for k in range(len(call.operation.outputs))])


def _elementwise(call: _Call) -> _Outcome:
    """The rule for elementwise operations."""
    (output,) = call.operation.outputs
    return _Outcome([_merged(call, output)])


def _merged(call: _Call, output: tf.Tensor) -> Origin:
    """Returns the labels of all operands, broadcast, in slots of their own."""
    operation, known = call.operation, call.known
    units = call.graph.units(output)
    labels: dict[Node, list[Labels]] = {}
    changed: set[Node] = set()
    for k, origin in known.items():
        if len(call.graph.units(operation.inputs[k])) != len(units):
            raise NotImplementedError
        for node, made_from in origin.labels.items():
            if node in labels or node not in origin.unchanged or not passes_unchanged(operation, k):
                changed.add(node)
            labels.setdefault(node, []).append(np.broadcast_to(made_from, (len(made_from), *units)))
    merged = {node: _tidied(np.concatenate(parts)) for node, parts in labels.items()}
    return _checked(call, merged, frozenset(merged) - changed)


def _moved(call: _Call) -> _Outcome:
    """The rule for operations that move units."""
    operation, graph, known = call.operation, call.graph, call.known
    shapes = [graph.units(tensor) for tensor in operation.outputs]
    if not all(graph.size(operation.inputs[k]) for k in known):
        raise NotImplementedError
    moved: list[dict[Node, Labels]] = [{} for _ in shapes]
    for node in {node: None for origin in known.values() for node in origin.labels}:
        labels = _in_equal_slots({k: origin.labels[node] for k, origin in known.items() if node in origin.labels})
        slots = len(next(iter(labels.values())))
        for result, found in zip(moved, move(operation, labels, graph.units, shapes, slots), strict=True):
            if (found >= 0).any():
                result[node] = _tidied(found)
    changed = {node for origin in known.values() for node in origin.labels if node not in origin.unchanged}
    return _Outcome([_checked(call, labels, frozenset(labels) - changed) for labels in moved])


def _reduced(call: _Call) -> _Outcome:
    """The rule for reductions: the units along the axes make one unit, in slots of their own."""
    operation, graph, known = call.operation, call.graph, call.known
    axes = constant_value(operation.inputs[1])
    # The labels have their slots where the tensor has the points.
    rank = 1 + len(graph.units(operation.inputs[0]))
    if axes is None or 0 in (places := [int(axis) % rank for axis in np.ravel(axes)]):
        raise NotImplementedError
    units = graph.units(operation.outputs[0])
    labels = {}
    for node, made_from in known[0].labels.items():
        moved = np.moveaxis(made_from, places, range(1, 1 + len(places)))
        labels[node] = _tidied(moved.reshape(-1, *units))
    return _Outcome([_checked(call, labels, frozenset())])


def _product(call: _Call) -> _Outcome:
    """The rule for products with a kernel: the result is a node of its own."""
    operation, graph = call.operation, call.graph
    if len(call.operands) != 1:
        raise NotImplementedError(f"both sides of `{_name_of(operation)}` depend on the states or the inputs")
    ((position, origin),) = call.operands.items()
    y, (z,) = operation.inputs[position], operation.outputs
    if z.dtype.real_dtype.size < max(state.dtype.size for state in graph.states if state.dtype.is_floating):
        raise NotImplementedError(f"`{_name_of(operation)}` computes in {z.dtype.name}, which is less than its states")
    units = graph.units(z)
    shape = (graph.size(y), int(np.prod(units)))
    if not keeps_points(operation, position, len(graph.units(y)) + 1, len(units) + 1):
        raise NotImplementedError
    if operation.type != "MatMul" and int(np.prod(shape)) > _MOST_ENTRIES:
        raise NotImplementedError(f"the kernel of `{_name_of(operation)}` is too large to be written as a matrix")
    (kernel,) = (tensor for tensor in operation.inputs if tensor is not y)
    node = Node.product(len(call.products))
    product = Product(operation, y, z, graph.source_of(kernel), shape, origin.sources)
    labels = _whole(units)
    if z.dtype.is_complex:
        # A number is made from both of its parts.
        labels = np.concatenate([2 * labels, 2 * labels + 1])
    found = Origin({node: labels}, frozenset([node]), origin.sources, origin.unstructured)
    return _Outcome([found], product)


def _sorted(call: _Call) -> _Outcome:
    """The rule for operations that sort: the result is a node of its own, as of a product with a permutation."""
    operation, graph = call.operation, call.graph
    y, (z, _) = operation.inputs[0], operation.outputs
    units = graph.units(z)
    if set(call.operands) != {0} or units != graph.units(y) or len(units) != 1:
        raise NotImplementedError
    origin, node = call.operands[0], Node.product(len(call.products))
    product = Product(operation, y, z, "the order of the units", (units[0], units[0]), origin.sources)
    found = Origin({node: _whole(units)}, frozenset([node]), origin.sources, origin.unstructured)
    return _Outcome([found, Origin()], product)


_RULES: Mapping[OpKind, _Rule] = {
    OpKind.COPIES: _copied,
    OpKind.ELEMENTWISE: _elementwise,
    OpKind.MOVES: _moved,
    OpKind.PRODUCT: _product,
    OpKind.REDUCES: _reduced,
    OpKind.SORTS: _sorted,
}


def _checked(call: _Call, labels: Mapping[Node, Labels], unchanged: frozenset[Node]) -> Origin:
    """Returns the origin with these labels, without the nodes that reach a unit in too many ways.

    The sources of such a node have no structure from there on.
    """
    origins = call.known.values()
    unstructured = {source: reason for origin in origins for source, reason in origin.unstructured.items()}
    sound = {}
    for node, made_from in labels.items():
        used = made_from[made_from >= 0]
        reason = None
        uses = np.unique(used, return_counts=True)[1].max(initial=0)
        if uses > _MOST_USES or (uses > 1 and len(separated([made_from.reshape(len(made_from), -1)])) > _MOST_SETS):
            reason = f"a unit of {call.describe(node)} is used in several units"
        elif len(made_from) > _MOST_SLOTS:
            reason = f"a unit is made from more than {_MOST_SLOTS} units of {call.describe(node)}"
        if reason:
            unstructured |= dict.fromkeys(call.sources_of(node), reason)
        else:
            sound[node] = made_from
    return Origin(sound, unchanged & frozenset(sound), _sources(origins), unstructured)


def _unstructured(origins: Iterable[Origin], reason: str) -> Origin:
    """Returns the origin of a tensor without structure; the first reason for a source stands."""
    origins = list(origins)
    sources = _sources(origins)
    earlier = {source: why for origin in origins for source, why in origin.unstructured.items()}
    return Origin(sources=sources, unstructured={source: earlier.get(source, reason) for source in sources})


def _sources(origins: Iterable[Origin]) -> frozenset[Node]:
    return frozenset[Node]().union(*(origin.sources for origin in origins))


def _non_differentiable(tensor: tf.Tensor) -> bool:
    """Tells if a tensor has no derivative, by its type. A list of tensors (a variant) has one."""
    return tensor.dtype.is_integer or tensor.dtype.is_bool or tensor.dtype == tf.string


def _whole(units: Sequence[int]) -> Labels:
    """Returns the labels of a node's own tensor."""
    return np.arange(int(np.prod(units))).reshape(1, *units)


def _in_equal_slots(labels: Mapping[int, Labels]) -> dict[int, Labels]:
    """Pads the labels of all operands to the same number of slots."""
    slots = max(map(len, labels.values()))
    return {
        k: np.pad(x, [(0, slots - len(x))] + [(0, 0)] * (x.ndim - 1), constant_values=-1) for k, x in labels.items()
    }


def _tidied(labels: Labels) -> Labels:
    """Returns the same labels with each unit once, in as few slots as possible."""
    last = np.iinfo(labels.dtype).max
    labels = np.sort(np.where(labels < 0, last, labels), axis=0)
    again = np.zeros(labels.shape, bool)
    again[1:] = labels[1:] == labels[:-1]
    labels = np.sort(np.where(again, last, labels), axis=0)
    labels = labels[(labels != last).reshape(len(labels), -1).any(axis=1)]
    return np.where(labels == last, -1, labels)
