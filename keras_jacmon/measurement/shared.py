"""Objects that all models of a process share, such as compiled measurements: the ones that were used last."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

ObjectT = TypeVar("ObjectT")


class Shared(Generic[ObjectT]):
    """The objects that were used last, by key.

    Args:
        most: Integer, the number of objects that are kept. Whoever uses one that is not kept any more still has it.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[Hashable, ObjectT] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], ObjectT], is_for_all: Callable[[ObjectT], bool]) -> ObjectT:
        """Returns the object of a key, made if it is not kept.

        Threads that ask for the same object at the same time make it each for itself.

        Args:
            key: Hashable.
            make: Function without arguments; if it raises, nothing is kept.
            is_for_all: Function that returns False for an object that only the caller may use, which is not kept.
        """
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        made = make()
        if not is_for_all(made):
            return made
        with self._lock:
            self._known[key] = made
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        return made
