"""Packed summaries read through TensorBoard's data provider, the last ones kept."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.data import provider

from keras_jacmon.dashboard.answers import SPARKS, Moment
from keras_jacmon.dashboard.metadata import PLUGIN, TAG, read_header, unpack

# More than TensorBoard keeps by default, see `plugin.Loader`.
_ALL = 1_000_000

# Series of unpacked summaries that are kept.
_KEPT = 8

Headers = list[tuple[int, dict[str, Any]]]


class Series:
    """The packed summaries of an experiment, by run and layer.

    Args:
        data_provider: The `DataProvider` of TensorBoard.
    """

    def __init__(self, data_provider: Any) -> None:
        self._provider = data_provider
        self._lock = threading.Lock()
        self._kept: OrderedDict[Any, list[Moment]] = OrderedDict()

    def runs(self, ctx: Any, experiment: str) -> list[str]:
        """Returns the names of the runs that have packed summaries."""
        return sorted(self._list(ctx, experiment))

    def known(self, ctx: Any, experiment: str) -> list[str]:
        """Returns the names of all runs."""
        return [run.run_name for run in self._provider.list_runs(ctx, experiment_id=experiment)]

    def headers(self, ctx: Any, experiment: str, run: str) -> dict[str, Headers]:
        """Returns a sample of the steps and headers of each tag of a run, with the last one.

        Raises:
            KeyError: If there is no such run.
            ValueError: If a summary cannot be read.
        """
        tags = self._list(ctx, experiment, run)[run]
        found = self._read(ctx, experiment, run, list(tags), SPARKS)
        return {tag: [(datum.step, read_header(datum.numpy)) for datum in data] for tag, data in found.items() if data}

    def tag_of(self, ctx: Any, experiment: str, run: str, layer: str) -> str:
        """Returns the tag of a layer.

        Raises:
            KeyError: If there is no such run or layer.
        """
        tags = self._list(ctx, experiment, run)[run]
        if f"{layer}/{TAG}" in tags and self._layer(ctx, experiment, run, f"{layer}/{TAG}") == layer:
            return f"{layer}/{TAG}"
        # A name that reads as a view of another layer has a number in its tag.
        return next(tag for tag in tags if self._layer(ctx, experiment, run, tag) == layer)

    def moments(
        self, ctx: Any, experiment: str, run: str, tag: str, keys: Sequence[str] | None
    ) -> tuple[list[Moment], list[Any]]:
        """Returns the unpacked summaries of a tag with some of the keys, and the raw ones, in the order of the steps.

        Raises:
            KeyError: If there is no such run or tag.
            ValueError: If a summary cannot be read.
        """
        newest = self._list(ctx, experiment, run)[run][tag]
        data = self.raw(ctx, experiment, run, tag)
        known = (experiment, run, tag, tuple(keys or ()), newest.max_step, newest.max_wall_time, len(data))
        return self._keep(known, lambda: [Moment(datum.step, unpack(datum.numpy, keys)) for datum in data]), data

    def raw(self, ctx: Any, experiment: str, run: str, tag: str) -> list[Any]:
        """Returns the packed summaries of a tag; of a step that was measured twice, the last one."""
        data = self._read(ctx, experiment, run, [tag], _ALL).get(tag, [])
        return [by_step for _, by_step in sorted({datum.step: datum for datum in data}.items())]

    def _layer(self, ctx: Any, experiment: str, run: str, tag: str) -> str:
        (datum,) = self._read(ctx, experiment, run, [tag], 1)[tag]
        return str(read_header(datum.numpy)["layer"])

    def _keep(self, known: Any, make: Callable[[], list[Moment]]) -> list[Moment]:
        with self._lock:
            if known in self._kept:
                self._kept.move_to_end(known)
                return self._kept[known]
        made = make()
        with self._lock:
            self._kept[known] = made
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return made

    def _list(self, ctx: Any, experiment: str, run: str | None = None) -> dict[str, Any]:
        wanted = provider.RunTagFilter(runs=None if run is None else [run])
        found: dict[str, Any] = self._provider.list_tensors(
            ctx, experiment_id=experiment, plugin_name=PLUGIN, run_tag_filter=wanted
        )
        return found

    def _read(self, ctx: Any, experiment: str, run: str, tags: Iterable[str], most: int) -> dict[str, Any]:
        found: dict[str, Any] = self._provider.read_tensors(
            ctx,
            experiment_id=experiment,
            plugin_name=PLUGIN,
            run_tag_filter=provider.RunTagFilter(runs=[run], tags=list(tags)),
            downsample=most,
        )
        return found.get(run, {})


def spectra_before(data: Sequence[Any], step: int) -> list[Moment]:
    """Returns the measurement nearest to a step, and before it the last one that has spectra, if there is one.

    Args:
        data: Packed summaries in the order of the steps, at least one.
        step: Integer, the training step.
    """
    steps = np.array([datum.step for datum in data])
    at = int(np.abs(steps - step).argmin())
    chosen = Moment(int(steps[at]), unpack(data[at].numpy))
    if chosen.packed.spectra:
        return [chosen]
    for datum in reversed(data[:at]):
        if read_header(datum.numpy)["spectra"]:
            return [Moment(int(datum.step), unpack(datum.numpy)), chosen]
    return [chosen]


def read_directory(logs: str) -> dict[str, dict[str, list[Moment]]]:
    """Returns the packed summaries in the event files of a directory, by run and layer.

    Args:
        logs: String, the directory.

    Raises:
        ValueError: If a summary cannot be read.
    """
    multiplexer = EventMultiplexer(tensor_size_guidance={PLUGIN: 0})
    multiplexer.AddRunsFromDirectory(logs)
    multiplexer.Reload()
    series = Series(MultiplexerDataProvider(multiplexer, logs))
    ctx = RequestContext()
    found: dict[str, dict[str, list[Moment]]] = {}
    for run in series.runs(ctx, ""):
        for tag in series.headers(ctx, "", run):
            moments = [Moment(datum.step, unpack(datum.numpy)) for datum in series.raw(ctx, "", run, tag)]
            found.setdefault(run, {})[moments[-1].packed.header["layer"]] = moments
    return found
