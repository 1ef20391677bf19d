"""The course of the last training among those that wrote to one place."""

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def last_course(items: Iterable[T], step: Callable[[T], int]) -> list[T]:
    """Returns items in the order of their steps: where a training began again at a step, what it has made since then.

    TensorBoard's data server leaves out the same ones.

    Args:
        items: Iterable of items, in the order in which they were made.
        step: Function from an item to its training step.
    """
    kept: list[T] = []
    for item in items:
        while kept and step(kept[-1]) >= step(item):
            kept.pop()
        kept.append(item)
    return kept
