"""One call of a recurrent layer, measured: the graph from its inputs to the measures of each step and sample."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from keras_jacmon.jacobians.resolve import CellJacobian, Choice, Rows
from keras_jacmon.jacobians.views import Connections, View, find_connections, floating_states, size
from keras_jacmon.measures.options import Memory, Options
from keras_jacmon.measures.registry import MEASURES, Selection
from keras_jacmon.measures.rows import RowSource, measure_rows, spread_evenly
from keras_jacmon.probe.capture import RecurrentCall
from keras_jacmon.probe.step import CellStep
from keras_jacmon.probe.trajectory import Trajectory, Walk, as_rows, known_sizes, unroll
from keras_jacmon.report import LayerReport

# More (row, vector) pairs at once than this do not fit a cache and are no faster.
_MOST_ROWS = 2**14

# The share of the memory allowed that a trajectory may take, and that the derivatives on it may take. What else is
# alive at that time, and what the allocator holds back, was measured to be about twice as much as both.
_SHARES = 9

# So many rows have their structure compared with autodiff at each measurement, others each time.
CERTIFIED_ROWS = 16

# The random numbers of one segment are told from those of another by as many streams as it may have chunks.
_STREAMS = 2**12

# A graph may not know how many samples it will get.
_UNKNOWN_SAMPLES = 2**10

# Keys of results that are tests, scalars: of the structure, and of the independence of rows.
CERTIFICATE, DEPENDENCE = "certificate", "dependence"

# Key of the mask of the rows at which expensive measures are taken, if not at all.
SAMPLED = "sampled"

# What is known of each (step, sample): `hidden/variance`, and `hidden/variance/uncertainty` if there is one.
Results = dict[str, tf.Tensor]

# From a key, a shape and a type to a variable.
Remember = Callable[[str, Sequence[int], tf.DType], tf.Variable]


@dataclass(frozen=True)
class CallFacts:
    """What is known of a call before any number is.

    Attributes:
        cell: Class of the cell.
        units: Size of the hidden state.
        views: Those that there are.
        choices: By view, how each of its blocks is taken.
        notes: What a reader of the numbers must know.
        jacobian: Must live as long as what it has given operators to.
    """

    cell: str
    units: int
    views: tuple[str, ...]
    choices: dict[str, list[Choice]]
    notes: tuple[str, ...]
    jacobian: CellJacobian

    @classmethod
    def of(
        cls, call: RecurrentCall, states: Sequence[tf.Tensor], jacobian: CellJacobian, connections: Connections
    ) -> "CallFacts":
        """The facts of a call.

        Raises:
            ValueError: If no state has a derivative.
        """
        floating = floating_states(states)
        depends = connections.depends
        views, notes = [], []
        if depends[0][0]:
            views.append("hidden")
        else:
            notes.append(
                f"new state {floating[0]} does not depend on the old one (no gradient connects them), "
                "so the hidden view is left out"
            )
        if len(floating) > 1 and any(map(any, depends)):
            views.append("joint")
            notes += [
                f"old state {state} has no influence on the new states (no gradient connects them)"
                for state, influences in zip(floating, zip(*depends, strict=True), strict=True)
                if not any(influences)
            ]
        choices = {view: jacobian.choices(view) for view in views}
        return cls(
            type(call.layer.cell).__name__, size(states[floating[0]]), tuple(views), choices, tuple(notes), jacobian
        )

    def report(self, results: Results) -> LayerReport:
        """The report of the numbers."""
        arrays = {key: tensor.numpy() for key, tensor in results.items()}
        mask, sampled = arrays.pop("mask"), arrays.pop(SAMPLED, None)
        certificate = float(arrays.pop(CERTIFICATE)) if CERTIFICATE in arrays else None
        arrays.pop(DEPENDENCE, None)
        named = {key.removeprefix("hidden/"): array for key, array in arrays.items()}
        values = {key: array for key, array in named.items() if not key.endswith("/uncertainty")}
        uncertainties = {key: named[f"{key}/uncertainty"] for key in values if f"{key}/uncertainty" in named}
        estimated = {key for key in uncertainties if MEASURES[key.split("/")[-1]].uncertainty == "standard error"}
        expensive = [key for key in values if MEASURES[key.split("/")[-1]].expensive]
        layer = LayerReport(
            self.cell,
            self.units,
            values,
            mask,
            uncertainties,
            frozenset(estimated),
            {} if sampled is None else dict.fromkeys(expensive, sampled),
            certificate,
            self.notes,
        )
        broken = layer.nonfinite()
        if not broken:
            return layer
        counts = ", ".join(f"{count} of `{key}`" for key, count in broken.items())
        return dataclasses.replace(layer, notes=(*self.notes, f"NaN or Inf among the values: {counts}"))


def measure_call(
    call: RecurrentCall,
    measures: Selection,
    options: Options,
    *,
    max_bytes: int,
    trusted: bool,
    independent: bool,
    draw: tf.Tensor,
    remember: Remember | None = None,
) -> tuple[CallFacts, Results]:
    """Measures one call, in the graph that is being traced.

    Args:
        call: What the layer received.
        measures: What to measure, by view.
        options: How.
        max_bytes: Bounds the memory, through segments of the sequence and chunks of rows.
        trusted: Whether structures that were found, and registered forms, may be used.
        independent: Whether each row of a step is a function of itself; otherwise steps are taken one by one.
        draw: Counts the measurements; it decides which rows are certified.
        remember: Gives a variable that lives from one measurement to the next one, and is zero at first; None to
            start each time anew.

    Returns:
        What is known before any number is, and the results: `mask` and each measure `(time, batch)`, certificates
        scalars.

    Raises:
        ValueError: If no state has a derivative.
    """
    walk, step = Walk.of(call), CellStep(call.layer.cell, call.states)
    if not floating_states(walk.states):
        raise ValueError(f"None of its {len(walk.states)} states is floating-point, so there is no derivative")
    jacobian = CellJacobian(step, walk.inputs[0], walk.states, trusted=trusted, independent=independent)
    connections = find_connections(step, walk.inputs[0], walk.states)
    facts = CallFacts.of(call, walk.states, jacobian, connections)
    shortcut = jacobian.shortcut()

    dtype = walk.states[floating_states(walk.states)[0]].dtype
    rows = walk.inputs.shape[:2].num_elements()
    time, samples = known_sizes(walk.inputs)[:2]
    selection = _of_views(measures, facts.views, several=len(floating_states(walk.states)) > 1)
    wanted = None
    if options.max_rows is not None and any(m.expensive for chosen in selection.values() for m in chosen):
        wanted = _sample(walk.mask, time, samples, options.max_rows, independent=independent)
    memory = {} if remember is None else _memory(walk, selection, wanted, options.max_rows, remember)
    points = _Points(
        jacobian,
        selection,
        dataclasses.replace(options, rows=rows, dtype=dtype),
        bytes_allowed=max_bytes // _SHARES,
        bytes_per_row=connections.bytes_per_row,
        draw=draw,
        independent=independent,
    )

    def measure_segment(
        part: Walk, index: tf.Tensor | int, start: tf.Tensor | int
    ) -> tuple[Results, tuple[tf.Tensor, ...]]:
        trajectory = unroll(step, part, shortcut)
        stop = start + known_sizes(part.inputs)[0]
        known = {key: Memory(m.vectors, tf.reshape(m.places[start:stop], [-1])) for key, m in memory.items()}
        results = points.measure(trajectory, part.mask, None if wanted is None else wanted[start:stop], known, index)
        return results, trajectory.last

    in_walk = [walk.inputs, *(state[None] for state in walk.states)]
    in_graph = [*shortcut.kept, *shortcut.hoisted] if shortcut else []
    # Twice: a list of steps becomes one tensor, and for a moment there are both.
    values = 2 * (sum(size(t[0]) for t in in_walk) + sum(size(t) for t in in_graph))
    steps = max(1, max_bytes // _SHARES // (values * dtype.size * int(walk.inputs.shape[1] or _UNKNOWN_SAMPLES)))
    if walk.inputs.shape[0] is not None and walk.inputs.shape[0] <= steps:
        results, _ = measure_segment(walk, 0, 0)
    else:
        results = _in_segments(walk, steps, points.keys(), dtype, measure_segment)
    results = {
        key: value if value.shape.rank == 0 else tf.reshape(value, [time, samples]) for key, value in results.items()
    }
    if walk.mask is not None:
        nan = tf.constant(float("nan"), dtype)
        results = {
            key: value if value.shape.rank == 0 else tf.where(walk.mask, value, nan) for key, value in results.items()
        }
    results["mask"] = tf.ones([time, samples], tf.bool) if walk.mask is None else walk.mask
    if wanted is not None:
        results[SAMPLED] = wanted & results["mask"]
    if call.layer.go_backwards:
        results = {key: value if value.shape.rank == 0 else value[::-1] for key, value in results.items()}
    return facts, results


def _of_views(measures: Selection, views: Sequence[str], *, several: bool) -> Selection:
    """The measures of the views that a cell has; with one state its hidden view is the joint one."""
    if several:
        return {view: chosen for view, chosen in measures.items() if view in views}
    chosen = {measure for of_view in measures.values() for measure in of_view}
    return {view: tuple(measure for measure in MEASURES.values() if measure in chosen) for view in views}


def _sample(
    mask: tf.Tensor | None, time: int | tf.Tensor, samples: int | tf.Tensor, count: int, *, independent: bool
) -> tf.Tensor:
    """At most `count` unmasked rows, evenly in time: `(time, batch)`. Dependent rows: one whole step at least."""
    if not independent:
        steps = spread_evenly(time, max(1, count // int(tf.get_static_value(samples) or _UNKNOWN_SAMPLES)))
        chosen = tf.scatter_nd(steps[:, None], tf.ones_like(steps), tf.cast([time], tf.int64))
        return tf.broadcast_to(chosen[:, None] > 0, [time, samples])
    places = tf.range(tf.cast(time * samples, tf.int64)) if mask is None else tf.where(tf.reshape(mask, [-1]))[:, 0]
    places = tf.gather(places, spread_evenly(tf.size(places), count))
    chosen = tf.scatter_nd(places[:, None], tf.ones_like(places), tf.cast([time * samples], tf.int64))
    return tf.reshape(chosen > 0, [time, samples])


def _memory(
    walk: Walk,
    measures: Selection,
    wanted: tf.Tensor | None,
    max_rows: int | None,
    remember: Remember,
) -> dict[str, Memory]:
    """For each measure that can use it, vectors of all rows that it is measured at, and their places `(time, batch)`.

    Nothing if it is not known beforehand how many rows there are.
    """
    rows = walk.inputs.shape[:2].num_elements()
    if rows is None:
        return {}
    chosen = tf.ones(walk.inputs.shape[:2], tf.bool) if wanted is None else wanted
    places = tf.reshape(tf.cumsum(tf.cast(tf.reshape(chosen, [-1]), tf.int32), exclusive=True), walk.inputs.shape[:2])
    count = min(rows, rows if wanted is None or max_rows is None else max_rows)
    memory = {}
    for name, chosen_measures in measures.items():
        view = View.of(name, walk.states)
        shape = [count, sum(size(walk.states[q]) for q in view.olds)]
        for measure in chosen_measures:
            if measure.warm_start:
                key = f"{name}/{measure.name}"
                memory[key] = Memory(remember(key, shape, walk.states[view.olds[0]].dtype), places)
    return memory


def _places(mask: tf.Tensor) -> tf.Tensor:
    """The indices of the rows that a mask `(time, batch)` chooses."""
    return tf.cast(tf.where(tf.reshape(mask, [-1]))[:, 0], tf.int32)


@dataclass(frozen=True)
class _Points:
    """How the Jacobians at the points of a trajectory are measured."""

    jacobian: CellJacobian
    measures: Selection
    options: Options
    bytes_allowed: int
    bytes_per_row: int
    draw: tf.Tensor
    independent: bool

    def keys(self) -> list[str]:
        """What `measure` may return."""
        values = [f"{view}/{measure.name}" for view, chosen in self.measures.items() for measure in chosen]
        return [*values, *(f"{key}/uncertainty" for key in values), CERTIFICATE, DEPENDENCE]

    def measure(
        self,
        trajectory: Trajectory,
        mask: tf.Tensor | None,
        wanted: tf.Tensor | None,
        memory: Mapping[str, Memory],
        segment: tf.Tensor | int,
    ) -> Results:
        """The measures, `(time * batch,)`, and the certificates, scalars."""
        rows = Rows(
            as_rows(trajectory.inputs),
            tuple(as_rows(state) for state in trajectory.states),
            {name: as_rows(value) for name, value in trajectory.values.items()},
        )
        # Rows that are no functions of themselves stay together: all samples of a step, masked ones included.
        valid = None if mask is None or not self.independent else _places(mask)
        options = dataclasses.replace(self.options, stream=segment * _STREAMS)
        results: Results = {}
        for measures, chosen in self._at(valid, None if wanted is None else _places(wanted)):
            source = self._source(rows, list(measures), chosen, memory)
            chunk = self._chunk(rows, measures) if self.independent else known_sizes(trajectory.inputs)[1]
            for key, (value, uncertainty) in measure_rows(source, measures, options, chunk).items():
                results[key] = value
                if uncertainty is not None:
                    results[f"{key}/uncertainty"] = uncertainty
        return {**results, **self._certificates(trajectory, rows, valid)} if self.independent else results

    def _at(self, valid: tf.Tensor | None, wanted: tf.Tensor | None) -> list[tuple[Selection, tf.Tensor | None]]:
        """Which measures are taken at which rows."""
        if wanted is None:
            return [(self.measures, valid)]
        split = [
            ({v: tuple(m for m in chosen if m.expensive == expensive) for v, chosen in self.measures.items()}, rows)
            for expensive, rows in ((False, valid), (True, wanted))
        ]
        split = [({v: chosen for v, chosen in measures.items() if chosen}, rows) for measures, rows in split]
        return [(measures, rows) for measures, rows in split if measures]

    def _chunk(self, rows: Rows, measures: Selection) -> int:
        """The most rows at once."""
        kept = [
            measure.vectors * sum(size(rows.states[q]) for q in View.of(view, rows.states).olds)
            for view, chosen in measures.items()
            for measure in chosen
        ]
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

    def _certificates(self, trajectory: Trajectory, rows: Rows, valid: tf.Tensor | None) -> Results:
        """Tests, on some rows, of what the measures rest on."""
        count, samples = known_sizes(rows.inputs)[0], known_sizes(trajectory.inputs)[1]
        total = count if valid is None else tf.size(valid)
        # The first time half as many rows as are measured at once, since autodiff takes its memory beside them; then a
        # few that are spread over them, others each time: after enough measurements each row has had its turn.
        number = tf.minimum(total, tf.where(self.draw == 0, self._chunk(rows, {}) // 2, CERTIFIED_ROWS))
        stride = -(-total // tf.maximum(number, 1))
        chosen = (tf.range(number) * stride + self.draw % tf.maximum(stride, 1)) % tf.maximum(total, 1)
        chosen = chosen if valid is None else tf.gather(valid, tf.cast(chosen, valid.dtype))
        chosen = tf.cast(chosen, tf.int32)
        # The new states are the old ones of the next step, and of the last step the last ones.
        following = [
            tf.where(
                tf.reshape(chosen + samples < count, [-1] + [1] * (last.shape.rank - 1)),
                tf.gather(states, tf.minimum(chosen + samples, count - 1)),
                tf.gather(last, chosen % samples),
            )
            for states, last in zip(rows.states, trajectory.last, strict=True)
        ]
        seed = tf.random.experimental.stateless_fold_in([self.options.seed, 3], self.draw)
        dependence, certificate = self.jacobian.tests(list(self.measures), rows.take(chosen), following, seed)
        return {DEPENDENCE: dependence} | ({} if certificate is None else {CERTIFICATE: certificate})


def _in_segments(
    walk: Walk,
    steps: int,
    keys: Sequence[str],
    dtype: tf.DType,
    measure_segment: Callable[[Walk, tf.Tensor, tf.Tensor], tuple[Results, tuple[tf.Tensor, ...]]],
) -> Results:
    """Measures so many steps at a time, so that a long sequence is never held as a whole."""
    time = tf.shape(walk.inputs)[0]
    count = -(-time // steps)

    present: set[str] = set()

    def body(index: tf.Tensor, states: Sequence[tf.Tensor], arrays: dict[str, tf.TensorArray]) -> tuple[Any, ...]:
        start = index * steps
        part = walk.between(start, tf.minimum(start + steps, time), states)
        results, last = measure_segment(part, index, start)
        # Which keys there are is known once the body is traced, and a loop needs its variables before.
        present.update(results)
        arrays = {
            key: array.write(index, tf.reshape(results[key], [-1])) if key in results else array
            for key, array in arrays.items()
        }
        return index + 1, list(last), arrays

    empty = {key: tf.TensorArray(dtype, count, infer_shape=False, element_shape=[None]) for key in keys}
    _, _, arrays = tf.while_loop(lambda index, *_: index < count, body, [tf.constant(0), list(walk.states), empty])
    return {
        key: tf.reduce_max(arrays[key].concat()) if key in (CERTIFICATE, DEPENDENCE) else arrays[key].concat()
        for key in sorted(present)
    }
