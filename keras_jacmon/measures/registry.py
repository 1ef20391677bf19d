"""Which measures are there?"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import tensorflow as tf

from keras_jacmon.measures.moments import rms_singular_value, variance
from keras_jacmon.measures.options import Measured, Options
from keras_jacmon.measures.spectrum import MAX_STEPS, spectral_norm

__all__ = ["MEASURES", "VIEWS", "Measure", "Measured", "Options", "Selection", "key_of", "select_measures"]

# Of a step's Jacobian: which states, see `state_jacobian`.
VIEWS = ("hidden", "joint")


@dataclass(frozen=True)
class Measure:
    """A number that says how large a Jacobian is.

    Attributes:
        name: Its key in reports, logs and TensorBoard tags.
        function: From an operator and options to a value for each row.
        uncertainty: What the second array of the result is: `"standard error"` or `"residual"`.
        reading: What a value means, in a sentence.
        expensive: Whether `max_rows` bounds the rows that it is measured at.
        vectors: How many vectors it keeps for each row while it is computed.
        warm_start: Whether it can start from vectors of the last time.
    """

    name: str
    function: Callable[[tf.linalg.LinearOperator, Options], Measured]
    uncertainty: str
    reading: str
    expensive: bool = False
    vectors: int = 0
    warm_start: bool = False


MEASURES = {
    measure.name: measure
    for measure in (
        Measure("variance", variance, "standard error", "1.0 keeps the gradient's size if the mean is zero"),
        Measure("rms_singular_value", rms_singular_value, "standard error", "1 keeps the norm of a random direction"),
        Measure(
            "spectral_norm",
            spectral_norm,
            "residual",
            "the worst-case gain of one step",
            expensive=True,
            vectors=MAX_STEPS,
            warm_start=True,
        ),
    )
}


# What is measured, by view.
Selection = Mapping[str, tuple[Measure, ...]]


def select_measures(names: Iterable[str] | str | None) -> Selection:
    """The measures of these names for each view, in the order of the registry.

    Args:
        names: Names of measures, `"variance"` of the hidden view, `"joint/variance"` of the joint one; None for all.

    Raises:
        ValueError: If a name is unknown, or there is none.
    """
    keys = {key_of(view, measure.name): (view, measure) for view in VIEWS for measure in MEASURES.values()}
    names = list(keys) if names is None else [names] if isinstance(names, str) else list(names)
    if not names or not all(name in keys for name in names):
        raise ValueError(
            f"Invalid value for argument `measures`. Expected names out of {list(keys)}. Received: {names}"
        )
    chosen = [keys[key] for key in keys if key in names]
    return {view: tuple(m for of, m in chosen if of == view) for view in VIEWS if any(of == view for of, _ in chosen)}


def key_of(view: str, measure: str) -> str:
    """The key of a measure in reports: with the view in front, unless that is the hidden one."""
    return measure if view == "hidden" else f"{view}/{measure}"
