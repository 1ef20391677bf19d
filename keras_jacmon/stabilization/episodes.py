"""The Keras callback that flosses between the epochs of a training."""

import warnings
from collections.abc import Iterable
from typing import Any

import keras

from keras_jacmon.errors import check_whole, invalid_argument, is_number, is_whole, message_of
from keras_jacmon.model.building import build
from keras_jacmon.model.distribution import check_distribution
from keras_jacmon.model.inputs import fit_probe, read_probe
from keras_jacmon.model.layers import check_model, find_recurrent_layers, select_layers
from keras_jacmon.options import LARGEST_SEED
from keras_jacmon.stabilization.result import StabilizeResult
from keras_jacmon.stabilization.stabilize import stabilize


class FlossingEpisodes(keras.callbacks.Callback):
    """Brings the leading Lyapunov exponents of recurrent layers to 0 before given epochs of a training.

    Each episode is one call of `stabilize(method="flossing")`, with an optimizer of its own. It changes the weights of
    the recurrent layers and nothing else: the optimizer of the training keeps its state. The same training has the
    same episodes.

    Example:

    ```python
    import keras, numpy as np, keras_jacmon

    model = keras.Sequential([keras.Input((12, 2)), keras.layers.SimpleRNN(4, name="rnn"), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    x, y = np.ones((8, 12, 2), "float32"), np.zeros((8, 1), "float32")
    episodes = keras_jacmon.FlossingEpisodes(x, epochs=(0, 2), updates=10)
    model.fit(x, y, epochs=3, verbose=0, callbacks=[episodes])
    print(episodes.results[-1][1])
    ```

    Args:
        probe: A batch of model inputs, as for `JacobianMeter`. Its length is the window of the exponents.
        epochs: Iterable of integers, the epochs before which an episode comes, counted from 0 as in Keras. Defaults to
            `(0,)`, before the training.
        updates: Integer, maximum number of updates of an episode. It ends before if the root mean square of the
            exponents stays below 0.08. Defaults to 500.
        layers: Names of recurrent layers, or layers. Defaults to None, all of them.
        exponents: Integer, number of leading exponents, as far as a layer has them. Defaults to 16.
        learning_rate: Float, that of Adam in an episode. Defaults to 0.001.
        seed: Integer, the seed of the first directions. Defaults to 0.
        verbose: Integer, 1 for a progress bar in each episode, 0 for silence. Defaults to 0.

    Attributes:
        results: List of `(epoch, StabilizeResult)`, one for each episode that succeeded.

    Raises:
        ValueError: If an argument is invalid. A probe or a layer that does not fit the model is refused when `fit`
            begins. An episode that fails later is warned of, and the training goes on.

    References:
        R. Engelken, "Gradient flossing: improving gradient descent through dynamic control of Jacobians", arXiv
        2312.17306.
    """

    def __init__(
        self,
        probe: Any,
        epochs: Iterable[int] = (0,),
        updates: int = 500,
        *,
        layers: Iterable[str | keras.Layer] | str | keras.Layer | None = None,
        exponents: int = 16,
        learning_rate: float = 1e-3,
        seed: int = 0,
        verbose: int = 0,
    ) -> None:
        super().__init__()
        self._epochs = _checked(epochs)
        for name, value in (("updates", updates), ("exponents", exponents)):
            check_whole(name, value, 1)
        check_whole("seed", seed, 0, LARGEST_SEED)
        if not is_number(learning_rate) or not learning_rate > 0:
            raise invalid_argument("learning_rate", "a number above 0", learning_rate)
        self._probe, self._layers = read_probe(probe), layers
        self._updates, self._exponents = updates, exponents
        self._learning_rate, self._seed, self._verbose = learning_rate, seed, verbose
        self.results: list[tuple[int, StabilizeResult]] = []

    def set_model(self, model: keras.Model) -> None:
        """Checks probe and layers against the model, before the training begins."""
        super().set_model(model)
        check_model(model)
        check_distribution(model)
        build(model, self._probe)
        fit_probe(model, self._probe)
        select_layers(find_recurrent_layers(model), self._layers)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Flosses if the epoch is one of those that were given."""
        if epoch not in self._epochs:
            return
        try:
            result = self._episode()
        except Exception as error:  # noqa: BLE001 - a training that has run for days goes on
            warnings.warn(
                f"The flossing before epoch {epoch} failed: {message_of(error)}\nTraining goes on.", stacklevel=2
            )
        else:
            self.results.append((epoch, result))

    def _episode(self) -> StabilizeResult:
        return stabilize(
            self.model,
            self._probe,
            method="flossing",
            layers=self._layers,
            steps=self._updates,
            exponents=self._exponents,
            optimizer=keras.optimizers.Adam(self._learning_rate),
            seed=self._seed,
            verbose=self._verbose,
        )


def _checked(epochs: Iterable[int]) -> frozenset[int]:
    """Returns the epochs as a set."""
    numbers = list(epochs) if isinstance(epochs, Iterable) else [epochs]
    if not numbers or not all(is_whole(number, 0) for number in numbers):
        raise invalid_argument("epochs", "whole numbers of at least 0", f"epochs={epochs}")
    return frozenset(numbers)
