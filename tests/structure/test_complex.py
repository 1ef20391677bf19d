"""Structure of cells that compute with complex numbers, and of those that use a unit twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tensorflow as tf
from helpers import FEATURES, FunctionCell, normal
from structure_laws import assert_structured_as_autodiff, double_precision

from keras_jacmon.cell.cell_graph import CellGraph
from keras_jacmon.cell.step import CellStep
from keras_jacmon.structure.index_map import Node, separated
from keras_jacmon.structure.interpreter import find_structure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with double_precision():
        yield


def numbers(h: Any) -> Any:
    return tf.complex(h[:, :2], h[:, 2:])


def parts(z: Any) -> Any:
    return tf.concat([tf.math.real(z), tf.math.imag(z)], axis=-1)


def kernel(cell: Any) -> Any:
    return tf.complex(cell.U[:2, :2], cell.U[2:, 2:])


def modulus_relu(z: Any) -> Any:
    """The activation of Arjovsky, Shah and Bengio (2016)."""
    size = tf.abs(z)
    return tf.cast(tf.nn.relu(size - 0.05) / (size + 1e-5), z.dtype) * z


def unitary(cell: Any, x: Any, h: Any) -> Any:
    """Phases, two kernels, and an activation that is not holomorphic."""
    phases = tf.exp(tf.complex(tf.zeros_like(cell.vector[:2]), tf.convert_to_tensor(cell.vector)[:2]))
    rotated = tf.sin((numbers(h) * phases) @ kernel(cell)) @ tf.linalg.adjoint(kernel(cell))
    return parts(modulus_relu(numbers(x) + rotated * phases))


STRUCTURED: dict[str, Callable[[Any, Any, Any], Any]] = {
    "unitary": unitary,
    "conjugates": lambda c, x, h: parts(
        0.5 * tf.math.conj(numbers(h)) + numbers(x) + tf.einsum("bi,ij->bj", numbers(h), kernel(c))
    ),
    "real_part": lambda c, x, h: tf.math.real(
        tf.cast(x, tf.complex128) + tf.cast(h, tf.complex128) @ (tf.cast(c.U, tf.complex128) * (1 + 2j))
    ),
    "pairs": lambda c, x, h: tf.tanh(x + (h * h[:, ::-1]) @ c.U),
    "outer_product": lambda c, x, h: tf.tanh(x + tf.reshape(h[:, :2, None] * h[:, None, 2:], [-1, 4]) @ c.U),
}


def built(function: Any) -> tuple[Any, tf.Tensor, tf.Tensor]:
    cell = FunctionCell(function)
    cell.build((1, FEATURES))
    cell.vector.assign(normal(4))
    x, h = (tf.constant(normal(7, n), tf.float64) for n in (FEATURES, 4))
    return cell, x, h


@pytest.mark.parametrize("name", STRUCTURED)
def test_the_structure_is_found_and_is_autodiff(name: str) -> None:
    cell, x, h = built(STRUCTURED[name])
    assert set(assert_structured_as_autodiff(cell, x, [h], 1e-10).values()) == {None}
    assert find_structure(CellGraph(CellStep(cell, [h]), x, [h])).point_by_point


@pytest.mark.fast
def test_complex_numbers_of_lower_precision_than_the_states_are_left_to_autodiff() -> None:
    def step(cell: Any, x: Any, h: Any) -> Any:
        narrow = tf.abs(tf.cast(h, tf.complex64) @ tf.cast(cell.U, tf.complex64))
        return x + tf.cast(narrow, x.dtype)

    cell, x, h = built(step)
    structure = find_structure(CellGraph(CellStep(cell, [h]), x, [h]))
    assert "computes in complex64" in str(structure.reason(0, Node.state(0)))


@pytest.mark.fast
def test_units_are_separated_so_that_none_is_met_twice() -> None:
    first, second = np.array([[0, 1, 1, 0], [-1, -1, 2, 3]]), np.array([[0, -1, 1, 2]])
    sets = separated([first, second])
    assert np.array_equal(np.sum(sets, axis=0), np.ones(4))
    for chosen in sets:
        for labels in (first, second):
            used = labels[:, chosen][labels[:, chosen] >= 0]
            assert len(np.unique(used)) == used.size
    assert len(separated([second])) == 1
