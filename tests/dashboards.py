"""Reports of trainings that never ran, written as a training would, and a client of the tab's server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from tensorboard.backend import application
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client

from keras_jacmon import LayerReport, Report
from keras_jacmon.dashboard.metadata import PLUGIN
from keras_jacmon.dashboard.plugin import Loader
from keras_jacmon.events.writer import EventWriter

if TYPE_CHECKING:
    from pathlib import Path

KEYS = ("variance", "joint/variance", "joint/spectral_norm", "loss_gradient")
HOSTILE = "<img src=x onerror=\"document.title='broken'\">'\n\u202e</script><script>document.title='broken'</script>"


def make_layer(
    growth: float = -0.1, *, time: int = 20, batch: int = 4, keys: tuple[str, ...] = KEYS, seed: int = 0
) -> LayerReport:
    """Make a report with a flow of this growth, values near 1, a spectrum, and no NaN."""
    random = np.random.default_rng(seed)
    flow = np.cumsum(growth + random.normal(0, 0.01, (time, batch)), axis=0).astype(np.float32)
    angles = 2 * np.pi * np.arange(6) / 6
    return LayerReport(
        "LSTMCell",
        8,
        {key: np.exp(random.normal(0, 0.3, (time, batch))).astype(np.float32) for key in keys},
        np.ones((time, batch), bool),
        sequences={"joint/flow": flow, "joint/growth": flow[-1] / time, "joint/horizon": np.full(batch, np.inf)},
        spectra={
            "joint/eigenvalues": (0.9 * np.exp(1j * angles)).astype(np.complex64)[None],
            "joint/singular_values": np.linspace(1.5, 0.5, 6, dtype=np.float32)[None],
        },
        spectra_at=np.zeros((1, 2), np.int64),
        joint="joint/",
        reductions={"joint/growth": "growth", "joint/horizon": "horizon"},
        targets={"joint/variance": 0.8},
    )


def make_reports(**layers: float) -> list[tuple[int, Report]]:
    """Make the reports of three measurements at the steps 0, 10, 20; a number is the growth at the last one."""
    return [
        (10 * at, Report({name: make_layer(growth * at / 2, seed=at) for name, growth in layers.items()}))
        for at in range(3)
    ]


def write(log_dir: Path, reports: list[tuple[int, Report]], **options: Any) -> None:
    writer = EventWriter(log_dir, **options)
    for step, report in reports:
        writer.write(report, step)
    writer.close()


def client(log_dir: Path) -> Client:
    """Serve a directory by TensorBoard's own application, with our tab as its only one."""
    multiplexer = EventMultiplexer(tensor_size_guidance={PLUGIN: 1000})
    multiplexer.AddRunsFromDirectory(str(log_dir))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(log_dir))
    plugin = Loader().load(TBContext(data_provider=provider, logdir=str(log_dir)))
    return Client(application.TensorBoardWSGI([plugin], data_provider=provider))
