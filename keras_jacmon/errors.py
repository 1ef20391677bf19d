"""Error sentences: what is wrong, what was expected, what came."""

from typing import Any


def invalid_argument(name: str, expected: str, received: Any) -> ValueError:
    """Returns the error for an invalid argument, to be raised where it is found.

    Args:
        name: The argument's name.
        expected: A noun phrase: what the argument should have been.
        received: What came instead, in words or as a value.
    """
    return ValueError(f"Invalid value for argument `{name}`. Expected {expected}. Received: {received}")
