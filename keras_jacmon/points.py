"""The Jacobians at the points of a trajectory, measured step by step and sample by sample."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_jacmon.jacobians.evidence import DEPENDENCE, INFLUENCE, TESTS, examine_independence, examine_rows
from keras_jacmon.jacobians.resolve import CellJacobian, Rows
from keras_jacmon.jacobians.views import View, size
from keras_jacmon.measures.options import Memory, Options
from keras_jacmon.measures.registry import Selection, filtered
from keras_jacmon.measures.rows import RowSource, measure_rows, spread_evenly
from keras_jacmon.probe.trajectory import Walk, known_sizes

# More (row, vector) pairs at once than this do not fit a cache and are no faster.
_MOST_ROWS = 2**14

# So many rows have their structure compared with autodiff at each measurement, others each time.
CERTIFIED_ROWS = 16

# The random numbers of one segment are told from those of another by as many streams as it may have chunks.
_STREAMS = 2**12

# A graph may not know how many samples it will get.
UNKNOWN_SAMPLES = 2**10

# What is known of each (step, sample): `hidden/variance`, and `hidden/variance/uncertainty` if there is one; and what
# `TESTS` found, scalars.
Results = dict[str, tf.Tensor]

# From a key, a shape and a type to a variable.
Remember = Callable[[str, Sequence[int], tf.DType], tf.Variable]


class Places(NamedTuple):
    """Masks `(time, batch)` of the rows that are measured.

    Attributes:
        mask: False at steps that are skipped; None if there are none.
        expensive: Where expensive measures are taken; None for everywhere.
        spectra: Where spectra are taken; None if there are none.
    """

    mask: tf.Tensor | None
    expensive: tf.Tensor | None
    spectra: tf.Tensor | None

    def between(self, start: tf.Tensor | int, stop: tf.Tensor | int) -> "Places":
        """Those of a part of the sequence."""
        return Places(*(None if mask is None else mask[start:stop] for mask in self))


def choose_places(
    mask: tf.Tensor | None,
    shape: Sequence[int | tf.Tensor],
    measures: Selection,
    options: Options,
    *,
    independent: bool,
) -> Places:
    """Where measures are taken.

    Args:
        mask: `(time, batch)`, False at steps that are skipped; None for no mask.
        shape: Time and batch.
        measures: By view.
        options: `max_rows` and `spectra` count.
        independent: Whether each row of a step is a function of itself.
    """
    expensive = spectra = None
    sample = partial(_sample_rows, mask, shape, independent=independent)
    if mask is None and all(isinstance(size, int) for size in shape):
        sample = partial(_known, sample)
    if options.max_rows is not None and filtered(measures, lambda measure: measure.expensive):
        expensive = sample(options.max_rows)
    if filtered(measures, lambda measure: measure.of == "spectrum"):
        # One step, if its rows cannot be told apart.
        spectra = sample(options.spectra if independent else 1)
    return Places(mask, expensive, spectra)


def _known(function: Callable[..., tf.Tensor], *args: Any) -> tf.Tensor:
    """What a function of no tensors gives, as a constant: with it the shapes are known of what is chosen by it."""
    with tf.init_scope():
        value = function(*args).numpy()
    return tf.constant(value)


def _sample_rows(
    mask: tf.Tensor | None, shape: Sequence[int | tf.Tensor], count: int, *, independent: bool
) -> tf.Tensor:
    """At most `count` unmasked rows, evenly in time: `(time, batch)`. Dependent rows: one whole step at least."""
    time, samples = shape
    if not independent:
        steps = spread_evenly(time, max(1, count // int(tf.get_static_value(samples) or UNKNOWN_SAMPLES)))
        chosen = tf.scatter_nd(steps[:, None], tf.ones_like(steps), tf.cast([time], tf.int64))
        return tf.broadcast_to(chosen[:, None] > 0, [time, samples])
    places = tf.range(tf.cast(time * samples, tf.int64)) if mask is None else tf.where(tf.reshape(mask, [-1]))[:, 0]
    places = tf.gather(places, spread_evenly(tf.size(places), count))
    chosen = tf.scatter_nd(places[:, None], tf.ones_like(places), tf.cast([time * samples], tf.int64))
    return tf.reshape(chosen > 0, [time, samples])


def vectors_to_remember(
    walk: Walk,
    measures: Selection,
    wanted: tf.Tensor | None,
    max_rows: int | None,
    remember: Remember,
) -> dict[str, Memory]:
    """For each measure that can use it, vectors of all rows that it is measured at, and the place of each row.

    Nothing if it is not known beforehand how many rows there are.
    """
    rows = walk.inputs.shape[:2].num_elements()
    if rows is None:
        return {}
    chosen = tf.ones(walk.inputs.shape[:2], tf.bool) if wanted is None else wanted
    places = tf.cumsum(tf.cast(tf.reshape(chosen, [-1]), tf.int32), exclusive=True)
    count = min(rows, rows if wanted is None or max_rows is None else max_rows)
    memory = {}
    for name, chosen_measures in measures.items():
        view = View.of(name, walk.states)
        shape = [count, view.columns(walk.inputs[0], walk.states)]
        for measure in chosen_measures:
            if measure.warm_start:
                key = f"{name}/{measure.name}"
                memory[key] = Memory(remember(key, shape, walk.states[view.news[0]].dtype), places)
    return memory


def _indices(mask: tf.Tensor) -> tf.Tensor:
    """The indices of the rows that a mask `(time, batch)` chooses; that of the first row if it chooses none.

    TensorFlow does not compute all cells for no rows at all: its optimizer gets the shapes of empty convolutions wrong.
    What is measured there must be left out afterwards.
    """
    known = tf.get_static_value(mask)
    if known is not None and known.any():
        return tf.constant(np.flatnonzero(known), tf.int32)
    flat = tf.reshape(mask, [-1])
    stand_in = ~tf.reduce_any(flat) & (tf.range(tf.size(flat)) == 0)
    return tf.cast(tf.where(flat | stand_in)[:, 0], tf.int32)


@dataclass(frozen=True)
class Points:
    """How the Jacobians at the points of a trajectory are measured.

    Attributes:
        jacobian: Of the cell.
        measures: Of a step, and spectra, by view.
        views: Whose structure is tested.
        options: How.
        bytes_allowed: For the derivatives.
        bytes_per_row: That an evaluation of the cell with its derivative takes.
        draw: Counts the measurements.
        independent: Whether each row of a step is a function of itself.
        samples: Rows of a step.
    """

    jacobian: CellJacobian
    measures: Selection
    views: tuple[str, ...]
    options: Options
    bytes_allowed: int
    bytes_per_row: int
    draw: tf.Tensor
    independent: bool
    samples: int | tf.Tensor

    def types(self) -> dict[str, tf.DType]:
        """What `measure` may return."""
        real = self.options.dtype
        types = dict.fromkeys(TESTS, real)
        for view, chosen in self.measures.items():
            for measure in chosen:
                types[f"{view}/{measure.name}"] = _complex(real) if measure.name == "eigenvalues" else real
                types[f"{view}/{measure.name}/uncertainty"] = real
        return types

    def evaluated(self, rows: Rows) -> Rows:
        """The rows, with all structures evaluated if there is memory for all at once."""
        count = rows.inputs.shape[0]
        at_once = self.independent and count is not None and count <= self._chunk(rows, {})
        return self.jacobian.evaluated(self.views, rows) if at_once else rows

    def measure(
        self,
        rows: Rows,
        last: Sequence[tf.Tensor],
        places: Places,
        memory: Mapping[str, Memory],
        segment: tf.Tensor | int,
    ) -> Results:
        """The measures, `(time * batch,)`, the spectra, `(rows, values)`, and what the tests found, scalars.

        Args:
            rows: The points.
            last: The states behind the last step.
            places: Which of them are measured.
            memory: By `view/measure`, what they may start from.
            segment: Counts the parts of a sequence.
        """
        # Rows that are no functions of themselves stay together: all samples of a step, masked ones included.
        valid = None if places.mask is None or not self.independent else _indices(places.mask)
        options = dataclasses.replace(self.options, stream=segment * _STREAMS)
        results: Results = {}
        for measures, chosen, place in self._at(valid, places.expensive):
            rows = rows.behind(results.values())
            source = self._source(rows, list(measures), chosen, memory)
            chunk = self._chunk(rows, measures) if self.independent else self.samples
            for key, (value, uncertainty) in measure_rows(source, measures, options, chunk).items():
                found = {key: value} if uncertainty is None else {key: value, f"{key}/uncertainty": uncertainty}
                results |= found if place is None else {name: _where(place, array) for name, array in found.items()}
        spectra = filtered(self.measures, lambda measure: measure.of == "spectrum")
        rows = rows.behind(results.values())
        if places.spectra is not None:
            found = self._spectra(spectra, rows, _indices(places.spectra), options)
            count = tf.math.count_nonzero(places.spectra)
            results |= {key: values[:count] for key, values in found.items()}
        tests = self._examined(rows, last, valid)
        # Of a row that stands in for none, the state behind it is not what the cell makes of it.
        exists = True if places.mask is None else tf.reduce_any(places.mask)
        return results | {name: tf.where(exists, worst, tf.zeros_like(worst)) for name, worst in tests.items()}

    def _at(
        self, valid: tf.Tensor | None, expensive: tf.Tensor | None
    ) -> list[tuple[Selection, tf.Tensor | None, tf.Tensor | None]]:
        """Which measures are taken at which rows, and, if these are not all, where `(time, batch)` they are wanted."""
        of_steps = filtered(self.measures, lambda measure: measure.of == "step")
        if expensive is None:
            return [(of_steps, valid, None)] if of_steps else []
        split = [
            (filtered(of_steps, lambda measure: not measure.expensive), valid, None),
            (filtered(of_steps, lambda measure: measure.expensive), _indices(expensive), expensive),
        ]
        return [part for part in split if part[0]]

    def _spectra(self, measures: Selection, rows: Rows, indices: tf.Tensor, options: Options) -> Results:
        """The spectra `(k, values)` of rows with these indices `(k,)`, one by one, since each takes a matrix."""

        def at(chosen: tf.Tensor) -> Results:
            operators = self.jacobian.operators(list(measures), rows.take(chosen))
            return {f"{v}/{m.name}": m.function(operators[v], options) for v, found in measures.items() for m in found}

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

    def _shape(self, name: str, rows: Rows) -> tuple[int, int]:
        """Rows and columns of the Jacobians of a view."""
        view = View.of(name, rows.states)
        return sum(size(rows.states[new]) for new in view.news), view.columns(rows.inputs, rows.states)

    def _chunk(self, rows: Rows, measures: Selection) -> int:
        """The most rows at once."""
        kept = [measure.kept(*self._shape(view, rows)) for view, chosen in measures.items() for measure in chosen]
        if not self.jacobian.trust.products:
            # J is formed.
            kept += [math.prod(self._shape(view, rows)) for view in self.views]
        bytes_per_row = self.bytes_per_row + max(kept, default=0) * self.options.dtype.size
        return max(1, min(self.bytes_allowed // bytes_per_row, _MOST_ROWS))

    def _source(
        self, rows: Rows, views: Sequence[str], valid: tf.Tensor | None, memory: Mapping[str, Memory]
    ) -> RowSource:
        return RowSource(
            known_sizes(rows.inputs)[0],
            lambda start, stop: self.jacobian.operators(views, rows if start is None else rows.between(start, stop)),
            lambda chosen: self.jacobian.operators(views, rows.take(chosen)),
            valid,
            memory,
        )

    def _examined(self, rows: Rows, last: Sequence[tf.Tensor], valid: tf.Tensor | None) -> Results:
        """Tests of what the measures rest on."""
        if not self.views:
            # No gradient connects the states, and there is nothing to measure.
            return {}
        count = known_sizes(rows.inputs)[0]
        total = count if valid is None else tf.size(valid)
        # Half as many rows as are measured at once, since autodiff takes its memory beside them.
        most = max(1, self._chunk(rows, {}) // 2) if self.independent else self.samples
        seed = tf.random.experimental.stateless_fold_in([self.options.seed, 3], self.draw)

        def at(indices: tf.Tensor) -> tuple[Rows, list[tf.Tensor]]:
            chosen = tf.cast(indices if valid is None else tf.gather(valid, indices), tf.int32)
            return rows.take(chosen), self._following(rows, last, chosen)

        # As many as possible the first time; then a few that are spread over them, others each time: after enough
        # measurements each row has had its turn. Those of a step, if they must stay together.
        number = tf.minimum(total, tf.where(self.draw == 0, most, CERTIFIED_ROWS))
        stride = -(-total // tf.maximum(number, 1))
        chosen = (tf.range(number) * stride + self.draw % tf.maximum(stride, 1)) % tf.maximum(total, 1)
        if not self.independent:
            chosen = tf.range(self.samples) + self.draw * self.samples % count
        results = examine_rows(self.jacobian, self.views, *at(chosen), seed)
        if self.jacobian.row_by_row:
            return results

        # All of them, at each measurement.
        def body(start: tf.Tensor, worst: Results) -> tuple[tf.Tensor, Results]:
            here = tf.range(start, tf.minimum(start + most, total))
            own = tf.random.experimental.stateless_fold_in(seed, start)
            found = examine_independence(self.jacobian, self.views, *at(here), own)
            return start + most, {name: tf.maximum(worst[name], found[name]) for name in worst}

        wanted = (DEPENDENCE, INFLUENCE) if self.independent else (INFLUENCE,)
        nothing = tf.zeros([], self.options.dtype)
        _, worst = tf.while_loop(
            lambda start, _: start < total,
            body,
            [tf.constant(0), dict.fromkeys(wanted, nothing)],
            parallel_iterations=1,
        )
        return results | worst

    def _following(self, rows: Rows, last: Sequence[tf.Tensor], chosen: tf.Tensor) -> list[tf.Tensor]:
        """The states behind some rows: the old ones of the next step, and of the last step the last ones."""
        count, samples = known_sizes(rows.inputs)[0], self.samples
        return [
            tf.where(
                tf.reshape(chosen + samples < count, [-1] + [1] * (end.shape.rank - 1)),
                tf.gather(states, tf.minimum(chosen + samples, count - 1)),
                tf.gather(end, chosen % samples),
            )
            for states, end in zip(rows.states, last, strict=True)
        ]


def in_segments(
    walk: Walk,
    steps: int,
    types: Mapping[str, tf.DType],
    measure_segment: Callable[[Walk, tf.Tensor, tf.Tensor], tuple[Results, tuple[tf.Tensor, ...]]],
) -> Results:
    """Measures so many steps at a time, so that a long sequence is never held as a whole."""
    time = tf.shape(walk.inputs)[0]
    count = -(-time // steps)

    widths: dict[str, int | None] = {}

    def body(index: tf.Tensor, states: Sequence[tf.Tensor], arrays: dict[str, tf.TensorArray]) -> tuple[Any, ...]:
        start = index * steps
        part = walk.between(start, tf.minimum(start + steps, time), states)
        results, last = measure_segment(part, index, start)
        # Which keys there are is known once the body is traced, and a loop needs its variables before.
        widths.update({key: value.shape[1] if value.shape.rank == 2 else None for key, value in results.items()})  # noqa: PLR2004
        arrays = {
            key: array.write(index, tf.reshape(results[key], [-1])) if key in results else array
            for key, array in arrays.items()
        }
        return index + 1, list(last), arrays

    empty = {key: tf.TensorArray(dtype, count, infer_shape=False, element_shape=[None]) for key, dtype in types.items()}
    _, _, arrays = tf.while_loop(
        lambda index, *_: index < count,
        body,
        [tf.constant(0), list(walk.states), empty],
        # The next segment could be unrolled while this one is measured, and would need its memory beside it.
        parallel_iterations=1,
    )
    results = {key: arrays[key].concat() for key in sorted(widths)}
    results = {key: tf.reduce_max(x) if key in TESTS else x for key, x in results.items()}
    return {key: tf.reshape(x, [-1, widths[key]]) if widths[key] else x for key, x in results.items()}


def _where(mask: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """The values `(time * batch,)` where a mask `(time, batch)` is True, and NaN elsewhere."""
    return tf.where(tf.reshape(mask, [-1]), values, tf.constant(float("nan"), values.dtype))


def _complex(real: tf.DType) -> tf.DType:
    return tf.complex128 if real == tf.float64 else tf.complex64
