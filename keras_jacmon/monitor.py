"""The Keras callback that measures while a model trains, and hands the reports on."""

import os
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import keras

from keras_jacmon.callback_list import misplaced, neighbours
from keras_jacmon.dashboard.answers import Moment
from keras_jacmon.dashboard.one_file import Frame, page, write_page
from keras_jacmon.errors import UnmeasurableError, check_whole, did_you_mean, invalid_argument, is_whole, message_of
from keras_jacmon.events.thinning import thin
from keras_jacmon.events.writer import EventWriter
from keras_jacmon.measurement.plan import MeasurementPlan
from keras_jacmon.meter import JacobianMeter
from keras_jacmon.options import takes_options
from keras_jacmon.progress import MeasurementProgress
from keras_jacmon.regularization.regularizer import JacobianRegularizer
from keras_jacmon.report.changes import Change, VerdictHistory
from keras_jacmon.report.chosen import names_in_logs
from keras_jacmon.report.frame import to_dataframe
from keras_jacmon.report.html import as_html, moments_of
from keras_jacmon.report.plots import plot
from keras_jacmon.report.report import Report
from keras_jacmon.report.verdict import Verdict

if TYPE_CHECKING:
    from keras_jacmon.events.sink import Sink
    from keras_jacmon.regularization.held_model import RegularizedModel

# Its key in the logs and its tag in TensorBoard.
PENALTY = "jac_penalty"


class JacobianMonitor(keras.callbacks.Callback):
    """Shows while `fit` runs whether the recurrent layers of a model let their gradient vanish, live or explode.

    Measures the state-to-state Jacobians `ds_t/ds_{t-1}` on a probe batch before the first batch of a training, then
    every `update_freq`, and at its end; writes them to TensorBoard event files and adds some means to the `logs`
    of each epoch, where `History`, the progress line and the callbacks that stand *after* this one see them. The
    training itself stays as it is, to the bit, unless a regularizer is given.

    Example:

    ```python
    monitor = keras_jacmon.JacobianMonitor(x[:32], log_dir="logs")
    model.fit(x, y, epochs=10, callbacks=[monitor])
    print(monitor.reports[-1][1])       # and: tensorboard --logdir logs
    ```

    Args:
        probe: A batch of model inputs: array, tensor, list or dict of them, or a dataset (its first batch is taken).
        layers: Names of recurrent layers, or layers. Defaults to None, for all.
        measures: String or list of strings: `"fast"`, `"standard"` or `"full"`, or names of measures, as for
            `JacobianMeter`. Defaults to None, for `"standard"`.
        targets: Targets of the probe's samples. If given, `‖dLoss/dh_t‖` of the compiled loss is measured too. Defaults
            to None.
        update_freq: `"epoch"`, `"batch"` or an integer number of batches, as in `keras.callbacks.TensorBoard`. Defaults
            to `"epoch"`.
        slow_freq: Integer. The measures that only `"full"` has take long: they are taken at the first of every
            `slow_freq` measurements, and at the end. `logs` keep the newest values. Defaults to 10.
        log_dir: String or path. Event files go to `<log_dir>/jacobian`; None writes no files. Defaults to `"logs"`.
        positions: Integer, the maximum number of positions of a curve in the Jacobian tab; a longer sequence is binned,
            with the least and the greatest value of each bin. Defaults to 256.
        step: `"iteration"` or `"epoch"`, the step in the event files: the iteration count of the optimizer, or the
            number of the last epoch that has ended, as Keras' own `epoch_loss` has it, and one less than the first
            epoch's for the measurement before a training; with `update_freq="epoch"` only. Defaults to
            `"iteration"`.
        max_reports: Integer of at least 2, the maximum length of `reports` and of `failures`. A list that is longer
            loses every second member, but neither the first nor the newest, so that older members are sparser. Defaults
            to 1000.
        on_error: `"warn"` or `"raise"`, the reaction to a measurement or a file that fails. `"warn"` warns the first
            time and lets the training go on. What is invalid when the first `fit` begins is always raised. Defaults to
            `"warn"`.
        regularizer: `JacobianRegularizer` for the measured layers while `fit` runs. Its penalty, not scaled by the
            strength, is `jac_penalty` in `logs` and event files, with the present weights. Defaults to None.
        name: String of letters, digits and `_.-`, for a training with several monitors, such as one on training and one
            on validation data. It stands before the keys in `logs` (`valid_lstm_jac_variance`) and before the tags, and
            the event files go to `<log_dir>/jacobian/<name>`. Defaults to None, no name; among monitors with the same
            name the second one is named `<name>_1` (`monitor_1` without a name), and so on.
        logs: Names of the measures that go into the `logs` of each epoch, `"all"`, or None for none; event files have
            all of them. Defaults to `"auto"`: `variance`, `spectral_norm` and `growth` for up to three layers, beyond
            that `growth` alone; all if none of these is measured.
        on_verdict_change: Function that is called as `f(step, layer, old, new)` when the state of a layer's `Verdict`
            changes from one measurement to the next. Defaults to None.
        seed: Integer, the seed of the random vectors. Defaults to 0.
        verbose: 0 or 1; 1 prints each report, and a line when a verdict changes. A measurement that takes more than a
            second shows a progress bar, with 1 or in a `fit` that shows one. Defaults to 0.
        **options: As for `JacobianMeter`: `tolerance`, `max_rows`, `max_bytes`, ...

    Attributes:
        reports: List of `(step, Report)`, one for each measurement; the step is the iteration count of the optimizer.
        failures: List of sentences, one for each measurement or file that failed with `on_error="warn"`.

    Raises:
        ValueError: If an argument is invalid. An argument that does not fit the model is refused when `fit` begins,
            before the first batch.
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
        positions: int = 256,
        step: Literal["iteration", "epoch"] = "iteration",
        max_reports: int = 1000,
        on_error: Literal["warn", "raise"] = "warn",
        regularizer: JacobianRegularizer | None = None,
        name: str | None = None,
        logs: Iterable[str] | str | None = "auto",
        on_verdict_change: Callable[[int, str, Verdict, Verdict], Any] | None = None,
        verbose: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        _check_arguments(
            update_freq=update_freq,
            on_error=on_error,
            regularizer=regularizer,
            on_verdict_change=on_verdict_change,
            slow_freq=slow_freq,
            positions=positions,
            max_reports=max_reports,
        )
        _check_name(name)
        self._plan = MeasurementPlan.read(JacobianMonitor, probe, layers=layers, targets=targets, options=options)
        self._schedule = _Schedule(1 if update_freq == "batch" else update_freq, slow_freq)
        self._log_dir, self._positions = log_dir, positions
        self._in_epochs, self._epochs = _is_in_epochs(step, update_freq), -1
        self._max_reports = max_reports
        self._failures = _Failures(on_error, max_reports)
        self._regularizer = regularizer
        self._logs = _read_logs(logs, self._plan)
        self._on_verdict_change = on_verdict_change
        self._verdicts = VerdictHistory()
        self._progress = MeasurementProgress()
        self._verbose = verbose
        self._given_name = self._name = name
        self._held: RegularizedModel | None = None
        self._writer: Sink | None = None
        self._meter: JacobianMeter | None = None
        self._traced_for: list[Any] = []
        self._scalars: dict[str, float] = {}
        self._told: set[str] = set()
        self.reports: list[tuple[int, Report]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy keeps: the options, and nothing of a model."""
        return vars(self) | {
            "_model": None,
            "params": None,
            "_plan": self._plan.without_a_model(),
            "_schedule": _Schedule(self._schedule.every, self._schedule.slow_every),
            "_failures": _Failures(self._failures.on_error, self._max_reports),
            "_name": self._given_name,
            "_held": None,
            "_writer": None,
            "_meter": None,
            "_traced_for": [],
            "_scalars": {},
            "_told": set(),
            "_verdicts": VerdictHistory(),
            "reports": [],
        }

    @property
    def failures(self) -> list[str]:
        """A sentence for each measurement or file that failed, up to `max_reports` of them."""
        return self._failures.sentences

    def to_dataframe(self) -> Any:
        """Returns every number of all `reports` as a `pandas.DataFrame` in the long form.

        Returns:
            `pandas.DataFrame` with the columns of `Report.to_dataframe` and before them `iteration`, the iteration
            count of the optimizer.

        Raises:
            ImportError: If pandas is not installed.
        """
        return to_dataframe((step, report.layers) for step, report in self.reports)

    def plot(
        self, kind: str = "heatmap", *, layer: str | None = None, measure: str | None = None, ax: Any = None
    ) -> Any:
        """Draws a measure of a layer over the training, in a size that fits a column of a paper.

        Args:
            kind: String. `"heatmap"`: the mean over samples by training step and position in the input. The other kinds
                are those of `Report.plot`, for the newest report. Defaults to `"heatmap"`.
            layer: String, the key of a layer. Defaults to None, the first layer.
            measure: String, the key of a measure. Defaults to None, as in `Report.plot`.
            ax: `matplotlib.axes.Axes` to draw into. Defaults to None, a new figure.

        Returns:
            `matplotlib.figure.Figure`.

        Raises:
            ImportError: If Matplotlib is not installed.
            RuntimeError: If there is no report yet.
            ValueError: If the kind, the layer or the measure is unknown, or was not measured.
        """
        if not self.reports:
            raise RuntimeError("There is nothing to draw yet: `reports` is empty. Call `fit` before `plot`.")
        return plot(self.reports, kind=kind, layer=layer, measure=measure, ax=ax)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the page of the Jacobian tab with the reports so far as one file, which opens without a network.

        Args:
            path: String or path of the file; one that is there is replaced.

        Raises:
            RuntimeError: If there is no report yet.
            OSError: If the file cannot be written.
        """
        write_page(path, self._shown())

    def show(self) -> Frame:
        """Returns the page of the Jacobian tab, which a notebook shows below its cell.

        Raises:
            RuntimeError: If there is no report yet.
        """
        return Frame(page(self._shown()))

    def _repr_html_(self) -> str:
        if not self.reports:
            return "<p>JacobianMonitor: no report yet</p>"
        step, report = self.reports[-1]
        return f"<p>Jacobians at step {step}, the last of {len(self.reports)} reports</p>{as_html(report.layers)}"

    def _shown(self) -> dict[str, dict[str, list[Moment]]]:
        """Returns what the page shows."""
        if not self.reports:
            raise RuntimeError("There is nothing to show yet: `reports` is empty. Call `fit` before.")
        return {"training": moments_of([(step, report.layers) for step, report in self.reports], self._positions)}

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
            self._writer = EventWriter(self._log_dir, positions=self._positions, name=self._name)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts a new count; measures nothing yet, since other callbacks may still restore weights here."""
        self._schedule.begin()
        self._failures.begin()
        self._scalars, self._told = {}, set()
        before, after = neighbours(self)
        for sentence in misplaced(before, after):
            warnings.warn(sentence, stacklevel=2)
        self._take_name([other._name for other in before if isinstance(other, JacobianMonitor)])  # noqa: SLF001

    def _take_name(self, taken: Iterable[str | None]) -> None:
        """Takes the given name, numbered if a monitor before this one has it."""
        base = self._given_name or "monitor"
        names = [self._given_name, *(f"{base}_{number}" for number, _ in enumerate(taken, 1))]
        name = next(name for name in names if name not in taken)
        if name != self._name and self._log_dir is not None:
            self._writer = EventWriter(self._log_dir, positions=self._positions, name=name)
        self._name = name

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Follows the numbering of Keras, which counts batches from 0 in each epoch."""
        self._epochs = epoch - 1
        self._schedule.begin_epoch()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures before the first batch, and prepares the penalty of each batch."""
        if self._schedule.start is None:
            self._schedule.start = self._iterations() or 0
            self._prepare_penalty()
            self._measure()
        self._prepare_penalty()
        if self._held is not None:
            # Not before this hook can raise no more: Keras would not say that the training has ended.
            self._held.attach(to_fit=True)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures after every `update_freq` batches."""
        if self._schedule.is_due_after(batch):
            self._measure()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures if `update_freq` is `"epoch"`, and adds the newest means to the logs."""
        self._warn_of_unused_penalty()
        self._epochs = epoch
        if self._schedule.is_due_after_epoch():
            self._measure(last=epoch + 1 == (self.params or {}).get("epochs"))
        if logs is None:
            return
        logs.update(self._named(self._scalars))
        penalty = self._penalty()
        if penalty is not None:
            logs.update(self._named({PENALTY: penalty}))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Measures after the last batch, takes the penalty out of the losses and closes the event file."""
        if self._schedule.is_due_at_end():
            self._measure(last=True)
        if self._held is not None:
            self._held.detach()
        if self._writer is not None:
            self._attempt("Closing the event file", self._writer.close)

    def _prepare(self, model: keras.Model) -> None:
        """Traces the measurement and the penalty of a model."""
        self._meter = self._held = None
        # Until it is known that it can be measured.
        self._traced_for = [model]
        meter = self._meter_of(model)
        if self._regularizer is not None:
            self._held = self._regularizer.prepare(model, self._plan.probe, self._plan.layers)
        self._meter = meter
        # Building a model may have made variables.
        self._traced_for = _identity(model)

    def _meter_of(self, model: keras.Model) -> JacobianMeter | None:
        """Returns the meter; None, with a warning, if no layer can be measured and the user named none."""
        try:
            return JacobianMeter.of_plan(model, self._plan)
        except UnmeasurableError as error:
            if self._plan.layers is not None or self._failures.on_error == "raise":
                raise
            warnings.warn(f"The monitor measures nothing, and the training goes on. {error}", stacklevel=4)
            return None

    def _prepare_penalty(self) -> None:
        """Prepares the penalty of the next batch, counted over the trainings before this one, too."""
        if self._held is not None:
            before = (self._schedule.start or 0) * self._batches_per_iteration()
            self._attempt("Taking states for the regularizer", self._held.begin, before + self._schedule.done)

    def _measure(self, *, last: bool = False) -> None:
        """Measures once, and hands the report on to the event file, to `reports` and to the logs of the epoch."""
        if self._meter is None:
            if self._traced_for:
                # It cannot be measured, which the user has been told.
                return
            raise RuntimeError("JacobianMonitor has no model yet. Call `set_model(model)` before `on_train_begin()`.")
        again = self._schedule.is_measured
        slow = self._schedule.next_is_slow(last=last, has_slow=self._meter.has_slow_measures)
        visible = bool(self._verbose) or (self.params or {}).get("verbose") == 1
        with self._progress.shown(slow=slow, visible=visible):
            report = self._attempt("Measuring the Jacobians", partial(self._report, self._meter, slow=slow))
        if report is None:
            # Old values under a new epoch would be wrong, and callbacks such as CSVLogger want the same keys.
            self._scalars = dict.fromkeys(self._scalars, float("nan"))
            return
        if again and self.reports:
            # Without the slow measures, when it was not known that the training would end there.
            self.reports.pop()
        self._hand_on(report, self._step())

    def _report(self, meter: JacobianMeter, *, slow: bool) -> Report:
        """Returns a new report, with the targets of the regularizer if there is one."""
        report = meter(slow=slow)
        return report if self._held is None else self._held.with_targets(report)

    def _hand_on(self, report: Report, step: int) -> None:
        self.reports.append((step, report))
        thin(self.reports, self._max_reports)
        self._scalars |= report.scalars(names_in_logs(self._logs, report))
        changes = self._attempt("Judging the report", lambda: self._verdicts.update(report.verdict)) or []
        if self._writer is not None:
            penalty = self._penalty()
            scalars = {} if penalty is None else {PENALTY: penalty}
            sentences = [change.sentence(step) for change in changes]
            at = self._epochs if self._in_epochs else step
            self._attempt("Writing the event file", self._writer.write, report, at, scalars, sentences)
        for change in changes:
            self._tell(change, step)
        if self._verbose:
            # Not every terminal knows all characters, and a pipe may be closed.
            self._attempt("Printing the report", print, f"\nJacobians at step {step}\n{report}")
        self._warn_of_values(report, step)

    def _tell(self, change: Change, step: int) -> None:
        """Prints a change of a verdict, and hands it to the user's function."""
        if self._verbose:
            self._attempt("Printing a verdict", print, f"\n{change.sentence(step)}")
        if self._on_verdict_change is not None:
            self._attempt(
                "Calling `on_verdict_change`", self._on_verdict_change, step, change.layer, change.old, change.new
            )

    def _penalty(self) -> float | None:
        """Returns the penalty with the present weights, NaN if it cannot be computed; None without a regularizer."""
        if self._held is None:
            return None
        value = self._attempt("Evaluating the penalty", self._held.penalty)
        return float("nan") if value is None else float(value)

    def _named(self, scalars: dict[str, float]) -> dict[str, float]:
        """Returns numbers by their keys in the logs."""
        return scalars if self._name is None else {f"{self._name}_{key}": value for key, value in scalars.items()}

    def _warn_once(self, what: str, sentence: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warnings.warn(sentence, stacklevel=3)

    def _warn_of_unused_penalty(self) -> None:
        """Warns after the first epoch if the training does not look at the penalty."""
        if self._held is None or self._held.is_used or not self._schedule.done:
            return
        self._warn_once(
            PENALTY,
            f"The `JacobianRegularizer` does nothing: the training of the model `{self.model.name}` did not read "
            "`model.losses` in its first epoch, so the penalty is no part of the loss. In a `train_step` or "
            "`compute_loss` of your own add `sum(self.losses)` to the loss, or call `super().compute_loss(...)`.",
        )

    def _attempt(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        return self._failures.attempt(what, self._step, partial(function, *args))

    def _warn_of_values(self, report: Report, step: int) -> None:
        """Warns once of each layer without a value, and of each one with values that are not finite."""
        for name, layer in report.layers.items():
            if not layer.mask.any():
                self._warn_once(
                    name,
                    f"Layer `{name}` skips all steps of the probe, which are masked: there is nothing to measure, and "
                    "its values are NaN. Give a probe with steps that are not masked.",
                )
            counts = layer.nonfinite()
            if counts:
                found = ", ".join(f"{count} of `{key}`" for key, count in counts.items())
                self._warn_once(
                    name,
                    f"Layer `{name}` has NaN or Inf in its Jacobians at step {step}: {found}. They are logged as they "
                    "are; later ones of this layer are not warned of.",
                )

    def _step(self) -> int:
        """Returns the optimizer's iteration count, or the batches seen if a custom `train_step` does not use it."""
        start, done = self._schedule.start or 0, self._schedule.done
        iterations = self._iterations()
        if iterations is None or (iterations == start and done >= 2 * self._batches_per_iteration()):
            return start + done
        return iterations

    def _batches_per_iteration(self) -> int:
        return getattr(getattr(self.model, "optimizer", None), "gradient_accumulation_steps", None) or 1

    def _iterations(self) -> int | None:
        iterations = getattr(getattr(self.model, "optimizer", None), "iterations", None)
        return None if iterations is None else int(keras.ops.convert_to_numpy(iterations))


@dataclass
class _Schedule:
    """The batches of a training, and the batches after which there is a measurement.

    Attributes:
        every: Number of batches between two measurements, or `"epoch"`.
        slow_every: Number of measurements from one with the slow measures to the next.
        start: Iteration count of the optimizer before the first batch; None before that.
        done: Number of batches of this training so far.
    """

    every: Literal["epoch"] | int
    slow_every: int
    start: int | None = None
    done: int = 0
    _batch: int = -1
    _measured_at: int | None = None
    _measured_slow: bool = True
    _measurements: int = 0

    def begin(self) -> None:
        """Starts a new count."""
        self.start, self.done, self._batch = None, 0, -1
        self._measured_at, self._measured_slow, self._measurements = None, True, 0

    def begin_epoch(self) -> None:
        self._batch = -1

    @property
    def is_measured(self) -> bool:
        """Boolean, True if there is a measurement after the last batch."""
        return self._measured_at == self.done

    def is_due_after(self, batch: int) -> bool:
        """Counts the batches up to the given one, and returns True if a measurement is due."""
        # `batch` is the last of the `steps_per_execution` batches that have just been run.
        before = (self.start or 0) + self.done
        self.done += batch - self._batch
        self._batch = batch
        return self.every != "epoch" and ((self.start or 0) + self.done) // self.every > before // self.every

    def is_due_after_epoch(self) -> bool:
        by_hand = self._batch < 0
        if by_hand:
            # A loop that calls no hooks of batches may have trained nevertheless.
            self._measured_at = None
        return (by_hand or self.every == "epoch") and not self.is_measured

    def is_due_at_end(self) -> bool:
        return self._measurements > 0 and not (self.is_measured and self._measured_slow)

    def next_is_slow(self, *, last: bool, has_slow: bool) -> bool:
        """Counts the next measurement, and returns True if it includes the slow measures."""
        slow = last or self._measurements % self.slow_every == 0
        self._measured_at, self._measured_slow = self.done, slow or not has_slow
        self._measurements += 1
        return slow


@dataclass
class _Failures:
    """The failures of a monitor: raised, or told once for each training and kept.

    Attributes:
        on_error: `"warn"` or `"raise"`.
        most: Number of sentences above which they are thinned.
        sentences: A sentence for each failure.
    """

    on_error: Literal["warn", "raise"]
    most: int
    sentences: list[str] = field(default_factory=list)
    _told: set[str] = field(default_factory=set)

    def begin(self) -> None:
        """Starts a training, in which the first failure of each kind is warned of again."""
        self._told.clear()

    def attempt(self, what: str, step: Callable[[], int], function: Callable[[], Any]) -> Any:
        """Calls the function; if it fails, raises or returns None.

        Args:
            what: String, the subject of the sentence about a failure.
            step: Callable that returns the step for this sentence.
            function: Callable without arguments.
        """
        try:
            return function()
        except Exception as error:
            if self.on_error == "raise":
                raise
            sentence = f"{what} at step {step()} failed: {message_of(error)}"
            self.sentences.append(sentence)
            thin(self.sentences, self.most)
            if what not in self._told:
                self._told.add(what)
                warnings.warn(
                    f"{sentence}\nTraining goes on. Further failures are not warned of, but kept in "
                    "`JacobianMonitor.failures`.",
                    stacklevel=3,
                )
            return None


def _is_in_epochs(step: Any, update_freq: Any) -> bool:
    """Returns True if the event files count epochs.

    Raises:
        ValueError: If the step is unknown, or several measurements would have the same one.
    """
    if step not in ("iteration", "epoch"):
        raise invalid_argument("step", "'iteration' or 'epoch'", f"step={step!r}")
    if step == "epoch" and update_freq != "epoch":
        raise invalid_argument("step", "'iteration' unless `update_freq` is 'epoch'", f"step={step!r}")
    return bool(step == "epoch")


def _check_arguments(
    *, update_freq: Any, on_error: Any, regularizer: Any, on_verdict_change: Any, **whole: Any
) -> None:
    """Refuses arguments that are invalid with any model."""
    if update_freq not in ("epoch", "batch") and not is_whole(update_freq, 1):
        raise invalid_argument("update_freq", "'epoch', 'batch' or a positive integer", f"update_freq={update_freq!r}")
    if on_error not in ("warn", "raise"):
        raise invalid_argument("on_error", "'warn' or 'raise'", f"on_error={on_error!r}")
    for name, value in whole.items():
        check_whole(name, value, 2 if name == "max_reports" else 1)
    if not isinstance(regularizer, (JacobianRegularizer, type(None))):
        raise invalid_argument("regularizer", "a `JacobianRegularizer` or None", f"regularizer={regularizer!r}")
    if on_verdict_change is not None and not callable(on_verdict_change):
        expected, received = "a function or None", f"on_verdict_change={on_verdict_change!r}"
        raise invalid_argument("on_verdict_change", expected, received)


def _read_logs(logs: Any, plan: MeasurementPlan) -> str | tuple[str, ...] | None:
    """Returns the choice of the numbers in the logs; refuses names of what is not measured."""
    if logs in ("auto", "all", None):
        return logs
    measured = [quantity.key for quantity in plan.selection] + (["loss_gradient"] if plan.targets is not None else [])
    known = {name for key in measured for name in (key, key.removeprefix("joint/"), f"joint/{key}")}
    names = [logs] if isinstance(logs, str) or not isinstance(logs, Iterable) else list(logs)
    unknown = [name for name in names if name not in known]
    if unknown:
        hint = did_you_mean(unknown[0], measured)
        raise invalid_argument("logs", f"'auto', 'all', None or names out of {measured}", f"logs={logs!r}{hint}")
    return tuple(names)


def _check_name(name: Any) -> None:
    """Refuses a name that cannot stand in keys and paths."""
    if name is not None and not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-]", name)):
        raise invalid_argument("name", "a string of letters, digits and `_.-`, or None", f"name={name!r}")


def _identity(model: keras.Model) -> list[Any]:
    """Returns the objects that a measurement depends on: if one of them is replaced, it must be traced anew."""
    # Each `compile` makes a new one, and Keras traces the model anew then too.
    loss = getattr(model, "_compile_loss", None)
    return [model, loss, *model.variables, None, *model.trainable_variables]


def _same(left: list[Any], right: list[Any]) -> bool:
    """Returns True if two lists have the same objects; `==` of variables compares their values."""
    return len(left) == len(right) and all(one is other for one, other in zip(left, right, strict=True))
