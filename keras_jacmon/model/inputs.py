"""Inputs of a model, the probe and its targets: read without effect on the training, checked against the model."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_jacmon.errors import invalid_argument
from keras_jacmon.model.internals import dataset_sources, sublayers

# A single sample of sequences with features has two axes.
_AXES_OF_A_SAMPLE = 2
_MISSING_BATCH = "; if the batch axis is missing, pass `x[:1]` and not `x[0]`"


def hint_at_slip(arrays: Any) -> str:
    """Returns a hint at a slip that a probe looks like, to be put behind the sentence that refuses it.

    Args:
        arrays: Structure of arrays or tensors `(batch, ...)`, the probe.

    Returns:
        String; empty if it looks like none.
    """
    if isinstance(arrays, tuple):
        return "; of a pair of inputs and targets, as `next(iter(dataset))` gives it, pass the inputs alone: `pair[0]`"
    axes = [len(array.shape) for array in keras.tree.flatten(arrays)]
    return _MISSING_BATCH if min(axes) <= _AXES_OF_A_SAMPLE else ""


def read_probe(probe: Any) -> Any:
    """Reads the probe as arrays.

    Args:
        probe: Batch of model inputs: an array or tensor, a list, tuple or dict of them for several inputs, or a
            `tf.data.Dataset` or `keras.utils.PyDataset`, whose first batch is taken (x, if it is a pair `(x, y)`).

    Returns:
        NumPy arrays `(batch, ...)` in the structure of the inputs.

    Raises:
        ValueError: If the batch is empty, ragged, not numeric (text is allowed), holds NaN or Inf, comes from a dataset
            that shuffles, or is a model.
    """
    if isinstance(probe, keras.Layer):
        expected = "a batch of model inputs, after the model if there is one"
        raise invalid_argument("probe", expected, f"a Keras layer of the class {type(probe).__name__}")
    if isinstance(probe, (tf.data.Dataset, keras.utils.PyDataset)):
        with _random_numbers_put_back():
            probe = _first_batch(probe)
    elif isinstance(probe, Iterator):
        expected = (
            "an array, tensor, dict, list or dataset: a batch taken from an iterator would be missing in the training"
        )
        raise invalid_argument("probe", expected, type(probe).__name__)
    if keras.tree.is_nested(probe) and not keras.tree.flatten(probe):
        raise invalid_argument("probe", "a batch of model inputs", repr(probe))
    arrays = keras.tree.map_structure(_as_array, probe)
    _check_values(keras.tree.flatten(arrays))
    return arrays


def read_targets(targets: Any, probe: Any) -> Any:
    """Reads the targets of a probe as tensors.

    Args:
        targets: Array or tensor, or a list, tuple or dict of them, that the loss compares the outputs with.
        probe: Structure of NumPy arrays `(batch, ...)`, as `read_probe` returns them.

    Returns:
        Tensors `(batch, ...)` in the structure of the targets. Floating-point ones have Keras' default type, as in
        `fit`.

    Raises:
        ValueError: If there is not one target for each sample.
    """
    tensors = keras.tree.map_structure(_as_target, targets)
    samples = keras.tree.flatten(probe)[0].shape[0]
    counts = [int(tensor.shape[0]) for tensor in keras.tree.flatten(tensors)]
    if not counts or set(counts) != {samples}:
        raise invalid_argument(
            "targets", f"one target for each of the {samples} samples of the probe", f"targets of {counts} samples"
        )
    return tensors


def _as_target(leaf: Any) -> tf.Tensor:
    array = np.asarray(leaf)
    if array.dtype.kind not in "biufV" or array.ndim == 0:
        raise invalid_argument(
            "targets",
            "arrays of numbers, the first axis of which counts the samples",
            f"an array of dtype {array.dtype} and shape {array.shape}",
        )
    return _to_tensor(array)


def fit_probe(model: keras.Layer, arrays: Any) -> Any:
    """Checks a probe against the model's inputs and converts it to tensors of their types.

    Args:
        model: Built Keras model. Structure, shapes and types are checked if it declares them, as functional and
            Sequential models do.
        arrays: Structure of NumPy arrays `(batch, ...)`, as `read_probe` returns them.

    Returns:
        Tensors `(batch, ...)` in the same structure.

    Raises:
        ValueError: If number, names, shapes or types of the arrays differ from the model's inputs.
    """
    declared = getattr(model, "inputs", None)
    if not declared:
        return keras.tree.map_structure(_to_tensor, arrays)
    # A Sequential model without an `Input` declares the whole shape of the first batch that it saw, but takes others.
    frozen = isinstance(model, keras.Sequential) and not any(
        getattr(layer, "stateful", False) for layer in sublayers(model)
    )
    if isinstance(arrays, dict):
        names = [spec.name for spec in declared]
        missing = [name for name in names if name not in arrays]
        if missing:
            raise invalid_argument("probe", f"a dict with the model's inputs {names}", f"a dict with {sorted(arrays)}")
        return {name: _fit(arrays[name], spec, name, frozen=frozen) for name, spec in zip(names, declared, strict=True)}
    flat = keras.tree.flatten(arrays)
    if len(flat) != len(declared):
        received = f"{len(flat)} array(s){hint_at_slip(arrays)}"
        raise invalid_argument("probe", f"{len(declared)} input(s), as the model takes them", received)
    tensors = [_fit(array, spec, spec.name, frozen=frozen) for array, spec in zip(flat, declared, strict=True)]
    return keras.tree.pack_sequence_as(arrays, tensors)


@contextlib.contextmanager
def _random_numbers_put_back() -> Iterator[None]:
    """Restores the states of NumPy's and Python's global random generators at the end of the context.

    Reading a dataset may augment it with random numbers from these generators, which the training uses too.
    """
    of_numpy, of_python = np.random.get_state(), random.getstate()  # noqa: NPY002 - that is the one
    try:
        yield
    finally:
        np.random.set_state(of_numpy)  # noqa: NPY002
        random.setstate(of_python)


def _first_batch(dataset: Any) -> Any:
    if isinstance(dataset, keras.utils.PyDataset):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(dataset[0])
        return x
    if _shuffles(dataset):
        # A shuffle draws a new order each time it is read: reading it here would change the order in the training.
        raise invalid_argument(
            "probe",
            "a dataset that does not shuffle (reading one that does changes the order that training sees); "
            "pass a batch instead, e.g. `x[:32]`, or build the probe before `shuffle()`",
            "a dataset with `shuffle()`",
        )
    for batch in dataset:
        x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
        return x
    raise invalid_argument("probe", "a dataset with at least one batch", "an empty dataset")


def _shuffles(dataset: tf.data.Dataset) -> bool:
    return "Shuffle" in type(dataset).__name__ or any(map(_shuffles, dataset_sources(dataset)))


def _as_array(leaf: Any) -> np.ndarray[Any, Any]:
    if isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor)):
        raise invalid_argument("probe", "dense arrays; pad them and mask the padding", type(leaf).__name__)
    if leaf is None or isinstance(leaf, (bool, int, float, str, bytes)):
        # A list stands for several inputs, and so its numbers for inputs of their own.
        expected = "arrays or tensors; of a list of numbers make one by `np.array(probe)`"
        raise invalid_argument("probe", expected, f"a single value of type {type(leaf).__name__}")
    try:
        array = np.asarray(leaf)
    except ValueError as error:
        raise invalid_argument(
            "probe", "arrays of one shape for all samples", f"{type(leaf).__name__} ({error})"
        ) from error
    text = array.dtype.kind in "SU" or (array.dtype.kind == "O" and _is_text(array))
    # Kind V is NumPy's kind for bfloat16 and similar types.
    if array.dtype.kind not in "biufV" and not text:
        raise invalid_argument("probe", "numbers", f"an array of dtype {array.dtype}")
    return array


def _is_text(array: np.ndarray[Any, Any]) -> bool:
    return all(isinstance(value, (str, bytes)) for value in array.flat)


def _check_values(arrays: Sequence[np.ndarray[Any, Any]]) -> None:
    for array in arrays:
        if array.ndim == 0 or array.size == 0:
            raise invalid_argument("probe", "at least one sample and one step", f"an array of shape {array.shape}")
        if array.dtype.kind in "fV" and not np.isfinite(array.astype(np.float64)).all():
            bad = int((~np.isfinite(array.astype(np.float64))).sum())
            raise invalid_argument("probe", "finite numbers", f"an array of shape {array.shape} with {bad} NaN or Inf")
    batches = sorted({array.shape[0] for array in arrays})
    if len(batches) > 1:
        raise invalid_argument("probe", "the same number of samples in each input", f"batch sizes {batches}")


def _fit(array: np.ndarray[Any, Any], spec: Any, name: str, *, frozen: bool) -> tf.Tensor:
    """Converts an array to a tensor of the declared input's type, after checks of its shape and type."""
    shape = tuple(spec.shape)
    if frozen and shape and shape[0] is not None:
        shape = (*[None] * (len(shape) - 1), shape[-1])
    if len(shape) != array.ndim or any(
        want is not None and want != got for want, got in zip(shape, array.shape, strict=True)
    ):
        hint = _MISSING_BATCH if array.ndim == len(shape) - 1 else ""
        received = f"an array of shape {array.shape}{hint}"
        raise invalid_argument("probe", f"shape {shape} for input `{name}`", received)
    dtype = tf.as_dtype(spec.dtype)
    text = array.dtype.kind in "SUO"
    if text != (dtype == tf.string):
        raise invalid_argument("probe", f"dtype {dtype.name} for input `{name}`", f"an array of dtype {array.dtype}")
    if dtype.is_integer and array.dtype.kind in "fV" and (array != np.floor(array)).any():
        raise invalid_argument(
            "probe", f"whole numbers (dtype {dtype.name}) for input `{name}`", f"fractions of dtype {array.dtype}"
        )
    return tf.convert_to_tensor(array) if text else tf.cast(tf.convert_to_tensor(array), dtype)


def _to_tensor(array: np.ndarray[Any, Any]) -> tf.Tensor:
    tensor = tf.convert_to_tensor(array)
    # As `fit` converts its arrays.
    return tf.cast(tensor, keras.config.floatx()) if tensor.dtype.is_floating else tensor
