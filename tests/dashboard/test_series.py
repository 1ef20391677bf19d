"""What the tab's server reads of its data, and what it keeps of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from dashboards import make_layer, make_reports, write
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext

from keras_jacmon import Report
from keras_jacmon.dashboard.codec import pack
from keras_jacmon.dashboard.metadata import PLUGIN
from keras_jacmon.dashboard.series import Series, read_directory
from keras_jacmon.dashboard.stack import Moment, stack_of, stack_of_moments
from keras_jacmon.report.packing import packed

if TYPE_CHECKING:
    from pathlib import Path


class CountingProvider(MultiplexerDataProvider):
    """Counts how often all measurements of a layer are read."""

    reads = 0

    def read_tensors(self, ctx: Any = None, **options: Any) -> Any:
        self.reads += options["downsample"] > 1
        return super().read_tensors(ctx, **options)


def test_a_layer_is_read_once_and_again_when_there_is_more(tmp_path: Path) -> None:
    write(tmp_path, make_reports(a=0.1, b=0.2))
    multiplexer = EventMultiplexer(tensor_size_guidance={PLUGIN: 0})
    multiplexer.AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider, ctx = CountingProvider(multiplexer, str(tmp_path)), RequestContext()
    series = Series(provider)

    def steps(layer: str) -> list[int]:
        return series.layer(ctx, "", "jacobian", layer).stack("variance").steps.tolist()

    assert [steps(layer) for layer in "abba"] == [[0, 10, 20]] * 4
    assert provider.reads == 2
    write(tmp_path, [(30, make_reports(a=0.1)[0][1])])
    multiplexer.Reload()
    assert [steps(layer) for layer in "abba"] == [[0, 10, 20, 30], [0, 10, 20], [0, 10, 20], [0, 10, 20, 30]]
    assert provider.reads == 3
    # Memory is bounded: without room for two layers, the last one is kept.
    series = Series(provider, most_bytes=1)
    assert [len(steps(layer)) for layer in "aabba"] == [4, 4, 3, 3, 4]
    assert provider.reads == 6


def test_of_several_trainings_in_one_run_the_last_one_is_shown(tmp_path: Path) -> None:
    """Where a step is measured again, what came after it belongs to the training before."""
    for growth, steps in ((0.5, (0, 10, 20)), (-0.5, (0, 6, 12))):
        write(tmp_path, [(step, Report({"a": make_layer(growth)})) for step in steps])
    write(tmp_path, [(12, Report({"a": make_layer(0.0)})), (14, Report({"a": make_layer(0.0)}))])
    multiplexer = EventMultiplexer(tensor_size_guidance={PLUGIN: 0})
    multiplexer.AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    series, ctx = Series(MultiplexerDataProvider(multiplexer, str(tmp_path))), RequestContext()
    (headers,) = series.headers(ctx, "", "jacobian").values()
    assert [step for step, _ in headers] == [0, 6, 12, 14]
    states = ["vanishing", "vanishing", "stable", "stable"]
    assert [header["verdict"]["state"] for _, header in headers] == states
    moments = series.layer(ctx, "", "jacobian", "a").moments()
    assert [(one.step, one.packed.header["verdict"]["state"]) for one in moments] == list(
        zip([0, 6, 12, 14], states, strict=True)
    )
    assert [one.step for one in read_directory(str(tmp_path))["jacobian"]["a"]] == [0, 6, 12, 14]


def test_many_summaries_are_unpacked_at_once_as_one_by_one() -> None:
    layers = [make_layer(time=time, seed=time) for time in (20, 600, 20, 7)]
    for at, layer in enumerate(layers):
        layer.values["variance"][at] = np.nan
        layer.sampled["variance"] = np.arange(layer.mask.size).reshape(layer.mask.shape) % (2 + at) == 0
    layers.append(make_layer(keys=("spectral_norm",)))
    moments = [Moment(step, packed("rnn", layer)) for step, layer in enumerate(layers)]
    contents = [pack(moment.packed) for moment in moments]
    together = stack_of(contents, np.arange(5), "variance", 256)
    alone = stack_of_moments(moments, "variance", 256)
    assert together.steps.tolist() == alone.steps.tolist() == [0, 1, 2, 3]
    assert (together.length, together.nan, together.inf) == (alone.length, alone.nan, alone.inf) == (600, alone.nan, 0)
    np.testing.assert_array_equal(together.present, alone.present)
    np.testing.assert_allclose(together.mean, alone.mean, rtol=2.0**-16)
    np.testing.assert_allclose(together.least, alone.least, rtol=2.0**-7)
    np.testing.assert_allclose(together.greatest, alone.greatest, rtol=2.0**-7)
