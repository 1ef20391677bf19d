"""Is the probe something that the model can read, and can it be read without touching the training?"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_jacmon.model.layers import sublayers


def read_probe(probe: Any) -> Any:
    """Takes the probe batch out of what the user gave.

    Args:
        probe: A batch of model inputs: an array or tensor, a list, tuple or dict of them for several inputs, or a
            `tf.data.Dataset` or `keras.utils.PyDataset`, whose first batch is taken (of `(x, y)`, x).

    Returns:
        NumPy arrays in the structure of the inputs.

    Raises:
        ValueError: If the batch is empty, ragged, not numeric (text is allowed), holds NaN or Inf, or comes from a
            dataset that shuffles.
    """
    if isinstance(probe, (tf.data.Dataset, keras.utils.PyDataset)):
        with _random_numbers_put_back():
            probe = _first_batch(probe)
    elif hasattr(probe, "__next__"):
        raise _invalid("an array, tensor, dict, list or dataset: a batch taken from an iterator would be missing "
                       "in the training", type(probe).__name__)  # fmt: skip
    if keras.tree.is_nested(probe) and not keras.tree.flatten(probe):
        raise _invalid("a batch of model inputs", repr(probe))
    arrays = keras.tree.map_structure(_as_array, probe)
    _check_values(keras.tree.flatten(arrays))
    return arrays


def read_targets(targets: Any, probe: Any) -> Any:
    """Checks the targets of a probe.

    Args:
        targets: What the loss compares the outputs with: an array or tensor, a list, tuple or dict of them.
        probe: What `read_probe` returned.

    Returns:
        Tensors in the same structure, floating-point ones of Keras' default type, as `fit` converts them.

    Raises:
        ValueError: If there is not one target for each sample.
    """

    def as_tensor(leaf: Any) -> tf.Tensor:
        array = np.asarray(leaf)
        if array.dtype.kind not in "biufV" or array.ndim == 0:
            raise ValueError(
                "Invalid value for argument `targets`. Expected arrays of numbers, the first axis of which counts the "
                f"samples. Received: an array of dtype {array.dtype} and shape {array.shape}"
            )
        return _to_tensor(array)

    tensors = keras.tree.map_structure(as_tensor, targets)
    samples = keras.tree.flatten(probe)[0].shape[0]
    counts = [int(tensor.shape[0]) for tensor in keras.tree.flatten(tensors)]
    if not counts or set(counts) != {samples}:
        raise ValueError(
            f"Invalid value for argument `targets`. Expected those of the {samples} samples of the probe. Received: "
            f"targets of {counts} samples"
        )
    return tensors


def fit_probe(model: keras.Layer, arrays: Any) -> Any:
    """Checks a probe against the model's inputs and converts it to tensors of their types.

    Args:
        model: A built model. Structure, shapes and types are checked where it declares them (functional and
            Sequential models do).
        arrays: What `read_probe` returned.

    Returns:
        Tensors in the same structure.

    Raises:
        ValueError: If number, names, shapes or types of the arrays are not those of the model's inputs.
    """
    declared = getattr(model, "inputs", None)
    if not declared:
        return keras.tree.map_structure(_to_tensor, arrays)
    # Of the first batch that it saw, a Sequential model without an `Input` declares the whole shape, and holds no other
    # batch to it.
    frozen = isinstance(model, keras.Sequential) and not any(
        getattr(layer, "stateful", False) for layer in sublayers(model)
    )
    if isinstance(arrays, dict):
        names = [spec.name for spec in declared]
        missing = [name for name in names if name not in arrays]
        if missing:
            raise _invalid(f"a dict with the model's inputs {names}", f"a dict with {sorted(arrays)}")
        return {name: _fit(arrays[name], spec, name, frozen=frozen) for name, spec in zip(names, declared, strict=True)}
    flat = keras.tree.flatten(arrays)
    if len(flat) != len(declared):
        raise _invalid(f"{len(declared)} input(s), as the model takes them", f"{len(flat)} array(s)")
    tensors = [_fit(array, spec, spec.name, frozen=frozen) for array, spec in zip(flat, declared, strict=True)]
    return keras.tree.pack_sequence_as(arrays, tensors)


@contextlib.contextmanager
def _random_numbers_put_back() -> Iterator[None]:
    """Reading a dataset may augment it with the generators of NumPy and Python, which the training draws from too."""
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
        # A shuffle draws a new order each time it is read: reading it here would shift the order of the training.
        raise _invalid(
            "a dataset that does not shuffle (reading one that does changes the order that training sees); "
            "pass a batch instead, e.g. `x[:32]`, or build the probe before `shuffle()`",
            "a dataset with `shuffle()`",
        )
    for batch in dataset:
        x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
        return x
    raise _invalid("a dataset with at least one batch", "an empty dataset")


def _shuffles(dataset: tf.data.Dataset) -> bool:
    # A dataset does not say what it was made from in public.
    return "Shuffle" in type(dataset).__name__ or any(_shuffles(source) for source in dataset._inputs())  # noqa: SLF001


def _as_array(leaf: Any) -> np.ndarray[Any, Any]:
    if isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor)):
        raise _invalid("dense arrays; pad them and mask the padding", type(leaf).__name__)
    try:
        array = np.asarray(leaf)
    except ValueError as error:
        raise _invalid("arrays of one shape for all samples", f"{type(leaf).__name__} ({error})") from error
    text = array.dtype.kind in "SU" or (array.dtype.kind == "O" and _is_text(array))
    # Kind V is what NumPy calls bfloat16 and its kin.
    if array.dtype.kind not in "biufV" and not text:
        raise _invalid("numbers", f"an array of dtype {array.dtype}")
    return array


def _is_text(array: np.ndarray[Any, Any]) -> bool:
    return all(isinstance(value, (str, bytes)) for value in array.flat)


def _check_values(arrays: Sequence[np.ndarray[Any, Any]]) -> None:
    for array in arrays:
        if array.ndim == 0 or array.size == 0:
            raise _invalid("at least one sample and one step", f"an array of shape {array.shape}")
        if array.dtype.kind in "fV" and not np.isfinite(array.astype(np.float64)).all():
            bad = int((~np.isfinite(array.astype(np.float64))).sum())
            raise _invalid("finite numbers", f"an array of shape {array.shape} with {bad} NaN or Inf")
    batches = sorted({array.shape[0] for array in arrays})
    if len(batches) > 1:
        raise _invalid("the same number of samples in each input", f"batch sizes {batches}")


def _fit(array: np.ndarray[Any, Any], spec: Any, name: str, *, frozen: bool) -> tf.Tensor:
    """One array as a tensor of the declared input's type, if its shape allows."""
    shape = tuple(spec.shape)
    if frozen and shape and shape[0] is not None:
        shape = (*[None] * (len(shape) - 1), shape[-1])
    if len(shape) != array.ndim or any(
        want is not None and want != got for want, got in zip(shape, array.shape, strict=True)
    ):
        raise _invalid(f"shape {shape} for input `{name}`", f"an array of shape {array.shape}")
    dtype = tf.as_dtype(spec.dtype)
    text = array.dtype.kind in "SUO"
    if text != (dtype == tf.string):
        raise _invalid(f"dtype {dtype.name} for input `{name}`", f"an array of dtype {array.dtype}")
    if dtype.is_integer and array.dtype.kind in "fV" and (array != np.floor(array)).any():
        raise _invalid(f"whole numbers (dtype {dtype.name}) for input `{name}`", f"fractions of dtype {array.dtype}")
    return tf.convert_to_tensor(array) if text else tf.cast(tf.convert_to_tensor(array), dtype)


def _to_tensor(array: np.ndarray[Any, Any]) -> tf.Tensor:
    tensor = tf.convert_to_tensor(array)
    # As `fit` converts its arrays.
    return tf.cast(tensor, keras.config.floatx()) if tensor.dtype.is_floating else tensor


def _invalid(expected: str, received: str) -> ValueError:
    return ValueError(f"Invalid value for argument `probe`. Expected {expected}. Received: {received}")
