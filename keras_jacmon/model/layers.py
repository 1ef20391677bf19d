"""Recurrent layers of a model, and their names in reports."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from keras_jacmon.errors import did_you_mean, invalid_argument
from keras_jacmon.model.internals import sublayers
from keras_jacmon.model.recurrences import Adapter, registered_adapter
from keras_jacmon.model.unregistered import registration_hint


@dataclass(frozen=True)
class RecurrentLayer:
    """A recurrent layer and its name in reports, logs and TensorBoard tags.

    Attributes:
        name: String, unique within a model.
        layer: `keras.layers.RNN`, or a layer with a registered recurrence.
        adapter: The registered adapter of the layer. Defaults to None, for `keras.layers.RNN`.
    """

    name: str
    layer: Any
    adapter: Adapter | None = None


def check_model(model: Any) -> None:
    """Checks that a model is one of Keras.

    Args:
        model: The object that was given as the model.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(model, keras.Layer):
        raise invalid_argument("model", "a Keras model or layer, before the probe", f"a {type(model).__name__}")


def find_recurrent_layers(model: keras.Layer) -> tuple[RecurrentLayer, ...]:
    """Finds every `keras.layers.RNN`, subclasses included, and every layer with a registered recurrence, at any depth.

    Args:
        model: Built Keras model or layer.

    Returns:
        Tuple of `RecurrentLayer`s. Their names are Keras paths without the model's own name, e.g.
        `bidirectional/forward_lstm`.

    Raises:
        ValueError: If the model has no recurrent layer.
    """
    found: dict[str, RecurrentLayer] = {}
    for layer in sublayers(model):
        adapter = registered_adapter(layer)
        if adapter or isinstance(layer, keras.layers.RNN):
            name = _unique(_path(layer, model), found)
            found[name] = RecurrentLayer(name, layer, adapter)
    if not found:
        raise invalid_argument(
            "model",
            "a model with at least one recurrent layer (`keras.layers.RNN` or a subclass)",
            f"model={model.name} ({type(model).__name__}) "
            f"with the layers {sorted({type(layer).__name__ for layer in sublayers(model)[1:]})}"
            + (f".{hint}" if (hint := registration_hint(model)) else ""),
        )
    return tuple(found.values())


def as_list(wanted: Iterable[str | keras.Layer] | str | keras.Layer | None) -> list[str | keras.Layer] | None:
    """Returns the layers that the user named as a list.

    Args:
        wanted: Name, layer, or iterable of them; None for all layers.

    Raises:
        ValueError: If it is nothing of that.
    """
    if wanted is None:
        return None
    if isinstance(wanted, (str, keras.Layer)):
        return [wanted]
    if isinstance(wanted, Mapping) or not isinstance(wanted, Iterable):
        raise invalid_argument("layers", "names of recurrent layers, or layers", f"layers={wanted!r}")
    return list(wanted)


def select_layers(
    found: Sequence[RecurrentLayer], wanted: Iterable[str | keras.Layer] | str | keras.Layer | None
) -> tuple[RecurrentLayer, ...]:
    """Selects the layers that the user named.

    Args:
        found: Sequence of layers from `find_recurrent_layers`.
        wanted: Name as in reports, name of a Keras layer, or a layer; or an iterable of them; None for all layers.

    Returns:
        Tuple of the wanted layers, in the order of `found`.

    Raises:
        ValueError: If a wanted layer is not in `found`, or `wanted` is empty or no names.
    """
    wanted = as_list(wanted)
    if wanted is None:
        return tuple(found)
    chosen: set[str] = set()
    for want in wanted:
        matches = [item.name for item in found if want is item.layer or want in (item.name, item.layer.name)]
        if not matches:
            names = [item.name for item in found]
            received = (
                f"{want.name} (a layer)" if isinstance(want, keras.Layer) else f"{want!r}{did_you_mean(want, names)}"
            )
            raise invalid_argument("layers", f"recurrent layers of the model: {names}", received)
        chosen.update(matches)
    if not chosen:
        raise invalid_argument("layers", "at least one layer, or None for every recurrent layer", f"layers={wanted}")
    return tuple(item for item in found if item.name in chosen)


def _path(layer: keras.Layer, model: keras.Layer) -> str:
    # Keras sets the path when it builds a layer; a layer that is never called has only its name.
    return (layer.path or layer.name).removeprefix(f"{model.name}/")


def _unique(name: str, taken: Iterable[str]) -> str:
    """Returns the name, numbered if it is taken.

    Keras allows two layers with the same path (e.g. the same name in two custom layers); reports must distinguish them.
    """
    candidate, count = name, 1
    while candidate in taken:
        candidate, count = f"{name}_{count}", count + 1
    return candidate
