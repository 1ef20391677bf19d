"""Packed summaries read through TensorBoard's data provider, the last ones kept."""

import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.data import provider

from keras_jacmon.dashboard.answers import MOST_ROWS, SPARKS
from keras_jacmon.dashboard.codec import read_header, unpack
from keras_jacmon.dashboard.course import last_course
from keras_jacmon.dashboard.metadata import PLUGIN, TAG
from keras_jacmon.dashboard.stack import Moment, Stack, stack_of

# More than TensorBoard keeps by default, see `plugin.Loader`.
_ALL = 1_000_000

# Bytes of packed summaries and stacks that are kept: about ten layers of 1,000 measurements.
_MOST_BYTES = 96_000_000

# Measures of a layer that are kept as stacks.
_STACKS = 4

Headers = list[tuple[int, dict[str, Any]]]


class Series:
    """The packed summaries of an experiment, by run and layer.

    Args:
        data_provider: The `DataProvider` of TensorBoard.
        most_bytes: Integer, the size of the arrays that are kept, beyond the last layer's. Defaults to 96 MB.
    """

    def __init__(self, data_provider: Any, most_bytes: int = _MOST_BYTES) -> None:
        self._provider, self._most = data_provider, most_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[Any, tuple[Any, Recorded]] = OrderedDict()

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
        return {
            tag: [(datum.step, read_header(datum.numpy)) for datum in last_course(data, _step)]
            for tag, data in found.items()
            if data
        }

    def layer(self, ctx: Any, experiment: str, run: str, layer: str) -> "Recorded":
        """Returns the packed summaries of a layer; they are read again only when there are newer ones.

        Raises:
            KeyError: If there is no such run or layer.
            ValueError: If a summary cannot be read.
        """
        likely = f"{layer}/{TAG}"
        found = self._list(ctx, experiment, run, [likely]).get(run, {})
        if found:
            recorded = self._recorded(ctx, experiment, run, likely, found[likely])
            if recorded.layer == layer:
                return recorded
        # A name that reads as a view of another layer has a number in its tag.
        for tag, newest in self._list(ctx, experiment, run)[run].items():
            (datum,) = self._read(ctx, experiment, run, [tag], 1)[tag]
            if read_header(datum.numpy)["layer"] == layer:
                return self._recorded(ctx, experiment, run, tag, newest)
        raise KeyError(layer)

    def recorded(self, ctx: Any, experiment: str, run: str, tag: str) -> "Recorded":
        """Reads the packed summaries of a tag: those of the last training, if several wrote to this run.

        Raises:
            KeyError: If there are none.
        """
        data = last_course(self._read(ctx, experiment, run, [tag], _ALL)[tag], _step)
        return Recorded(np.array(list(map(_step, data)), np.int64), [datum.numpy for datum in data])

    def _recorded(self, ctx: Any, experiment: str, run: str, tag: str, newest: Any) -> "Recorded":
        name, version = (experiment, run, tag), (newest.max_step, newest.max_wall_time)
        with self._lock:
            known, recorded = self._kept.get(name, (None, None))
            if recorded is not None and known == version:
                self._kept.move_to_end(name)
                return recorded
        recorded = self.recorded(ctx, experiment, run, tag)
        with self._lock:
            self._kept[name] = (version, recorded)
            self._kept.move_to_end(name)
            while len(self._kept) > 1 and sum(one.nbytes for _, one in self._kept.values()) > self._most:
                self._kept.popitem(last=False)
        return recorded

    def _list(
        self, ctx: Any, experiment: str, run: str | None = None, tags: Sequence[str] | None = None
    ) -> dict[str, Any]:
        wanted = provider.RunTagFilter(runs=None if run is None else [run], tags=tags)
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


class Recorded:
    """The packed summaries of a layer, and the stacks made of them.

    Args:
        steps: Integer array `(measurements,)`, the training steps, in order.
        contents: List of uint8 arrays, the packed summaries.
    """

    def __init__(self, steps: npt.NDArray[np.int64], contents: list[npt.NDArray[np.uint8]]) -> None:
        self._steps, self._contents = steps, contents
        self._stacks: OrderedDict[str, Stack] = OrderedDict()

    @functools.cached_property
    def layer(self) -> str:
        """String, the name of the layer."""
        return str(read_header(self._contents[-1])["layer"])

    @property
    def nbytes(self) -> int:
        """Integer, the size of all arrays in bytes."""
        return sum(content.nbytes for content in self._contents) + sum(one.nbytes for one in [*self._stacks.values()])

    def stack(self, key: str) -> Stack:
        """Returns a measure at all measurements; the last ones that were asked for are kept.

        Args:
            key: String, a key of the curves.

        Raises:
            ValueError: If a summary cannot be read.
        """
        found = self._stacks.get(key)
        if found is None:
            found = self._stacks[key] = stack_of(self._contents, self._steps, key, MOST_ROWS)
            if len(self._stacks) > _STACKS:
                self._stacks.popitem(last=False)
        return found

    def near(self, step: int) -> list[Moment]:
        """Returns the measurement nearest to a step, and before it the last one that has spectra, if there is one.

        Args:
            step: Integer, the training step.
        """
        at = int(np.abs(self._steps - step).argmin())
        chosen = self._moment(at)
        if chosen.packed.spectra:
            return [chosen]
        earlier = (other for other in reversed(range(at)) if read_header(self._contents[other])["spectra"])
        return [*(self._moment(other) for other in itertools.islice(earlier, 1)), chosen]

    def moments(self) -> list[Moment]:
        """Returns all packed summaries, unpacked."""
        return [self._moment(at) for at in range(len(self._contents))]

    def _moment(self, at: int) -> Moment:
        return Moment(int(self._steps[at]), unpack(self._contents[at]))


def _step(datum: Any) -> int:
    return int(datum.step)


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
            recorded = series.recorded(ctx, "", run, tag)
            found.setdefault(run, {})[recorded.layer] = recorded.moments()
    return found
