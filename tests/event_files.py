"""Reads TensorBoard event files back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tensorflow as tf
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Summary:
    """One value in an event file; `directory` is relative to the log directory."""

    directory: str
    tag: str
    step: int
    plugin: str
    value: NDArray[Any]
    description: str


def read_summaries(log_dir: Path) -> list[Summary]:
    """Everything that was written below `log_dir`, in the order of writing within a file."""
    summaries = []
    for path in sorted(log_dir.rglob("*.tfevents.*")):
        # A tag's plugin and description stand only in its first value of a file.
        plugins: dict[str, tuple[str, str]] = {}
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                of_value = (value.metadata.plugin_data.plugin_name, value.metadata.summary_description)
                plugin, description = plugins.setdefault(value.tag, of_value)
                directory = str(path.parent.relative_to(log_dir))
                array = tf.make_ndarray(value.tensor)
                summaries.append(Summary(directory, value.tag, event.step, plugin, array, description))
    return summaries


def names(summaries: list[Summary]) -> set[tuple[str, str]]:
    """The set of (directory, tag)."""
    return {(summary.directory, summary.tag) for summary in summaries}


def by_tag(summaries: list[Summary], tag: str, run: str = "") -> list[Summary]:
    """The values of a tag: the means, or those of the run `min` or `max`."""
    return [summary for summary in summaries if summary.tag == tag and _extreme(summary.directory) == run]


def _extreme(directory: str) -> str:
    last = directory.rpartition("/")[2]
    return last if last in ("min", "max") else ""
