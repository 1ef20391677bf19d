"""Layers that look recurrent, and that nothing is known of."""

import re
import types
from collections.abc import Iterator
from typing import Any

import keras

from keras_jacmon.model.internals import sublayers
from keras_jacmon.model.recurrences import registered_adapter

# Names of recurrent and state-space layers of the literature, as words of a class name.
_NAMES = re.compile(
    r"rnn|recurren|lstm|gru|scan|ssm|statespace|s4|s5|s6|lru|mamba|hippo|lmu|rwkv|retention|retnet|hawk|griffin"
    r"|linearattention|gatedlinear|deltanet|liquid|ltc|cfc|reservoir|echostate",
    re.IGNORECASE,
)

# Functions that a loop over steps is made of.
_LOOPS = ("associative_scan", "scan", "while_loop", "fori_loop", "rnn")


def registration_hint(model: keras.Layer) -> str:
    """Names the layers of a model that look recurrent, and shows how to register one; empty if there are none.

    Args:
        model: Keras model or layer.
    """
    signs = {layer: sign for layer in sublayers(model)[1:] if (sign := _sign(layer)) is not None}
    if not signs:
        return ""
    named = "; ".join(f"`{layer.name}` ({type(layer).__name__}, since {sign})" for layer, sign in signs.items())
    name = type(next(iter(signs))).__name__
    return (
        f" These layers look recurrent: {named}. Register the recurrence of a layer to have it measured:\n\n"
        "    def recurrence(layer, x):  # step(inputs_t, states) -> (output_t, new_states)\n"
        "        return keras_jacmon.Recurrence(inputs=x, states=[initial_state], step=step)\n"
        f"    keras_jacmon.register_recurrence({name}, recurrence)\n"
    )


def _sign(layer: keras.Layer) -> str | None:
    """Returns the sign by which a layer looks recurrent, in words; None if there is none."""
    kind = type(layer)
    if kind.__module__.startswith("keras.") or isinstance(layer, keras.layers.RNN) or registered_adapter(layer):
        return None
    if used := next((name for name in _LOOPS if name in _names_used(kind)), None):
        return f"its code uses `{used}`"
    # A cell is no layer with a loop; the layer around it is.
    if _is_cell(layer):
        return None
    if cell := next((part for part in _direct_parts(layer) if _is_cell(part)), None):
        return f"it holds the cell `{cell.name}`"
    return "its name says so" if _NAMES.search(kind.__name__) else None


def _is_cell(layer: Any) -> bool:
    return "state_size" in dir(layer) and not isinstance(layer, keras.layers.RNN)


def _direct_parts(layer: keras.Layer) -> list[Any]:
    """Returns the layers inside a layer that no `keras.layers.RNN` in it holds."""
    held = {id(part) for rnn in sublayers(layer) if isinstance(rnn, keras.layers.RNN) for part in sublayers(rnn)}
    return [part for part in sublayers(layer)[1:] if id(part) not in held]


def _names_used(kind: type) -> set[str]:
    """Returns the names that the methods of a user's class use."""
    own = [base for base in kind.__mro__ if not base.__module__.startswith(("keras.", "builtins"))]
    codes = [value.__code__ for base in own for value in vars(base).values() if isinstance(value, types.FunctionType)]
    return {name for code in codes for part in _with_inner(code) for name in part.co_names}


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yields the code of a function, and of the functions defined in it."""
    yield code
    for part in filter(lambda constant: isinstance(constant, types.CodeType), code.co_consts):
        yield from _with_inner(part)
