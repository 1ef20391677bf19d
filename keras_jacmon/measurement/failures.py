"""Failures of a measurement, in words that name the layer."""

import contextlib
import re
from collections.abc import Iterator, Sequence

import tensorflow as tf

from keras_jacmon.cell.step import cell_type
from keras_jacmon.errors import UnmeasurableError, message_of
from keras_jacmon.measurement.measurable_call import MeasurableCall
from keras_jacmon.model.internals import tensors_in


@contextlib.contextmanager
def explaining_failures(layers: Sequence[str], name: str | None = None) -> Iterator[None]:
    """Turns an error of TensorFlow into one that names the layer.

    Args:
        layers: Names of the recurrent layers, in the order in which the pass of the model numbers them.
        name: Name of the call that is measured. Defaults to None: the pass of the model runs, and TensorFlow tells the
            layer.

    Raises:
        RuntimeError: If TensorFlow raises.
    """
    try:
        yield
    except tf.errors.OpError as error:
        where = re.search(r"forward_of_layer_(\d+)", error.message)
        if name is None and where is not None:
            name = layers[int(where[1])]
        culprit = "the model, outside of its recurrent layers," if name is None else f"layer `{name}`"
        raise RuntimeError(f"Measuring {culprit} failed: {_essence(error)}") from error


def unmeasurable(call: MeasurableCall, error: Exception) -> UnmeasurableError:
    """Returns the error that says why a call cannot be measured.

    Args:
        call: The call.
        error: What tracing its measurement raised.
    """
    foreign = ", ".join(f"`{name}`" for name in tensors_in(call.cell))
    hint = " The cell uses tensors of the model that are neither its inputs nor its states: " if foreign else ""
    refusal = UnmeasurableError(
        f"The Jacobians of layer `{call.name}` ({cell_type(call.cell).__name__}) cannot be taken; name the other "
        f"layers in `layers` to leave it out.{hint}{foreign}{'.' * bool(foreign)} The reason: {message_of(error)}",
        call.layer,
    )
    refusal.__cause__ = error
    return refusal


def _essence(error: tf.errors.OpError) -> str:
    """Returns the message without its dozens of lines on the origin of the operation."""
    lines = [line for line in error.message.splitlines() if line.strip() and not line.startswith('  File "')]
    if re.search("only supports (the )?ND?HWC", error.message):
        # The first words alone would send the reader to look for them in vain.
        lines.insert(
            0,
            "TensorFlow has no convolution with `data_format='channels_first'` for this CPU. Expected "
            "`data_format='channels_last'`, or a GPU. TensorFlow says:",
        )
    return "\n".join(
        line for line in lines if not re.match(r"Graph execution error:|Detected at node |<stack traces", line)
    )
