"""Operators for the views of a cell's Jacobian, by a plan that gives each block its method."""

import contextlib
import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import tensorflow as tf

from keras_jacmon.cell.cell_graph import CellGraph
from keras_jacmon.cell.step import CellStep
from keras_jacmon.cell.unroll_plan import UnrollPlan
from keras_jacmon.errors import message_of
from keras_jacmon.jacobians.linearise import kernels_of, structured_jacobian, weights_only_values
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.jacobians.registered_forms import registered_form
from keras_jacmon.jacobians.unroll_rules import unroll_plan_of
from keras_jacmon.jacobians.views import View, floating_states, size, view_function
from keras_jacmon.operators.autodiff import AutodiffJacobian
from keras_jacmon.operators.block import BlockJacobian, BlockPart
from keras_jacmon.operators.contract import JacobianOperator
from keras_jacmon.operators.formed import as_jacobian_operator
from keras_jacmon.operators.structured import StructuredJacobian
from keras_jacmon.options import ViewName
from keras_jacmon.structure.index_map import Node
from keras_jacmon.structure.interpreter import find_structure

if TYPE_CHECKING:
    from keras_jacmon.structure.structure import Structure


@dataclass(frozen=True)
class Assumptions:
    """Properties of a cell that may be relied on until a check fails.

    Attributes:
        structure: True if a structure that was found, or a registered form, is right.
        independent: True if each point of a step is a function of the same point of inputs and states.
        products: True if the tape applied twice gives the products with J, and `tf.vectorized_map` those with several
            vectors at once; otherwise J is formed by one gradient for each unit.
        inputs: True if the new states of a sample do not depend on the inputs of others.
    """

    structure: bool = True
    independent: bool = True
    products: bool = True
    inputs: bool = True


class JacobianMethod(str, enum.Enum):
    """The ways in which a block of a Jacobian is taken."""

    STRUCTURE = "structure"
    AUTODIFF = "autodiff"
    ZERO = "zero"
    REGISTERED_FORM = "registered form"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Choice:
    """The plan of one block: the way in which the derivative of a new state by an old one is taken.

    Attributes:
        new: Position of the new state among the cell's states.
        old: Position of the old one; None for the inputs.
        how: The method: `"structure"`, `"autodiff"`, `"zero"` or `"registered form"`.
        why: Of `"autodiff"` the reason why there is no structure, of `"structure"` what it is made of.
    """

    new: int
    old: int | None
    how: JacobianMethod
    why: str

    @property
    def is_structured(self) -> bool:
        """True if the block is known from the cell's graph."""
        return self.how in (JacobianMethod.STRUCTURE, JacobianMethod.ZERO)

    @property
    def source(self) -> Node:
        """The node of the old state, or of the inputs."""
        return Node.inputs() if self.old is None else Node.state(self.old)


@dataclass(frozen=True)
class ViewPlan:
    """The plan of a view.

    Attributes:
        view: The view.
        blocks: The choice for each of its blocks, new state by new state.
    """

    view: View
    blocks: tuple[Choice, ...]

    @property
    def is_registered(self) -> bool:
        """True if a registered form gives the view."""
        return self.blocks[0].how is JacobianMethod.REGISTERED_FORM

    def parts(self, *, structured: bool | None = None) -> list[tuple[View, bool]]:
        """The view as rectangles of blocks, each with a Boolean, True if it has a structure.

        Args:
            structured: Boolean, True or False for one kind of rectangles only; None for both, the default.
        """
        rectangles: dict[tuple[tuple[Node, ...], bool], list[int]] = {}
        for new in self.view.outputs:
            for known in (True, False):
                sources = tuple(c.source for c in self.blocks if c.new == new and c.is_structured == known)
                if sources and structured in (None, known):
                    rectangles.setdefault((sources, known), []).append(new)
        return [(View(tuple(outputs), sources), known) for (sources, known), outputs in rectangles.items()]


class CellJacobian:
    """The Jacobians of a cell's step: finds their structure, and gives each view its operator.

    Args:
        step: The cell's step.
        inputs: `(points, ...)`, or its `tf.TensorSpec`: only shape and type count, except for a registered form.
        states: Flat, each `(points, ...)`; only shapes and types count.
        assumptions: The properties that may be relied on.

    Attributes:
        step: The cell's step.
        assumptions: The properties that are relied on.
        point_by_point: True if it is proven that each point's new states are a function of the same point alone.
    """

    def __init__(
        self,
        step: CellStep,
        inputs: tf.Tensor,
        states: Sequence[tf.Tensor],
        assumptions: Assumptions = Assumptions(),
    ) -> None:
        self.step, self.assumptions = step, assumptions
        self._example = PointBatch(inputs, tuple(states))
        self._plans: dict[ViewName, ViewPlan] = {}
        whole = assumptions.structure and assumptions.independent
        self._form = registered_form(step.cell) if whole else None
        self._structure: Structure | None = None
        self._unstructured: CellGraph | None = None
        self._reason = "its structure differs from autodiff"
        if not assumptions.independent:
            self._reason = "its samples are not independent of each other"
        if whole:
            try:
                self._structure = find_structure(CellGraph(step, inputs, states))
            except NotImplementedError as error:
                self._reason = str(error)
            except Exception as error:  # noqa: BLE001 - autodiff takes over, and `explain` shows what went wrong
                self._reason = f"its graph is not understood: {message_of(error)}"
        self.point_by_point = self._structure is not None and self._structure.point_by_point
        if self._structure:
            self._weights_only = weights_only_values(self._structure)
            self._kernels = kernels_of(self._structure, self._weights_only, states[floating_states(states)[0]].dtype)

    def graph(self) -> CellGraph | None:
        """The graph of the cell's step, also where its structure is not relied on; None if it cannot be traced."""
        if self._structure is not None:
            return self._structure.graph
        if self._unstructured is None:
            with contextlib.suppress(NotImplementedError):
                self._unstructured = CellGraph(self.step, self._example.inputs, self._example.states)
        return self._unstructured

    @property
    def graphs(self) -> tuple[CellGraph, ...]:
        """The graphs of the cell's step so far. They must live as long as what was computed by copies of them."""
        found = (self._structure.graph if self._structure is not None else None, self._unstructured)
        return tuple(graph for graph in found if graph is not None)

    def unroll_plan(self) -> UnrollPlan | None:
        """A plan for unrolling the cell at a lower cost; None if nothing is known of its graph."""
        if self._structure is None:
            return None
        return unroll_plan_of(self._structure, self._weights_only, self._kernels)

    def plan(self, name: ViewName) -> ViewPlan:
        """The plan of a view, made once."""
        if name not in self._plans:
            view = View.of(name, self._example.states)
            blocks = [self._choice(new, source) for new in view.outputs for source in view.sources]
            if self._registered(name, self._example) is not None:
                why = getattr(self._form, "__name__", repr(self._form))
                blocks = [replace(block, how=JacobianMethod.REGISTERED_FORM, why=why) for block in blocks]
            self._plans[name] = ViewPlan(view, tuple(blocks))
        return self._plans[name]

    def _choice(self, new: int, source: Node) -> Choice:
        old = source.position if source.is_state else None
        reason = self._structure.reason(new, source) if self._structure else self._reason
        if reason is not None or self._structure is None:
            return Choice(new, old, JacobianMethod.AUTODIFF, reason or "")
        if not self._structure.depends(new, source):
            return Choice(new, old, JacobianMethod.ZERO, "no gradient connects them")
        return Choice(new, old, JacobianMethod.STRUCTURE, self._structure.describe(new, source))

    def choices(self, name: ViewName) -> list[Choice]:
        """The choices for the blocks of a view."""
        return list(self.plan(name).blocks)

    def has_structure(self, views: Sequence[ViewName]) -> bool:
        """True if a block of one of the views does not rest on autodiff."""
        return any(block.how is not JacobianMethod.AUTODIFF for name in views for block in self.plan(name).blocks)

    def _whole(self, name: ViewName, views: Sequence[ViewName]) -> ViewName:
        """The view that another one is made from: the hidden one is a block of the joint one, if both are wanted."""
        is_block = name == "hidden" and "joint" in views and not self.plan("joint").is_registered
        return "joint" if is_block else name

    def _holds_hidden(self, points: PointBatch) -> bool:
        """True if the whole joint view was evaluated at the points, and the hidden one was not."""
        if not points.operators:
            return False
        hidden, joint = (
            all(part in points.operators for part, _ in self.plan(name).parts()) for name in ("hidden", "joint")
        )
        return joint and not hidden

    def evaluated(self, views: Sequence[ViewName], points: PointBatch) -> PointBatch:
        """The points with the structured operators of some views evaluated, once for all uses of these views."""
        if self._form is not None:
            return points
        wholes = dict.fromkeys(self._whole(name, views) for name in views)
        parts = [part for name in wholes for part, _ in self.plan(name).parts(structured=True)]
        return replace(points, operators={part: self._structured(part, points) for part in parts}, values={})

    def operators(self, views: Sequence[ViewName], points: PointBatch) -> dict[ViewName, JacobianOperator]:
        """The operators of views at some points; they share their common parts."""
        operators: dict[ViewName, JacobianOperator] = {}
        wholes: dict[ViewName, dict[View, JacobianOperator]] = {}
        for name in views:
            registered = self._registered(name, points)
            if registered is not None:
                operators[name] = registered
                continue
            whole = self._whole(name, views)
            if whole == "hidden" and self._holds_hidden(points):
                whole = "joint"
            if whole not in wholes:
                wholes[whole] = {
                    part: self._structured(part, points) if structured else self._by_autodiff(part, points)
                    for part, structured in self.plan(whole).parts()
                }
            if name == whole:
                operators[name] = self._assembled(self.plan(whole).view, wholes[whole])
            else:
                operators[name] = self._hidden_of(wholes[whole], points)
        return operators

    def without_autodiff(
        self, views: Sequence[ViewName], points: PointBatch
    ) -> Iterator[tuple[View, JacobianOperator]]:
        """The operators of some views that do not rest on autodiff."""
        for name in views:
            registered = self._registered(name, points)
            if registered is not None:
                yield self.plan(name).view, registered
            elif name == self._whole(name, views):
                for part, _ in self.plan(name).parts(structured=True):
                    yield part, self._structured(part, points)

    def reference(self, view: View, points: PointBatch) -> AutodiffJacobian:
        """The operator to compare with: by autodiff, for one product with Jᵀ."""
        function = view_function(self.step, points.inputs, points.states, view)
        return function.jacobian(independent=self.assumptions.independent, for_many=False, twice=False)

    def by_tape_twice(self, views: Sequence[ViewName], points: PointBatch) -> Iterator[tuple[View, AutodiffJacobian]]:
        """The operators of some views that rest on the tape applied twice."""
        plans = [self.plan(name) for name in views] if self.assumptions.products else []
        parts = [part for plan in plans if not plan.is_registered for part, _ in plan.parts(structured=False)]
        for part in dict.fromkeys(parts):
            yield part, self._autodiff(part, points)

    def _assembled(self, view: View, parts: dict[View, JacobianOperator]) -> JacobianOperator:
        """A view put together from operators for its parts."""
        if len(parts) == 1:
            return next(iter(parts.values()))
        places = [
            BlockPart(
                operator, tuple(map(view.outputs.index, part.outputs)), tuple(map(view.sources.index, part.sources))
            )
            for part, operator in parts.items()
        ]
        states = self._example.states
        return BlockJacobian(
            places, [size(states[new]) for new in view.outputs], [size(states[old.position]) for old in view.sources]
        )

    def _hidden_of(self, parts: dict[View, JacobianOperator], points: PointBatch) -> JacobianOperator:
        """The hidden view as a block of the joint one, if that block has a structure."""
        hidden = View.of("hidden", self._example.states)
        new, old = hidden.outputs[0], hidden.sources[0]
        for part, operator in parts.items():
            if new in part.outputs and old in part.sources:
                block = operator.block(new, old.position)
                if block is not None:
                    return block
        return self._by_autodiff(hidden, points)

    def _registered(self, name: ViewName, points: PointBatch) -> JacobianOperator | None:
        """The operator of a view by the registered form; None if there is none."""
        # A registered form knows the views by name.
        if self._form is None or not isinstance(name, str):
            return None
        operator = self._form(self.step.cell, points.inputs, self.step.packed(points.states), name)
        return None if operator is None else as_jacobian_operator(operator)

    def _structured(self, view: View, points: PointBatch) -> StructuredJacobian:
        if view in points.operators:
            return points.operators[view]
        if self._structure is None:
            raise RuntimeError("A cell without a structure was asked for one.")
        graph = self._structure.graph
        # Known values may lie between the inputs and the results, and would cut the derivative by the inputs.
        known = {} if Node.inputs() in view.sources else points.values
        values = {**self._weights_only, graph.step_inputs.name: points.inputs, **known}
        values |= {tensor.name: state for tensor, state in zip(graph.states, points.states, strict=True)}
        return structured_jacobian(self._structure, values, self._kernels, view.outputs, view.sources)

    def _by_autodiff(self, view: View, points: PointBatch) -> JacobianOperator:
        jacobian = self._autodiff(view, points)
        # Without trust in the tape applied twice, J is formed from products with its transpose.
        return jacobian if self.assumptions.products else jacobian.formed()

    def _autodiff(self, view: View, points: PointBatch) -> AutodiffJacobian:
        function = view_function(self.step, points.inputs, points.states, view)
        twice, independent = self.assumptions.products, self.assumptions.independent
        return function.jacobian(independent=independent, for_many=twice, twice=twice, vectorized=True)
