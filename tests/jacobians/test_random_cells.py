"""A cell that is random at inference is refused, told from the graph of its step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import pytest
import tensorflow as tf
from helpers import FEATURES, FunctionCell

from keras_jacmon.cell.step import CellStep
from keras_jacmon.jacobians.dependencies import Dependencies, find_dependencies

if TYPE_CHECKING:
    from collections.abc import Callable

GENERATOR = keras.random.SeedGenerator(1)

RANDOM: dict[str, Callable[[Any, Any, Any], Any]] = {
    "dropout": lambda c, x, h: tf.tanh(x + keras.random.dropout(h, 0.5, seed=GENERATOR) @ c.U),
    "noise": lambda c, x, h: tf.tanh(x + h @ c.U + tf.random.normal(tf.shape(x))),
    "inside a function": lambda c, x, h: tf.function(lambda z: z + tf.random.uniform(tf.shape(z)))(x + h @ c.U),
    "inside a branch": lambda c, x, h: tf.cond(
        tf.reduce_sum(x) > 0.0, lambda: x + h @ c.U, lambda: h * tf.random.uniform(tf.shape(h))
    ),
}

FIXED: dict[str, Callable[[Any, Any, Any], Any]] = {
    "a fixed seed": lambda c, x, h: tf.tanh(x + h @ c.U + keras.random.normal((4,), seed=1)),
    "a draw that is not used": lambda c, x, h: (tf.random.normal(tf.shape(x)), tf.tanh(x + h @ c.U))[1],
}


def dependencies_of(function: Callable[[Any, Any, Any], Any]) -> Dependencies:
    cell, x, h = FunctionCell(function), tf.ones((3, FEATURES)), tf.ones((3, 4))
    cell.build(x.shape)
    found = []

    @tf.function(autograph=False)
    def run(x: Any, h: Any) -> Any:
        found.append(find_dependencies(CellStep(cell, [h]), x, [h]))
        return h

    run.get_concrete_function(x, h)
    return found[0]


@pytest.mark.fast
@pytest.mark.parametrize("name", RANDOM)
def test_a_cell_that_is_random_at_inference_is_refused_for_that(name: str) -> None:
    with pytest.raises(ValueError, match=r"^Its cell draws random numbers at inference too \(`.*`\): two evaluations"):
        dependencies_of(RANDOM[name])


@pytest.mark.fast
@pytest.mark.parametrize("name", FIXED)
def test_a_cell_that_draws_what_does_not_change_is_not_refused(name: str) -> None:
    assert dependencies_of(FIXED[name]).depends == ((True,),)
