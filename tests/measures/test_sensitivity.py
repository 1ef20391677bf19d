"""Sensitivity from random vectors, on sequences of plain matrices: no bias, an honest error, and no overflow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from sequences import in_graph, of_matrices, pieces

from keras_jacmon.measures.flow import FlowPlan, start_flow
from keras_jacmon.measures.sensitivity import (
    Sensitivities,
    SensitivityCarry,
    add_derivatives,
    add_outer_products,
    lead_backwards,
)

pytestmark = pytest.mark.fast

TIME, SAMPLES, UNITS, WEIGHTS = 7, 500, 6, (6, 4)


def sequence(scale: float, rank: int = UNITS) -> tuple[Any, Any, Any]:
    """Jacobians, and the outer products of the derivatives by the weights, the same ones for all samples."""
    rng = np.random.default_rng(3)
    J = scale * rng.standard_normal((TIME, UNITS, UNITS)) / np.sqrt(UNITS)
    J[-1] = J[-1][:, :rank] @ rng.standard_normal((rank, UNITS))
    # d s_t / d (shift of the product), and the other factor.
    outer = rng.standard_normal((TIME, UNITS, WEIGHTS[0]))
    outer[-1] *= rank == UNITS
    return J, outer, rng.standard_normal((TIME, WEIGHTS[1]))


def exact(J: Any, outer: Any, right: Any) -> Any:
    """The norms by span, from the matrices."""
    product, total, found = np.eye(UNITS), 0, []
    for t in range(TIME)[::-1]:
        total = total + np.einsum("ij,jo,k->iok", product, outer[t], right[t])
        product = product @ J[t]
        found.append(np.linalg.norm(total))
    return np.array(found)


def measured(
    parts: Any, vectors: int, *, outer_products: bool, length: int = TIME, dtype: Any = tf.float64
) -> Sensitivities:
    J, outer, right = (part.astype(dtype.as_numpy_dtype) for part in parts)

    def run() -> Any:
        steps = of_matrices(np.repeat(J[:, None], SAMPLES, axis=1))
        plan = FlowPlan((UNITS,), (True,), vectors)
        start = start_flow(SAMPLES, plan, (1, 2), dtype).vectors
        shapes = [WEIGHTS[::-1]] if outer_products else [[WEIGHTS[0] * WEIGHTS[1]]]
        carry = SensitivityCarry.start(start, shapes if length < TIME or not outer_products else [])
        numbers: list[tf.Tensor] = []
        for place, part in reversed(list(enumerate(pieces(steps, length)))):
            here = slice(place * length, place * length + int(part.time))
            cotangents, carry = lead_backwards(part, carry)
            lefts = tf.einsum("tbjn,tno->tbjo", cotangents.vectors, outer[here])
            rights = tf.repeat(tf.constant(right[here])[:, None], SAMPLES, axis=1)
            if outer_products:
                found, carry = add_outer_products(cotangents, [(lefts, rights)], carry)
            else:
                full = tf.reshape(tf.einsum("tbjo,tbk->tbjok", lefts, rights), [-1, SAMPLES, vectors, 24])

                def at(t: Any, _: Any, full: Any = full) -> Any:
                    return full[t], tf.constant(0.0)

                found, carry = add_derivatives(cotangents, at, carry)
            numbers.insert(0, found)
        return tf.concat(numbers, axis=0)

    return Sensitivities.of(in_graph(run), np.ones(SAMPLES), None, FlowPlan((UNITS,), (True,), vectors))


@pytest.mark.parametrize(("outer_products", "length"), [(True, TIME), (True, 3), (False, 3)])
def test_it_is_that_of_the_matrices_in_any_segments(outer_products: bool, length: int) -> None:  # noqa: FBT001 - pytest passes it by name
    parts = sequence(1.2)
    found = measured(parts, UNITS, outer_products=outer_products, length=length)
    np.testing.assert_allclose(found.by_span, np.repeat(exact(*parts)[:, None], SAMPLES, axis=1), rtol=1e-9)
    assert not found.standard_error.any()


@pytest.mark.parametrize("rank", [UNITS, 1])
def test_few_vectors_have_no_bias_in_the_square_and_an_honest_error(rank: int) -> None:
    parts = sequence(1.0, rank)
    found, expected = measured(parts, 3, outer_products=True), exact(*parts)[:, None]
    known = expected[:, 0] > 0
    square, truth = found.by_span[known] ** 2, expected[known] ** 2
    z = (square.mean(axis=1) - truth[:, 0]) / (square.std(axis=1) / np.sqrt(SAMPLES))
    assert np.abs(z).max() < 4
    held = np.abs(found.by_span - expected)[known] < 2 * found.standard_error[known]
    assert held.mean(axis=1).min() > 0.9


def test_single_precision_does_not_overflow() -> None:
    J, outer, right = sequence(1.0)
    parts = (J * 1e20, outer, right)
    np.testing.assert_allclose(
        measured(parts, UNITS, outer_products=True, dtype=tf.float32).by_span[:, 0], exact(*parts), rtol=1e-4
    )
