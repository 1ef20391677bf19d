"""Records of layer reports: dicts that an archive holds, checked when they are read."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_jacmon.report.layer_report import LayerReport
from keras_jacmon.report.reductions import REDUCTIONS
from keras_jacmon.report.suggestion import Suggestion

# A report with a value of the right type in each field.
_TYPES = LayerReport("", 0, {}, np.ones((0, 0), bool), certificate=0.0, weight_size=0.0)

# The fields that may be None instead.
_OPTIONAL = ("certificate", "weight_size")

# The measures of sequences with a value for each number of steps.
_BY_SPAN = ("flow", "flow_of_all", "sensitivity")

# A point is a step and a sample.
_POINT = 2


def to_record(layer: LayerReport) -> dict[str, Any]:
    """Returns the fields of a report by name, with a dict for each suggestion."""
    fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(LayerReport)}
    return {**fields, "suggestions": tuple(map(dataclasses.asdict, layer.suggestions))}


def from_record(record: Mapping[str, Any]) -> LayerReport:
    """Returns the report that a record was made of.

    Raises:
        TypeError: If fields are missing, unknown, of another type, or do not fit together.
    """
    suggestions = tuple(map(Suggestion.of_record, record.get("suggestions", ())))
    layer = LayerReport(**{**record, "suggestions": suggestions})
    _check_types(layer)
    _check_arrays(layer)
    _check_words(layer)
    if not layer.uncertainties.keys() >= layer.estimated & layer.values.keys():
        raise TypeError("estimated are values without an uncertainty")
    if not all(isinstance(number, (int, float)) for number in layer.targets.values()):
        raise TypeError("targets are not all numbers")
    return layer


def _check_types(layer: LayerReport) -> None:
    for name, value in to_record(layer).items():
        expected = type(getattr(_TYPES, name))
        if not isinstance(value, expected) and not (name in _OPTIONAL and value is None):
            raise TypeError(f"{name} is of type {type(value).__name__} and not {expected.__name__}")


def _check_arrays(layer: LayerReport) -> None:
    shape = layer.mask.shape
    _check("mask", [layer.mask], "b", lambda array: array.ndim == _POINT)
    _check("values", layer.values.values(), "f", lambda array: array.shape == shape)
    _check("sampled", layer.sampled.values(), "b", lambda array: array.shape == shape)
    measured = {**layer.values, **layer.sequences}
    for key, array in layer.sequences.items():
        _check(f"sequences of {key}", [array], "f", partial(_is_of_sequences, key, shape))
    for key, array in layer.uncertainties.items():
        _check(f"uncertainties of {key}", [array], "f", partial(_is_beside, measured.get(key)))
    _check("spectra", layer.spectra.values(), "fc", lambda array: array.shape[:-1] == layer.spectra_at.shape[:1])
    _check("spectra_at", [layer.spectra_at], "iu", lambda array: array.shape[1:] == (_POINT,))


def _is_of_sequences(key: str, shape: tuple[int, ...], array: npt.NDArray[Any]) -> bool:
    if key.rpartition("/")[2] in _BY_SPAN:
        return array.shape == shape
    return array.size > 0 and array.ndim <= len(shape) and array.shape[-1] == shape[-1]


def _is_beside(measured: Any, array: npt.NDArray[Any]) -> bool:
    return isinstance(measured, np.ndarray) and array.shape == measured.shape


def _check(name: str, arrays: Iterable[Any], kinds: str, fits: Callable[[npt.NDArray[Any]], bool]) -> None:
    """Checks the types and shapes of arrays.

    Raises:
        TypeError: If one of them is no array, or one of another type or shape.
    """
    for array in arrays:
        if not isinstance(array, np.ndarray) or array.dtype.kind not in kinds or not fits(array):
            found = f"dtype {array.dtype} and shape {array.shape}" if isinstance(array, np.ndarray) else repr(array)
            raise TypeError(f"{name} do not fit: {found}")


def _check_words(layer: LayerReport) -> None:
    for name, words in (
        ("estimated", layer.estimated),
        ("notes", layer.notes),
        ("methods", layer.methods.values()),
        ("may_be_infinite", layer.may_be_infinite),
    ):
        if not all(isinstance(word, str) for word in words):
            raise TypeError(f"{name} are not all text")
    known = layer.reductions.keys() <= layer.sequences.keys() and set(layer.reductions.values()) <= set(REDUCTIONS)
    if not known or not all(
        set(REDUCTIONS[name].source_keys(key)) <= layer.sequences.keys() for key, name in layer.reductions.items()
    ):
        raise TypeError(f"reductions do not fit: {layer.reductions}")
