"""The structure of a cell's Jacobian, found in the graph of its step.

In most cells a state passes through elementwise functions, products with kernels and elementwise functions again. Where
every operation between the products is known to act unit by unit, or to move units, each block of the Jacobian is made
of diagonals and kernels (`StructuredJacobian`). That is read off the graph here; no number is looked at.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from keras_jacmon.cell.cell_graph import ROWS, CellGraph
from keras_jacmon.structure.independence import row_by_row
from keras_jacmon.structure.index_map import IndexMap, Node
from keras_jacmon.structure.ops import (
    BLOCKING,
    ELEMENTWISE,
    MOVING,
    PRODUCTS,
    Labels,
    is_row_by_row,
    move,
    passes_unchanged,
)
from keras_jacmon.traced_graph import has_custom_gradient

# More units than this that one unit is made from, in one elementwise stretch, is no structure any more.
_MOST_SLOTS = 64

# The most entries of a kernel that is not a plain matrix and has to be written as one.
_MOST_ENTRIES = 2**24


@dataclass(frozen=True)
class Product:
    """A product `z = y @ W` in the graph, with a kernel that is the same for all rows.

    Attributes:
        operation: In the cell's graph.
        y: What is multiplied, a tensor of the cell's graph.
        z: The result.
        kernel: The kernel's name.
        shape: Of the kernel as a matrix, `(units of y, units of z)`.
    """

    operation: tf.Operation
    y: tf.Tensor
    z: tf.Tensor
    kernel: str
    shape: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Segment:
    """A tensor of the graph that holds some units of a product's result, plus what has been added to them."""

    tensor: tf.Tensor
    units: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Origin:
    """What a tensor is made from.

    Attributes:
        labels: By base, the labels `(slots, ...)` of the units that reach this tensor elementwise.
        unchanged: The bases whose units come with a derivative of one.
        sources: States and inputs with an influence on this tensor, also through products.
        unstructured: Of these, the ones whose influence has no structure, each with the reason.
        depends_on_state: Whether a state has an influence on its values, be it one without a derivative.
    """

    labels: dict[Node, Labels] = field(default_factory=dict)
    unchanged: frozenset[Node] = frozenset()
    sources: frozenset[Node] = frozenset()
    unstructured: dict[Node, str] = field(default_factory=dict)
    depends_on_state: bool = False


class Structure:
    """Which blocks of a cell's Jacobian are made of diagonals and kernels, and how.

    Args:
        graph: The cell's step.

    Attributes:
        products: In the order in which they are computed.
        inputs_only: The tensors of the graph that depend on the inputs alone, row by row, and feed others.
        weights_only: The tensors that depend on weights alone, and feed others.
        row_by_row: Whether it is proven that each row of the new states is a function of the same row of inputs and
            states.
    """

    def __init__(self, graph: CellGraph) -> None:
        self.graph = graph
        # A cell may compute what it does not use.
        self._used = graph.between((), graph.new_states)[0]
        self.products: list[Product] = []
        self._origins: dict[str, _Origin] = {}
        self._sources: dict[Node, tf.Tensor] = {Node.inputs(): graph.step_inputs}
        self._sources |= {Node.state(q): state for q, state in enumerate(graph.states)}
        for base, tensor in self._sources.items():
            self._origins[tensor.name] = self._start(base, tensor)
        for operation in graph.operations:
            known = {k: self._origins[t.name] for k, t in enumerate(operation.inputs) if t.name in self._origins}
            if known:
                self._follow(operation, known)
        self._row_by_row = row_by_row(graph)
        self.row_by_row = self._row_by_row.issuperset(tensor.name for tensor in graph.new_states)
        self.inputs_only = self._inputs_only()
        self.weights_only = self._weights_only()

    def reason(self, new: int, source: Node) -> str | None:
        """Why the block of new state `new` and an old state, or the inputs, has no structure; None if it has."""
        origin = self._origins.get(self.graph.new_states[new].name, _Origin())
        return origin.unstructured.get(source)

    def depends(self, new: int, source: Node) -> bool:
        """Whether new state `new` depends on an old state, or the inputs, through what has a derivative."""
        return source in self._origins.get(self.graph.new_states[new].name, _Origin()).sources

    def describe(self, new: int, source: Node) -> str:
        """What the block of a new state and an old one, or the inputs, is made of."""
        pending, products = [self.graph.new_states[new]], set[Node]()
        direct = source in self.index_maps(pending[0])
        while pending:
            for node in self.index_maps(pending.pop()):
                if node.is_product and node not in products and self.reaches(node, [source]):
                    products.add(node)
                    pending.append(self.product(node).y)
        parts = ["a diagonal"] if direct else []
        for product in [self.product(node) for node in sorted(products)]:
            chain = not products.isdisjoint(self.index_maps(product.y))
            parts.append(f"the product with {product.kernel}" + (", of another product" if chain else ""))
        return " + ".join(parts)

    def index_maps(self, tensor: tf.Tensor) -> dict[Node, IndexMap]:
        """How a tensor of the graph is made from states, inputs and products, elementwise."""
        origin = self._origins.get(tensor.name, _Origin())
        size = self.size(tensor)
        return {
            base: IndexMap(labels.reshape(len(labels), size), self.size(self.tensor(base)), base in origin.unchanged)
            for base, labels in origin.labels.items()
        }

    def reaches(self, product: Node, sources: Iterable[Node]) -> bool:
        """Whether one of the sources has an influence on the result of a product."""
        return not self._origins[self.product(product).z.name].sources.isdisjoint(sources)

    def varies(self, tensor: tf.Tensor) -> bool:
        """Whether the states or the inputs have an influence on a tensor, be it one without a derivative."""
        return tensor.name in self._origins

    def is_unstructured(self, tensor: tf.Tensor) -> bool:
        """Whether some state or input has an influence on a tensor that is not understood."""
        return bool(self._origins.get(tensor.name, _Origin()).unstructured)

    def depends_on_inputs_only(self, tensor: tf.Tensor) -> bool:
        """Whether row r of a tensor is known to be made from row r of the inputs, and from no state."""
        origin = self._origins.get(tensor.name, _Origin(depends_on_state=True))
        understood = origin.sources == {Node.inputs()} and not origin.unstructured and tensor.name in self._row_by_row
        return understood and not origin.depends_on_state

    def segments(self, product: Node, sources: Iterable[Node]) -> "list[Segment]":
        """The tensors nearest to what follows that together hold the result of a product, apart from what is added.

        Biases and inputs that are added, and the split into gates, need not be gone through again to know the
        derivatives by the product.

        Args:
            product: Which one.
            sources: What derivatives are taken by; what depends on them is not passed.
        """
        sources = frozenset(sources)
        z = self.product(product).z
        segments = [Segment(z, np.arange(self.size(z)))]
        place = 0
        while place < len(segments):
            beyond = self._beyond(segments[place], product, sources)
            segments[place : place + 1] = beyond or segments[place : place + 1]
            place += not beyond
        return segments

    def _beyond(self, segment: "Segment", product: Node, sources: frozenset[Node]) -> "list[Segment]":
        """The segments that one operation later hold the same units; none if there are none."""
        name = segment.tensor.name
        if any(name == target.name for target in (*self.graph.new_states, *(p.y for p in self.products))):
            return []
        beyond = []
        for operation in segment.tensor.consumers():
            if operation.name not in self._used:
                continue
            operands = [tensor.name for tensor in operation.inputs]
            others = [self._origins.get(operand, _Origin()).sources for operand in operands if operand != name]
            known = operation.type in MOVING or (
                operation.type in ELEMENTWISE and passes_unchanged(operation, operands.index(name))
            )
            if not known or any(not found.isdisjoint(sources) for found in others):
                return []
            for tensor in operation.outputs:
                origin = self._origins[tensor.name]
                labels = origin.labels.get(product)
                if labels is None or len(labels) != 1 or product not in origin.unchanged or (labels < 0).any():
                    return []
                beyond.append(Segment(tensor, labels.ravel()))
        units = np.concatenate([part.units for part in beyond]) if beyond else np.empty(0, np.int64)
        # As many of each as before, so that nothing is left out and nothing counts twice.
        return beyond if np.array_equal(np.sort(units), np.sort(segment.units)) else []

    def tensor(self, base: Node) -> tf.Tensor:
        """The tensor of the graph that a base is."""
        return self.product(base).z if base.is_product else self._sources[base]

    def product(self, node: Node) -> Product:
        """The product that a node stands for."""
        return self.products[node.position]

    def target(self, node: Node) -> tf.Tensor:
        """The tensor of the graph that nodes lead to: a new state, or the factor of a product."""
        return self.product(node).y if node.is_product else self.graph.new_states[node.position]

    def size(self, tensor: tf.Tensor) -> int:
        """The units of a tensor, per row."""
        return int(np.prod(self.units(tensor)))

    def units(self, tensor: tf.Tensor) -> tuple[int, ...]:
        """The shape without the rows.

        Raises:
            NotImplementedError: If the first axis is not that of the rows.
        """
        shape = self.graph.shapes.get(tensor.name)
        if shape is None or None in shape or not shape or shape[0] != ROWS:
            raise NotImplementedError
        return tuple(int(size) for size in shape[1:] if size is not None)

    def _start(self, base: Node, tensor: tf.Tensor) -> _Origin:
        depends_on_state = base.is_state
        if not tensor.dtype.is_floating:
            return _Origin(depends_on_state=depends_on_state)
        units = tuple(int(size) for size in tensor.shape[1:])
        labels = np.arange(int(np.prod(units))).reshape(1, *units)
        return _Origin({base: labels}, frozenset([base]), frozenset([base]), depends_on_state=depends_on_state)

    def _follow(self, operation: tf.Operation, operands: dict[int, _Origin]) -> None:
        """Finds out what the outputs of an operation are made from, given that for some of its operands."""
        known = {k: origin for k, origin in operands.items() if origin.sources}
        depends_on_state = any(origin.depends_on_state for origin in operands.values())
        # What has no derivative has no source, but is no constant either.
        origins = [_Origin()] * len(operation.outputs)
        if (
            known
            and operation.type not in BLOCKING
            and not all(_non_differentiable(tensor) for tensor in operation.outputs)
        ):
            try:
                origins = self._understood(operation, known)
            except NotImplementedError as error:
                reason = str(error) or f"`{operation.type}` mixes units or rows (operation `{operation.name}`)"
                origins = [_unstructured(known.values(), reason)] * len(operation.outputs)
        for tensor, origin in zip(operation.outputs, origins, strict=True):
            found = _Origin() if _non_differentiable(tensor) else origin
            self._origins[tensor.name] = dataclasses.replace(found, depends_on_state=depends_on_state)

    def _understood(self, operation: tf.Operation, known: dict[int, _Origin]) -> list[_Origin]:
        if has_custom_gradient(operation):
            raise NotImplementedError(f"`{operation.name}` has a gradient of its own")
        if operation.type == "IdentityN":
            return [known.get(k, _Origin()) for k in range(len(operation.outputs))]
        if operation.type in ELEMENTWISE:
            return [self._elementwise(operation, known)]
        if operation.type in MOVING:
            return self._moved(operation, known)
        return [self._product(operation, known)]

    def _elementwise(self, operation: tf.Operation, known: dict[int, _Origin]) -> _Origin:
        (output,) = operation.outputs
        units = self.units(output)
        labels: dict[Node, list[Labels]] = {}
        changed: set[Node] = set()
        for k, origin in known.items():
            if len(self.units(operation.inputs[k])) != len(units):
                raise NotImplementedError
            for base, made_from in origin.labels.items():
                if base in labels or base not in origin.unchanged or not passes_unchanged(operation, k):
                    changed.add(base)
                labels.setdefault(base, []).append(np.broadcast_to(made_from, (len(made_from), *units)))
        merged = {base: _tidied(np.concatenate(parts)) for base, parts in labels.items()}
        return self._checked(merged, frozenset(merged) - changed, known)

    def _moved(self, operation: tf.Operation, known: dict[int, _Origin]) -> list[_Origin]:
        outputs = [self.units(tensor) for tensor in operation.outputs]
        for k in known:
            if int(np.prod(self.units(operation.inputs[k]))) == 0:
                raise NotImplementedError
        if operation.type == "Reshape" and int(np.prod(self.units(operation.inputs[0]))) != int(np.prod(outputs[0])):
            raise NotImplementedError
        moved: list[dict[Node, Labels]] = [{} for _ in outputs]
        for base in {base: None for origin in known.values() for base in origin.labels}:
            here = {k: origin.labels[base] for k, origin in known.items() if base in origin.labels}
            slots = max(len(labels) for labels in here.values())
            padded = {
                k: np.pad(x, [(0, slots - len(x))] + [(0, 0)] * (x.ndim - 1), constant_values=-1)
                for k, x in here.items()
            }
            for labels, result in zip(move(operation, padded, self.units, outputs, slots), moved, strict=True):
                if (labels >= 0).any():
                    result[base] = _tidied(labels)
        unchanged = frozenset(
            base
            for result in moved
            for base in result
            if all(base in o.unchanged for o in known.values() if base in o.labels)
        )
        return [self._checked(labels, unchanged & frozenset(labels), known) for labels in moved]

    def _checked(self, labels: dict[Node, Labels], unchanged: frozenset[Node], known: dict[int, _Origin]) -> _Origin:
        """The origin with these labels, where a base that reaches a unit on too many ways spoils its sources."""
        unstructured = {source: reason for origin in known.values() for source, reason in origin.unstructured.items()}
        kept = {}
        for base, made_from in labels.items():
            used = made_from[made_from >= 0]
            reason = None
            if len(np.unique(used)) < used.size:
                reason = f"a unit of {self._describe(base)} is used in several units"
            elif len(made_from) > _MOST_SLOTS:
                reason = f"a unit is made from more than {_MOST_SLOTS} units of {self._describe(base)}"
            if reason:
                unstructured |= dict.fromkeys(self._origins[self.tensor(base).name].sources, reason)
            else:
                kept[base] = made_from
        sources = frozenset[Node]().union(*(origin.sources for origin in known.values()))
        return _Origin(kept, unchanged & frozenset(kept), sources, unstructured)

    def _describe(self, base: Node) -> str:
        if base.is_product:
            return f"the product with {self.product(base).kernel}"
        return f"state {base.position}" if base.is_state else "the inputs"

    def _product(self, operation: tf.Operation, known: dict[int, _Origin]) -> _Origin:
        if operation.type not in PRODUCTS:
            raise NotImplementedError
        operands = [t for t in operation.inputs if t.name in self._origins]
        if len(operands) != 1:
            raise NotImplementedError(f"both sides of `{operation.name}` depend on the states or the inputs")
        (y,), (z,) = operands, operation.outputs
        if z.dtype.size < max(state.dtype.size for state in self.graph.states if state.dtype.is_floating):
            raise NotImplementedError(f"`{operation.name}` computes in {z.dtype.name}, which is less than its states")
        size, units = int(np.prod(self.units(y))), self.units(z)
        if not is_row_by_row(operation, operation.inputs[0] is y, len(self.units(y)) + 1, len(units) + 1):
            raise NotImplementedError
        if operation.type != "MatMul" and size * int(np.prod(units)) > _MOST_ENTRIES:
            raise NotImplementedError(f"the kernel of `{operation.name}` is too large to be written as a matrix")
        (kernel,) = (t for t in operation.inputs if t is not y)
        base = Node.product(len(self.products))
        self.products.append(Product(operation, y, z, self.graph.source_of(kernel), (size, int(np.prod(units)))))
        (origin,) = known.values()
        labels = np.arange(int(np.prod(units))).reshape(1, *units)
        return _Origin({base: labels}, frozenset([base]), origin.sources, origin.unstructured)

    def _inputs_only(self) -> list[tf.Tensor]:
        """The last tensors on the ways from the inputs that depend on nothing else and are understood."""
        inputs_only = {}
        for operation in self.graph.operations:
            if not all(self.depends_on_inputs_only(tensor) for tensor in operation.outputs) or not operation.outputs:
                inputs_only.update({t.name: t for t in operation.inputs if self.depends_on_inputs_only(t)})
        inputs_only.update({t.name: t for t in self.graph.new_states if self.depends_on_inputs_only(t)})
        return list(inputs_only.values())

    def _weights_only(self) -> list[tf.Tensor]:
        # Constants stay where they are: shape functions and derivatives must see them.
        constant: dict[str, bool] = {}
        weights_only = {}
        for operation in self.graph.operations:
            if all(tensor.name in self._origins for tensor in operation.outputs):
                weights_only.update({t.name: t for t in operation.inputs if not constant.get(t.name, True)})
            else:
                of_constants = operation.type != "Placeholder" and all(constant[t.name] for t in operation.inputs)
                constant.update({tensor.name: of_constants for tensor in operation.outputs})
        return [tensor for tensor in weights_only.values() if tensor.dtype != tf.resource]


def _non_differentiable(tensor: tf.Tensor) -> bool:
    """Whether it has no derivative, by its type. A list of tensors (a variant) has."""
    return tensor.dtype.is_integer or tensor.dtype.is_bool or tensor.dtype == tf.string


def _unstructured(origins: Iterable[_Origin], reason: str) -> _Origin:
    origins = list(origins)
    sources = frozenset[Node]().union(*(origin.sources for origin in origins))
    earlier = {source: why for origin in origins for source, why in origin.unstructured.items()}
    return _Origin(sources=sources, unstructured={source: earlier.get(source, reason) for source in sources})


def _tidied(labels: Labels) -> Labels:
    """The same labels with each unit once, in as few slots as possible."""
    last = np.iinfo(labels.dtype).max
    labels = np.sort(np.where(labels < 0, last, labels), axis=0)
    again = np.zeros(labels.shape, bool)
    again[1:] = labels[1:] == labels[:-1]
    labels = np.sort(np.where(again, last, labels), axis=0)
    labels = labels[(labels != last).reshape(len(labels), -1).any(axis=1)]
    return np.where(labels == last, -1, labels)
