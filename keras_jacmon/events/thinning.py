"""Thinning of long series: fewer members the older they are."""

from typing import Any


def thin(series: list[Any], most: int) -> None:
    """Removes every second member of a list that is too long, in place; the first and the newest stay.

    Done at each addition, this leaves the members the sparser the older they are.

    Args:
        series: List.
        most: Integer, at least 2, the number of members above which it is thinned.
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
