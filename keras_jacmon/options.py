"""The settings of a measurement: declared, documented and checked in one place."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeVar

from keras_jacmon.errors import invalid_argument

# The parts of a step's Jacobian that are measured, see `state_jacobian`.
VIEWS = ("hidden", "joint", "inputs")

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _option(default: Any, description: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": description})


@dataclass(frozen=True, kw_only=True)
class Options:
    """The settings of a measurement: costs, exactness and random numbers.

    `JacobianMeter`, `JacobianMonitor` and the command line take their arguments and defaults from here. The docstring
    of `JacobianMeter` explains each of them.

    Raises:
        ValueError: If a value is out of range.
    """

    measures: Iterable[str] | str | None = _option(None, "names of measures, or fast, standard, full")
    seed: int = _option(0, "seed of the random vectors")
    tolerance: float = _option(1e-2, "relative tolerance of the iterative measures")
    max_rows: int | None = _option(64, "maximum number of (step, sample) points for expensive measures; none for all")
    spectra: int = _option(16, "maximum number of (step, sample) points for whole spectra")
    flow_vectors: int = _option(3, "random vectors per sample for the flow")
    exact_flow: bool = _option(False, "form the products of the flow instead of estimating them")  # noqa: FBT003
    exponents: int = _option(8, "maximum number of Lyapunov exponents")
    warmup: int | None = _option(None, "steps that the exponents leave out; none for a tenth of the sequence")
    qr_every: int = _option(1, "steps between two QR decompositions")
    max_bytes: int = _option(2**30, "memory for trajectories and derivatives")
    max_entries: int = _option(2**26, "number of Jacobian entries up to which variance and RMS are exact")

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral):
            raise invalid_argument("seed", "an integer", f"seed={self.seed!r}")
        if not 0 <= self.tolerance < 1:
            expected = "a relative tolerance from 0 up to, not including, 1"
            raise invalid_argument("tolerance", expected, f"tolerance={self.tolerance}")
        if self.max_rows is not None and self.max_rows < 1:
            raise invalid_argument("max_rows", "a positive integer, or None for all", f"max_rows={self.max_rows}")
        if not isinstance(self.exact_flow, bool):
            raise invalid_argument("exact_flow", "True or False", f"exact_flow={self.exact_flow!r}")
        for name, value, least in (
            ("spectra", self.spectra, 1),
            ("flow_vectors", self.flow_vectors, 2),
            ("exponents", self.exponents, 1),
            ("warmup", self.warmup or 0, 0),
            ("qr_every", self.qr_every, 1),
            ("max_bytes", self.max_bytes, 1),
            ("max_entries", self.max_entries, 0),
        ):
            if value < least:
                raise invalid_argument(name, f"an integer of at least {least}", f"{name}={value}")

    @classmethod
    def of(cls, owner: str, given: Mapping[str, Any]) -> "Options":
        """Makes the options from keyword arguments.

        Args:
            owner: The class that was called with them, for the error.
            given: The keyword arguments.

        Raises:
            TypeError: If one of them is no option.
            ValueError: If a value is out of range.
        """
        unknown = given.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise TypeError(f"{owner}() got an unexpected keyword argument {min(unknown)!r}")
        return cls(**given)


def takes_options(function: _Function) -> _Function:
    """Shows each option with its default in the signature of a function that ends in `**options`."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in dataclasses.fields(Options)
        if field.name not in signature.parameters
    ]
    vars(function)["__signature__"] = signature.replace(parameters=[*own, *options])
    return function
