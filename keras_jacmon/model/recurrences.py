"""Recurrences that users register for layers with a loop of their own."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras

from keras_jacmon.errors import invalid_argument

Step = Callable[[Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Recurrence:
    """The recurrence of one call of a layer: what an adapter returns; see `register_recurrence`.

    Example:

    ```python
    def running_sum(layer, x):
        def step(x_t, states):
            h = states[0] + x_t
            return h, [h]
        return keras_jacmon.Recurrence(inputs=x, states=[keras.ops.zeros_like(x[:, 0])], step=step)
    ```

    Attributes:
        inputs: Structure of tensors `(batch, time, ...)`, all that changes from step to step or from sample to sample.
            A time axis of size 1 stands for a tensor that is the same at all steps.
        states: Structure of tensors `(batch, ...)`, the initial states; the first one is the hidden state.
        step: Function of the inputs of one step and the states before it, in the structures of `inputs` and `states`
            with tensors `(points, ...)`. It returns the output of the step and the new states, in TensorFlow or Keras
            operations.
        mask: Boolean tensor `(batch, time)`, False at the steps that leave the states as they are. Defaults to None.
        go_backwards: Boolean, True if the steps run from the last position of `inputs` to the first. Defaults to False.
    """

    inputs: Any
    states: Any
    step: Step
    mask: Any = None
    go_backwards: bool = False


Adapter = Callable[..., Recurrence]

_OF_TYPES: dict[type, Adapter] = {}
_OF_LAYERS: "weakref.WeakKeyDictionary[keras.Layer, Adapter]" = weakref.WeakKeyDictionary()


def register_recurrence(layer: type | keras.Layer, adapter: Adapter | None) -> None:
    """Registers the recurrence of a layer that has a loop of its own: a scan, a convolution, a Python loop.

    From then on the layer is measured as a `keras.layers.RNN` is. At each measurement the outputs of the steps are
    compared with what the layer returned on the probe; a layer whose outputs differ is refused.

    Example:

    ```python
    class MinGRU(keras.layers.Layer):
        # h_t = (1 - z_t) h_{t-1} + z_t c_t for all steps at once.
        def __init__(self, units, **kwargs):
            super().__init__(**kwargs)
            self.units = units
            self.gate, self.candidate = keras.layers.Dense(units, "sigmoid"), keras.layers.Dense(units)

        def build(self, shape):
            self.gate.build(shape)
            self.candidate.build(shape)

        def call(self, x):
            z = self.gate(x)
            combine = lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1])
            h = keras.ops.associative_scan(combine, (1 - z, z * self.candidate(x)), axis=1)[1]
            return keras.ops.reshape(h, keras.ops.shape(z))

    def recurrence(layer, x):
        def step(x_t, states):
            z = layer.gate(x_t)
            h = (1 - z) * states[0] + z * layer.candidate(x_t)
            return h, [h]
        return keras_jacmon.Recurrence(x, [keras.ops.zeros((x.shape[0], layer.units))], step)

    keras_jacmon.register_recurrence(MinGRU, recurrence)

    model = keras.Sequential([keras.Input((5, 3)), MinGRU(8, name="min_gru")])
    print(keras_jacmon.measure(model, np.ones((2, 5, 3)))["min_gru"]["variance"])
    ```

    Args:
        layer: The class of the layer, or a layer, whose adapter goes before the one of its class. A subclass needs an
            adapter of its own, since it may override `call`.
        adapter: A function of the layer and of the arguments that its `call` received, without `training`, and without
            those that are None. It returns the `Recurrence` of this call. It is called again wherever a step is needed,
            then with zeros: what `step` takes from around it may depend on weights, not on the arguments. None removes
            the adapter.

    Raises:
        ValueError: If `layer` is neither a class of Keras layers nor a layer, or `adapter` cannot be called.
    """
    if not isinstance(layer, keras.Layer) and not (isinstance(layer, type) and issubclass(layer, keras.Layer)):
        raise invalid_argument("layer", "a class of Keras layers, or a layer", f"layer={layer!r}")
    if adapter is not None and not callable(adapter):
        expected = "a function that returns a `keras_jacmon.Recurrence`, or None"
        raise invalid_argument("adapter", expected, f"adapter={adapter!r}")
    registry: Any = _OF_LAYERS if isinstance(layer, keras.Layer) else _OF_TYPES
    if adapter is None:
        registry.pop(layer, None)
    else:
        registry[layer] = adapter


def registered_adapter(layer: keras.Layer) -> Adapter | None:
    """Returns the adapter of a layer, or of its class itself; None if there is none."""
    return _OF_LAYERS.get(layer) or _OF_TYPES.get(type(layer))
