"""The Jacobians at the points of a long sequence, measured a bounded number of steps at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_jacmon.cell.trajectory import UnrollInputs
from keras_jacmon.jacobians.diagnosis import CheckResults
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.measurement.per_step import StepMeasurement
from keras_jacmon.measurement.results import MeasuredArray
from keras_jacmon.measures.selection import Quantity


def in_segments(
    sequence: UnrollInputs,
    steps: int,
    measurement: StepMeasurement,
    measure_segment: Callable[
        [UnrollInputs, tf.Tensor, tf.Tensor], tuple[list[MeasuredArray], CheckResults, tuple[tf.Tensor, ...]]
    ],
) -> tuple[list[MeasuredArray], CheckResults]:
    """Measures a bounded number of steps at a time, so that a long sequence is never held as a whole.

    Args:
        sequence: The whole sequence.
        steps: Integer, maximum number of steps of a segment.
        measurement: `StepMeasurement`, for its quantities and their context.
        measure_segment: Function from a segment, its index and its first step to the values, the results of the checks
            and the states after the last step.

    Returns:
        The values of each quantity, and the worst results of the checks.
    """
    time = tf.shape(sequence.inputs)[0]
    count = -(-time // steps)

    def body(
        index: tf.Tensor, states: Sequence[tf.Tensor], lists: list[MeasuredArray], worst: CheckResults
    ) -> tuple[Any, ...]:
        start = index * steps
        part = sequence.between(start, tf.minimum(start + steps, time), states)
        arrays, checks, last = measure_segment(part, index, start)
        return index + 1, list(last), _written(lists, index, arrays), worst.worst(checks)

    real = measurement.context.dtype
    empty = [_empty_lists(quantity, count, real) for quantity in measurement.quantities]
    _, _, lists, checks = tf.while_loop(
        lambda index, *_: index < count,
        body,
        [tf.constant(0), list(sequence.states), empty, CheckResults.zero(real)],
        # The next segment could be unrolled while this one is measured, and would need its memory beside it.
        parallel_iterations=1,
    )
    first = PointBatch(sequence.inputs[0], sequence.states)
    widths = [measurement.width(quantity, first) for quantity in measurement.quantities]
    return list(map(_joined, lists, widths)), checks


def _empty_lists(quantity: Quantity, count: tf.Tensor, real: tf.DType) -> MeasuredArray:
    """Returns a quantity's lists of values and uncertainties, for `count` segments."""
    value, uncertainty = (
        tf.TensorArray(dtype, count, infer_shape=False, element_shape=[None])
        for dtype in (quantity.measure.kind.dtype(real), real)
    )
    return MeasuredArray(value, uncertainty, tf.constant(True))  # noqa: FBT003 - positional only


def _written(lists: list[MeasuredArray], index: tf.Tensor, arrays: list[MeasuredArray]) -> list[MeasuredArray]:
    """Returns the lists with the values of one segment."""
    return [
        MeasuredArray(
            known.value.write(index, tf.reshape(array.value, [-1])),
            known.uncertainty.write(index, tf.reshape(array.uncertainty, [-1])),
            known.is_exact & array.is_exact,
        )
        for known, array in zip(lists, arrays, strict=True)
    ]


def _joined(lists: MeasuredArray, width: int | None) -> MeasuredArray:
    """Returns the values of all segments, `(points,)` or `(points, width)`."""
    value, uncertainty = (
        array.concat() if width is None else tf.reshape(array.concat(), [-1, width])
        for array in (lists.value, lists.uncertainty)
    )
    return MeasuredArray(value, uncertainty, lists.is_exact)
