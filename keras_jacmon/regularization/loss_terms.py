"""Puts terms into the losses of a model, and takes them out again, whatever becomes of the training."""

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

if TYPE_CHECKING:
    from types import FrameType

Term = Callable[[], tf.Tensor]

# What Keras traces of a model with losses, and keeps.
_FUNCTIONS = ("train_function", "test_function")


class Terms(keras.regularizers.Regularizer):
    """Stands in the place of a variable's regularizer: what was there before, and some terms more.

    Keras adds what the regularizers of trainable variables return to `model.losses`, and does not save them with it.
    """

    def __init__(self, own: Callable[[Any], Any] | None) -> None:
        self.own = own
        self.terms: list[Term] = []

    def __call__(self, value: Any) -> tf.Tensor:
        """The sum of all."""
        total = tf.add_n([term() for term in self.terms])
        return total if self.own is None else tf.cast(self.own(value), total.dtype) + total


class LossTerms:
    """Terms that can be put into the losses of a model and taken out again.

    Args:
        model: The model.
        terms: Each with a trainable variable of the model, whose regularizer it becomes a part of.
    """

    def __init__(self, model: keras.Layer, terms: Sequence[tuple[keras.Variable, Term]]) -> None:
        self._model = model
        self._terms = list(terms)
        self.attached = False
        # By name, what Keras had traced without the terms and what it has traced with them, and none besides.
        self._kept: dict[str, tuple[Any, Any]] = {}

    def attach(self) -> None:
        """Puts the terms in; what Keras has traced of the model without them is put aside, or comes back from there."""
        if self.attached:
            return
        self.attached = True
        for variable, term in self._terms:
            if not isinstance(variable.regularizer, Terms):
                variable.regularizer = Terms(variable.regularizer)
            variable.regularizer.terms.append(term)
        fit = _FITS.setdefault(self._model, _Fit())
        fit.enter(self)
        if fit.held != [self]:
            self.trace_anew()
            return
        fit.plain = {name: getattr(self._model, name, None) for name in _FUNCTIONS}
        # Unless Keras has made others since.
        if all(self._kept[name][0] is plain for name, plain in fit.plain.items() if name in self._kept):
            fit.made = {name: held for name, (_, held) in self._kept.items()}
        for name in _FUNCTIONS:
            if name in fit.made:
                setattr(self._model, name, fit.made[name])
            else:
                self._make(name)

    def announce(self) -> None:
        """Says, in `fit`, that a batch begins."""
        if self._model in _FITS:
            _FITS[self._model].announced = True

    def detach(self) -> None:
        """Takes the terms out; of a variable's regularizer what was there before stays."""
        if not self.attached:
            return
        self.attached = False
        for variable, term in self._terms:
            terms = variable.regularizer
            # The user may have put another one there.
            if isinstance(terms, Terms) and term in terms.terms:
                terms.terms.remove(term)
                if not terms.terms:
                    variable.regularizer = terms.own
        fit = _FITS[self._model]
        fit.leave(self)
        if fit.held:
            self.trace_anew()
            return
        del _FITS[self._model]
        for name in _FUNCTIONS:
            function = getattr(self._model, name, None)
            if function is not None and fit.alone and function is fit.made.get(name, function):
                # So that the next training need not trace it again.
                self._kept[name] = fit.plain[name], function
                setattr(self._model, name, fit.plain[name])
            else:
                self._make(name)

    def trace_anew(self) -> None:
        """Replaces what Keras has traced of the model; it would go on using the losses of that time.

        Also in the middle of `fit`, which looks the function up at each step.
        """
        self._kept.clear()
        for name in _FUNCTIONS:
            self._make(name)

    def _make(self, name: str) -> None:
        if getattr(self._model, name, None) is None:
            return
        getattr(self._model, f"make_{name}")(force=True)
        if self._model in _FITS:
            _FITS[self._model].made[name] = _Guarded(self._model, name)
            setattr(self._model, name, _FITS[self._model].made[name])


class _Fit:
    """What holds during a `fit` of a model, and whether that still runs.

    Keras does not call `on_train_end` if anything raises. A step that raises is seen by `_Guarded`. If something else
    does, a callback or the data, `fit` lets go of its list of callbacks. Where something still holds on to that, as
    the traceback of an interrupted cell in a notebook does, the next step is one that was not announced.
    """

    def __init__(self) -> None:
        self.held: list[LossTerms] = []
        # Whether there was never more than one of them.
        self.alone = True
        # By name, what Keras had traced before, and what it has traced since.
        self.plain: dict[str, Any] = {}
        self.made: dict[str, Any] = {}
        self.announced = False
        self._callbacks: weakref.ref[keras.callbacks.CallbackList] | None = None
        self._finalizer: Any = None

    def enter(self, attachment: LossTerms) -> None:
        self.held.append(attachment)
        self.alone = len(self.held) == 1 and self.alone
        callbacks = next((x for x in _locals_of_callers("self") if isinstance(x, keras.callbacks.CallbackList)), None)
        if callbacks is not None and self._finalizer is None:
            self._callbacks = weakref.ref(callbacks)
            self._finalizer = weakref.finalize(callbacks, self.end)
            self._finalizer.atexit = False

    def leave(self, attachment: LossTerms) -> None:
        self.held.remove(attachment)
        if not self.held and self._finalizer is not None:
            self._finalizer.detach()

    def end(self) -> None:
        for attachment in list(self.held):
            attachment.detach()

    def is_over(self) -> bool:
        """Whether the `fit` that this was begun in does not run any more; False if it was begun elsewhere."""
        if self.announced or self._callbacks is None:
            return False
        begun = self._callbacks()
        # An `evaluate` in a callback is not announced either.
        return begun is None or not any(running is begun for running in _locals_of_callers("callbacks"))


_FITS: weakref.WeakKeyDictionary[keras.Layer, _Fit] = weakref.WeakKeyDictionary()


class _Guarded:
    """A function of a model that Keras has traced; if it raises, what held during this `fit` is taken out."""

    def __init__(self, model: keras.Model, name: str) -> None:
        self._name = name
        self._model = weakref.ref(model)
        self._function = getattr(model, name)

    def __call__(self, iterator: Any) -> Any:
        model = self._model()
        fit = None if model is None else _FITS.get(model)
        if fit is None:
            return self._function(iterator)
        if fit.is_over():
            fit.end()
            return getattr(model, f"make_{self._name}")()(iterator)
        fit.announced = False
        try:
            return self._function(iterator)
        except (StopIteration, tf.errors.OutOfRangeError):
            # The end of the data.
            raise
        except BaseException:
            fit.end()
            raise


def _locals_of_callers(name: str) -> Iterator[Any]:
    """The values of a local variable in the functions that are running, the innermost first."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if name in frame.f_locals:
            yield frame.f_locals[name]
        frame = frame.f_back
