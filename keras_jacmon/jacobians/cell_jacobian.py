"""Which operator does each part of a cell's Jacobian get, and why?"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from keras_jacmon.cell.cell_graph import CellGraph
from keras_jacmon.cell.step import CellStep
from keras_jacmon.cell.unroll_plan import UnrollPlan
from keras_jacmon.jacobians.linearise import fixed_values, kernels_of, structured_jacobian
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.jacobians.unroll_rules import unroll_plan_of
from keras_jacmon.jacobians.views import View, floating_states, size, view_function
from keras_jacmon.operators.autodiff import AutodiffJacobian
from keras_jacmon.operators.block import BlockJacobian, BlockPart
from keras_jacmon.operators.structured import StructuredJacobian
from keras_jacmon.structure.index_map import Node
from keras_jacmon.structure.structure import Structure

Form = Callable[[Any, tf.Tensor, Any, str], tf.linalg.LinearOperator | None]

_FORMS: dict[type, Form] = {}


def register_jacobian(cell_type: type, form: Form | None) -> None:
    """Says how the Jacobian of a type of cell is to be taken. Rarely needed: see `explain`.

    Example:

    ```python
    def form(cell, inputs, states, view):
        if view != "hidden":
            return None
        slope = 1.0 - tf.tanh(inputs @ cell.kernel + states[0] @ cell.recurrent_kernel) ** 2
        kernel = tf.linalg.matrix_transpose(cell.recurrent_kernel)
        return tf.linalg.LinearOperatorFullMatrix(slope[:, :, None] * kernel)

    register_jacobian(MyCell, form)
    ```

    Args:
        cell_type: The class itself; subclasses are not meant, since they may override `call`.
        form: From the cell, `inputs` `(rows, ...)`, `states` in the cell's structure and the view (`"hidden"`,
            `"joint"` or `"inputs"`) to a `tf.linalg.LinearOperator` of batch shape `(rows,)`, `J[b, i, k] = d new[b, i]
            / d old[b, k]`, or None to leave the view to discovery. It is certified like a structure that was found.
            None takes a form back.

    Raises:
        ValueError: If `cell_type` is no class, or `form` cannot be called.
    """
    if not isinstance(cell_type, type):
        raise ValueError(f"Invalid value for argument `cell_type`. Expected a class. Received: cell_type={cell_type!r}")
    if form is None:
        _FORMS.pop(cell_type, None)
        return
    if not callable(form):
        raise ValueError(
            "Invalid value for argument `form`. Expected a function of a cell, inputs, states and a view, or None. "
            f"Received: form={form!r}"
        )
    _FORMS[cell_type] = form


@dataclass(frozen=True)
class Assumptions:
    """What may be relied on, until a check fails.

    Attributes:
        structure: That a structure that was found, or a registered form, is right.
        independent: That each row of a step is a function of the same row of inputs and states.
        products: That the tape applied twice gives the products with J.
    """

    structure: bool = True
    independent: bool = True
    products: bool = True


@dataclass(frozen=True)
class Choice:
    """How the derivative of a new state by an old one is taken.

    Attributes:
        new: Position of the new state among the cell's states.
        old: Position of the old one; None for the inputs.
        how: `"structure"`, `"autodiff"`, `"zero"` or `"registered form"`.
        why: Of `"autodiff"` the reason why there is no structure, of `"structure"` what it is made of.
    """

    new: int
    old: int | None
    how: str
    why: str


class CellJacobian:
    """The Jacobians of a cell's step: finds their structure, and gives each view its operator.

    Args:
        step: The cell's step.
        inputs: `(rows, ...)`; only shape and type count.
        states: Flat, each `(rows, ...)`.
        trust: What may be relied on.

    Attributes:
        step: The cell's step.
        trust: What is relied on.
        row_by_row: Whether it is proven that each row of a step is a function of the same row of inputs and states.
    """

    def __init__(
        self,
        step: CellStep,
        inputs: tf.Tensor,
        states: Sequence[tf.Tensor],
        trust: Assumptions = Assumptions(),
    ) -> None:
        self.step = step
        self._inputs, self._states = inputs, list(states)
        self.trust = trust
        whole = trust.structure and trust.independent
        self._form = _FORMS.get(type(step.cell)) if whole else None
        self._structure: Structure | None = None
        self._reason = "its certificate failed"
        if not trust.independent:
            self._reason = "its samples are not independent of each other"
        if whole:
            try:
                self._structure = Structure(CellGraph(step, inputs, states))
            except NotImplementedError as error:
                self._reason = str(error)
            except Exception as error:  # noqa: BLE001 - autodiff takes over, and `explain` shows what went wrong
                self._reason = f"its graph is not understood ({type(error).__name__}: {error})"
        self.row_by_row = self._structure is not None and self._structure.row_by_row
        if self._structure:
            self._fixed = fixed_values(self._structure)
            self._kernels = kernels_of(self._structure, self._fixed, self._states[floating_states(states)[0]].dtype)

    def shortcut(self) -> UnrollPlan | None:
        """How the cell can be unrolled at a lower cost; None if nothing is known of its graph."""
        if self._structure is None:
            return None
        return unroll_plan_of(self._structure, self._fixed, self._kernels)

    def evaluated(self, views: Sequence[str], rows: PointBatch) -> PointBatch:
        """The same rows, with what is structured of some views evaluated once for all that is made of some rows."""
        if self._form is not None:
            return rows
        wide = dict.fromkeys(_wide(name, views) for name in views)
        parts = [part for name in wide for part, structured in self._parts(name) if structured]
        return replace(rows, operators={part: self._structured(part, rows) for part in parts})

    def operators(self, views: Sequence[str], rows: PointBatch) -> dict[str, tf.linalg.LinearOperator]:
        """The operators of views, of `VIEWS`, at some rows; they share what they have in common."""
        operators = {name: self._registered(name, rows) for name in views}
        parts: dict[str, list[tuple[View, tf.linalg.LinearOperator, bool]]] = {}
        for name in views:
            if operators[name] is not None:
                continue
            wide = _wide(name, views)
            if wide not in parts:
                parts[wide] = [
                    (part, self._structured(part, rows) if structured else self._by_autodiff(part, rows), structured)
                    for part, structured in self._parts(wide)
                ]
            if name == wide:
                operators[name] = self._assembled(wide, [(part, operator) for part, operator, _ in parts[wide]])
            else:
                operators[name] = self._hidden_of(parts[wide], rows)
        return operators

    def has_structure(self, views: Sequence[str]) -> bool:
        """Whether something that is measured of some views does not rest on autodiff."""
        points = PointBatch(self._inputs, tuple(self._states))
        return any(
            self._registered(name, points) is not None or any(structured for _, structured in self._parts(name))
            for name in views
        )

    def certified(self, views: Sequence[str], rows: PointBatch) -> Iterator[tuple[View, tf.linalg.LinearOperator]]:
        """What is measured of some views and does not rest on autodiff."""
        for name in views:
            operator = self._registered(name, rows)
            if operator is not None:
                yield View.of(name, self._states), operator
            elif name == _wide(name, views):
                for part in [part for part, structured in self._parts(name) if structured]:
                    yield part, self._structured(part, rows)

    def stepped_with(self, view: View) -> View:
        """The view with all new states, if their derivatives have a structure too and can be taken as safely."""
        news = floating_states(self._states)
        structured = all(self._reason_against(new, source) is None for new in news for source in _sources(view))
        return View(tuple(news), view.olds) if structured and self._form is None else view

    def reference(self, view: View, rows: PointBatch) -> AutodiffJacobian:
        """What is to be compared with: by autodiff, and J formed where nobody knows what the cell's graph contains."""
        function = view_function(self.step, rows.inputs, rows.states, view)
        twice = self.trust.products and self._form is None
        return function.jacobian(independent=self.trust.independent, for_many=False, twice=twice)

    def by_tape_twice(self, views: Sequence[str], rows: PointBatch) -> Iterator[tuple[View, tf.linalg.LinearOperator]]:
        """What is left to autodiff of some views, unless J is formed there."""
        names = [name for name in views if self._registered(name, rows) is None] if self.trust.products else []
        parts = [part for name in names for part, structured in self._parts(name) if not structured]
        for part in dict.fromkeys(parts):
            yield part, self._by_autodiff(part, rows)

    def choices(self, name: str) -> list[Choice]:
        """How each block of a view is taken."""
        view = View.of(name, self._states)
        registered = self._registered(name, PointBatch(self._inputs, tuple(self._states))) is not None
        return [self._choice(new, source, registered=registered) for new in view.news for source in _sources(view)]

    def _choice(self, new: int, source: Node, *, registered: bool) -> Choice:
        old = source.position if source.is_state else None
        if registered:
            return Choice(new, old, "registered form", getattr(self._form, "__name__", repr(self._form)))
        reason = self._reason_against(new, source)
        if reason is not None or self._structure is None:
            return Choice(new, old, "autodiff", reason or "")
        if not self._structure.depends(new, source):
            return Choice(new, old, "zero", "no gradient connects them")
        return Choice(new, old, "structure", self._structure.describe(new, source))

    def _reason_against(self, new: int, source: Node) -> str | None:
        return self._structure.reason(new, source) if self._structure else self._reason

    def _parts(self, name: str) -> list[tuple[View, bool]]:
        """The view as rectangles of blocks, each with whether it has a structure."""
        view = View.of(name, self._states)
        if not view.olds:
            return [(view, self._reason_against(view.news[0], Node.inputs()) is None)]
        rectangles: dict[tuple[tuple[int, ...], bool], list[int]] = {}
        for new in view.news:
            for structured in (True, False):
                olds = tuple(o for o in view.olds if (self._reason_against(new, Node.state(o)) is None) == structured)
                if olds:
                    rectangles.setdefault((olds, structured), []).append(new)
        return [(View(tuple(news), olds), structured) for (olds, structured), news in rectangles.items()]

    def _assembled(self, name: str, parts: Sequence[tuple[View, tf.linalg.LinearOperator]]) -> tf.linalg.LinearOperator:
        if len(parts) == 1:
            return parts[0][1]
        view = View.of(name, self._states)
        places = [
            BlockPart(operator, tuple(map(view.news.index, part.news)), tuple(map(view.olds.index, part.olds)))
            for part, operator in parts
        ]
        sizes = [[size(self._states[k]) for k in positions] for positions in (view.news, view.olds)]
        return BlockJacobian(places, *sizes)

    def _hidden_of(
        self, parts: Sequence[tuple[View, tf.linalg.LinearOperator, bool]], rows: PointBatch
    ) -> tf.linalg.LinearOperator:
        """The hidden view as a block of the joint one, if that block has a structure."""
        hidden = View.of("hidden", self._states)
        for part, operator, structured in parts:
            if structured and hidden.news[0] in part.news and hidden.olds[0] in part.olds:
                return operator.block(hidden.news[0], hidden.olds[0])
        return self._by_autodiff(hidden, rows)

    def _registered(self, name: str, rows: PointBatch) -> tf.linalg.LinearOperator | None:
        if self._form is None:
            return None
        return self._form(self.step.cell, rows.inputs, self.step.packed(rows.states), name)

    def _structured(self, view: View, rows: PointBatch) -> StructuredJacobian:
        if view in rows.operators:
            return rows.operators[view]
        if self._structure is None:
            raise RuntimeError("A cell without a structure was asked for one.")
        graph = self._structure.graph
        # What is known beforehand may lie between the inputs and what is made of them.
        known = rows.values if view.olds else {}
        values = {**self._fixed, graph.step_inputs.name: rows.inputs, **known}
        values |= {tensor.name: state for tensor, state in zip(graph.states, rows.states, strict=True)}
        return structured_jacobian(self._structure, values, self._kernels, view.news, _sources(view))

    def _by_autodiff(self, view: View, rows: PointBatch) -> tf.linalg.LinearOperator:
        function = view_function(self.step, rows.inputs, rows.states, view)
        # Formed of its transpose, if that is all that is relied on.
        twice = self.trust.products
        jacobian = function.jacobian(independent=self.trust.independent, for_many=twice, twice=twice)
        return jacobian if twice else jacobian.formed()


def _wide(name: str, views: Sequence[str]) -> str:
    """The view, of some, of whose structure another one is a part: the hidden state is a block of the joint one."""
    return "joint" if name == "hidden" and "joint" in views else name


def _sources(view: View) -> list[Node]:
    """What the columns of a view are."""
    return [Node.state(old) for old in view.olds] or [Node.inputs()]
