"""The Jacobians at the points of a trajectory, measured step by step and sample by sample."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from keras_jacmon.cell.trajectory import UnrollInputs
from keras_jacmon.jacobians.cell_jacobian import CellJacobian
from keras_jacmon.jacobians.checks import CheckResults, check_independence, check_points
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.jacobians.views import View, size
from keras_jacmon.measurement.subsampling import Subsample, indices_of
from keras_jacmon.measures.context import MeasureContext
from keras_jacmon.measures.registry import Selection, filtered
from keras_jacmon.measures.rows import RowSource, measure_rows

# More (row, vector) pairs at once than this do not fit a cache and are no faster.
_MOST_ROWS = 2**14

# So many rows have their structure compared with autodiff at each measurement, others each time.
CERTIFIED_ROWS = 16

# The random numbers of one segment are told from those of another by as many streams as it may have chunks.
_STREAMS = 2**12

# What is known of each (step, sample): `hidden/variance`, and `hidden/variance/uncertainty` if there is one.
Results = dict[str, Any]


@dataclass(frozen=True)
class StepMeasurement:
    """How the Jacobians at the points of a trajectory are measured.

    Attributes:
        jacobian: Of the cell.
        measures: Of a step, and spectra, by view.
        views: Whose structure is tested.
        context: How.
        bytes_allowed: For the derivatives.
        bytes_per_row: That an evaluation of the cell with its derivative takes.
        draw: Counts the measurements.
        independent: Whether each row of a step is a function of itself.
        samples: PointBatch of a step.
    """

    jacobian: CellJacobian
    measures: Selection
    views: tuple[str, ...]
    context: MeasureContext
    bytes_allowed: int
    bytes_per_row: int
    draw: tf.Tensor
    independent: bool
    samples: int | tf.Tensor

    def types(self) -> dict[str, tf.DType]:
        """What `measure` may return."""
        real = self.context.dtype
        types = {}
        for view, chosen in self.measures.items():
            for measure in chosen:
                types[f"{view}/{measure.name}"] = _complex(real) if measure.name == "eigenvalues" else real
                types[f"{view}/{measure.name}/uncertainty"] = real
        return types

    def evaluated(self, rows: PointBatch) -> PointBatch:
        """The rows, with all structures evaluated if there is memory for all at once."""
        count = rows.inputs.shape[0]
        at_once = self.independent and count is not None and count <= self._chunk(rows, {})
        return self.jacobian.evaluated(self.views, rows) if at_once else rows

    def measure(
        self,
        rows: PointBatch,
        last: Sequence[tf.Tensor],
        places: Subsample,
        segment: tf.Tensor | int,
    ) -> tuple[Results, CheckResults]:
        """The measures, `(time * batch,)`, and the spectra, `(rows, values)`; the results of the checks.

        Args:
            rows: The points.
            last: The states behind the last step.
            places: Which of them are measured.
            segment: Counts the parts of a sequence.
        """
        # PointBatch that are no functions of themselves stay together: all samples of a step, masked ones included.
        valid = None if places.mask is None or not self.independent else indices_of(places.mask)
        context = dataclasses.replace(self.context, stream=segment * _STREAMS)
        results: Results = {}
        for measures, chosen, place in self._at(valid, places.expensive):
            rows = rows.behind(results.values())
            source = self._source(rows, list(measures), chosen)
            chunk = self._chunk(rows, measures) if self.independent else self.samples
            for key, (value, uncertainty) in measure_rows(source, measures, context, chunk).items():
                found = {key: value} if uncertainty is None else {key: value, f"{key}/uncertainty": uncertainty}
                results |= found if place is None else {name: _where(place, array) for name, array in found.items()}
        spectra = filtered(self.measures, lambda measure: measure.of == "spectrum")
        rows = rows.behind(results.values())
        if places.spectra is not None:
            found = self._spectra(spectra, rows, indices_of(places.spectra), context)
            count = tf.math.count_nonzero(places.spectra)
            results |= {key: values[:count] for key, values in found.items()}
        checks = self._checked(rows, last, valid)
        # Of a row that stands in for none, the state behind it is not what the cell makes of it.
        exists = True if places.mask is None else tf.reduce_any(places.mask)
        return results, CheckResults(*(tf.where(exists, check, tf.zeros_like(check)) for check in checks))

    def _at(
        self, valid: tf.Tensor | None, expensive: tf.Tensor | None
    ) -> list[tuple[Selection, tf.Tensor | None, tf.Tensor | None]]:
        """Which measures are taken at which rows, and, if these are not all, where `(time, batch)` they are wanted."""
        of_steps = filtered(self.measures, lambda measure: measure.of == "step")
        if expensive is None:
            return [(of_steps, valid, None)] if of_steps else []
        split = [
            (filtered(of_steps, lambda measure: not measure.expensive), valid, None),
            (filtered(of_steps, lambda measure: measure.expensive), indices_of(expensive), expensive),
        ]
        return [part for part in split if part[0]]

    def _spectra(self, measures: Selection, rows: PointBatch, indices: tf.Tensor, context: MeasureContext) -> Results:
        """The spectra `(k, values)` of rows with these indices `(k,)`, one by one, since each takes a matrix."""

        def at(chosen: tf.Tensor) -> Results:
            operators = self.jacobian.operators(list(measures), rows.take(chosen))
            return {f"{v}/{m.name}": m.function(operators[v], context) for v, found in measures.items() for m in found}

        if not self.independent:
            return at(indices)
        types = self.types()
        signature = {
            f"{v}/{m.name}": tf.TensorSpec([m.values(*self._shape(v, rows))], types[f"{v}/{m.name}"])
            for v, found in measures.items()
            for m in found
        }
        return tf.map_fn(
            lambda index: {key: values[0] for key, values in at(index[None]).items()},
            indices,
            fn_output_signature=signature,
            parallel_iterations=1,
        )

    def _shape(self, name: str, rows: PointBatch) -> tuple[int, int]:
        """Rows and columns of the Jacobians of a view."""
        view = View.of(name, rows.states)
        return sum(size(rows.states[new]) for new in view.news), view.columns(rows.inputs, rows.states)

    def _chunk(self, rows: PointBatch, measures: Selection) -> int:
        """The most rows at once."""
        kept = [measure.kept(*self._shape(view, rows)) for view, chosen in measures.items() for measure in chosen]
        if not self.jacobian.trust.products:
            # J is formed.
            kept += [math.prod(self._shape(view, rows)) for view in self.views]
        bytes_per_row = self.bytes_per_row + max(kept, default=0) * self.context.dtype.size
        return max(1, min(self.bytes_allowed // bytes_per_row, _MOST_ROWS))

    def _source(self, rows: PointBatch, views: Sequence[str], valid: tf.Tensor | None) -> RowSource:
        return RowSource(
            rows.count,
            lambda start, stop: self.jacobian.operators(views, rows if start is None else rows.between(start, stop)),
            lambda chosen: self.jacobian.operators(views, rows.take(chosen)),
            valid,
        )

    def _checked(self, rows: PointBatch, last: Sequence[tf.Tensor], valid: tf.Tensor | None) -> CheckResults:
        """Checks of what the measures rest on."""
        if not self.views:
            # No gradient connects the states, and there is nothing to measure.
            return CheckResults.zero(self.context.dtype)
        count = rows.count
        total = count if valid is None else tf.size(valid)
        # Half as many rows as are measured at once, since autodiff takes its memory beside them.
        most = max(1, self._chunk(rows, {}) // 2) if self.independent else self.samples
        seed = tf.random.experimental.stateless_fold_in([self.context.options.seed, 3], self.draw)

        def at(indices: tf.Tensor) -> tuple[PointBatch, list[tf.Tensor]]:
            chosen = tf.cast(indices if valid is None else tf.gather(valid, indices), tf.int32)
            return rows.take(chosen), self._following(rows, last, chosen)

        # As many as possible the first time; then a few that are spread over them, others each time: after enough
        # measurements each row has had its turn. Those of a step, if they must stay together.
        number = tf.minimum(total, tf.where(self.draw == 0, most, CERTIFIED_ROWS))
        stride = -(-total // tf.maximum(number, 1))
        chosen = (tf.range(number) * stride + self.draw % tf.maximum(stride, 1)) % tf.maximum(total, 1)
        if not self.independent:
            chosen = tf.range(self.samples) + self.draw * self.samples % count
        checks = check_points(self.jacobian, self.views, *at(chosen), seed)
        if self.jacobian.row_by_row:
            return checks

        # All of them, at each measurement.
        def body(start: tf.Tensor, worst: CheckResults) -> tuple[tf.Tensor, CheckResults]:
            here = tf.range(start, tf.minimum(start + most, total))
            own = tf.random.experimental.stateless_fold_in(seed, start)
            return start + most, worst.worst(check_independence(self.jacobian, self.views, *at(here), own))

        _, worst = tf.while_loop(
            lambda start, _: start < total,
            body,
            [tf.constant(0), checks],
            parallel_iterations=1,
        )
        return worst

    def _following(self, rows: PointBatch, last: Sequence[tf.Tensor], chosen: tf.Tensor) -> list[tf.Tensor]:
        """The states behind some rows: the old ones of the next step, and of the last step the last ones."""
        count, samples = rows.count, self.samples
        return [
            tf.where(
                tf.reshape(chosen + samples < count, [-1] + [1] * (end.shape.rank - 1)),
                tf.gather(states, tf.minimum(chosen + samples, count - 1)),
                tf.gather(end, chosen % samples),
            )
            for states, end in zip(rows.states, last, strict=True)
        ]


def in_segments(
    walk: UnrollInputs,
    steps: int,
    types: Mapping[str, tf.DType],
    measure_segment: Callable[
        [UnrollInputs, tf.Tensor, tf.Tensor], tuple[Results, CheckResults, tuple[tf.Tensor, ...]]
    ],
    dtype: tf.DType,
) -> tuple[Results, CheckResults]:
    """Measures so many steps at a time, so that a long sequence is never held as a whole."""
    time = tf.shape(walk.inputs)[0]
    count = -(-time // steps)

    widths: dict[str, int | None] = {}

    def body(
        index: tf.Tensor, states: Sequence[tf.Tensor], arrays: dict[str, tf.TensorArray], worst: CheckResults
    ) -> tuple[Any, ...]:
        start = index * steps
        part = walk.between(start, tf.minimum(start + steps, time), states)
        results, checks, last = measure_segment(part, index, start)
        # Which keys there are is known once the body is traced, and a loop needs its variables before.
        widths.update({key: value.shape[1] if value.shape.rank == 2 else None for key, value in results.items()})  # noqa: PLR2004
        arrays = {
            key: array.write(index, tf.reshape(results[key], [-1])) if key in results else array
            for key, array in arrays.items()
        }
        return index + 1, list(last), arrays, worst.worst(checks)

    empty = {key: tf.TensorArray(dtype, count, infer_shape=False, element_shape=[None]) for key, dtype in types.items()}
    _, _, arrays, checks = tf.while_loop(
        lambda index, *_: index < count,
        body,
        [tf.constant(0), list(walk.states), empty, CheckResults.zero(dtype)],
        # The next segment could be unrolled while this one is measured, and would need its memory beside it.
        parallel_iterations=1,
    )
    results = {key: arrays[key].concat() for key in sorted(widths)}
    return {key: tf.reshape(x, [-1, widths[key]]) if widths[key] else x for key, x in results.items()}, checks


def _where(mask: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """The values `(time * batch,)` where a mask `(time, batch)` is True, and NaN elsewhere."""
    return tf.where(tf.reshape(mask, [-1]), values, tf.constant(float("nan"), values.dtype))


def _complex(real: tf.DType) -> tf.DType:
    return tf.complex128 if real == tf.float64 else tf.complex64
