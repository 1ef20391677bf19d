"""Arrays of the reports: their type, and what makes two of them the same."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]


def same(one: Any, other: Any) -> bool:
    """Returns True if two values are equal; arrays are if they have one shape and equal entries, NaN in one place.

    Args:
        one: Array, dict of arrays, or any other value.
        other: Value to compare with.
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other, equal_nan=one.dtype.kind in "fc" and other.dtype.kind in "fc")
    # NaN is the one value that is not equal to itself.
    return bool(one == other) or bool(one != one and other != other)  # noqa: PLR0124
