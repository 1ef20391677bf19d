"""Measures of many points, a bounded number of them at a time."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from keras_jacmon.measurement.results import MeasuredArray
from keras_jacmon.measures.context import MeasureContext, Measured
from keras_jacmon.measures.kinds import PerStep
from keras_jacmon.measures.selection import Quantity, Selection
from keras_jacmon.options import ViewName

# The operators of some points, by view.
Operators = Mapping[ViewName, Any]


@dataclasses.dataclass(frozen=True)
class PointSource:
    """Source of the operators of points.

    Attributes:
        count: Integer, number of points.
        between: Function from two indices to the operators, by view, of the points from the first index up to the
            second, which is excluded; two times None for all points.
        take: Function from indices `(k,)` to the operators, by view, of these points.
        valid: Integer `(k,)`, indices of the points to measure; None for all.
    """

    count: int | tf.Tensor
    between: Callable[[tf.Tensor | None, tf.Tensor | None], Operators]
    take: Callable[[tf.Tensor], Operators]
    valid: tf.Tensor | None


def measure_points(
    source: PointSource, quantities: Selection, context: MeasureContext, chunk: int | tf.Tensor
) -> list[MeasuredArray]:
    """Measures the operators of many points.

    Args:
        source: Source of the operators.
        quantities: The quantities to measure, of the kind `PerStep`.
        context: Settings of the measures.
        chunk: Integer, maximum number of points at once.

    Returns:
        For each quantity its values, `(points,)`, NaN where not measured.
    """
    if isinstance(chunk, int):
        # For fewer points there is memory for several vectors at once.
        context = dataclasses.replace(context, workspace_vectors=chunk)
        if isinstance(source.count, int):
            # Chunks of equal size, so that the last one is not a small one.
            chunk = -(-source.count // max(1, -(-source.count // chunk)))
    total = source.count if source.valid is None else source.valid.shape[0]
    at_once = isinstance(total, int) and isinstance(chunk, int) and total <= chunk
    if at_once and source.valid is None:
        return _measured(source.between(None, None), quantities, context)
    indices = tf.range(source.count) if source.valid is None else source.valid
    nothing = tf.fill([source.count], tf.constant(float("nan"), context.dtype))
    empty = [MeasuredArray(nothing, nothing, tf.constant(True)) for _ in quantities]  # noqa: FBT003 - positional only
    if at_once:
        return _put(_measured(source.take(indices), quantities, context), empty, indices)

    def body(index: tf.Tensor, arrays: list[MeasuredArray]) -> tuple[tf.Tensor, list[MeasuredArray]]:
        start, stop = index * chunk, tf.minimum((index + 1) * chunk, tf.size(indices))
        here = indices[start:stop]
        operators = source.between(start, stop) if source.valid is None else source.take(here)
        found = _measured(operators, quantities, dataclasses.replace(context, stream=context.stream + index))
        return index + 1, _put(found, arrays, here)

    chunks = -(-tf.size(indices) // chunk)
    # Several chunks at a time would need the memory of all of them.
    _, arrays = tf.while_loop(lambda index, _: index < chunks, body, [tf.constant(0), empty], parallel_iterations=1)
    return arrays


def _measured(operators: Operators, quantities: Selection, context: MeasureContext) -> list[MeasuredArray]:
    found: dict[Quantity, Measured] = {}
    for measure in dict.fromkeys(quantity.measure for quantity in quantities):
        same = [quantity for quantity in quantities if quantity.measure is measure]
        chosen = [operators[quantity.view] for quantity in same]
        if isinstance(measure.kind, PerStep) and measure.kind.of_several:
            found |= zip(same, measure.function(chosen, context), strict=True)
        else:
            found |= {q: measure.function(operator, context) for q, operator in zip(same, chosen, strict=True)}
    return [MeasuredArray.of(*found[quantity]) for quantity in quantities]


def _put(found: list[MeasuredArray], arrays: list[MeasuredArray], at: tf.Tensor) -> list[MeasuredArray]:
    """Returns the arrays with the found values at the given indices."""
    places = tf.expand_dims(at, axis=1)

    def put(part: tf.Tensor, array: tf.Tensor) -> tf.Tensor:
        return tf.tensor_scatter_nd_update(array, places, tf.cast(part, array.dtype))

    return [
        MeasuredArray(put(new.value, old.value), put(new.uncertainty, old.uncertainty), old.is_exact & new.is_exact)
        for new, old in zip(found, arrays, strict=True)
    ]
