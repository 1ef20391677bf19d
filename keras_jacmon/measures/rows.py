"""The measures of many rows, a bounded number of them at a time."""

import dataclasses
from collections.abc import Callable, Mapping

import tensorflow as tf

from keras_jacmon.measures.context import MeasureContext, Measured
from keras_jacmon.measures.registry import Selection

_GOLDEN = 0.6180339887498949

# The operators of some rows by view: of those between two indices, or of those at the indices (k,).
Operators = Mapping[str, tf.linalg.LinearOperator]


@dataclasses.dataclass(frozen=True)
class RowSource:
    """Where the operators of rows come from.

    Attributes:
        count: How many rows there are.
        between: From two indices to the operators, by view, of the rows from the one up to the other.
        take: From indices `(k,)` to the operators, by view, of these rows.
        valid: Indices of the rows to measure; None for all.
    """

    count: int | tf.Tensor
    between: Callable[[tf.Tensor | None, tf.Tensor | None], Operators]
    take: Callable[[tf.Tensor], Operators]
    valid: tf.Tensor | None


def measure_rows(
    source: RowSource, measures: Selection, context: MeasureContext, chunk: int | tf.Tensor
) -> dict[str, Measured]:
    """Measures the operators of many rows.

    Args:
        source: Gives the operators.
        measures: What to measure, by view.
        context: Passed on to the measures.
        chunk: The most rows at once.

    Returns:
        By `view/measure` `Measured` with `(rows,)` arrays, NaN where not measured.
    """
    if isinstance(chunk, int):
        # For fewer rows there is memory for several vectors at once.
        context = dataclasses.replace(context, workspace_vectors=chunk)
        if isinstance(source.count, int):
            # Chunks of equal size, so that the last one is not a small one.
            chunk = -(-source.count // max(1, -(-source.count // chunk)))

    total = source.count if source.valid is None else source.valid.shape[0]
    at_once = isinstance(total, int) and isinstance(chunk, int) and total <= chunk
    if at_once and source.valid is None:
        return _measured(source.between(None, None), measures, context)
    indices = tf.range(source.count) if source.valid is None else source.valid
    empty = tf.fill([source.count], tf.constant(float("nan"), context.dtype))

    if at_once:
        found = _measured(source.take(indices), measures, context)
        return {
            key: Measured(*(None if part is None else _put(part, empty, indices) for part in parts))
            for key, parts in found.items()
        }
    # Which measures have an uncertainty is known once they are traced, and a loop needs its variables before.
    has_uncertainty: dict[str, bool] = {}

    def body(
        index: tf.Tensor, results: dict[str, tuple[tf.Tensor, tf.Tensor]]
    ) -> tuple[tf.Tensor, dict[str, tuple[tf.Tensor, tf.Tensor]]]:
        start, stop = index * chunk, tf.minimum((index + 1) * chunk, tf.size(indices))
        rows = indices[start:stop]
        operators = source.between(start, stop) if source.valid is None else source.take(rows)
        here = dataclasses.replace(context, stream=context.stream + index)
        updated = {}
        found = _measured(operators, measures, here)
        for key, (value, uncertainty) in found.items():
            has_uncertainty[key] = uncertainty is not None
            parts = (value, value if uncertainty is None else uncertainty)
            updated[key] = tuple(_put(part, array, rows) for part, array in zip(parts, results[key], strict=True))
        return index + 1, updated

    chunks = -(-tf.size(indices) // chunk)
    _, results = tf.while_loop(
        lambda index, _: index < chunks,
        body,
        [tf.constant(0), {f"{view}/{m.name}": (empty, empty) for view, chosen in measures.items() for m in chosen}],
        # Several chunks at a time would need the memory of all of them.
        parallel_iterations=1,
    )
    return {
        key: Measured(value, uncertainty if has_uncertainty[key] else None)
        for key, (value, uncertainty) in results.items()
    }


def _measured(operators: Operators, measures: Selection, context: MeasureContext) -> dict[str, Measured]:
    return {
        f"{view}/{m.name}": m.function(operators[view], context) for view, chosen in measures.items() for m in chosen
    }


def _put(part: tf.Tensor, array: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """The array with other values at some rows."""
    return tf.tensor_scatter_nd_update(array, tf.expand_dims(rows, axis=1), tf.cast(part, array.dtype))


def spread_evenly(total: tf.Tensor | int, count: int) -> tf.Tensor:
    """At most `count` of the numbers from 0 up to `total`, `(min(total, count),)`: one in each of as many equal parts.

    Where in its part a number lies follows the golden ratio and not a stride, which could meet the same sample of a
    batch each time.
    """
    total = tf.cast(total, tf.int64)
    count = tf.minimum(tf.constant(count, tf.int64), total)
    index = tf.range(count)
    start, stop = index * total // count, (index + 1) * total // count
    share = tf.cast(index, tf.float64) * _GOLDEN % 1.0
    return start + tf.cast(share * tf.cast(stop - start, tf.float64), tf.int64)
