"""At which steps and samples are measures taken?"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_jacmon.cell.trajectory import UnrollInputs
from keras_jacmon.jacobians.views import View
from keras_jacmon.measures.registry import Selection, filtered
from keras_jacmon.measures.rows import spread_evenly
from keras_jacmon.options import Memory, Options

# A graph may not know how many samples it will get.
UNKNOWN_SAMPLES = 2**10

# From a key, a shape and a type to a variable.
Remember = Callable[[str, Sequence[int], tf.DType], tf.Variable]


class Subsample(NamedTuple):
    """Masks `(time, batch)` of the rows that are measured.

    Attributes:
        mask: False at steps that are skipped; None if there are none.
        expensive: Where expensive measures are taken; None for everywhere.
        spectra: Where spectra are taken; None if there are none.
    """

    mask: tf.Tensor | None
    expensive: tf.Tensor | None
    spectra: tf.Tensor | None

    def between(self, start: tf.Tensor | int, stop: tf.Tensor | int) -> "Subsample":
        """Those of a part of the sequence."""
        return Subsample(*(None if mask is None else mask[start:stop] for mask in self))


def choose_places(
    mask: tf.Tensor | None,
    shape: Sequence[int | tf.Tensor],
    measures: Selection,
    options: Options,
    *,
    independent: bool,
) -> Subsample:
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
    return Subsample(mask, expensive, spectra)


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
    walk: UnrollInputs,
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


def indices_of(mask: tf.Tensor) -> tf.Tensor:
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
