"""Comparison of the outputs of a registered recurrence with what its layer returned."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_jacmon.cell.step import CellStep, widened
from keras_jacmon.cell.trajectory import UnrollInputs, unroll
from keras_jacmon.errors import message_of
from keras_jacmon.model.recording import RecurrentCall
from keras_jacmon.tensors import as_points, known_sizes, swapped

_ROUNDING_UNITS = {tf.float16: 2.0**-10, tf.bfloat16: 2.0**-7, tf.float32: 2.0**-23, tf.float64: 2.0**-52}

# A difference may grow by this factor at a step, since rounding does where the dynamics expand. What a step gets wrong
# itself is there at once.
_GROWTH = 30.0


class OutputDifferences(NamedTuple):
    """The differences between the outputs of the steps and what the layer returned.

    Attributes:
        relative: Tensor `(time,)` in the order of the steps, the largest difference at each step, relative to the
            largest value that the layer returned there.
        tolerance: Scalar, the square root of the rounding unit of the layer's numbers.
    """

    relative: tf.Tensor
    tolerance: tf.Tensor

    def sentence(self) -> str | None:
        """Describes the first step that differs, from the values; returns None if there is none."""
        relative, tolerance = self.relative.numpy(), float(self.tolerance)
        before = np.maximum.accumulate(np.concatenate([[0.0], relative[:-1]]))
        (differing,) = np.nonzero(relative > tolerance + _GROWTH * before)
        if not differing.size:
            return None
        first = int(differing[0])
        return (
            "the outputs of the steps of its registered recurrence are not what the layer returned on the probe. The "
            f"first step that differs is step {first}, counted from 0, by {relative[first]:.2g} of the largest value "
            f"there; expected at most {tolerance:.2g}"
        )


def compare_outputs(calls: Iterable[RecurrentCall]) -> tuple[dict[str, OutputDifferences], dict[str, str]]:
    """Compares the outputs of recurrences with what their layers returned, in the graph that is being traced.

    Args:
        calls: Iterable of calls; those of `keras.layers.RNN` are left out.

    Returns:
        Two dicts by name of the call: the differences, and the reasons why the steps cannot be taken.
    """
    differences: dict[str, OutputDifferences] = {}
    refusals: dict[str, str] = {}
    for call in calls:
        if call.returned is None:
            continue
        try:
            differences[call.name] = output_differences(call, call.returned)
        except Exception as error:  # noqa: BLE001 - of any kind that a user's step may raise
            refusals[call.name] = message_of(error)
    return differences, refusals


def differing(differences: Mapping[str, OutputDifferences]) -> dict[str, str]:
    """Returns sentences on the calls whose outputs differ, by name of the call."""
    sentences = {name: found.sentence() for name, found in differences.items()}
    return {name: sentence for name, sentence in sentences.items() if sentence is not None}


def output_differences(call: RecurrentCall, returned: tf.Tensor) -> OutputDifferences:
    """Compares the outputs of the steps with what the layer returned, in the graph that is being traced.

    Args:
        call: Call of a layer with a registered recurrence.
        returned: Tensor that the layer returned, `(batch, time, ...)` or, of the last step alone, `(batch, ...)`.

    Raises:
        ValueError: If the outputs have other shapes than what the layer returned.
    """
    sequence, step = UnrollInputs.of(call), CellStep(call.cell, call.states)
    visited = unroll(step, sequence)
    (output, *_), _ = step.with_output(as_points(visited.inputs), [as_points(state) for state in visited.states])
    stepped = tf.reshape(output, [*known_sizes(sequence.inputs)[:2], *output.shape[1:]])
    if returned.shape.rank is None:
        # `keras.ops.associative_scan` loses the shape.
        returned = tf.ensure_shape(returned, [None] * stepped.shape.rank)
    expected, compared = _expected(sequence, stepped, tf.cast(widened(returned), stepped.dtype))
    tolerance = _ROUNDING_UNITS[returned.dtype] ** 0.5
    relative = _relative(stepped, expected, compared, tolerance)
    if call.go_backwards and returned.shape.rank == stepped.shape.rank:
        # Keras returns the outputs in the order of the steps then, a scan in the order of the positions.
        reversed_one = _relative(stepped, expected[::-1], compared, tolerance)
        relative = tf.where(tf.reduce_max(relative) <= tf.reduce_max(reversed_one), relative, reversed_one)
    return OutputDifferences(relative, tf.constant(tolerance, tf.float32))


def _expected(sequence: UnrollInputs, stepped: tf.Tensor, returned: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the expected output at each step, like `stepped`, and boolean `(time, batch)`, True where it is known."""
    time, batch = known_sizes(sequence.inputs)[:2]
    valid = tf.ones([time, batch], tf.bool) if sequence.mask is None else sequence.mask
    if returned.shape.rank == stepped.shape.rank:
        expected = swapped(returned)
    else:
        expected = returned[None]
        later = tf.cumsum(tf.cast(valid, tf.int32), reverse=True, exclusive=True)
        valid &= later == 0
    if not expected.shape[1:].is_compatible_with(stepped.shape[1:]) or expected.shape[0] not in {1, stepped.shape[0]}:
        shape = ", ".join(["batch", *map(str, stepped.shape[2:])])
        raise ValueError(
            f"the steps of its registered recurrence have outputs of shape ({shape}), and the layer returned a tensor "
            f"of shape {tuple(returned.shape)}. Expected the outputs of all steps side by side, or of the last one"
        )
    return tf.broadcast_to(expected, tf.shape(stepped)), valid


def _relative(stepped: tf.Tensor, expected: tf.Tensor, compared: tf.Tensor, tolerance: float) -> tf.Tensor:
    """Returns the largest relative difference at each step, `(time,)`."""
    axes = list(range(1, stepped.shape.rank))
    # What the layer makes of NaN and Inf is the network's own.
    known = tf.reshape(compared, [*known_sizes(compared), *[1] * (len(axes) - 1)]) & tf.math.is_finite(expected)

    def largest(values: tf.Tensor) -> tf.Tensor:
        return tf.reduce_max(tf.where(known, tf.abs(values), tf.zeros_like(values)), axis=axes)

    scale = largest(expected)
    floor = tolerance * tf.reduce_max(scale) + np.finfo(stepped.dtype.as_numpy_dtype).tiny
    found = tf.where(tf.math.is_finite(stepped), stepped, tf.constant(np.inf, stepped.dtype))
    return largest(found - expected) / tf.maximum(scale, floor)
