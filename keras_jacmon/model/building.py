"""Building of a model that has no weights yet, from the probe."""

from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.errors import invalid_argument, message_of
from keras_jacmon.model.guard import shielded
from keras_jacmon.model.inputs import fit_probe, hint_at_slip
from keras_jacmon.model.internals import sublayers, training_argument


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

    # Traced and not run: a cell may write to a `tf.Variable`, which the scope does not shield. The number of samples
    # stays open, because a Sequential model keeps the shape that it was built with, and is saved with it.
    specs = [tf.TensorSpec([None, *tensor.shape[1:]], tensor.dtype) for tensor in keras.tree.flatten(inputs)]
    with shielded(model):
        try:
            tf.function(call, autograph=False).get_concrete_function(*specs)
        except Exception as error:
            shapes = keras.tree.map_structure(lambda array: array.shape, arrays)
            raise invalid_argument(
                "probe",
                "a batch that the model can be built with",
                f"shapes {shapes}{hint_at_slip(arrays)}. The model says: {message_of(error)}",
            ) from error


def _cells(model: keras.Layer) -> list[Any]:
    """Returns the cells of the recurrent layers, and the layers inside of them."""
    recurrent = [layer for layer in sublayers(model) if isinstance(layer, keras.layers.RNN)]
    return [part for layer in recurrent for part in sublayers(layer.cell)]
