"""Changes of layers that make their verdicts better, as an explicit call."""

from collections.abc import Iterable
from typing import Any

import keras

from keras_jacmon.measurement.trials import Trials
from keras_jacmon.meter import JacobianMeter
from keras_jacmon.report.suggestion import Suggestion


def suggest(
    model: keras.Layer,
    probe: Any,
    *,
    layers: Iterable[str | keras.Layer] | str | keras.Layer | None = None,
    seed: int = 0,
) -> dict[str, tuple[Suggestion, ...]]:
    """Finds changes that make a vanishing or exploding layer better, by trying them.

    Tried are a shift of the bias of the gates that keep the state, for `LSTM` and `GRU`, and where that does not make
    the layer stable a factor of the weights that multiply the states. Each number is found by the secant method, from
    up to 8 measurements with the states that the network then has. So what a suggestion predicts comes true, and none
    makes a verdict worse.

    The suggestions of `measure(model, probe).verdict` are the same ones. This call measures nothing else.

    Example:

    ```python
    import keras, numpy as np, keras_jacmon

    model = keras.Sequential([keras.Input((60, 3)), keras.layers.SimpleRNN(8, name="rnn"), keras.layers.Dense(1)])
    probe = np.random.default_rng(0).normal(size=(4, 60, 3))
    for suggestion in keras_jacmon.suggest(model, probe)["rnn"]:
        print(suggestion)
    ```

    Args:
        model: Keras model, compiled or not. Its weights stay as they are: copies are changed, or, where copies do not
            reach a cell, the weights are put back, also if the call is interrupted.
        probe: A batch of model inputs, as for `JacobianMeter`.
        layers: Names of recurrent layers, or layers. Defaults to None, all of them.
        seed: Integer, the seed of the random vectors. Defaults to 0.

    Returns:
        Dict by layer of tuples of `Suggestion`, the best first; empty for a layer that is stable, or that none of the
        changes makes better.

    Raises:
        ValueError: As for `JacobianMeter`.
    """
    meter = JacobianMeter(model, probe, layers=layers, measures=["joint/growth"], seed=seed)
    report = meter.measured(slow=True, trials=Trials.ON_MODEL)
    return {name: layer.suggestions for name, layer in report.items()}
