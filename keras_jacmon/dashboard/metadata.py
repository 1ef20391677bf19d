"""Metadata of packed summaries, which the event writer and the dashboard share: the name of the plugin, and the tag."""

from typing import Any

from tensorboard.compat.proto import summary_pb2

# The name of the plugin, in event files and in the paths of the server.
PLUGIN = "keras_jacmon"

# The last part of the tag of a packed summary; no measure is called so.
TAG = "packed"


def summary_metadata() -> Any:
    """Returns the metadata of a packed summary; without a data class the Rust data server drops it."""
    return summary_pb2.SummaryMetadata(
        plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name=PLUGIN),
        data_class=summary_pb2.DATA_CLASS_TENSOR,
    )
