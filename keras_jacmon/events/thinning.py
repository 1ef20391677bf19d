"""What is kept of a series that has no end."""

from typing import Any


def thin(series: list[Any], most: int) -> None:
    """Takes members out of a list that has more than so many: every second one, but the first and the newest stay.

    Done at each addition, what is left is the sparser the older it is.
    """
    if len(series) > most:
        del series[1:-1:2]


def is_kept(number: int, each: int) -> bool:
    """Whether a member of a series is kept, if that must be decided when it comes.

    All of the first `each` members are, of what follows so many of every second one, so many of every fourth one,
    and so on: of n members about `each * log2(n / each)`.

    Args:
        number: Of the member, from 0 on.
        each: So many members are kept before it is every second one of those kept so far.
    """
    stride_exponent = (number // each + 1).bit_length() - 1
    begin = each * (2**stride_exponent - 1)
    return (number - begin) % 2**stride_exponent == 0
