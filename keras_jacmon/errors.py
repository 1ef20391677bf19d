"""Error sentences in one form: the argument, the expected value, the received one."""

from typing import Any


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
