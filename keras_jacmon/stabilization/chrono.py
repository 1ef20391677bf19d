"""Chrono initialization: biases of gates whose memories last up to a given number of steps."""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_jacmon.errors import check_whole, invalid_argument
from keras_jacmon.model.layers import RecurrentLayer, check_model, find_recurrent_layers, select_layers
from keras_jacmon.options import LARGEST_SEED
from keras_jacmon.report.arrays import FloatArray
from keras_jacmon.stabilization.best_weights import changeable_weights

# With fewer steps the interval of the random numbers, from 1 to `length - 1`, would be empty.
_LEAST_LENGTH = 2


def chrono_biases(
    model: keras.Layer,
    length: int,
    *,
    layers: Iterable[str | keras.Layer] | str | keras.Layer | None = None,
    seed: int = 0,
) -> tuple[str, ...]:
    """Sets the biases of the gates of LSTMs and GRUs for memories of up to `length` steps.

    The bias of a forget gate is `ln u` with u uniform between 1 and `length - 1`, so that the gate lets through
    `u / (1 + u)`, and a memory lasts for about `u + 1` steps. In an LSTM the input gate gets the opposite bias. In a
    GRU the update gate, which keeps the state in Keras, has the part of the forget gate. Other weights stay.
    With small kernels the leading Lyapunov exponent is about `ln((length - 1) / length)`.

    Example:

    ```python
    import keras, keras_jacmon

    model = keras.Sequential([keras.Input((200, 3)), keras.layers.LSTM(32, name="lstm"), keras.layers.Dense(1)])
    keras_jacmon.chrono_biases(model, length=200)
    ```

    Args:
        model: Built Keras model.
        length: Integer of at least 2, the number of steps over which the task needs a memory.
        layers: Names of recurrent layers, or layers. Defaults to None, all LSTMs and GRUs whose bias is trained.
        seed: Integer, the seed of the random numbers. Defaults to 0.

    Returns:
        Tuple of strings, the names of the layers whose biases were set.

    Raises:
        ValueError: If a number is out of range, or a named layer, or every layer, has no such bias.

    References:
        C. Tallec, Y. Ollivier, "Can recurrent neural networks warp time?", arXiv 1804.11188.
    """
    check_model(model)
    check_whole("length", length, _LEAST_LENGTH)
    check_whole("seed", seed, 0, LARGEST_SEED)
    found = select_layers(find_recurrent_layers(model), layers)
    trained = changeable_weights(model, found)
    biases = {item.name: _bias_of(item, trained[item.name]) for item in found}
    missing = [name for name, bias in biases.items() if bias is None]
    if len(missing) == len(found) or (missing and layers is not None):
        raise invalid_argument("layers", "built LSTMs and GRUs with a bias that is trained", f"{missing}")
    generator = np.random.default_rng(seed)
    changed = [(item, biases[item.name]) for item in found if item.name not in missing]
    for item, bias in changed:
        units = item.layer.cell.units
        memories = np.log(generator.uniform(1, length - 1, units))
        bias.assign(_with_memories(keras.ops.convert_to_numpy(bias).copy(), memories, item.layer.cell))
    return tuple(item.name for item, _ in changed)


def _bias_of(item: RecurrentLayer, trained: list[keras.Variable]) -> Any:
    """Returns the bias of the gates of an LSTM or a GRU; None for a subclass, which may use its gates otherwise."""
    if item.adapter or type(item.layer.cell) not in (keras.layers.LSTMCell, keras.layers.GRUCell):
        return None
    return next((weight for weight in trained if weight is item.layer.cell.bias), None)


def _with_memories(bias: FloatArray, memories: FloatArray, cell: Any) -> FloatArray:
    """Returns the bias with other values for the gates that keep the state, in the order of Keras."""
    units = memories.size
    if isinstance(cell, keras.layers.LSTMCell):
        # Input, forget, candidate, output.
        bias[: 2 * units] = np.concatenate([-memories, memories])
        return bias
    # Update, reset, candidate; in two rows, which are added, if the state is reset after the product with the kernel.
    rows = bias.reshape(-1, 3 * units)
    rows[:, :units] = 0
    rows[0, :units] = memories
    return rows.reshape(bias.shape)
