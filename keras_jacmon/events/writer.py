"""Event writer: reports as TensorBoard event files."""

import contextlib
import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorboard.plugins.histogram.summary_v2 import histogram_pb

from keras_jacmon.dashboard.codec import pack
from keras_jacmon.dashboard.metadata import TAG, summary_metadata
from keras_jacmon.events.charts import (
    GREATEST,
    LAYOUT_TAG,
    LEAST,
    Charts,
    charts_of,
    description,
    layout,
    layout_metadata,
)
from keras_jacmon.events.event_file import EventFile, check_writable
from keras_jacmon.options import VIEWS
from keras_jacmon.report.layer_report import LayerReport
from keras_jacmon.report.packing import packed
from keras_jacmon.report.report import Report


class EventWriter:
    """Writes reports to event files under `<log_dir>/jacobian`; a `Sink`.

    For each key of a layer there is the scalar `<layer>/<key>`: in the run `jacobian` the mean over samples and
    unmasked steps, in `jacobian/min` and `jacobian/max` the least and the greatest step of the mean over samples, so
    that one chart has all three. A measure of whole sequences has the scalar of `LayerReport.scalars`; a horizon beyond
    the sequence is drawn at the sequence's length. While there are fewer than ten charts of a layer, keys of single
    steps have margin charts in the tab *Custom Scalars*, of the tags `<layer>/<key>/least` and `/greatest`; a layout
    groups the charts there by layer, in the order of the model. After them up to two keys of single steps and spectra
    have a histogram `<layer>/<key>/histogram`, for eigenvalues one of the moduli.

    Args:
        log_dir: String or path, the directory that `tensorboard --logdir` is given; made if it is not there.
        positions: Integer, the maximum number of positions of a curve in the Jacobian tab; a longer sequence is binned.
            Defaults to 256.
        name: String, a directory below `jacobian`, and the beginning of the tags of all charts and texts; the tags of
            the layout and of the summaries for the Jacobian tab are without it. None for neither. Defaults to None.

    Raises:
        ValueError: If nothing can be written there.
    """

    def __init__(self, log_dir: str | os.PathLike[str], *, positions: int = 256, name: str | None = None) -> None:
        self._positions = positions
        self._number = 0
        self.directory = tf.io.gfile.join(_absolute(log_dir), "jacobian", *([] if name is None else [name]))
        self._prefix = "" if name is None else f"{name}/"
        self._main = EventFile(self.directory)
        # Runs of their own: the same tag in several runs is one chart.
        self._extremes = [EventFile(tf.io.gfile.join(self.directory, run)) for run in ("min", "max")]
        self._described: set[str] = set()
        check_writable(log_dir, self.directory)

    def write(
        self, report: Report, step: int, scalars: Mapping[str, float] | None = None, sentences: Sequence[str] = ()
    ) -> None:
        """Writes a report and flushes, so that a killed training loses nothing that was measured.

        Args:
            report: `Report`.
            step: Integer, the step in the files: the iteration count of the optimizer, or the epoch.
            scalars: Dict of further numbers by tag; None for no others. Defaults to None.
            sentences: Sequence of strings, one for each verdict that changed; the text summary `verdicts` has them.
                Defaults to none.

        Raises:
            OSError: If TensorFlow cannot write, e.g. to a full disk, or the directory is gone. The next report then
                begins a new file.
        """
        self._number += 1
        contents = [(self._main, partial(self._write_main, report, scalars or {}, sentences))]
        if any(layer.values for layer in report.layers.values()):
            contents += [
                (file, partial(_write_extremes, report, self._prefix, which))
                for which, file in enumerate(self._extremes)
            ]
        try:
            for file, content in contents:
                file.write(step, content)
        except OSError:
            with contextlib.suppress(OSError):
                self.close()
            raise

    def close(self) -> None:
        """Closes the event files; a later `write` begins others in the same directories.

        Raises:
            OSError: If TensorFlow cannot write the last of them.
        """
        # A new file has the descriptions again.
        self._described.clear()
        with contextlib.ExitStack() as files:
            for file in (self._main, *self._extremes):
                files.callback(file.close)

    def _write_main(self, report: Report, scalars: Mapping[str, float], sentences: Sequence[str]) -> None:
        tags = {name: self._prefix + _layer_tag(name, report.layers) for name in report.layers}
        charts = {tags[name]: charts_of(layer) for name, layer in report.layers.items()}
        if not self._described:
            tf.summary.write(LAYOUT_TAG, np.array(layout(charts), object), metadata=layout_metadata())
        for name, layer in report.layers.items():
            _write_layer(tags[name], layer, charts[tags[name]], self._described)
        for tag, value in scalars.items():
            text = f"{tag} with the weights of this step."
            _scalar(self._prefix + tag, value, _once(self._prefix + tag, text, self._described))
        _write_sentences(sentences, self._prefix)
        _write_packed(report, self._positions, self._number)


def _absolute(log_dir: str | os.PathLike[str]) -> str:
    """Returns a path that stays the same when a training changes its directory; a bucket's has no other form."""
    path = os.fspath(log_dir)
    return path if "://" in path else str(Path(path).absolute())


def _write_extremes(report: Report, prefix: str, which: int) -> None:
    """Writes the least (0) or the greatest (1) step of each key."""
    for name, layer in report.layers.items():
        for key in layer.values:
            _scalar(f"{prefix}{_layer_tag(name, report.layers)}/{key}", layer.extremes(key)[which])


def _write_sentences(sentences: Sequence[str], prefix: str) -> None:
    if sentences:
        # As code: a name is text, and no Markdown.
        lines = ["    " + " ".join(sentence.split()) for sentence in sentences]
        tf.summary.text(f"{prefix}verdicts", "\n".join(lines), description="Verdicts that have changed.")


def _write_packed(report: Report, positions: int, number: int) -> None:
    """Writes the summary of each layer that the Jacobian tab reads."""
    for order, (name, layer) in enumerate(report.layers.items()):
        content = pack(packed(name, layer, positions=positions, order=order, number=number))
        # Without the name of the monitor, which the run has: the tab looks for `<layer>/packed`.
        tf.summary.write(f"{_layer_tag(name, report.layers)}/{TAG}", content, metadata=summary_metadata())


def _layer_tag(name: str, names: Collection[str]) -> str:
    """Returns the beginning of a layer's tags: its name, unless that reads as a view of another layer."""
    above, _, last = name.rpartition("/")
    if above not in names or last not in VIEWS:
        return name
    numbered = (f"{name}_{number}" for number in itertools.count(1))
    return next(candidate for candidate in numbered if candidate not in names)


def _write_layer(name: str, layer: LayerReport, charts: Charts, described: set[str]) -> None:
    """Writes the charts of a layer."""
    for key, value in charts.scalars.items():
        tag = f"{name}/{key}"
        _scalar(tag, value, _once(tag, description(key, layer), described))
    for key, extremes in charts.margins.items():
        for part, value in zip((LEAST, GREATEST), extremes, strict=True):
            tag = f"{name}/{key}/{part}"
            text = f"The {part} step of {key}, for the margin chart in Custom Scalars."
            _scalar(tag, value, _once(tag, text, described))
    for key in charts.histograms:
        array = layer.valid(key) if key in layer.values else layer.spectra[key]
        tag, sizes = f"{name}/{key}/histogram", " (absolute values)" if np.iscomplexobj(array) else ""
        _histogram(tag, np.abs(array) if sizes else array, _once(tag, f"{key}{sizes} over the probe.", described))


def _once(tag: str, text: str, described: set[str]) -> str | None:
    """Returns the description of a tag the first time, and None later, since each event would repeat it."""
    if tag in described:
        return None
    described.add(tag)
    return text


def _scalar(tag: str, value: float, text: str | None = None) -> None:
    # Of numbers of Python TensorFlow keeps a copy on the device, for ever.
    tf.summary.scalar(tag, np.asarray(value, np.float64), description=text)


def _histogram(tag: str, values: npt.NDArray[Any], text: str | None) -> None:
    # TensorFlow cannot sort NaN into buckets; the scalars say that there is one.
    finite = values[np.isfinite(values)]
    if finite.size:
        # Counted by NumPy: the operations of `tf.summary.histogram` take ten times as long.
        tf.summary.experimental.write_raw_pb(histogram_pb(tag, finite, description=text).SerializeToString())
