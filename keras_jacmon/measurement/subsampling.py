"""Subsamples: the steps and samples at which measures are taken."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_jacmon.measures.kinds import Spectrum
from keras_jacmon.measures.selection import Selection, filtered, of_kind
from keras_jacmon.options import Options
from keras_jacmon.tensors import golden_shares

# A graph may not know how many samples it will get.
UNKNOWN_SAMPLES = 2**10


class Subsample(NamedTuple):
    """Masks `(time, batch)` of the points that are measured.

    Attributes:
        mask: Boolean, False at skipped steps; None if no step is skipped.
        expensive: Boolean, True where expensive measures are taken; None for everywhere.
        spectra: Boolean, True where spectra are taken; None without spectra.
    """

    mask: tf.Tensor | None
    expensive: tf.Tensor | None
    spectra: tf.Tensor | None

    @property
    def sampled(self) -> tf.Tensor | None:
        """The points at which expensive measures are taken, `(time, batch)`; None for everywhere."""
        return self.expensive if self.expensive is None or self.mask is None else self.expensive & self.mask

    def between(self, start: tf.Tensor | int, stop: tf.Tensor | int) -> "Subsample":
        """Returns the masks of the steps from `start` up to `stop`."""
        return Subsample(*(None if mask is None else mask[start:stop] for mask in self))


def choose_subsample(
    mask: tf.Tensor | None,
    shape: Sequence[int | tf.Tensor],
    measures: Selection,
    options: Options,
    *,
    independent: bool,
) -> Subsample:
    """Chooses the points at which measures are taken.

    Args:
        mask: Boolean `(time, batch)`, False at skipped steps; None for no mask.
        shape: Two integers, time and batch.
        measures: The quantities of single points.
        options: The settings `max_rows` and `spectra`.
        independent: Boolean, False if the points of a step must stay together.
    """
    expensive = spectra = None
    sample = partial(_sample_points, mask, shape, independent=independent)
    if mask is None and all(isinstance(size, int) for size in shape):
        sample = partial(_known, sample)
    if options.max_rows is not None and filtered(measures, lambda measure: measure.expensive):
        expensive = sample(options.max_rows)
    if of_kind(measures, Spectrum):
        # One step, if its points cannot be told apart.
        spectra = sample(options.spectra if independent else 1)
    return Subsample(mask, expensive, spectra)


def _known(function: Callable[..., tf.Tensor], *args: Any) -> tf.Tensor:
    """Evaluates a function of no tensors to a constant, so that its static value is known."""
    with tf.init_scope():
        value = function(*args).numpy()
    return tf.constant(value)


def _sample_points(
    mask: tf.Tensor | None, shape: Sequence[int | tf.Tensor], count: int, *, independent: bool
) -> tf.Tensor:
    """Marks at most `count` unmasked points, evenly in time, `(time, batch)`; at least one whole step if dependent."""
    time, samples = shape
    if not independent:
        steps = spread_evenly(time, max(1, count // int(tf.get_static_value(samples) or UNKNOWN_SAMPLES)))
        chosen = tf.scatter_nd(steps[:, None], tf.ones_like(steps), tf.cast([time], tf.int64))
        return tf.broadcast_to(chosen[:, None] > 0, [time, samples])
    places = tf.range(tf.cast(time * samples, tf.int64)) if mask is None else tf.where(tf.reshape(mask, [-1]))[:, 0]
    places = tf.gather(places, spread_evenly(tf.size(places), count))
    chosen = tf.scatter_nd(places[:, None], tf.ones_like(places), tf.cast([time * samples], tf.int64))
    return tf.reshape(chosen > 0, [time, samples])


def spread_evenly(total: tf.Tensor | int, count: int) -> tf.Tensor:
    """Returns at most `count` of the numbers from 0 up to `total`, `(min(total, count),)`, spread evenly.

    The range is cut into equal parts, with one number from each. The position of the number in its part follows the
    golden ratio. A constant stride could meet the same sample of a batch each time.
    """
    total = tf.cast(total, tf.int64)
    count = tf.minimum(tf.constant(count, tf.int64), total)
    index = tf.range(count)
    start, stop = index * total // count, (index + 1) * total // count
    share = golden_shares(index)
    return start + tf.cast(share * tf.cast(stop - start, tf.float64), tf.int64)


def indices_of(mask: tf.Tensor) -> tf.Tensor:
    """Returns the indices of the points that a mask `(time, batch)` chooses, or of the first point if it chooses none.

    TensorFlow's optimizer gets the shapes of empty convolutions wrong, so there is always a point. The caller leaves
    out the value of such a placeholder.
    """
    known = tf.get_static_value(mask)
    if known is not None and known.any():
        return tf.constant(np.flatnonzero(known), tf.int32)
    flat = tf.reshape(mask, [-1])
    stand_in = ~tf.reduce_any(flat) & (tf.range(tf.size(flat)) == 0)
    return tf.cast(tf.where(flat | stand_in)[:, 0], tf.int32)
