"""Nodes of a cell's step, and the index maps by which the units of one node reach those of another."""

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


class NodeKind(enum.Enum):
    """The kinds of tensors that derivatives are taken between."""

    STATE = "state"
    INPUTS = "inputs"
    PRODUCT = "product"
    NEW_STATE = "new state"


@dataclass(frozen=True, order=True)
class Node:
    """A tensor that derivatives are taken by or of.

    Attributes:
        kind: An old state, the inputs, the product with a kernel, or a new state.
        position: Among the nodes of its kind; products count in the order in which they are computed.
    """

    kind: NodeKind
    position: int

    @classmethod
    def state(cls, position: int) -> "Node":
        """Returns the node of an old state."""
        return cls(NodeKind.STATE, position)

    @classmethod
    def inputs(cls) -> "Node":
        """Returns the node of the step's inputs."""
        return cls(NodeKind.INPUTS, 0)

    @classmethod
    def product(cls, position: int) -> "Node":
        """Returns the node of a product with a kernel."""
        return cls(NodeKind.PRODUCT, position)

    @classmethod
    def new_state(cls, position: int) -> "Node":
        """Returns the node of a new state."""
        return cls(NodeKind.NEW_STATE, position)

    @property
    def is_state(self) -> bool:
        """True for an old state."""
        return self.kind is NodeKind.STATE

    @property
    def is_product(self) -> bool:
        """True for a product with a kernel."""
        return self.kind is NodeKind.PRODUCT


@dataclass(frozen=True)
class IndexMap:
    """The way of a node's units to the units of another tensor, through elementwise operations.

    Attributes:
        slots: `(slots, size)`, the units of the node that each unit of the target is made from; -1 for none. A unit of
            the node stands in it at most once.
        node_size: Number of units of the node.
        unchanged: True if all derivatives are one.
    """

    slots: npt.NDArray[np.int64]
    node_size: int
    unchanged: bool

    @property
    def targets(self) -> npt.NDArray[np.int64]:
        """`(node_size,)`: the unit of the target that each unit of the node reaches; -1 for none."""
        targets = np.full(self.node_size, -1)
        for slot in self.slots:
            targets[slot[slot >= 0]] = np.flatnonzero(slot >= 0)
        return targets
