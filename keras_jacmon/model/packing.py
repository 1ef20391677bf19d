"""Structures of tensors, complex ones too, as the real tensors that every stage below works with."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.tensors import known_sizes


@dataclass(frozen=True)
class Packing:
    """The structure of some tensors, and the way to their real form and back.

    A complex number becomes two real ones. In a tensor, all real parts stand before all imaginary parts.

    Attributes:
        structure: Structure with anything at the places of the tensors.
        shapes: Tuple of tuples, the shape of each tensor at one point.
        dtypes: Tuple of the types of the tensors.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[tf.DType, ...]

    @classmethod
    def of(cls, tensors: Any, *, leading: int) -> "Packing":
        """Makes it from a structure of tensors whose first `leading` axes are not those of a point."""
        flat = keras.tree.flatten(tensors)
        shapes = tuple(tuple(tensor.shape[leading:]) for tensor in flat)
        return cls(keras.tree.map_structure(lambda _: 0, tensors), shapes, tuple(tensor.dtype for tensor in flat))

    @property
    def is_plain(self) -> bool:
        """True for one real tensor."""
        return len(self.shapes) == 1 and not self.dtypes[0].is_complex

    def separate(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns each of the flat tensors `(points, ...)` as a real one; a complex one has a doubled first axis."""
        return [
            _doubled(tf.cast(tensor, dtype), axis=1) if dtype.is_complex else tensor
            for tensor, dtype in zip(tensors, self.dtypes, strict=True)
        ]

    def from_separate(self, tensors: Sequence[tf.Tensor]) -> Any:
        """Returns the structure whose `separate` form is given."""
        return self._packed(
            [
                tf.reshape(_complex(tensor), [-1, *shape]) if dtype.is_complex else tensor
                for tensor, shape, dtype in zip(tensors, self.shapes, self.dtypes, strict=True)
            ]
        )

    def joined(self, sequences: Any) -> tf.Tensor:
        """Returns a structure of tensors `(batch, time, ...)` as one real tensor `(batch, time, ...)`."""
        flat = keras.tree.flatten(sequences)
        if self.is_plain:
            return flat[0]
        common = self._common_dtype()
        real = [_doubled(tensor, axis=2) if tensor.dtype.is_complex else tensor for tensor in flat]
        return tf.concat([tf.cast(_with_one_axis(tensor), common) for tensor in real], axis=-1)

    def from_joined(self, tensor: tf.Tensor) -> Any:
        """Returns the structure of tensors `(points, ...)` whose `joined` form is given."""
        if self.is_plain:
            return self._packed([tensor])
        sizes = [
            prod(shape) * (2 if dtype.is_complex else 1) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]
        parts = []
        for part, shape, dtype in zip(tf.split(tensor, sizes, axis=-1), self.shapes, self.dtypes, strict=True):
            value = _complex(part) if dtype.is_complex else part
            # A tensor of half precision is given in float32 here.
            value = value if dtype.is_complex or dtype.is_floating else tf.cast(value, dtype)
            parts.append(tf.reshape(value, [-1, *shape]))
        return self._packed(parts)

    def _packed(self, flat: Sequence[tf.Tensor]) -> Any:
        return keras.tree.pack_sequence_as(self.structure, list(flat))

    def _common_dtype(self) -> tf.DType:
        """Returns the widest type of the real and imaginary parts; floating-point if one of them is."""
        real = [dtype.real_dtype for dtype in self.dtypes]
        floating = [dtype for dtype in real if dtype.is_floating]
        return max(
            floating or [dtype for dtype in real if dtype.is_integer] or [tf.int32], key=lambda dtype: dtype.size
        )


def real_form(tensor: tf.Tensor) -> tf.Tensor:
    """Returns a tensor `(points, ...)`, as a real one with a doubled first axis if it is complex."""
    return _doubled(tensor, axis=1) if tensor.dtype.is_complex else tensor


def like_original(real: tf.Tensor, original: tf.Tensor) -> tf.Tensor:
    """Returns a tensor `(points, ...)` whose `real_form` is given, with the type of another one."""
    if not original.dtype.is_complex:
        return tf.cast(real, original.dtype)
    return tf.cast(_complex(real), original.dtype)


def _doubled(tensor: tf.Tensor, axis: int) -> tf.Tensor:
    """Returns the real parts of a complex tensor, and behind them its imaginary parts, along an axis."""
    tensor = tensor if tensor.shape.rank > axis else tf.expand_dims(tensor, -1)
    return tf.concat([tf.math.real(tensor), tf.math.imag(tensor)], axis=axis)


def _complex(tensor: tf.Tensor) -> tf.Tensor:
    """Returns the complex tensor whose doubled form `(points, ...)` is given."""
    real, imaginary = tf.split(tensor, 2, axis=1)
    return tf.complex(real, imaginary)


def _with_one_axis(tensor: tf.Tensor) -> tf.Tensor:
    """`(batch, time, ...)` -> `(batch, time, n)`."""
    batch, time = known_sizes(tensor)[:2]
    return tf.reshape(tensor, [batch, time, prod(tensor.shape[2:])])
