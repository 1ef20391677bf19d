"""The measures of many rows, a bounded number of them at a time."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import tensorflow as tf

from keras_jacmon.measures.options import Measured, Options
from keras_jacmon.measures.registry import Measure

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
    source: RowSource, views: Sequence[str], measures: Sequence[Measure], options: Options, chunk: int | tf.Tensor
) -> dict[str, Measured]:
    """Measures the operators of many rows.

    Args:
        source: Gives the operators.
        views: Of what.
        measures: What to measure.
        options: Passed on to the measures.
        chunk: The most rows at once.

    Returns:
        By `view/measure` `Measured` with `(rows,)` arrays, NaN where not measured.
    """
    options = dataclasses.replace(options, vectors=chunk if isinstance(chunk, int) else options.vectors)

    def measured(operators: Operators, options: Options) -> dict[str, Measured]:
        return {f"{v}/{measure.name}": measure.function(operators[v], options) for v in views for measure in measures}

    if source.valid is None and isinstance(source.count, int) and isinstance(chunk, int) and source.count <= chunk:
        return measured(source.between(None, None), options)
    indices = tf.range(source.count) if source.valid is None else source.valid
    # Which measures have an uncertainty is known once they are traced, and a loop needs its variables before.
    has_uncertainty: dict[str, bool] = {}

    def body(
        index: tf.Tensor, results: dict[str, tuple[tf.Tensor, tf.Tensor]]
    ) -> tuple[tf.Tensor, dict[str, tuple[tf.Tensor, tf.Tensor]]]:
        start, stop = index * chunk, tf.minimum((index + 1) * chunk, tf.size(indices))
        rows = indices[start:stop]
        operators = source.between(start, stop) if source.valid is None else source.take(rows)
        updated = {}
        for key, (value, uncertainty) in measured(
            operators, dataclasses.replace(options, stream=options.stream + index)
        ).items():
            has_uncertainty[key] = uncertainty is not None
            updated[key] = tuple(
                tf.tensor_scatter_nd_update(array, rows[:, None], tf.cast(part, array.dtype))
                for array, part in zip(
                    results[key], (value, value if uncertainty is None else uncertainty), strict=True
                )
            )
        return index + 1, updated

    empty = tf.fill([source.count], tf.constant(float("nan"), options.dtype))
    chunks = -(-tf.size(indices) // chunk)
    _, results = tf.while_loop(
        lambda index, _: index < chunks,
        body,
        [tf.constant(0), {f"{view}/{measure.name}": (empty, empty) for view in views for measure in measures}],
    )
    return {
        key: Measured(value, uncertainty if has_uncertainty[key] else None)
        for key, (value, uncertainty) in results.items()
    }
