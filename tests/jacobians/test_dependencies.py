"""The dependencies of the new states on the old ones, and the states that a cell's output is or is made from."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import CounterCell, ReadoutFirstCell, SeedCell

from keras_jacmon.cell.step import CellStep
from keras_jacmon.jacobians.dependencies import Dependencies, find_dependencies

L = keras.layers


class CarryingCell(keras.layers.Layer):
    """A counter, a state, and a second counter that reads the first one; the output is the state, or made from it."""

    state_size = (2, 3, 2)

    def __init__(self, readout: Any) -> None:
        super().__init__()
        self.readout = readout

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        count, h, counts = states
        new_h = tf.tanh(h + inputs)
        return self.readout(new_h, h), [count + 1, new_h, counts + count]


def dependencies(cell: Any) -> Dependencies:
    found = []
    rnn = L.RNN(cell)
    rnn(np.ones((2, 1, 3), np.float32))

    @tf.function(autograph=False)
    def graph() -> None:
        states = rnn.get_initial_state(batch_size=2)
        flat = keras.tree.flatten(states)
        found.append(find_dependencies(CellStep(cell, states), tf.ones((2, 3)), flat))

    graph.get_concrete_function()
    return found[0]


@pytest.mark.fast
@pytest.mark.filterwarnings("ignore:.build\\(\\). was called on layer 'seed_cell")
@pytest.mark.parametrize(
    ("cell", "outputs", "carried"),
    [
        (L.LSTMCell(3), (0,), ()),
        (L.StackedRNNCells([L.LSTMCell(3), L.GRUCell(3)]), (2,), ()),
        (CounterCell(), (0,), ()),
        # Its readout is no state of the loop: the output is.
        (ReadoutFirstCell(3), (1,), ()),
        # The output is made from both new states.
        (SeedCell(3), (0, 1), ()),
        (CarryingCell(lambda new, _: new), (1,), (0, 2)),
        (CarryingCell(lambda new, _: 2 * new), (1,), (0, 2)),
        (CarryingCell(lambda _, old: 2 * old), (1,), (0, 2)),
        (CarryingCell(lambda *_: tf.ones((2, 3))), (0,), (1, 2)),
    ],
)
def test_the_states_of_the_output_and_those_that_it_never_feels(
    cell: Any, outputs: tuple[int, ...], carried: tuple[int, ...]
) -> None:
    found = dependencies(cell)
    assert (found.outputs, found.carried) == (outputs, carried)


class BranchingCell(keras.layers.SimpleRNNCell):
    """A step that is doubled where all states together are positive."""

    def call(self, inputs: Any, states: Any, training: Any = None) -> tuple[Any, list[Any]]:
        new_h, _ = super().call(inputs, states, training)
        new_h = tf.cond(tf.reduce_sum(new_h) > 0, lambda: new_h, lambda: 2.0 * new_h)
        return new_h, [new_h]


@pytest.mark.fast
def test_a_branch_may_be_differentiated_twice() -> None:
    """The derivative of a branch stands in a graph of its own, which does not know the functions that it calls."""
    assert dependencies(BranchingCell(3)).depends == ((True,),)
