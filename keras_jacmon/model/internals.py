"""Private parts of Keras and `tf.data` that this package needs, because they have no public counterpart."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf


def sublayers(layer: Any) -> list[Any]:
    """Returns every Keras layer inside a layer, itself included; nothing for an object that is not a Keras layer.

    Keras offers no public walk over the layers that a custom layer holds in attributes, lists and dicts.
    """
    return list(layer._flatten_layers()) if isinstance(layer, keras.Layer) else []  # noqa: SLF001


def training_argument(layer: Any) -> dict[str, bool]:
    """Returns `{"training": False}` if the layer's `call` takes it, as Keras itself decides.

    Keras reads the signature of `call` once and keeps the answer to itself.
    """
    return {"training": False} if getattr(layer, "_call_has_training_arg", False) else {}


@contextlib.contextmanager
def losses_put_back(model: keras.Layer) -> Iterator[None]:
    """Restores the losses that the layers had added, at the end of the context.

    At the beginning of a call Keras forgets the losses of the call before, and has no public way to set them.
    """
    layers = sublayers(model)
    before = [(list(layer._losses), set(layer._loss_ids)) for layer in layers]  # noqa: SLF001
    try:
        yield
    finally:
        for layer, (losses, ids) in zip(layers, before, strict=True):
            layer._losses[:] = losses  # noqa: SLF001
            layer._loss_ids.clear()  # noqa: SLF001
            layer._loss_ids.update(ids)  # noqa: SLF001


@contextlib.contextmanager
def open_again_on_failure(model: keras.Layer) -> Iterator[None]:
    """Makes Sequential models forget the shape that they were about to be built for, if the context raises.

    Keras puts the shape into a first layer of its own before it builds the others; it has no public way to undo that.
    """
    layers = {part: list(part._layers) for part in sublayers(model) if isinstance(part, keras.Sequential)}  # noqa: SLF001
    try:
        yield
    except Exception:
        for part, before in layers.items():
            if part._layers != before:  # noqa: SLF001
                part._layers, part._functional, part.built = before, None, False  # noqa: SLF001
        raise


@contextlib.contextmanager
def without_fused_kernels(model: keras.Layer) -> Iterator[None]:
    """Keeps layers from passing their whole sequence to one fused kernel, which never calls their cells.

    On a GPU `Bidirectional` passes both directions to such a kernel, without calling its layers. The
    attribute is an argument of `LSTM` and `GRU`, but Keras does not document that it may be set later.
    """
    fused = {layer: layer.use_cudnn for layer in sublayers(model) if getattr(layer, "use_cudnn", False)}
    try:
        for layer in fused:
            layer.use_cudnn = False
        yield
    finally:
        for layer, value in fused.items():
            layer.use_cudnn = value


@contextlib.contextmanager
def without_masks(layer: Any) -> Iterator[None]:
    """Resets the dropout masks that cells keep, at the end of the context.

    A mask from a trace is symbolic, and would fail in `fit`. The class of the cells that keep masks is not
    public; its methods are.
    """
    try:
        yield
    finally:
        for part in sublayers(layer):
            for name in ("reset_dropout_mask", "reset_recurrent_dropout_mask"):
                getattr(part, name, _do_nothing)()


def tensors_in(cell: Any) -> list[str]:
    """Returns the names of the attributes of a cell, and of the layers in it, that hold tensors of a graph."""
    return [
        name
        for part in sublayers(cell)
        for name, value in vars(part).items()
        if not name.startswith("_") and any(map(tf.is_symbolic_tensor, keras.tree.flatten(value)))
    ]


def _do_nothing() -> None:
    pass


def dataset_sources(dataset: tf.data.Dataset) -> list[tf.data.Dataset]:
    """Returns the datasets that a dataset reads from; it has no public way to say so."""
    return list(dataset._inputs())  # noqa: SLF001
