"""Which operator does each part of a cell's Jacobian get, and why?"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from keras_jacmon.jacobians.blocks import BlockJacobian, Part
from keras_jacmon.jacobians.discovery import Base, Structure
from keras_jacmon.jacobians.linearise import fixed_values, kernels_of, structured_jacobian
from keras_jacmon.jacobians.views import View, floating_states, size, view_function
from keras_jacmon.probe.cellgraph import CellGraph
from keras_jacmon.probe.step import CellStep
from keras_jacmon.probe.trajectory import Shortcut, known_sizes

Form = Callable[[Any, tf.Tensor, Any, str], tf.linalg.LinearOperator | None]

_FORMS: dict[type, Form] = {}

# Far below the least state or gradient that training could use.
_NEGLIGIBLE = 1e-30

# A gain of a step is known up to so many roundings of one: `1 - tanh²` of a unit that saturates is little else.
_ROUNDINGS = 16

# One row in twenty may differ by itself, so that a part must be tested in more than one.
_LEAST_TURNS = 4

# Relative. Rounding in float32 leaves about 1e-6.
CERTIFICATE_TOLERANCE = 1e-3


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


@dataclass(frozen=True)
class Rows:
    """Points at which Jacobians are taken: inputs, flat states, and known values of the cell's graph by name."""

    inputs: tf.Tensor
    states: tuple[tf.Tensor, ...]
    values: Mapping[str, tf.Tensor]

    def take(self, rows: tf.Tensor) -> "Rows":
        """Some of them, by their indices."""
        return self._each(lambda tensor: tf.gather(tensor, rows))

    def behind(self, results: Iterable[tf.Tensor]) -> "Rows":
        """The same, known once some results are: what is made of it does not need its memory at the same time."""
        with tf.control_dependencies([result.op for result in results]):
            return self._each(tf.identity)

    def between(self, start: tf.Tensor, stop: tf.Tensor) -> "Rows":
        """Those from one index up to another one, which takes no copy."""
        return self._each(lambda tensor: tensor[start:stop])

    def _each(self, function: Callable[[tf.Tensor], tf.Tensor]) -> "Rows":
        values = {name: function(value) for name, value in self.values.items()}
        return Rows(function(self.inputs), tuple(function(state) for state in self.states), values)


class CellJacobian:
    """The Jacobians of a cell's step: finds their structure, and gives each view its operator.

    Args:
        step: The cell's step.
        inputs: `(rows, ...)`; only shape and type count.
        states: Flat, each `(rows, ...)`.
        trusted: Whether a structure or a registered form may be used; once a certificate has failed it may not.
        independent: Whether each row of the step is a function of the same row of inputs and states.
    """

    def __init__(
        self,
        step: CellStep,
        inputs: tf.Tensor,
        states: Sequence[tf.Tensor],
        *,
        trusted: bool = True,
        independent: bool = True,
    ) -> None:
        self._step = step
        self._inputs, self._states = inputs, list(states)
        self._independent = independent
        self._form = _FORMS.get(type(step.cell)) if trusted and independent else None
        self._structure: Structure | None = None
        self._reason = "its certificate failed" if independent else "its samples are not independent of each other"
        if trusted and independent:
            try:
                self._structure = Structure(CellGraph(step, inputs, states))
            except NotImplementedError as error:
                self._reason = str(error)
            except Exception as error:  # noqa: BLE001 - autodiff takes over, and `explain` shows what went wrong
                self._reason = f"its graph is not understood ({type(error).__name__}: {error})"
        if self._structure:
            self._fixed = fixed_values(self._structure)
            self._kernels = kernels_of(self._structure, self._fixed, self._states[floating_states(states)[0]].dtype)

    def shortcut(self) -> Shortcut | None:
        """How the cell can be unrolled at a lower cost; None if nothing is known of its graph."""
        if self._structure is None:
            return None
        sources = [("state", q) for q in range(len(self._states))]
        products = [k for k in range(len(self._structure.products)) if self._structure.reaches(k, sources)]
        kept = [piece.tensor for k in products for piece in self._structure.pieces(k, sources)]
        return Shortcut(self._structure.graph, self._fixed, self._structure.hoisted, kept)

    def operators(self, views: Sequence[str], rows: Rows) -> dict[str, tf.linalg.LinearOperator]:
        """The operators of views, of `VIEWS`, at some rows; they share what they have in common."""
        operators = {name: self._registered(name, rows) for name in views}
        parts: dict[str, list[tuple[View, tf.linalg.LinearOperator, bool]]] = {}
        for name in views:
            if operators[name] is not None:
                continue
            wide = "joint" if name == "hidden" and "joint" in views else name
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

    def tests(
        self, views: Sequence[str], rows: Rows, new_states: Sequence[tf.Tensor], seed: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor | None]:
        """What the Jacobians rest on, tested by stepping the cell itself at some rows, and by its gradient there.

        Args:
            views: Those that are measured.
            rows: Some rows.
            new_states: Their new states in the trajectory.
            seed: For random vectors w.

        Returns:
            How far the new states of these rows by themselves are from those that the cell gave them among others,
            relative to their size: rows of all steps and samples are put together for the derivatives, which is right
            only if each row is a function of itself. And how far a structure that was found, or a registered form, is
            from the derivative of the cell: `‖J w - (J w by autodiff)‖ / ‖J w by autodiff‖`, for each new state and, in
            turns, each old one, so that no block hides behind larger ones; None if all rests on autodiff. Each is the
            largest of the rows but for one in twenty (see `_largest`), a scalar.
        """
        floating = floating_states(rows.states)
        alone = self._step(rows.inputs, rows.states)
        dependence = [
            _difference(*(tf.reshape(x[p], [-1, size(rows.states[p])]) for x in (alone, new_states))) for p in floating
        ]
        certificate = []
        for view, operator in self._certified(views, rows):
            reference = view_function(self._step, rows.inputs, rows.states, view).jacobian(for_many=False)
            # Jᵀ takes a product with the transposed kernel, which TensorFlow transposes each time.
            adjoint = reference.twice is None
            ends = [[size(rows.states[k]) for k in view.olds] or [size(rows.inputs)]]
            ends = [*ends, [size(rows.states[k]) for k in view.news]][:: -1 if adjoint else 1]
            w = _in_turns(known_sizes(rows.inputs)[0], ends[0], seed, operator.dtype)
            rounding = _ROUNDINGS * np.finfo(w.dtype.as_numpy_dtype).eps * tf.norm(w, axis=-1)
            products = [tf.split(J.matvec(w, adjoint=adjoint), ends[1], axis=-1) for J in (operator, reference)]
            certificate += [_difference(found, expected, rounding) for found, expected in zip(*products, strict=True)]
        return _largest(dependence), _largest(certificate) if certificate else None

    def _certified(self, views: Sequence[str], rows: Rows) -> list[tuple[View, tf.linalg.LinearOperator]]:
        """What does not rest on autodiff."""
        pairs = []
        for name in views:
            registered = self._registered(name, rows)
            if registered is not None:
                pairs.append((View.of(name, self._states), registered))
            elif name != "hidden" or "joint" not in views:
                # The hidden view of the same structure is one of its blocks.
                pairs += [(part, self._structured(part, rows)) for part, structured in self._parts(name) if structured]
        return pairs

    def choices(self, name: str) -> list[Choice]:
        """How each block of a view is taken."""
        view = View.of(name, self._states)
        registered = self._registered(name, Rows(self._inputs, tuple(self._states), {})) is not None
        return [self._choice(new, source, registered=registered) for new in view.news for source in _sources(view)]

    def _choice(self, new: int, source: Base, *, registered: bool) -> Choice:
        old = source[1] if source[0] == "state" else None
        if registered:
            return Choice(new, old, "registered form", getattr(self._form, "__name__", repr(self._form)))
        reason = self._reason_against(new, source)
        if reason is not None or self._structure is None:
            return Choice(new, old, "autodiff", reason or "")
        if not self._structure.depends(new, source):
            return Choice(new, old, "zero", "no gradient connects them")
        return Choice(new, old, "structure", self._structure.describe(new, source))

    def _reason_against(self, new: int, source: Base) -> str | None:
        return self._structure.reason(new, source) if self._structure else self._reason

    def _parts(self, name: str) -> list[tuple[View, bool]]:
        """The view as rectangles of blocks, each with whether it has a structure."""
        view = View.of(name, self._states)
        if not view.olds:
            return [(view, self._reason_against(view.news[0], ("inputs", 0)) is None)]
        rectangles: dict[tuple[tuple[int, ...], bool], list[int]] = {}
        for new in view.news:
            for structured in (True, False):
                olds = tuple(o for o in view.olds if (self._reason_against(new, ("state", o)) is None) == structured)
                if olds:
                    rectangles.setdefault((olds, structured), []).append(new)
        return [(View(tuple(news), olds), structured) for (olds, structured), news in rectangles.items()]

    def _assembled(self, name: str, parts: Sequence[tuple[View, tf.linalg.LinearOperator]]) -> tf.linalg.LinearOperator:
        if len(parts) == 1:
            return parts[0][1]
        view = View.of(name, self._states)
        places = [
            Part(operator, tuple(map(view.news.index, part.news)), tuple(map(view.olds.index, part.olds)))
            for part, operator in parts
        ]
        sizes = [[size(self._states[k]) for k in positions] for positions in (view.news, view.olds)]
        return BlockJacobian(places, *sizes)

    def _hidden_of(
        self, parts: Sequence[tuple[View, tf.linalg.LinearOperator, bool]], rows: Rows
    ) -> tf.linalg.LinearOperator:
        """The hidden view as a block of the joint one, if that block has a structure."""
        hidden = View.of("hidden", self._states)
        for part, operator, structured in parts:
            if structured and hidden.news[0] in part.news and hidden.olds[0] in part.olds:
                return operator.block(hidden.news[0], ("state", hidden.olds[0]))
        return self._by_autodiff(hidden, rows)

    def _registered(self, name: str, rows: Rows) -> tf.linalg.LinearOperator | None:
        if self._form is None:
            return None
        return self._form(self._step.cell, rows.inputs, self._step.packed(rows.states), name)

    def _structured(self, view: View, rows: Rows) -> tf.linalg.LinearOperator:
        if self._structure is None:
            raise RuntimeError("A cell without a structure was asked for one.")
        graph = self._structure.graph
        # What is known beforehand may lie between the inputs and what is made of them.
        known = rows.values if view.olds else {}
        values = {**self._fixed, graph.step_inputs.name: rows.inputs, **known}
        values |= {tensor.name: state for tensor, state in zip(graph.states, rows.states, strict=True)}
        return structured_jacobian(self._structure, values, self._kernels, view.news, _sources(view))

    def _by_autodiff(self, view: View, rows: Rows) -> tf.linalg.LinearOperator:
        function = view_function(self._step, rows.inputs, rows.states, view)
        return function.jacobian(independent=self._independent)


def _sources(view: View) -> list[Base]:
    """What the columns of a view are."""
    return [("state", old) for old in view.olds] or [("inputs", 0)]


def _in_turns(rows: int | tf.Tensor, sizes: Sequence[int], seed: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Random vectors, in each row for one of some parts and zero for the others; of few rows for all parts."""
    w = tf.random.stateless_normal([rows, sum(sizes)], seed, dtype=dtype)
    if len(sizes) == 1:
        return w
    part = tf.repeat(tf.range(len(sizes)), sizes)
    turn = tf.equal(tf.range(rows)[:, None] % len(sizes), part) | (rows < _LEAST_TURNS * len(sizes))
    return tf.where(turn, w, tf.zeros_like(w))


def _difference(found: tf.Tensor, expected: tf.Tensor, negligible: tf.Tensor | float = _NEGLIGIBLE) -> tf.Tensor:
    """How far vectors `(rows, n)` are apart, relative to the expected ones, `(rows,)`."""
    error, expected, found = (tf.norm(x, axis=-1) for x in (found - expected, expected, found))
    return _relative(error, expected, found, negligible)


def _relative(
    error: tf.Tensor, expected: tf.Tensor, found: tf.Tensor, negligible: tf.Tensor | float = _NEGLIGIBLE
) -> tf.Tensor:
    """The relative errors, from the norms of errors and of two vectors each, all `(rows,)`.

    Infinite where one of the two is finite and the other is not.
    """
    # Errors as small as these are no disagreement.
    relative = tf.where(error <= negligible, tf.zeros_like(error), error / expected)
    infinite = tf.fill(tf.shape(error), tf.constant(np.inf, error.dtype))
    one, other = tf.math.is_finite(expected), tf.math.is_finite(found)
    # Where both are NaN or infinite they agree: that is the network's own.
    unequal = tf.where(one | other, infinite, tf.zeros_like(error))
    return tf.where(one & other, relative, unequal)


def _largest(errors: Sequence[tf.Tensor]) -> tf.Tensor:
    """The largest of some errors `(rows,)`, a scalar, but for one row in twenty, or a single one of fewer.

    Where a unit stands at the kink of a ReLU or the step of a rounding, the side that it is on is up to rounding
    errors, so that in rare rows a right structure differs. A wrong one differs in all of them.
    """
    largest = tf.reduce_max(tf.stack(errors), axis=0)
    rows = tf.size(largest)
    outliers = tf.maximum(tf.minimum(tf.maximum(rows // 20, 1), rows - 1), 0)
    # The zero is for no rows at all.
    ordered = tf.sort(tf.concat([largest, tf.zeros([1], largest.dtype)], axis=0), direction="DESCENDING")
    return ordered[outliers]
