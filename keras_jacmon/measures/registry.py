"""Which measures are there?"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import tensorflow as tf

from keras_jacmon.measures.moments import rms_singular_value, variance
from keras_jacmon.measures.options import Measured, Options
from keras_jacmon.measures.spectrum import spectral_norm

__all__ = ["MEASURES", "Measure", "Measured", "Options", "select_measures"]


@dataclass(frozen=True)
class Measure:
    """A number that says how large a Jacobian is.

    Attributes:
        name: Its key in reports, logs and TensorBoard tags.
        function: From an operator and options to a value for each row.
        uncertainty: What the second array of the result is: `"standard error"` or `"residual"`.
        reading: What a value means, in a sentence.
    """

    name: str
    function: Callable[[tf.linalg.LinearOperator, Options], Measured]
    uncertainty: str
    reading: str


MEASURES = {
    measure.name: measure
    for measure in (
        Measure("variance", variance, "standard error", "1.0 keeps the gradient's size if the mean is zero"),
        Measure("rms_singular_value", rms_singular_value, "standard error", "1 keeps the norm of a random direction"),
        Measure("spectral_norm", spectral_norm, "residual", "the worst-case gain of one step"),
    )
}


def select_measures(names: Iterable[str] | str | None) -> tuple[Measure, ...]:
    """The measures of these names, in the order of the registry.

    Args:
        names: Names of measures; None for all.

    Raises:
        ValueError: If a name is unknown, or there is none.
    """
    if names is None:
        return tuple(MEASURES.values())
    names = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in MEASURES]
    if unknown or not names:
        raise ValueError(
            f"Invalid value for argument `measures`. Expected names out of {list(MEASURES)}. Received: {names}"
        )
    return tuple(measure for name, measure in MEASURES.items() if name in names)
