"""Makers of sequences of Jacobians, for the measures of products over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from keras_jacmon.cell.step import CellStep
from keras_jacmon.cell.trajectory import UnrollInputs, unroll
from keras_jacmon.jacobians.cell_jacobian import Assumptions, CellJacobian
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.measures.steps import Steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray


def of_matrices(J: Any, mask: NDArray[np.bool_] | None = None) -> Steps:
    """Steps of dense matrices `(time, samples, n, n)`; of a tensor, its shape may be unknown but for n."""
    J = tf.convert_to_tensor(J)
    time, samples = (tf.shape(J)[axis] if J.shape[axis] is None else J.shape[axis] for axis in (0, 1))
    return Steps(
        time,
        lambda t: tf.linalg.LinearOperatorFullMatrix(J[t]),
        None if mask is None else tf.constant(mask),
        samples,
        int(J.shape[-1]),
        J.dtype,
    )


def pieces(steps: Steps, length: int) -> Iterator[Steps]:
    """The segments of a sequence whose time is known, in the order of time."""
    for start in range(0, int(steps.time), length):
        stop = min(start + length, int(steps.time))
        mask = None if steps.mask is None else steps.mask[start:stop]
        yield Steps(stop - start, _from(steps, start), mask, steps.samples, steps.size, steps.dtype)


def _from(steps: Steps, start: int) -> Callable[[tf.Tensor], tf.linalg.LinearOperator]:
    return lambda t: steps.at(t + start)


@dataclass(frozen=True)
class MapCell:
    """A map `h -> function(x, h)` of states `(samples, n)` as a cell, in the precision of the states it starts from."""

    function: Callable[[Any, Any], Any]
    start: NDArray[Any]

    def get_initial_state(self, batch_size: int) -> list[Any]:
        assert batch_size == len(self.start)
        return [tf.constant(self.start)]

    def __call__(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        new = self.function(inputs, states[0])
        return new, [new]


def of_cell(cell: Any, inputs: NDArray[Any], *, structured: bool) -> Steps:
    """Steps of the joint view of a built cell along `inputs` `(time, samples, features)`; to be called in a graph.

    Args:
        cell: A Keras cell.
        inputs: What it is led through, from states of zero.
        structured: Whether the structure may be used, or everything rests on automatic differentiation.
    """
    time, samples = inputs.shape[:2]
    states = tf.nest.flatten(cell.get_initial_state(batch_size=samples))
    sequence = UnrollInputs(tf.constant(inputs), tuple(states), None)
    step = CellStep(cell, states)
    jacobian = CellJacobian(step, sequence.inputs[0], sequence.states, Assumptions(structure=structured))
    assert {choice.how for choice in jacobian.choices("joint")} <= (
        {"structure", "zero"} if structured else {"autodiff"}
    )
    trajectory = unroll(step, sequence, jacobian.unroll_plan())
    rows = PointBatch.of(trajectory)

    def at(t: tf.Tensor) -> tf.linalg.LinearOperator:
        return jacobian.operators(["joint"], rows.between(t * samples, (t + 1) * samples))["joint"]

    return Steps(time, at, None, samples, sum(int(state.shape[-1]) for state in states), states[0].dtype)


def built(cell: Any, features: int) -> Any:
    """A cell with its weights made."""
    cell.build((None, features))
    return cell


def in_graph(function: Callable[[], Any]) -> Any:
    """What a function of no arguments gives inside a graph, as NumPy."""
    return tf.nest.map_structure(lambda x: None if x is None else x.numpy(), tf.function(function, autograph=False)())


def rotations(samples: int, n: int, seed: int = 0) -> NDArray[np.float64]:
    """Random orthogonal matrices."""
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((samples, n, n)))[0]
