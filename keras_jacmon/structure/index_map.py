"""Nodes of a cell's step, and index maps from the units of a node to the units of another tensor."""

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
    """A tensor that is differentiated, or that another one is differentiated by.

    Attributes:
        kind: `NodeKind`: an old state, the inputs, the product with a kernel, or a new state.
        position: Integer, position among the nodes of its kind; products in the order in which they are computed.
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
    """The path of a node's units to the units of another tensor, the target, through elementwise operations.

    Attributes:
        slots: Integer array `(slots, size)`, the units of the node that each unit of the target is made from; -1 for
            none. Each unit of the node appears at most once.
        node_size: Integer, number of units of the node.
        unchanged: Boolean, True if all derivatives are one.
    """

    slots: npt.NDArray[np.int64]
    node_size: int
    unchanged: bool

    @property
    def targets(self) -> npt.NDArray[np.int64]:
        """Integer array `(node_size,)`, the unit of the target that each unit of the node reaches; -1 for none."""
        targets = np.full(self.node_size, -1)
        for slot in self.slots:
            targets[slot[slot >= 0]] = np.flatnonzero(slot >= 0)
        return targets
