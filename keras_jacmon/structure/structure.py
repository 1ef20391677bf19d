"""The structure of a cell's Jacobian: an immutable result with queries.

In most cells a state passes through elementwise functions, products with kernels and elementwise functions again. Where
every operation between the products is known to act unit by unit, or to move units, each block of the Jacobian is made
of diagonals and kernels (`StructuredJacobian`). `find_structure` reads that off the graph; no number is looked at.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from keras_jacmon.cell.cell_graph import CellGraph
from keras_jacmon.structure.index_map import IndexMap, Node
from keras_jacmon.structure.movers import Labels
from keras_jacmon.structure.ops import OpKind, moves_units, op_of, passes_unchanged


@dataclass(frozen=True)
class Product:
    """A product `z = y @ W` in the graph, with a kernel that is the same for all points.

    Attributes:
        operation: Operation of the cell's graph.
        y: Tensor of the cell's graph `(points, ...)`, the factor.
        z: Tensor of the cell's graph `(points, ...)`, the result.
        kernel: String, the kernel's name.
        shape: Shape of the kernel as a matrix, `(units of y, units of z)`.
        sources: Set of the states and inputs that the result has derivatives by.
    """

    operation: tf.Operation
    y: tf.Tensor
    z: tf.Tensor
    kernel: str
    shape: tuple[int, int]
    sources: frozenset[Node]

    @property
    def is_order(self) -> bool:
        """True if the kernel is a permutation that differs from point to point."""
        return op_of(self.operation).kind is OpKind.SORTS


@dataclass(frozen=True, eq=False)
class Segment:
    """A tensor of the graph that holds some units of a product's result, after additions.

    Attributes:
        tensor: Tensor of the cell's graph `(points, ...)`.
        units: Integer array, the unit of the result that each unit of the tensor holds.
    """

    tensor: tf.Tensor
    units: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Origin:
    """The nodes that a tensor is made from.

    Attributes:
        labels: Mapping by node, the labels `(slots, ...)` of the units that reach this tensor elementwise.
        unchanged: Set of the nodes whose units arrive with a derivative of one.
        sources: Set of the states and inputs that this tensor has derivatives by.
        unstructured: Mapping from the sources whose influence has no structure to the reason.
        depends_on_state: Boolean, True if a state has an influence on the values, with or without a derivative.
            Defaults to False.
    """

    labels: Mapping[Node, Labels] = field(default_factory=dict)
    unchanged: frozenset[Node] = frozenset()
    sources: frozenset[Node] = frozenset()
    unstructured: Mapping[Node, str] = field(default_factory=dict)
    depends_on_state: bool = False


_CONSTANT = Origin()


@dataclass(frozen=True, eq=False)
class Structure:
    """The blocks of a cell's Jacobian that are made of diagonals and kernels.

    Attributes:
        graph: `CellGraph`, the cell's step.
        products: Tuple of the products with kernels, in the order in which they are computed.
        origins: Mapping by name, the origins of the tensors that the states or the inputs have an influence on.
        independent: Set of the names of the tensors whose point p is proven to be made from point p of inputs and
            states.
    """

    graph: CellGraph
    products: tuple[Product, ...]
    origins: Mapping[str, Origin]
    independent: frozenset[str]

    @property
    def point_by_point(self) -> bool:
        """True if point p of all new states is proven to be a function of point p of inputs and states."""
        return self.independent.issuperset(tensor.name for tensor in self.graph.new_states)

    def reason(self, new: int, source: Node) -> str | None:
        """Returns the reason why the block of a new state and a source has no structure; None if it has one."""
        return self._origin(self.graph.new_states[new]).unstructured.get(source)

    def depends(self, new: int, source: Node) -> bool:
        """Tells if a new state has a derivative by a source."""
        return source in self._origin(self.graph.new_states[new]).sources

    def describe(self, new: int, source: Node) -> str:
        """Describes in words the parts of the block of a new state and a source."""
        pending, nodes = [self.graph.new_states[new]], set[Node]()
        direct = source in self.index_maps(pending[0])
        while pending:
            for node in self.index_maps(pending.pop()):
                if node.is_product and node not in nodes and self.reaches(node, [source]):
                    nodes.add(node)
                    pending.append(self.product(node).y)
        parts = ["a diagonal"] if direct else []
        for product in [self.product(node) for node in sorted(nodes)]:
            chain = not nodes.isdisjoint(self.index_maps(product.y))
            parts.append(f"the product with {product.kernel}" + (", of another product" if chain else ""))
        return " + ".join(parts)

    def index_maps(self, tensor: tf.Tensor) -> dict[Node, IndexMap]:
        """Returns the index maps, by node, from states, inputs and products to a tensor of the graph."""
        origin, size = self._origin(tensor), self.size(tensor)
        return {
            node: IndexMap(labels.reshape(len(labels), size), self._parts(self.tensor(node)), node in origin.unchanged)
            for node, labels in origin.labels.items()
        }

    def _parts(self, tensor: tf.Tensor) -> int:
        """Returns the number of units of a tensor, where a complex number has two parts."""
        return self.size(tensor) * (2 if tensor.dtype.is_complex else 1)

    def reaches(self, product: Node, sources: Iterable[Node]) -> bool:
        """Tells if one of the sources has an influence on the result of a product."""
        return not self.product(product).sources.isdisjoint(sources)

    def varies(self, tensor: tf.Tensor) -> bool:
        """Tells if the states or the inputs have an influence on a tensor, with or without a derivative."""
        return tensor.name in self.origins

    def is_unstructured(self, tensor: tf.Tensor) -> bool:
        """Tells if some state or input has an influence without structure on a tensor."""
        return bool(self._origin(tensor).unstructured)

    def depends_on_inputs_only(self, tensor: tf.Tensor) -> bool:
        """Tells if point p of a tensor is known to be made from point p of the inputs, and from no state."""
        origin = self._origin(tensor)
        # What has no derivative, such as an index, has no source.
        understood = self.varies(tensor) and origin.sources <= {Node.inputs()} and not origin.unstructured
        return understood and not origin.depends_on_state and tensor.name in self.independent

    @functools.cached_property
    def inputs_only(self) -> tuple[tf.Tensor, ...]:
        """The last tensors after the inputs that depend on the inputs alone, point by point."""
        found = {}
        for operation in self.graph.operations:
            if not operation.outputs or not all(map(self.depends_on_inputs_only, operation.outputs)):
                found.update({t.name: t for t in operation.inputs if self.depends_on_inputs_only(t)})
        found.update({t.name: t for t in self.graph.new_states if self.depends_on_inputs_only(t)})
        return tuple(found.values())

    @functools.cached_property
    def weights_only(self) -> tuple[tf.Tensor, ...]:
        """The last tensors that depend on weights alone.

        Constants do not count. They stay in the graph, where shape functions and derivatives must see them.
        """
        constant: dict[str, bool] = {}
        found = {}
        for operation in self.graph.operations:
            if all(map(self.varies, operation.outputs)):
                found.update({t.name: t for t in operation.inputs if not constant.get(t.name, True)})
            else:
                of_constants = operation.type != "Placeholder" and all(constant[t.name] for t in operation.inputs)
                constant.update({tensor.name: of_constants for tensor in operation.outputs})
        return tuple(tensor for tensor in found.values() if tensor.dtype != tf.resource)

    def segments(self, product: Node, sources: Iterable[Node]) -> list[Segment]:
        """Returns the last tensors that together hold the result of a product, after additions.

        The derivatives by the product are the same before and after the addition of biases and inputs. So these
        operations, and the split into gates, need not be replayed.

        Args:
            product: Node of the product.
            sources: Iterable of the nodes that derivatives are taken by. The addition of a tensor that depends on them
                ends the search.

        Returns:
            List of `Segment`s.
        """
        sources = frozenset(sources)
        z = self.product(product).z
        found, pending = [], [Segment(z, np.arange(self.size(z)))]
        while pending:
            segment = pending.pop(0)
            later = self._later(segment, product, sources)
            pending = [*later, *pending]
            if not later:
                found.append(segment)
        return found

    def _later(self, segment: Segment, product: Node, sources: frozenset[Node]) -> list[Segment]:
        """Returns the segments one operation later, if they hold the same units; an empty list otherwise."""
        if segment.tensor.name in self._ends:
            return []
        operations = [operation for operation in segment.tensor.consumers() if operation.name in self._used]
        if not all(self._moved_or_added_to(operation, segment.tensor, sources) for operation in operations):
            return []
        later = []
        for tensor in [tensor for operation in operations for tensor in operation.outputs]:
            origin = self.origins[tensor.name]
            labels = origin.labels.get(product)
            if tensor.dtype.is_complex != segment.tensor.dtype.is_complex:
                return []
            if labels is None or len(labels) != 1 or product not in origin.unchanged or (labels < 0).any():
                return []
            later.append(Segment(tensor, labels.ravel()))
        units = np.concatenate([part.units for part in later]) if later else np.empty(0, np.int64)
        # Each unit as often as before, so that none is left out and none counts twice.
        return later if np.array_equal(np.sort(units), np.sort(segment.units)) else []

    def _moved_or_added_to(self, operation: tf.Operation, tensor: tf.Tensor, sources: frozenset[Node]) -> bool:
        """Tells if an operation moves the units of a tensor, or adds a tensor that does not depend on the sources."""
        names = [operand.name for operand in operation.inputs]
        others = [self._origin(operand) for operand in operation.inputs if operand.name != tensor.name]
        known = moves_units(operation) or passes_unchanged(operation, names.index(tensor.name))
        return known and all(origin.sources.isdisjoint(sources) for origin in others)

    def product(self, node: Node) -> Product:
        """Returns the product that a node stands for."""
        return self.products[node.position]

    def tensor(self, node: Node) -> tf.Tensor:
        """Returns the tensor of the graph that derivatives are taken by: a state, the inputs, a product's result."""
        if node.is_product:
            return self.product(node).z
        return self.graph.states[node.position] if node.is_state else self.graph.step_inputs

    def target(self, node: Node) -> tf.Tensor:
        """Returns the tensor of the graph that derivatives are taken of: a new state, or the factor of a product."""
        return self.product(node).y if node.is_product else self.graph.new_states[node.position]

    def size(self, tensor: tf.Tensor) -> int:
        """Returns the number of units of a tensor at each point."""
        return self.graph.size(tensor)

    def units(self, tensor: tf.Tensor) -> tuple[int, ...]:
        """Returns the shape of a tensor without the points."""
        return self.graph.units(tensor)

    @functools.cached_property
    def _used(self) -> set[str]:
        # A cell may compute what it does not use.
        return self.graph.between((), self.graph.new_states)[0]

    @functools.cached_property
    def _ends(self) -> set[str]:
        return {t.name for t in (*self.graph.new_states, *(product.y for product in self.products))}

    def _origin(self, tensor: tf.Tensor) -> Origin:
        return self.origins.get(tensor.name, _CONSTANT)
