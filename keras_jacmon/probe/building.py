"""A model that has no weights yet is built from the probe."""

from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.probe.capture import shielded, training_argument
from keras_jacmon.probe.data import fit_probe
from keras_jacmon.probe.layers import sublayers


def build(model: keras.Layer, arrays: Any) -> None:
    """Lets layers that make their weights at the first call make them, without moving any state.

    Args:
        model: The model; one that has its weights is left as it is.
        arrays: What `read_probe` returned.

    Raises:
        ValueError: If the model cannot be called on the probe.
    """
    if model.built and all(layer.built for layer in _cells(model)):
        return
    # Traced and not run: a cell may write to a `tf.Variable`, which the scope does not shield.
    inputs = fit_probe(model, arrays)
    with shielded(model):
        build = tf.function(lambda: model(inputs, **training_argument(model)), autograph=False)
        try:
            build.get_concrete_function()
        except Exception as error:
            shapes = keras.tree.map_structure(lambda array: array.shape, arrays)
            raise ValueError(
                "Invalid value for argument `probe`. Expected a batch that the model can be built with. Received: "
                f"shapes {shapes}, for which the model raised {type(error).__name__}: {error}"
            ) from error


def _cells(model: keras.Layer) -> list[Any]:
    recurrent = [layer for layer in sublayers(model) if isinstance(layer, keras.layers.RNN)]
    return [part for layer in recurrent for part in sublayers(layer.cell)]
