"""Error sentences in one form: the argument, the expected value, the received one."""

import difflib
import re
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

_BOLD = re.compile("\x1b\\[1m(.+?)\x1b\\[0m", re.DOTALL)


def invalid_argument(name: str, expected: str, received: Any) -> ValueError:
    """Returns the error for an invalid argument, to be raised where it is found.

    Args:
        name: String, the argument's name.
        expected: String, a noun phrase for the values that the argument may have.
        received: The value that came instead, or a string that describes it.

    Returns:
        `ValueError`.
    """
    return ValueError(f"Invalid value for argument `{name}`. Expected {expected}. Received: {received}")


class UnmeasurableError(ValueError):
    """The error for a layer whose Jacobians cannot be taken.

    Args:
        message: String, the sentence.
        layer: The layer; None if there are several.
    """

    def __init__(self, message: str, layer: Any = None) -> None:
        super().__init__(message)
        self.layer = layer


def is_number(value: Any) -> bool:
    """Returns True if a value is a real number, of Python or of NumPy; True and False are none.

    Args:
        value: The value.
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: Any, least: int, most: int | None = None) -> bool:
    """Returns True if a value is a whole number in a range; True and False are none.

    Args:
        value: The value.
        least: Integer, the smallest valid value.
        most: Integer, the largest valid value. Defaults to None, without such a bound.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and value >= least and (most is None or value <= most)


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Checks that an argument is a whole number in a range.

    Args:
        name: String, the argument's name.
        value: The value that was given.
        least: Integer, the smallest valid value.
        most: Integer, the largest valid value. Defaults to None, without such a bound.

    Raises:
        ValueError: If it is not.
    """
    if not is_whole(value, least, most):
        expected = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
        raise invalid_argument(name, expected, f"{name}={value!r}")


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """Returns a question that names the known word most like a given one.

    Args:
        word: The word that is not known.
        known: Iterable of strings, the known words.

    Returns:
        String, to be put behind a sentence; empty if no known word is like the given one.
    """
    like = difflib.get_close_matches(str(word), list(known), n=1)
    return f". Did you mean {like[0]!r}?" if like else ""


def message_of(error: BaseException) -> str:
    """Returns what an error says, for a sentence; the name of its class stands in for an empty message.

    Args:
        error: The error.
    """
    if isinstance(error, KeyError):
        # Its message is the key alone.
        return f"there is no key {error}"
    # Keras puts what a layer said between its own lines, in bold.
    said = _BOLD.search(str(error))
    return (
        said[1] if said else str(error)
    ).strip() or f"an error of the class {type(error).__name__}, without a message"


def sentence(text: str) -> str:
    """Returns a text with a capital letter and a full stop.

    Args:
        text: String without them.
    """
    return f"{text[:1].upper()}{text[1:]}."
