"""Data frames: the numbers of reports in one long table."""

import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_jacmon.report.layer_report import LayerReport

_COLUMNS = ("iteration", "layer", "measure", "step", "sample", "index", "value", "imaginary", "uncertainty")

# The columns that say where a value of a measure belongs; each of them may be missing.
_PLACES = ("step", "sample", "index")

# In a column of whole numbers, an entry without one.
_NOTHING = -1

Columns = dict[str, npt.NDArray[Any]]


def to_dataframe(reports: Iterable[tuple[int | None, Mapping[str, LayerReport]]]) -> Any:
    """Returns the numbers of reports as a `pandas.DataFrame` in the long form, one number in each line.

    Args:
        reports: Iterable of pairs: the iteration count of the optimizer, and the layer reports by key. None instead of
            each count for a table without this column.

    Raises:
        ImportError: If pandas is not installed.
    """
    try:
        pandas = importlib.import_module("pandas")
    except ImportError as error:
        raise ImportError("`to_dataframe` needs pandas: pip install 'keras-jacmon[dataframe]'") from error
    # A part without lines has the columns of a table without reports.
    parts = [_labelled(_NOTHING, "", _part("", np.empty(0), {}))]
    counted = True
    for iteration, layers in reports:
        counted = iteration is not None
        for name, layer in layers.items():
            measures = (*_steps(layer), *_sequences(layer), *_spectra(layer))
            parts += [_labelled(_NOTHING if iteration is None else iteration, name, part) for part in measures]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in _COLUMNS[0 if counted else 1 :]}
    whole = {name: pandas.arrays.IntegerArray(columns[name], columns[name] == _NOTHING) for name in _PLACES}
    return pandas.DataFrame(columns | whole)


def _labelled(iteration: int, layer: str, part: Columns) -> Columns:
    shape = part["value"].shape
    return part | {"iteration": np.full(shape, iteration, np.int64), "layer": np.full(shape, layer, object)}


def _part(measure: str, values: npt.NDArray[Any], at: Mapping[str, Any], uncertainty: Any = np.nan) -> Columns:
    """Returns the columns of one measure; `at` has the whole numbers that say where each value belongs."""
    return {
        "measure": np.full(values.shape, measure, object),
        **{name: at.get(name, np.full(values.shape, _NOTHING)).astype(np.int64) for name in _PLACES},
        "value": values.real.astype(np.float64),
        "imaginary": values.imag.astype(np.float64),
        "uncertainty": np.broadcast_to(uncertainty, values.shape).astype(np.float64),
    }


def _steps(layer: LayerReport) -> Iterator[Columns]:
    for key, array in layer.values.items():
        at = layer.measured(key)
        steps, samples = np.nonzero(at)
        uncertainty = layer.uncertainties[key][at] if key in layer.uncertainties else np.nan
        yield _part(key, array[at], {"step": steps, "sample": samples}, uncertainty)


def _sequences(layer: LayerReport) -> Iterator[Columns]:
    for key, array in layer.sequences.items():
        at = _is_there(np.atleast_2d(array))
        places, samples = np.nonzero(at)
        errors = layer.uncertainties.get(key, np.empty(0))
        uncertainty = np.atleast_2d(errors)[at] if errors.shape == array.shape else np.nan
        # One number for a sample has no place among others.
        where = {"sample": samples} | ({"index": places + 1} if array.ndim > 1 else {})
        yield _part(key, np.atleast_2d(array)[at], where, uncertainty)


def _spectra(layer: LayerReport) -> Iterator[Columns]:
    for key, array in layer.spectra.items():
        at = _is_there(array.T).T
        points, places = np.nonzero(at)
        steps, samples = layer.spectra_at[points].T
        yield _part(key, array[at], {"step": steps, "sample": samples, "index": places + 1})


def _is_there(array: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Returns where the columns of an array have entries: NaN after the last number of a column fills it up."""
    number = ~np.isnan(array)
    until_last = np.logical_or.accumulate(number[::-1], axis=0)[::-1]
    return np.asarray(until_last | ~number.any(axis=0))
