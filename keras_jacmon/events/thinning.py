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
