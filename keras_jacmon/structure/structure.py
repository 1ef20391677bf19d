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

# A tensor whose derivative is asked for, or the result of a product: ("state", 0), ("inputs", 0), ("product", 2).
Node = tuple[str, int]

# More units than this that one unit is made from, in one elementwise stretch, is no structure any more.
_MOST_SLOTS = 64

# The most entries of a kernel that is not a plain matrix and has to be written as one.
_MOST_ENTRIES = 2**24


@dataclass(frozen=True)
class IndexMap:
    """How the units of a base reach those of another tensor through elementwise operations.

    Attributes:
        slots: `(slots, size)`, the units of the base that each unit of the target is made from; -1 for none. A unit of
            the base stands in it at most once.
        base_size: Units of the base.
        unchanged: All derivatives are one.
    """

    slots: Labels
    base_size: int
    unchanged: bool

    @property
    def targets(self) -> Labels:
        """`(base_size,)`: the unit of the target that each unit of the base reaches; -1 for none."""
        targets = np.full(self.base_size, -1)
        for slot in self.slots:
            targets[slot[slot >= 0]] = np.flatnonzero(slot >= 0)
        return targets


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
        spoilt: Of these, the ones whose influence has no structure, each with the reason.
        touched: Whether a state has an influence on its values, be it one without a derivative.
    """

    labels: dict[Node, Labels] = field(default_factory=dict)
    unchanged: frozenset[Node] = frozenset()
    sources: frozenset[Node] = frozenset()
    spoilt: dict[Node, str] = field(default_factory=dict)
    touched: bool = False


class Structure:
    """Which blocks of a cell's Jacobian are made of diagonals and kernels, and how.

    Args:
        graph: The cell's step.

    Attributes:
        products: In the order in which they are computed.
        hoisted: The tensors of the graph that depend on the inputs alone, row by row, and feed others.
        fixed: The tensors that depend on weights alone, and feed others.
        row_by_row: Whether it is proven that each row of the new states is a function of the same row of inputs and
            states.
    """

    def __init__(self, graph: CellGraph) -> None:
        self.graph = graph
        # A cell may compute what it does not use.
        self._used = graph.between((), graph.new_states)[0]
        self.products: list[Product] = []
        self._origins: dict[str, _Origin] = {}
        self._sources: dict[Node, tf.Tensor] = {("inputs", 0): graph.step_inputs}
        self._sources |= {("state", q): state for q, state in enumerate(graph.states)}
        for base, tensor in self._sources.items():
            self._origins[tensor.name] = self._start(base, tensor)
        for operation in graph.operations:
            known = {k: self._origins[t.name] for k, t in enumerate(operation.inputs) if t.name in self._origins}
            if known:
                self._follow(operation, known)
        self._row_by_row = row_by_row(graph)
        self.row_by_row = self._row_by_row.issuperset(tensor.name for tensor in graph.new_states)
        self.hoisted = self._hoisted()
        self.fixed = self._fixed()

    def reason(self, new: int, source: Node) -> str | None:
        """Why the block of new state `new` and an old state, or the inputs, has no structure; None if it has."""
        origin = self._origins.get(self.graph.new_states[new].name, _Origin())
        return origin.spoilt.get(source)

    def depends(self, new: int, source: Node) -> bool:
        """Whether new state `new` depends on an old state, or the inputs, through what has a derivative."""
        return source in self._origins.get(self.graph.new_states[new].name, _Origin()).sources

    def describe(self, new: int, source: Node) -> str:
        """What the block of a new state and an old one, or the inputs, is made of."""
        pending, products = [self.graph.new_states[new]], set()
        direct = source in self.links(pending[0])
        while pending:
            for kind, k in self.links(pending.pop()):
                if kind == "product" and k not in products and self.reaches(k, [source]):
                    products.add(k)
                    pending.append(self.products[k].y)
        parts = ["a diagonal"] if direct else []
        for k in sorted(products):
            product = self.products[k]
            chain = any(kind == "product" and m in products for kind, m in self.links(product.y))
            parts.append(f"the product with {product.kernel}" + (", of another product" if chain else ""))
        return " + ".join(parts)

    def links(self, tensor: tf.Tensor) -> dict[Node, IndexMap]:
        """How a tensor of the graph is made from states, inputs and products, elementwise."""
        origin = self._origins.get(tensor.name, _Origin())
        size = self.size(tensor)
        return {
            base: IndexMap(labels.reshape(len(labels), size), self.size(self.tensor(base)), base in origin.unchanged)
            for base, labels in origin.labels.items()
        }

    def reaches(self, product: int, sources: Iterable[Node]) -> bool:
        """Whether one of the sources has an influence on the result of a product."""
        return not self._origins[self.products[product].z.name].sources.isdisjoint(sources)

    def varies(self, tensor: tf.Tensor) -> bool:
        """Whether the states or the inputs have an influence on a tensor, be it one without a derivative."""
        return tensor.name in self._origins

    def is_spoilt(self, tensor: tf.Tensor) -> bool:
        """Whether some state or input has an influence on a tensor that is not understood."""
        return bool(self._origins.get(tensor.name, _Origin()).spoilt)

    def is_of_inputs_alone(self, tensor: tf.Tensor) -> bool:
        """Whether row r of a tensor is known to be made from row r of the inputs, and from no state."""
        origin = self._origins.get(tensor.name, _Origin(touched=True))
        understood = origin.sources == {("inputs", 0)} and not origin.spoilt and tensor.name in self._row_by_row
        return understood and not origin.touched

    def pieces(self, product: int, sources: Iterable[Node]) -> "list[Segment]":
        """The tensors nearest to what follows that together hold the result of a product, apart from what is added.

        Biases and inputs that are added, and the split into gates, need not be gone through again to know the
        derivatives by the product.

        Args:
            product: Which one.
            sources: What derivatives are taken by; what depends on them is not passed.
        """
        sources = frozenset(sources)
        z = self.products[product].z
        pieces = [Segment(z, np.arange(self.size(z)))]
        place = 0
        while place < len(pieces):
            beyond = self._beyond(pieces[place], product, sources)
            pieces[place : place + 1] = beyond or pieces[place : place + 1]
            place += not beyond
        return pieces

    def _beyond(self, piece: "Segment", product: int, sources: frozenset[Node]) -> "list[Segment]":
        """The pieces that one operation later hold the same units; none if there are none."""
        base = ("product", product)
        name = piece.tensor.name
        if any(name == target.name for target in (*self.graph.new_states, *(p.y for p in self.products))):
            return []
        beyond = []
        for operation in piece.tensor.consumers():
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
                labels = origin.labels.get(base)
                if labels is None or len(labels) != 1 or base not in origin.unchanged or (labels < 0).any():
                    return []
                beyond.append(Segment(tensor, labels.ravel()))
        units = np.concatenate([part.units for part in beyond]) if beyond else np.empty(0, np.int64)
        # As many of each as before, so that nothing is left out and nothing counts twice.
        return beyond if np.array_equal(np.sort(units), np.sort(piece.units)) else []

    def tensor(self, base: Node) -> tf.Tensor:
        """The tensor of the graph that a base is."""
        return self.products[base[1]].z if base[0] == "product" else self._sources[base]

    def target(self, name: Node) -> tf.Tensor:
        """The tensor of the graph that bases lead to: new state `("new", p)`, or what a `("product", m)` multiplies."""
        return self.graph.new_states[name[1]] if name[0] == "new" else self.products[name[1]].y

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
        touched = base[0] == "state"
        if not tensor.dtype.is_floating:
            return _Origin(touched=touched)
        units = tuple(int(size) for size in tensor.shape[1:])
        labels = np.arange(int(np.prod(units))).reshape(1, *units)
        return _Origin({base: labels}, frozenset([base]), frozenset([base]), touched=touched)

    def _follow(self, operation: tf.Operation, operands: dict[int, _Origin]) -> None:
        """Finds out what the outputs of an operation are made from, given that for some of its operands."""
        known = {k: origin for k, origin in operands.items() if origin.sources}
        touched = any(origin.touched for origin in operands.values())
        # What has no derivative has no source, but is no constant either.
        origins = [_Origin()] * len(operation.outputs)
        if known and operation.type not in BLOCKING and not all(_is_flat(tensor) for tensor in operation.outputs):
            try:
                origins = self._understood(operation, known)
            except NotImplementedError as error:
                reason = str(error) or f"`{operation.type}` mixes units or rows (operation `{operation.name}`)"
                origins = [_spoilt(known.values(), reason)] * len(operation.outputs)
        for tensor, origin in zip(operation.outputs, origins, strict=True):
            found = _Origin() if _is_flat(tensor) else origin
            self._origins[tensor.name] = dataclasses.replace(found, touched=touched)

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
        spoilt = {source: reason for origin in known.values() for source, reason in origin.spoilt.items()}
        kept = {}
        for base, made_from in labels.items():
            used = made_from[made_from >= 0]
            reason = None
            if len(np.unique(used)) < used.size:
                reason = f"a unit of {self._describe(base)} is used in several units"
            elif len(made_from) > _MOST_SLOTS:
                reason = f"a unit is made from more than {_MOST_SLOTS} units of {self._describe(base)}"
            if reason:
                spoilt |= dict.fromkeys(self._origins[self.tensor(base).name].sources, reason)
            else:
                kept[base] = made_from
        sources = frozenset[Node]().union(*(origin.sources for origin in known.values()))
        return _Origin(kept, unchanged & frozenset(kept), sources, spoilt)

    def _describe(self, base: Node) -> str:
        if base[0] == "product":
            return f"the product with {self.products[base[1]].kernel}"
        return f"state {base[1]}" if base[0] == "state" else "the inputs"

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
        base = ("product", len(self.products))
        self.products.append(Product(operation, y, z, self.graph.source_of(kernel), (size, int(np.prod(units)))))
        (origin,) = known.values()
        labels = np.arange(int(np.prod(units))).reshape(1, *units)
        return _Origin({base: labels}, frozenset([base]), origin.sources, origin.spoilt)

    def _hoisted(self) -> list[tf.Tensor]:
        """The last tensors on the ways from the inputs that depend on nothing else and are understood."""
        hoisted = {}
        for operation in self.graph.operations:
            if not all(self.is_of_inputs_alone(tensor) for tensor in operation.outputs) or not operation.outputs:
                hoisted.update({t.name: t for t in operation.inputs if self.is_of_inputs_alone(t)})
        hoisted.update({t.name: t for t in self.graph.new_states if self.is_of_inputs_alone(t)})
        return list(hoisted.values())

    def _fixed(self) -> list[tf.Tensor]:
        # Constants stay where they are: shape functions and derivatives must see them.
        constant: dict[str, bool] = {}
        fixed = {}
        for operation in self.graph.operations:
            if all(tensor.name in self._origins for tensor in operation.outputs):
                fixed.update({t.name: t for t in operation.inputs if not constant.get(t.name, True)})
            else:
                of_constants = operation.type != "Placeholder" and all(constant[t.name] for t in operation.inputs)
                constant.update({tensor.name: of_constants for tensor in operation.outputs})
        return [tensor for tensor in fixed.values() if tensor.dtype != tf.resource]


def _is_flat(tensor: tf.Tensor) -> bool:
    """Whether it has no derivative, by its type. A list of tensors (a variant) has."""
    return tensor.dtype.is_integer or tensor.dtype.is_bool or tensor.dtype == tf.string


def _spoilt(origins: Iterable[_Origin], reason: str) -> _Origin:
    origins = list(origins)
    sources = frozenset[Node]().union(*(origin.sources for origin in origins))
    earlier = {source: why for origin in origins for source, why in origin.spoilt.items()}
    return _Origin(sources=sources, spoilt={source: earlier.get(source, reason) for source in sources})


def _tidied(labels: Labels) -> Labels:
    """The same labels with each unit once, in as few slots as possible."""
    last = np.iinfo(labels.dtype).max
    labels = np.sort(np.where(labels < 0, last, labels), axis=0)
    again = np.zeros(labels.shape, bool)
    again[1:] = labels[1:] == labels[:-1]
    labels = np.sort(np.where(again, last, labels), axis=0)
    labels = labels[(labels != last).reshape(len(labels), -1).any(axis=1)]
    return np.where(labels == last, -1, labels)
