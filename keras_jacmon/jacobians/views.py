"""Views: the parts of a step's Jacobian, by the hidden state, by all states or by the inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.cell.step import CellStep, widened
from keras_jacmon.errors import invalid_argument
from keras_jacmon.operators.autodiff import AutodiffJacobian
from keras_jacmon.options import VIEWS, ViewName
from keras_jacmon.structure.index_map import Node
from keras_jacmon.tensors import joined

# The rank of a batch of vectors.
_FLAT = 2


def state_jacobian(
    cell: Any, inputs: tf.Tensor, states: Any, view: str | Sequence[int | str] = "hidden"
) -> tf.linalg.LinearOperator:
    """Returns the Jacobian of one step of a cell at each of a batch of points.

    `J[b, i, k] = d new[b, i] / d old[b, k]`: rows are new, columns are old. States of a higher rank are flattened.

    Example:

    ```python
    cell = keras.layers.LSTMCell(8)
    x, h, c = tf.ones((5, 3)), tf.zeros((5, 8)), tf.zeros((5, 8))
    J = state_jacobian(cell, x, [h, c], view="joint")
    J.to_dense()                        # (5, 16, 16)
    J.matvec(tf.ones((5, 16)))          # J v at each point, without forming J
    J.matvec(tf.ones((5, 16)), adjoint=True)
    ```

    Args:
        cell: A cell, anything that `keras.layers.RNN` takes as one; built here if it is not.
        inputs: Tensor `(points, ...)`, the input of this step.
        states: Tensors `(points, ...)`, the old states in the structure that the cell takes.
        view: A string. `"hidden"`, the first state alone, the others held (`dh_t/dh_{t-1}`); `"joint"`, all
            floating-point states, concatenated; `"inputs"`, the first state with respect to the inputs (`dh_t/dx_t`).
            Or chosen states, such as `(0, 2)` or, where the states are in a dict, `("v", "a")`: the block of the joint
            view for these states in this order, the others held. Defaults to `"hidden"`.

    Returns:
        A `tf.linalg.LinearOperator` with batch shape `(points,)`, in float32 or better.

    Raises:
        ValueError: If `view` is unknown, or the states do not fit together.
    """
    states = [states] if not keras.tree.is_nested(states) else states
    flat = [widened(state) for state in keras.tree.flatten(states)]
    view = chosen_view(view, states, floating_states(flat))
    inputs = widened(inputs)
    counts = {int(tensor.shape[0]) for tensor in (inputs, *flat) if tensor.shape[0] is not None}
    if len(counts) > 1:
        raise ValueError(
            "Invalid value for arguments `inputs` and `states`. Expected the same number of points in each. "
            f"Received: inputs of shape {tuple(inputs.shape)}, states of shapes {[tuple(s.shape) for s in flat]}"
        )
    step = CellStep(cell, states)
    # Weights that a cell makes at its first call must not be made under a tape.
    step(inputs, flat)
    return view_function(step, inputs, flat, View.of(view, flat)).jacobian()


def chosen_view(view: str | Sequence[int | str], states: Any, floating: Sequence[int]) -> ViewName:
    """Returns a view with its states by position.

    Args:
        view: String, one of `VIEWS`; or chosen states, by position or by name.
        states: The states in the structure that the cell takes; the keys of a dict are names.
        floating: Positions of the floating-point states among the flat ones.

    Raises:
        ValueError: If there is no such view.
    """
    if isinstance(view, str):
        if view not in VIEWS:
            raise invalid_argument("view", f"one of {list(VIEWS)}, or chosen states such as `(0, 1)`", f"view={view!r}")
        return view
    known = _names_of(states)
    places = tuple(known.get(state, -1) if isinstance(state, str) else state for state in view)
    if not places or len(set(places)) < len(places) or not set(places) <= set(floating):
        raise invalid_argument("view", f"different {choice_of_states(states, floating)}", f"view={view!r}")
    return places


def choice_of_states(states: Any, floating: Sequence[int]) -> str:
    """Returns the states that can be chosen, in words; see `chosen_view`."""
    known = _names_of(states)
    by_name = f", or by name out of {list(known)}" if known else ""
    return f"floating-point states out of {list(floating)}{by_name}"


def _names_of(states: Any) -> dict[str, int]:
    """Returns the positions of the states that have a name."""
    names = [str(path[-1]) if path else "" for path, _ in keras.tree.flatten_with_path(states)]
    return {name: place for place, name in enumerate(names) if not name.isdecimal()}


@dataclass(frozen=True)
class View:
    """A part of a step's Jacobian: the derivatives of some new states by some old ones, or by the inputs.

    Attributes:
        outputs: Positions of the new states among the flat states.
        sources: Nodes of the old states; or the node of the inputs alone.
    """

    outputs: tuple[int, ...]
    sources: tuple[Node, ...]

    def columns(self, inputs: tf.Tensor, states: Sequence[tf.Tensor]) -> int:
        """The number of columns of its Jacobian."""
        return sum(size(states[source.position] if source.is_state else inputs) for source in self.sources)

    @classmethod
    def of(cls, name: ViewName, states: Sequence[tf.Tensor]) -> "View":
        """The view `"hidden"`, `"joint"` or `"inputs"` of a cell with these states, or that of chosen ones."""
        if not isinstance(name, str):
            return cls(name, tuple(map(Node.state, name)))
        floating = tuple(floating_states(states))
        sources = tuple(map(Node.state, floating))
        return {
            "hidden": cls(floating[:1], sources[:1]),
            "joint": cls(floating, sources),
            "inputs": cls(floating[:1], (Node.inputs(),)),
        }[name]


@dataclass(frozen=True)
class ViewFunction:
    """The new states of a view as a function of its sources, which are flattened and stand side by side.

    Attributes:
        function: Maps a point `(points, n)` and a context, tensors that begin with the points, to `(points, m)`.
        point: Tensor `(points, n)`, at which the function is differentiated.
        context: List of tensors that are held constant.
        range_dimension: Integer, m.
    """

    function: Callable[[tf.Tensor, list[tf.Tensor]], tf.Tensor]
    point: tf.Tensor
    context: list[tf.Tensor]
    range_dimension: int

    def jacobian(self, **options: bool) -> AutodiffJacobian:
        """Its Jacobian at the point; options as for `AutodiffJacobian`."""
        return AutodiffJacobian(self.function, self.point, self.context, self.range_dimension, **options)


def view_function(step: CellStep, inputs: tf.Tensor, states: Sequence[tf.Tensor], view: View) -> ViewFunction:
    """The function of a view at the given points; `inputs` and flat `states` have the points as their first axis."""
    # With the inputs as the last tensor both kinds of view read alike: the point is the chosen tensors side by side.
    tensors = [*states, inputs]
    chosen = [source.position if source.is_state else len(states) for source in view.sources]
    sizes = [size(tensors[k]) for k in chosen]
    context = [tensor for k, tensor in enumerate(tensors) if k not in chosen]

    def function(point: tf.Tensor, context: list[tf.Tensor]) -> tf.Tensor:
        parts = [point] if len(sizes) == 1 else tf.split(point, sizes, axis=-1)
        pieces = dict(zip(chosen, parts, strict=True))
        held = iter(context)
        *old, x = [_shaped(pieces[k], tensor) if k in pieces else next(held) for k, tensor in enumerate(tensors)]
        new = step(x, old)
        return side_by_side([new[p] for p in view.outputs])

    # A tensor of its own: one that serves as another state too would get the sum of two derivatives.
    point = tf.identity(side_by_side([tensors[k] for k in chosen]))
    return ViewFunction(function, point, context, sum(size(states[p]) for p in view.outputs))


def floating_states(states: Sequence[tf.Tensor]) -> list[int]:
    """The positions of the states that have a derivative; a step counter has none."""
    return [k for k, state in enumerate(states) if state.dtype.is_floating]


def size(tensor: tf.Tensor) -> int:
    """The number of values at each point."""
    return int(tensor.shape[1:].num_elements())


def flattened(tensor: tf.Tensor) -> tf.Tensor:
    """`(points, ...)` -> `(points, n)`."""
    # Most are flat, and what is differentiated twice had better have no operation that does nothing.
    return tensor if tensor.shape.rank == _FLAT else tf.reshape(tensor, [-1, size(tensor)])


def side_by_side(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Tensors `(points, ...)`, each flattened, as one `(points, n)`."""
    return joined([flattened(tensor) for tensor in tensors])


def _shaped(flat: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    return flat if like.shape.rank == _FLAT else tf.reshape(flat, [-1, *like.shape[1:]])
