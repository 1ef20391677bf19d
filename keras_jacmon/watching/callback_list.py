"""The list of callbacks that a callback stands in, and the places in it at which values are lost."""

import gc
import threading
import weakref
from collections.abc import Sequence
from typing import Any, TypeVar

import keras

CallbackT = TypeVar("CallbackT", bound=keras.callbacks.Callback)

# Part of the name of each key that a monitor adds to the logs.
MARK = "jac_"

_ORDER = "[TensorBoard, JacobianMonitor, EarlyStopping, ModelCheckpoint, CSVLogger]"
_READ_ALL = (keras.callbacks.CSVLogger, keras.callbacks.RemoteMonitor)
_READ_ONE = (keras.callbacks.EarlyStopping, keras.callbacks.ModelCheckpoint, keras.callbacks.ReduceLROnPlateau)

# The `params` of callbacks when they began.
_BEGUN: "weakref.WeakKeyDictionary[Any, dict[str, Any] | None]" = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def neighbours(
    callback: keras.callbacks.Callback,
) -> tuple[Sequence[keras.callbacks.Callback], Sequence[keras.callbacks.Callback]]:
    """Returns the callbacks before and after one in the present `fit`; none where Keras does not call it.

    Keras gives a callback no reference to the list that it stands in. The list is found among the objects that refer to
    the callback, and to such a list in turn. Only those are touched: to look through all objects of Python is not safe,
    since a tuple that another thread is about to make cannot be finished while somebody holds it.
    """
    lists = [found for found in gc.get_referrers(callback) if type(found) is list]
    # Of all lists at once: each search goes through the memory of the process.
    for owner in map(_attributes, gc.get_referrers(*lists)):
        members = next((found for found in lists if found is owner.get("callbacks")), None)
        if members is not None and owner.get("params") is callback.params:
            place = next(place for place, member in enumerate(members) if member is callback)
            return members[:place], members[place + 1 :]
    return [], []


def begun_before(callback: CallbackT) -> list[CallbackT]:
    """Returns the callbacks that were given here in the present `fit` before this one, and takes note of this one.

    Callbacks of one `fit` have the same dict as `params`, and begin in the order of their list.
    """
    params = callback.params
    with _LOCK:
        if params is None or _BEGUN.get(callback) is params:
            # A list of callbacks that is used again, and begins with this one.
            for one in [one for one, begun_with in _BEGUN.items() if begun_with is params]:
                del _BEGUN[one]
        before = [one for one, begun_with in _BEGUN.items() if begun_with is params]
        _BEGUN[callback] = params
    return before


def _attributes(found: object) -> dict[str, Any]:
    """Returns the attributes of a `CallbackList`, found itself or by its `__dict__`; else none."""
    if type(found) is dict:
        return found
    # The type and not the class, which some objects make up when they are asked for it.
    return vars(found) if issubclass(type(found), keras.callbacks.CallbackList) else {}


def misplaced(before: Sequence[keras.callbacks.Callback], after: Sequence[keras.callbacks.Callback]) -> list[str]:
    """Returns a sentence for each callback that does not see the values of a monitor, or writes them again.

    Args:
        before: Sequence of the callbacks before the monitor.
        after: Sequence of the callbacks after it.
    """
    blind = [
        one for one in before if isinstance(one, _READ_ALL) or (isinstance(one, _READ_ONE) and MARK in str(one.monitor))
    ]
    sentences = [
        f"`{type(one).__name__}` stands before the `JacobianMonitor` in the list of callbacks, and does not see its "
        f"values. The order that works: {_ORDER}."
        for one in blind
    ]
    if any(isinstance(one, keras.callbacks.TensorBoard) for one in after):
        sentences.append(
            "`TensorBoard` stands after the `JacobianMonitor` in the list of callbacks, and writes its values again, "
            f"as charts named `epoch_...`. The order that works: {_ORDER}."
        )
    return sentences
