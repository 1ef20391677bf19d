"""Nodes of a cell's step, and index maps from the units of a node to the units of another tensor."""

import enum
from collections.abc import Sequence
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
            none. Each unit of the node appears once or a few times; see `separated`.
        node_size: Integer, number of units of the node; a complex number counts as two, its real and imaginary part.
        unchanged: Boolean, True if all derivatives are one.
    """

    slots: npt.NDArray[np.int64]
    node_size: int
    unchanged: bool

    @property
    def targets(self) -> npt.NDArray[np.int64]:
        """Integer array `(node_size,)`, the unit of the target that each unit of the node reaches; -1 for none.

        Only if each unit of the node appears at most once.
        """
        targets = np.full(self.node_size, -1)
        for slot in self.slots:
            targets[slot[slot >= 0]] = np.flatnonzero(slot >= 0)
        return targets

    def part(self, chosen: npt.NDArray[np.bool_], part_of_target: int | None, *, from_complex: bool) -> "IndexMap":
        """The path to some units of the target.

        Args:
            chosen: Boolean array `(size,)`, the units of the target.
            part_of_target: Integer, the part of the target's numbers: 0 for the real ones, 1 for the imaginary ones,
                which are units beside each other; None if the numbers are real.
            from_complex: Boolean, True if the node's units are the parts of complex numbers.
        """
        slots = np.where(chosen, self.slots, -1)
        if self.unchanged and part_of_target is not None:
            # Real parts stay real parts, and imaginary parts stay imaginary parts.
            slots = np.where(slots % 2 == part_of_target if from_complex else part_of_target == 0, slots, -1)
        if part_of_target is not None:
            places = np.full((len(slots), 2 * slots.shape[1]), -1)
            places[:, part_of_target::2] = slots
            slots = places
        return IndexMap(slots, self.node_size, self.unchanged)


def separated(labels: Sequence[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.bool_]]:
    """Divides the units of a target into sets in which no two are made from the same unit of a node.

    Args:
        labels: Sequence of integer arrays `(slots, size)` for the same target, one for each node; -1 for none.

    Returns:
        List of Boolean arrays `(size,)`, one for each set.
    """
    size = labels[0].shape[-1]
    if not any(_is_used_again(array) for array in labels):
        return [np.ones(size, bool)]
    places = np.zeros(size, np.int64)
    taken: list[set[tuple[int, int]]] = []
    for unit in range(size):
        made_from = {(k, int(label)) for k, array in enumerate(labels) for label in array[:, unit] if label >= 0}
        place = next((k for k, others in enumerate(taken) if others.isdisjoint(made_from)), len(taken))
        taken += [set()] if place == len(taken) else []
        taken[place] |= made_from
        places[unit] = place
    return [places == place for place in range(len(taken))]


def _is_used_again(labels: npt.NDArray[np.int64]) -> bool:
    used = labels[labels >= 0]
    return len(np.unique(used)) < used.size
