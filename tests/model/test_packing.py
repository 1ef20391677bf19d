"""Structures of tensors go into their real form and come back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from helpers import normal

from keras_jacmon.model.packing import Packing, like_original, real_form

pytestmark = pytest.mark.fast

BATCH, STEPS = 2, 3


def complex_normal(*shape: int) -> tf.Tensor:
    return tf.complex(normal(*shape, seed=1), normal(*shape, seed=2))


STRUCTURES: dict[str, Any] = {
    "one_tensor": tf.constant(normal(BATCH, STEPS, 4, 5)),
    "pair_with_token_ids": (tf.constant(normal(BATCH, STEPS, 4)), tf.constant([[1, 2, 3], [7, 8, 2**24]], tf.int32)),
    "token_ids_and_flags": {"ids": tf.constant([[1, 2, 3], [7, 8, 9]], tf.int64), "flags": tf.ones((2, 3, 2), tf.bool)},
    "complex": complex_normal(BATCH, STEPS, 4),
    "nested": {"a": [complex_normal(BATCH, STEPS, 2, 3)], "b": (tf.constant(normal(BATCH, STEPS)),)},
    "double": (tf.constant(normal(BATCH, STEPS, 2), tf.float64), tf.constant(normal(BATCH, STEPS, 2))),
}


def assert_same(found: Any, expected: Any) -> None:
    tf.nest.assert_same_structure(found, expected)
    for left, right in zip(tf.nest.flatten(found), tf.nest.flatten(expected), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("name", STRUCTURES)
def test_inputs_by_step_come_back_from_one_real_tensor(name: str) -> None:
    sequences = STRUCTURES[name]
    packing = Packing.of(sequences, leading=2)
    joined = packing.joined(sequences)
    assert not joined.dtype.is_complex
    for t in range(STEPS):
        here = tf.nest.map_structure(lambda leaf: leaf[:, t], sequences)  # noqa: B023 - called at once
        assert_same(packing.from_joined(joined[:, t]), here)


@pytest.mark.parametrize("name", STRUCTURES)
def test_states_come_back_from_real_tensors(name: str) -> None:
    states = tf.nest.map_structure(lambda leaf: leaf[:, 0], STRUCTURES[name])
    packing = Packing.of(states, leading=1)
    separate = packing.separate(tf.nest.flatten(states))
    assert not any(tensor.dtype.is_complex for tensor in separate)
    assert_same(packing.from_separate(separate), states)


def test_real_parts_stand_before_imaginary_ones() -> None:
    z = complex_normal(BATCH, 3)
    np.testing.assert_array_equal(real_form(z), np.concatenate([np.real(z), np.imag(z)], axis=1), strict=True)
    np.testing.assert_array_equal(like_original(real_form(z), z), z)
