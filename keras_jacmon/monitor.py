"""The Keras callback: when to measure, and what becomes of it."""

import itertools
import os
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import keras

from keras_jacmon.events.thinning import thin
from keras_jacmon.events.writer import EventWriter
from keras_jacmon.measurement.plan import MeasurementPlan
from keras_jacmon.meter import JacobianMeter
from keras_jacmon.options import takes_options
from keras_jacmon.regularization.regularizer import JacobianRegularizer, RegularizedModel
from keras_jacmon.report.report import Report

# Its key in the logs and its tag in TensorBoard.
PENALTY = "jac_penalty"


class JacobianMonitor(keras.callbacks.Callback):
    """Shows while `fit` runs whether the recurrent layers of a model let their gradient vanish, live or explode.

    Measures the state-to-state Jacobians `ds_t/ds_{t-1}` on a probe batch before the first batch of a training, then
    every `update_freq`, and at its end; writes them to TensorBoard event files and adds their means to the `logs`
    of each epoch, where `History`, the progress line and the callbacks that stand *after* this one see them. The
    training itself stays as it is, to the bit, unless a regularizer is given.

    Example:

    ```python
    monitor = keras_jacmon.JacobianMonitor(x[:32], log_dir="logs")
    model.fit(x, y, epochs=10, callbacks=[monitor])
    print(monitor.reports[-1][1])       # and: tensorboard --logdir logs
    ```

    Args:
        probe: A batch of model inputs: array, tensor, list or dict of them, or a dataset (its first batch).
        layers: Names of recurrent layers, or layers; None for all.
        measures: `"fast"`, `"standard"` (None) or `"full"`, or names of measures, as for `JacobianMeter`.
        targets: Of the probe's samples, if `‖dLoss/dh_t‖` is to be measured too, of the loss in `compile`.
        update_freq: `"epoch"`, `"batch"` or an integer number of batches, as in `keras.callbacks.TensorBoard`.
        slow_freq: What only `"full"` has takes its time: it is measured at the first of so many measurements, and at
            the end. `logs` keep the newest values.
        log_dir: Event files go to `<log_dir>/jacobian`; None writes none.
        max_reports: Bounds `reports` (and `failures`): when there are more, every second one is taken out, but never
            the first one and the newest, so that the older they are the sparser they get. At least 2.
        on_error: `"warn"`, the first time that a measurement or a file fails, and go on training; or `"raise"`. What
            is invalid when the first `fit` begins is always raised.
        regularizer: A `JacobianRegularizer` that holds the measured layers while `fit` runs. Its penalty, not scaled
            by the strength, is `jac_penalty` in `logs` and event files, with the weights of that moment.
        seed: Integer, for random vectors.
        verbose: 1 prints each report.
        **options: As for `JacobianMeter`: `tolerance`, `max_rows`, `max_bytes`, ...

    Attributes:
        reports: `(step, Report)` for each measurement, up to `max_reports`; step is the optimizer's iteration count.
        failures: A sentence for each measurement or file that failed, with `on_error="warn"`, up to `max_reports`.

    Raises:
        ValueError: If an argument is invalid; what depends on the model when `fit` begins, before the first batch.
    """

    @takes_options
    def __init__(
        self,
        probe: Any,
        *,
        layers: Iterable[str | keras.Layer] | str | keras.Layer | None = None,
        targets: Any = None,
        update_freq: Literal["epoch", "batch"] | int = "epoch",
        slow_freq: int = 10,
        log_dir: str | os.PathLike[str] | None = "logs",
        max_reports: int = 1000,
        on_error: Literal["warn", "raise"] = "warn",
        regularizer: JacobianRegularizer | None = None,
        verbose: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        if update_freq not in ("epoch", "batch") and (
            isinstance(update_freq, bool) or not isinstance(update_freq, int) or update_freq < 1
        ):
            raise ValueError(
                "Invalid value for argument `update_freq`. Expected 'epoch', 'batch' or a positive integer. "
                f"Received: update_freq={update_freq!r}"
            )
        if on_error not in ("warn", "raise"):
            raise ValueError(
                f"Invalid value for argument `on_error`. Expected 'warn' or 'raise'. Received: on_error={on_error!r}"
            )
        for name, value, least in (
            ("slow_freq", slow_freq, 1),
            ("max_reports", max_reports, 2),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"Invalid value for argument `{name}`. Expected an integer of at least {least}. Received: "
                    f"{name}={value!r}"
                )
        if not isinstance(regularizer, (JacobianRegularizer, type(None))):
            raise ValueError(
                "Invalid value for argument `regularizer`. Expected a `JacobianRegularizer` or None. Received: "
                f"regularizer={regularizer!r}"
            )
        self._plan = MeasurementPlan.read("JacobianMonitor", probe, layers=layers, targets=targets, options=options)
        self._every = 1 if update_freq == "batch" else update_freq
        self._slow_every = slow_freq
        self._log_dir = log_dir
        self._max_reports = max_reports
        self._on_error = on_error
        self._regularizer = regularizer
        self._held: RegularizedModel | None = None
        self._verbose = verbose
        self._writer: EventWriter | None = None
        self._meter: JacobianMeter | None = None
        self._traced_for: list[Any] = []
        self.reports: list[tuple[int, Report]] = []
        self.failures: list[str] = []

    def set_model(self, model: keras.Model) -> None:
        """Checks the probe against the model and traces the measurement, before any callback's `on_train_begin`."""
        super().set_model(model)
        if self._held is not None:
            # A `fit` that has failed may not have come to its end.
            self._held.detach()
        if not _same(self._traced_for, _identity(model)):
            if self._traced_for and self.reports:
                # In the middle of a program that may have run for days.
                self._attempt("Preparing for a model that has changed", self._prepare, model)
            else:
                self._prepare(model)
        if self._writer is None and self._log_dir is not None:
            self._writer = EventWriter(self._log_dir)

    def _prepare(self, model: keras.Model) -> None:
        self._meter = self._held = None
        # Until it is known that it can be measured.
        self._traced_for = [model]
        meter = JacobianMeter.of_plan(model, self._plan)
        if self._regularizer is not None:
            self._held = RegularizedModel(self._regularizer, model, self._plan.probe, self._plan.layers)
        self._meter = meter
        # Building a model may have made variables.
        self._traced_for = _identity(model)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Counts anew; nothing is measured yet, since other callbacks may still restore weights here."""
        self._start: int | None = None
        self._done = 0
        self._batch = -1
        self._measured_at: int | None = None
        self._measured_slow = True
        self._batches_before = 0
        self._measurements = 0
        self._scalars: dict[str, float] = {}
        self._failed: set[str] = set()
        self._broken: set[str] = set()
        if self._held is not None:
            self._held.attach()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Keras numbers the batches from 0 in each epoch."""
        self._batch = -1

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures before the first batch."""
        if self._start is None:
            self._start = self._iterations() or 0
            # Of the trainings before this one, too.
            self._batches_before = self._start * self._batches_per_iteration()
            self._hold(0)
            self._measure()
        self._hold(self._done)

    def on_test_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """A validation has the penalty in its loss too."""
        if self._held is not None:
            self._held.announce()

    def _hold(self, step: int) -> None:
        """Prepares the penalty of the next batch."""
        if self._held is not None:
            self._held.announce()
            self._attempt("Taking states for the regularizer", self._held.begin, self._batches_before + step)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures after every `update_freq` batches."""
        # `batch` is the last of the `steps_per_execution` batches that have just been run.
        before = (self._start or 0) + self._done
        self._done += batch - self._batch
        self._batch = batch
        if self._every != "epoch" and ((self._start or 0) + self._done) // self._every > before // self._every:
            self._measure()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures if that is the rhythm, and adds the newest means to the logs."""
        if self._every == "epoch" and self._measured_at != self._done:
            self._measure(last=epoch + 1 == (self.params or {}).get("epochs"))
        if logs is not None:
            logs.update(self._scalars)
            names = itertools.chain([PENALTY], (f"{PENALTY}_{number}" for number in itertools.count(1)))
            # Another monitor may hold the same model.
            key = next(name for name in names if name not in logs)
            for value in self._penalty().values():
                logs[key] = value

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Measures what the last batch has made of the model, and closes the event file."""
        if self._start is not None and (self._measured_at != self._done or not self._measured_slow):
            self._measure(last=True)
        if self._held is not None:
            self._held.detach()
        if self._writer is not None:
            self._attempt("Closing the event file", self._writer.close)

    def _measure(self, *, last: bool = False) -> None:
        """Measures once; the report goes to the event file, to `reports` and, at the end of the epoch, to the logs."""
        if self._meter is None:
            if self._traced_for:
                # It cannot be measured, which the user has been told.
                return
            raise RuntimeError("JacobianMonitor has no model yet. Call `set_model(model)` before `on_train_begin()`.")
        again = self._measured_at == self._done
        self._measured_at = self._done
        slow = last or self._measurements % self._slow_every == 0
        self._measured_slow = slow or not self._meter.has_slow_measures
        self._measurements += 1
        report = self._attempt("Measuring the Jacobians", partial(self._meter, slow=slow))
        if report is None:
            # Old values under a new epoch would be wrong, and callbacks such as CSVLogger want the same keys.
            self._scalars = dict.fromkeys(self._scalars, float("nan"))
            return
        step = self._step()
        if again and self.reports:
            # Without the slow measures, when it was not known that the training would end there.
            self.reports.pop()
        self.reports.append((step, report))
        thin(self.reports, self._max_reports)
        self._scalars |= report.scalars()
        if self._writer is not None:
            self._attempt("Writing the event file", self._writer.write, report, step, self._penalty())
        if self._verbose:
            # Not every terminal knows all characters, and a pipe may be closed.
            self._attempt("Printing the report", print, f"\nJacobians at step {step}\n{report}")
        self._warn_of_nonfinite(report, step)

    def _penalty(self) -> dict[str, float]:
        """By its key; nothing without a regularizer."""
        if self._held is None:
            return {}
        value = self._attempt("Evaluating the penalty", self._held.penalty)
        return {PENALTY: float("nan") if value is None else value}

    def _attempt(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        """Calls the function; if it fails, warns the first time and returns None, or raises, as the user chose."""
        try:
            return function(*args)
        except Exception as error:
            if self._on_error == "raise":
                raise
            sentence = f"{what} at step {self._step()} failed. {type(error).__name__}: {error}"
            self.failures.append(sentence)
            thin(self.failures, self._max_reports)
            if what not in self._failed:
                self._failed.add(what)
                warnings.warn(
                    f"{sentence}\nTraining goes on. Further failures are not warned of, but kept in "
                    "`JacobianMonitor.failures`.",
                    stacklevel=2,
                )
            return None

    def _warn_of_nonfinite(self, report: Report, step: int) -> None:
        for name, layer in report.layers.items():
            counts = layer.nonfinite()
            if counts and name not in self._broken:
                self._broken.add(name)
                found = ", ".join(f"{count} of `{key}`" for key, count in counts.items())
                warnings.warn(
                    f"Layer `{name}` has NaN or Inf in its Jacobians at step {step}: {found}. They are logged as they "
                    "are; later ones of this layer are not warned of.",
                    stacklevel=2,
                )

    def _step(self) -> int:
        """The optimizer's iteration count, or the batches seen if a custom `train_step` does not use that optimizer."""
        start = self._start or 0
        iterations = self._iterations()
        if iterations is None or (iterations == start and self._done >= 2 * self._batches_per_iteration()):
            return start + self._done
        return iterations

    def _batches_per_iteration(self) -> int:
        return getattr(getattr(self.model, "optimizer", None), "gradient_accumulation_steps", None) or 1

    def _iterations(self) -> int | None:
        iterations = getattr(getattr(self.model, "optimizer", None), "iterations", None)
        return None if iterations is None else int(keras.ops.convert_to_numpy(iterations))


def _identity(model: keras.Model) -> list[Any]:
    """What makes a model another one for the measurement."""
    # Each `compile` makes a new one, and Keras traces the model anew then too.
    loss = getattr(model, "_compile_loss", None)
    return [model, loss, *model.variables, None, *model.trainable_variables]


def _same(left: list[Any], right: list[Any]) -> bool:
    """Whether two lists have the same objects; `==` of variables is that of their values."""
    return len(left) == len(right) and all(one is other for one, other in zip(left, right, strict=True))
