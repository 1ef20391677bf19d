"""Terms in the losses of a Keras model, put in for a training and taken out however it ends."""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.errors import message_of

Term = Callable[[], tf.Tensor]

# The attributes of a model that hold the functions that Keras has traced with its losses.
_TRAIN, _TEST = _FUNCTIONS = ("train_function", "test_function")

# The operations of a term have this in their names, so that their errors can be told from others.
SCOPE = "jacobian_penalty"


class SummedRegularizer(keras.regularizers.Regularizer):
    """A regularizer that adds terms to the regularizer that a variable had before.

    Keras adds the values of the regularizers of trainable variables to `model.losses`, and does not save them with the
    model.

    Args:
        own: The regularizer of the variable, a callable; None for none.
    """

    def __init__(self, own: Callable[[Any], Any] | None) -> None:
        self.own = own
        self.terms: list[Term] = []

    def __call__(self, value: Any) -> tf.Tensor:
        """Returns the sum of the terms and of the own regularizer, a scalar."""
        # Keras adds up losses of one type only; a half-precision one takes no number that is too large.
        total = tf.saturate_cast(tf.add_n([term() for term in self.terms]), keras.config.floatx())
        return total if self.own is None else tf.cast(self.own(value), total.dtype) + total


class LossTerms:
    """Terms that can be put into the losses of a model and taken out again.

    Keras does not call `on_train_end` if anything raises during `fit`. The end of a `fit` is noticed nevertheless:

    - A step that raises is seen by the function that stands in the place of `model.train_function`.
    - The logs that a step returns live in `fit` until the next step returns. If they are released earlier, something
      between two steps has raised, such as a callback, and `fit` has been left.
    - Where something holds on to the `fit` that was left, such as the traceback of an interrupted cell in a notebook,
      the logs live on. The next `fit` is known by its `model.history`, which Keras makes anew.

    Until that next `fit`, or `detach`, the terms stay in the losses where something holds on to a `fit` that was left,
    and where another callback raises before the first step has returned. An `evaluate` by a callback cannot be told
    from an `evaluate` after that, so it includes the terms.

    Args:
        model: Keras model.
        terms: Sequence of pairs: a trainable variable of the model, and the callable that its regularizer adds.
    """

    def __init__(self, model: keras.Layer, terms: Sequence[tuple[keras.Variable, Term]]) -> None:
        self._model = model
        self._terms = [(variable, self._guarded(term)) for variable, term in terms]
        self._history: Any = None
        self._to_fit = False
        self.attached = False
        # True if a training has read the terms.
        self.is_used = False
        self._is_broken, self._is_left_out = False, False
        # By name, the function that Keras had traced without the terms, and the one traced with them and no others.
        self.traced: dict[str, tuple[Any, Any]] = {}

    def attach(self, *, to_fit: bool = False) -> None:
        """Puts the terms in, unless they are in.

        Args:
            to_fit: Boolean, True if they are taken out when the present `fit` of the model is left. Defaults to False,
                for a loop that calls `detach` itself.
        """
        if self.attached or self._is_broken:
            return
        self.attached = True
        self._to_fit, self._history = to_fit, getattr(self._model, "history", None)
        for variable, term in self._terms:
            if not isinstance(variable.regularizer, SummedRegularizer):
                variable.regularizer = SummedRegularizer(variable.regularizer)
            variable.regularizer.terms.append(term)
        _SWAPPED.setdefault(self._model, _SwappedFunctions(self._model)).add(self)

    def detach(self) -> None:
        """Takes the terms out; the regularizer that a variable had before stays."""
        if not self.attached:
            return
        self.attached = False
        for variable, term in self._terms:
            summed = variable.regularizer
            # The user may have put another one there.
            if isinstance(summed, SummedRegularizer) and term in summed.terms:
                summed.terms.remove(term)
                if not summed.terms:
                    variable.regularizer = summed.own
        _SWAPPED[self._model].remove(self)

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Makes the terms zero in what is traced meanwhile."""
        self._is_left_out = True
        try:
            yield
        finally:
            self._is_left_out = False

    def give_up(self, error: Exception) -> None:
        """Leaves the terms out of all later losses, with a warning, because they cannot be computed."""
        self._is_broken = True
        warnings.warn(
            "The penalty on the Jacobians failed in a step of the training, which goes on without it. "
            f"The reason: {message_of(error)}",
            stacklevel=2,
        )

    def _guarded(self, term: Term) -> Term:
        """Returns a term that ends no training when it raises, and is zero from then on."""

        def guarded() -> tf.Tensor:
            self.is_used = self.is_used or (self._model in _SWAPPED and _SWAPPED[self._model].is_training)
            if not (self._is_broken or self._is_left_out):
                try:
                    # Not before the batch is there: a failure on the way would end the data of the epoch.
                    with tf.control_dependencies(_sources_of_data()):
                        return term()
                except Exception as error:  # noqa: BLE001 - whatever it is, the training goes on
                    self.give_up(error)
            return tf.zeros([])

        return guarded

    def trace_anew(self) -> None:
        """Makes Keras trace the model again, since the terms are computed in another way from now on.

        Also in the middle of `fit`, which looks the function up at each step.
        """
        self.traced.clear()
        if self.attached:
            _SWAPPED[self._model].trace_anew()

    @property
    def in_fit(self) -> bool:
        """True if they were attached for the time of a `fit`."""
        return self.attached and self._to_fit

    @property
    def in_earlier_fit(self) -> bool:
        """True if they were attached for the time of a `fit` that is not the present one."""
        return self.in_fit and getattr(self._model, "history", None) is not self._history


def _sources_of_data() -> list[tf.Operation]:
    """Returns the operations of the present graph that bring the batch and other arguments; none outside of one."""
    if tf.executing_eagerly():
        return []
    operations = tf.compat.v1.get_default_graph().get_operations()
    return [operation for operation in operations if operation.type in ("IteratorGetNext", "Placeholder")]


class _SwappedFunctions:
    """The functions that Keras traces of a model, replaced while terms are in its losses.

    Otherwise Keras would go on using functions that it traced with other losses.

    Args:
        model: Keras model.
    """

    def __init__(self, model: keras.Layer) -> None:
        self._model = model
        self._holders: list[LossTerms] = []
        # True until there is more than one of them.
        self._alone = True
        self._plain: dict[str, Any] = {}
        self._made: dict[str, Any] = {}
        self._release: Any = None
        self._running: str | None = None

    @property
    def is_training(self) -> bool:
        """Boolean, True while Keras takes a step of a training, or if a loop of the user's own takes the steps."""
        return self._running == _TRAIN or _TRAIN not in self._made

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Notes that one of the functions runs.

        Args:
            name: String, the attribute of the model that holds it.
        """
        before, self._running = self._running, name
        try:
            yield
        finally:
            self._running = before

    def add(self, terms: LossTerms) -> None:
        """Puts the functions with the terms in the place of those without, traced anew unless they are known."""
        self._holders.append(terms)
        if len(self._holders) > 1:
            self._alone = False
            self.trace_anew()
            return
        self._plain = {name: getattr(self._model, name, None) for name in _FUNCTIONS}
        # Unless Keras has made others since.
        if all(traced[0] is self._plain[name] for name, traced in terms.traced.items()):
            self._made = {name: held for name, (_, held) in terms.traced.items()}
        for name in _FUNCTIONS:
            if name in self._made:
                setattr(self._model, name, self._made[name])
            else:
                self._make(name)

    def remove(self, terms: LossTerms) -> None:
        """Puts the functions without the terms back."""
        self._holders.remove(terms)
        if self._holders:
            self.trace_anew()
            return
        self.watch(None)
        del _SWAPPED[self._model]
        for name in _FUNCTIONS:
            function = getattr(self._model, name, None)
            if function is not None and self._alone and function is self._made.get(name, function):
                # So that the next training need not trace it again.
                terms.traced[name] = self._plain[name], function
                setattr(self._model, name, self._plain[name])
            elif function is not None:
                getattr(self._model, f"make_{name}")(force=True)

    def trace_anew(self) -> None:
        """Replaces the functions by new ones, which Keras traces when it calls them."""
        for terms in self._holders:
            terms.traced.clear()
        for name in _FUNCTIONS:
            self._make(name)

    def end(self, *, earlier_fit: bool = False) -> list[LossTerms]:
        """Takes the terms out that were attached for the time of a `fit`, and returns them."""
        over = [terms for terms in self._holders if (terms.in_earlier_fit if earlier_fit else terms.in_fit)]
        for terms in over:
            terms.detach()
        return over

    def watch(self, logs: "_StepLogs | None") -> None:
        """Ends when the newest logs of a step are released."""
        if self._release is not None:
            self._release.detach()
        self._release = None if logs is None else weakref.finalize(logs, self.end)
        if self._release is not None:
            self._release.atexit = False

    def _make(self, name: str) -> None:
        if getattr(self._model, name, None) is not None:
            getattr(self._model, f"make_{name}")(force=True)
            self._made[name] = _GuardedFunction(self._model, name)
            setattr(self._model, name, self._made[name])


class _StepLogs(dict[str, Any]):
    """The logs of a step: a dict to which there can be weak references."""


class _GuardedFunction:
    """A function that Keras traces of a model; takes the terms out of the losses if it raises or the `fit` is another.

    Args:
        model: Keras model.
        name: String, the attribute of the model that holds the function.
    """

    def __init__(self, model: keras.Layer, name: str) -> None:
        self._name = name
        self._model = weakref.ref(model)
        self._function = getattr(model, name)

    def __call__(self, iterator: Any) -> Any:
        model = self._model()
        swapped = None if model is None else _SWAPPED.get(model)
        if swapped is None:
            return self._function(iterator)
        if self._name == _TRAIN and swapped.end(earlier_fit=True):
            getattr(model, f"make_{self._name}")()
            return getattr(model, self._name)(iterator)
        try:
            with swapped.running(self._name):
                logs = self._function(iterator)
        except (StopIteration, tf.errors.OutOfRangeError):
            # The end of the data.
            raise
        except BaseException as error:
            ended = swapped.end()
            if self._name == _TRAIN and ended and isinstance(error, tf.errors.OpError) and SCOPE in error.message:
                for terms in ended:
                    terms.give_up(error)
                # With the next batch.
                return getattr(model, self._name)(iterator)
            raise
        if self._name == _TRAIN and isinstance(logs, dict) and _is_of_fit(iterator):
            logs = _StepLogs(logs)
            swapped.watch(logs)
        return logs


def _is_of_fit(iterator: Any) -> bool:
    """Returns True if `fit` takes a step on this data; `train_on_batch` hands over a generator."""
    return isinstance(iterator, (tf.data.Iterator, tf.distribute.DistributedIterator))


_SWAPPED: weakref.WeakKeyDictionary[keras.Layer, _SwappedFunctions] = weakref.WeakKeyDictionary()
