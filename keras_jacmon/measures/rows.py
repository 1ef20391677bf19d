"""The measures of many rows, a bounded number of them at a time."""

import dataclasses
from collections.abc import Callable, Sequence

import tensorflow as tf

from keras_jacmon.measures.options import Measured, Options
from keras_jacmon.measures.registry import Measure


def measure_rows(
    operator_at: Callable[[tf.Tensor], tf.linalg.LinearOperator],
    mask: tf.Tensor,
    measures: Sequence[Measure],
    options: Options,
    chunk: int,
) -> dict[str, Measured]:
    """Measures the operator of each unmasked row.

    Args:
        operator_at: From indices `(k,)` into the rows to the operator of those rows.
        mask: `(rows,)`, False for the rows to leave out.
        measures: What to measure.
        options: Passed on to the measures.
        chunk: The most rows at once.

    Returns:
        By measure name `Measured` with `(rows,)` arrays, NaN where masked.
    """
    indices = tf.reshape(tf.where(mask), [-1])
    count = tf.size(indices)
    # Which measures have an uncertainty is known once they are traced, and a loop needs its variables before.
    has_uncertainty: dict[str, bool] = {}

    def body(
        index: tf.Tensor, results: dict[str, tuple[tf.Tensor, tf.Tensor]]
    ) -> tuple[tf.Tensor, dict[str, tuple[tf.Tensor, tf.Tensor]]]:
        rows = indices[index * chunk : (index + 1) * chunk]
        operator = operator_at(rows)
        here = dataclasses.replace(options, stream=index)
        updated = {}
        for measure in measures:
            measured = measure.function(operator, here)
            has_uncertainty[measure.name] = measured.uncertainty is not None
            both = (measured.value, measured.value if measured.uncertainty is None else measured.uncertainty)
            updated[measure.name] = tuple(
                tf.tensor_scatter_nd_update(array, rows[:, None], tf.cast(part, array.dtype))
                for array, part in zip(results[measure.name], both, strict=True)
            )
        return index + 1, updated

    empty = tf.fill(tf.shape(mask), tf.constant(float("nan"), options.dtype))
    chunks = -(-count // chunk)
    _, results = tf.while_loop(
        lambda index, _: index < chunks,
        body,
        [tf.constant(0), {measure.name: (empty, empty) for measure in measures}],
    )
    return {
        name: Measured(value, uncertainty if has_uncertainty[name] else None)
        for name, (value, uncertainty) in results.items()
    }
