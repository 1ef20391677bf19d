"""Building of a model that has no weights yet, from the probe."""

import contextlib
from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.errors import invalid_argument, message_of
from keras_jacmon.graphs.trace import trace
from keras_jacmon.model.guard import shielded
from keras_jacmon.model.inputs import fit_probe, hint_at_slip
from keras_jacmon.model.internals import open_again_on_failure, sublayers, training_argument


def build(model: keras.Layer, arrays: Any) -> None:
    """Builds the layers that make their weights at the first call, without changing any state.

    Args:
        model: Keras model; a built one is left as it is.
        arrays: Structure of NumPy arrays `(batch, ...)`, as `read_probe` returns them.

    Raises:
        ValueError: If the model cannot be called on the probe.
    """
    if model.built and all(layer.built for layer in _cells(model)):
        return
    if any(getattr(layer, "stateful", False) and not layer.built for layer in sublayers(model)):
        raise ValueError(
            f"The model `{model.name}` is not built, and cannot be built from the probe: it has stateful layers, whose "
            "states are made for one size of batch. Build it before, by calling it on a batch of the training."
        )
    inputs = fit_probe(model, arrays)

    def call(*tensors: tf.Tensor) -> Any:
        return model(keras.tree.pack_sequence_as(inputs, list(tensors)), **training_argument(model))

    flat = keras.tree.flatten(inputs)
    with shielded(model):
        # Traced and not run: a cell may write to a `tf.Variable`, which the scope does not shield. The numbers of
        # samples and steps stay open: a Sequential model keeps the shape that it was built with, and is saved with it.
        with contextlib.suppress(Exception), open_again_on_failure(model):
            trace(lambda *tensors: (call(*tensors), None), [_spec(tensor, open_axes=2) for tensor in flat])
            return
        # Some layers need the number of steps, which is that of the training then.
        try:
            trace(lambda *tensors: (call(*tensors), None), [_spec(tensor, open_axes=1) for tensor in flat])
        except Exception as error:
            shapes = keras.tree.map_structure(lambda array: array.shape, arrays)
            raise invalid_argument(
                "probe",
                "a batch that the model can be built with",
                f"shapes {shapes}{hint_at_slip(arrays)}. The model says: {message_of(error)}",
            ) from error


def _spec(tensor: tf.Tensor, *, open_axes: int) -> tf.TensorSpec:
    """Returns the specification of an input whose first axes have any size."""
    sizes = [None if axis < open_axes else size for axis, size in enumerate(tensor.shape)]
    return tf.TensorSpec(sizes, tensor.dtype)


def _cells(model: keras.Layer) -> list[Any]:
    """Returns the cells of the recurrent layers, and the layers inside of them."""
    recurrent = [layer for layer in sublayers(model) if isinstance(layer, keras.layers.RNN)]
    return [part for layer in recurrent for part in sublayers(layer.cell)]
