"""The settings of a measurement: declared, documented and checked in one place."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

from keras_jacmon.errors import check_whole, did_you_mean, invalid_argument, is_whole

# The parts of a step's Jacobian that are measured, see `state_jacobian`.
VIEWS = ("hidden", "joint", "inputs")

# One of these, or the positions of chosen states.
ViewName = str | tuple[int, ...]

# Chosen states, by position or by name.
ChosenStates = tuple[int | str, ...]

# TensorFlow's seeds have 32 bits, one of them for the sign.
LARGEST_SEED = 2**31 - 1

# Arguments that callbacks of Keras and others have for what is an argument of another name here.
_NAMES_ELSEWHERE = {"histogram_freq": "update_freq", "log_freq": "update_freq"}

_Function = TypeVar("_Function", bound=Callable[..., Any])


def label_of(view: str | ChosenStates) -> str:
    """Returns the name of a view in reports: of chosen states `"v+a"`, or `"0+2"` by position."""
    return view if isinstance(view, str) else "+".join(map(str, view))


def states_in(label: str) -> ChosenStates | None:
    """Returns the states in the name of a view in reports; None if it is none of chosen states."""
    parts = label.split("+")
    if label in VIEWS or not all(part.isidentifier() or _is_position(part) for part in parts):
        return None
    return tuple(int(part) if _is_position(part) else part for part in parts)


def _is_position(part: str) -> bool:
    """True for a number as reports write it: not for `00`, which would name a state a second time."""
    return part.isdecimal() and part == str(int(part))


def default_warmup(steps: Any) -> Any:
    """Returns a tenth of a number of steps, an integer or an integer tensor: what exponents leave out by default."""
    return steps // 10


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
    flow_vectors: int = _option(3, "random vectors per sample for flow and sensitivity")
    exact_flow: bool = _option(False, "take the spectral norm of the products, which are formed, as flow")  # noqa: FBT003
    exponents: int = _option(8, "maximum number of Lyapunov exponents")
    warmup: int | None = _option(None, "steps that the exponents leave out; none for a tenth of the sequence")
    qr_every: int = _option(1, "steps between two QR decompositions")
    max_bytes: int = _option(2**30, "memory for trajectories and derivatives")
    max_entries: int = _option(2**26, "number of Jacobian entries up to which variance and RMS are exact")

    def __post_init__(self) -> None:
        check_whole("seed", self.seed, 0, LARGEST_SEED)
        if isinstance(self.tolerance, bool) or not isinstance(self.tolerance, Real) or not 0 <= self.tolerance < 1:
            expected = "a relative tolerance from 0 up to, not including, 1"
            raise invalid_argument("tolerance", expected, f"tolerance={self.tolerance!r}")
        if self.max_rows is not None and not is_whole(self.max_rows, 1):
            raise invalid_argument("max_rows", "a positive integer, or None for all", f"max_rows={self.max_rows!r}")
        if not isinstance(self.exact_flow, bool):
            raise invalid_argument("exact_flow", "True or False", f"exact_flow={self.exact_flow!r}")
        for name, value, least in (
            ("spectra", self.spectra, 1),
            ("flow_vectors", self.flow_vectors, 2),
            ("exponents", self.exponents, 1),
            ("warmup", 0 if self.warmup is None else self.warmup, 0),
            ("qr_every", self.qr_every, 1),
            ("max_bytes", self.max_bytes, 1),
            ("max_entries", self.max_entries, 0),
        ):
            check_whole(name, value, least)

    def warmup_of(self, steps: Any) -> Any:
        """Returns the number of steps that the exponents leave out of a sequence, as `default_warmup` does."""
        return default_warmup(steps) if self.warmup is None else self.warmup

    @classmethod
    def of(cls, owner: type, given: Mapping[str, Any]) -> "Options":
        """Makes the options from keyword arguments.

        Args:
            owner: Class, the one that was called with them, for the error.
            given: Mapping of the keyword arguments.

        Raises:
            TypeError: If one of them is no option.
            ValueError: If a value is out of range.
        """
        unknown = given.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            word = min(unknown)
            known = inspect.signature(owner).parameters
            elsewhere = _NAMES_ELSEWHERE.get(word)
            hint = f". Did you mean {elsewhere!r}?" if elsewhere in known else did_you_mean(word, known)
            raise TypeError(f"{owner.__name__}() got an unexpected keyword argument {word!r}{hint}")
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
