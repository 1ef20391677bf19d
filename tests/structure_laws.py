"""What the structure that was found in a cell must give: the Jacobian that the tape gives."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from helpers import step_jacobians

from keras_jacmon.cell.cell_graph import CellGraph
from keras_jacmon.cell.step import CellStep
from keras_jacmon.jacobians.linearise import kernels_of, structured_jacobian, weights_only_values
from keras_jacmon.structure.index_map import Node
from keras_jacmon.structure.interpreter import find_structure

if TYPE_CHECKING:
    from collections.abc import Iterator

INPUTS = Node.inputs()


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Makes Keras layers compute in float64."""
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        yield
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])


def structured_blocks(cell: Any, inputs: Any, states: Any) -> tuple[dict[Any, tuple[Any, ...]], dict[Any, str | None]]:
    """J, J from products with Jᵀ, ΣJ and ΣJ² of blocks, by (new state, source); and the reasons why a block has none.

    Of the inputs it is the block of the first state. Where all blocks of the states have a structure, they are all
    together under "joint", and of them alone there is the first one.
    """
    flat = tf.nest.flatten(states)
    floating = [k for k, state in enumerate(flat) if state.dtype.is_floating]
    olds = [Node.state(q) for q in floating]
    reasons: dict[Any, str | None] = {}

    def numbers(operator: Any) -> tuple[Any, ...]:
        identity = tf.eye(operator.shape[-2], batch_shape=[operator.shape[0]], dtype=operator.dtype)
        transposed = tf.linalg.adjoint(operator.matmul(identity, adjoint=True))
        return operator.to_dense(), transposed, operator.entry_sum(), operator.spread()

    @tf.function(autograph=False)
    def run(inputs: Any, *flat: Any) -> dict[str, Any]:
        graph = CellGraph(CellStep(cell, states), inputs, flat)
        structure = find_structure(graph)
        fixed = weights_only_values(structure)
        kernels = kernels_of(structure, fixed, flat[floating[0]].dtype)
        values = {**fixed, graph.step_inputs.name: inputs}
        values |= {tensor.name: state for tensor, state in zip(graph.states, flat, strict=True)}
        reasons.update({(p, q): structure.reason(p, q) for p in floating for q in (*olds, INPUTS)})
        blocks: dict[Any, Any] = {key: ([key[0]], [key[1]]) for key, reason in reasons.items() if reason is None}
        blocks = {key: block for key, block in blocks.items() if key[1] != INPUTS or key[0] == floating[0]}
        if all(reasons[p, q] is None for p in floating for q in olds):
            alone = {(floating[0], INPUTS), *([(floating[0], olds[0])] if len(olds) > 1 else [])}
            blocks = {key: block for key, block in blocks.items() if key in alone} | {"joint": (floating, olds)}
        return {str(k): numbers(structured_jacobian(structure, values, kernels, *block)) for k, block in blocks.items()}

    found = run(inputs, *flat)
    names: dict[str, Any] = {str(key): key for key in reasons} | {"joint": "joint"}
    return {names[key]: value for key, value in found.items()}, reasons


def assert_structured_as_autodiff(cell: Any, inputs: Any, states: Any, tolerance: float) -> dict[Any, str | None]:
    """Holds every block with a structure against the tape, in units of its largest entry; returns the reasons."""
    flat = tf.nest.flatten(states)
    sizes = [int(np.prod(state.shape[1:])) for state in flat if state.dtype.is_floating]
    floating = [k for k, state in enumerate(flat) if state.dtype.is_floating]
    edges = np.cumsum([0, *sizes])
    blocks, reasons = structured_blocks(cell, inputs, states)
    dense, _ = step_jacobians(cell, inputs, states, ["joint", "inputs"])
    for key, (found, transposed, entry_sum, spread) in blocks.items():
        if key == "joint":
            expected = dense["joint"]
        elif key[1] == INPUTS:
            expected = dense["inputs"]
        else:
            p, q = floating.index(key[0]), floating.index(key[1].position)
            expected = dense["joint"][:, edges[p] : edges[p + 1], edges[q] : edges[q + 1]]
        scale = np.abs(expected).max(initial=0.0) or 1.0
        np.testing.assert_allclose(found / scale, expected / scale, atol=tolerance, err_msg=str(key))
        np.testing.assert_allclose(transposed / scale, expected / scale, atol=tolerance, err_msg=str(key))
        entries = int(np.prod(expected.shape[1:]))
        np.testing.assert_allclose(entry_sum / scale, expected.sum((1, 2)) / scale, atol=entries * tolerance)
        np.testing.assert_allclose(
            spread / scale**2, entries * (expected / scale).var((1, 2)), atol=entries * tolerance
        )
    return reasons
