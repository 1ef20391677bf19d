"""The Keras callback that measures while a model trains, and hands the reports on."""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import keras

from keras_jacmon.dashboard.one_file import Frame, page, write_page
from keras_jacmon.dashboard.stack import Moment
from keras_jacmon.events.thinning import thin
from keras_jacmon.events.writer import EventWriter
from keras_jacmon.measurement.plan import MeasurementPlan
from keras_jacmon.options import takes_options
from keras_jacmon.regularization.regularizer import JacobianRegularizer
from keras_jacmon.report.changes import VerdictChange
from keras_jacmon.report.frame import to_dataframe
from keras_jacmon.report.html import as_html
from keras_jacmon.report.packing import moments_of
from keras_jacmon.report.plots import plot
from keras_jacmon.report.report import Report
from keras_jacmon.report.verdict import Verdict
from keras_jacmon.watching.announcements import Announcements
from keras_jacmon.watching.arguments import check_arguments, check_name, is_in_epochs, read_logs
from keras_jacmon.watching.callback_list import begun_before, misplaced, neighbours
from keras_jacmon.watching.failures import Failures
from keras_jacmon.watching.log_values import PENALTY, STRENGTH, LogValues
from keras_jacmon.watching.progress import MeasurementProgress
from keras_jacmon.watching.schedule import MeasurementSchedule, batches_per_iteration, iterations_of
from keras_jacmon.watching.traced_model import TracedModel

if TYPE_CHECKING:
    from keras_jacmon.events.sink import Sink


class JacobianMonitor(keras.callbacks.Callback):
    """Shows while `fit` runs whether the recurrent layers of a model let their gradient vanish, live or explode.

    Measures the state-to-state Jacobians `ds_t/ds_{t-1}` on a probe batch before the first batch of a training, then
    every `update_freq`, and at its end; writes them to TensorBoard event files and adds some means to the `logs`
    of each epoch, where `History`, the progress line and the callbacks that stand *after* this one see them. The
    training itself stays as it is, to the bit, unless a regularizer is given. At the end of a training, and with
    `verbose=1` before it too, changes of layers that are not stable are tried on copies of their weights; those that
    help are the `suggestions` of the verdict.

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
            strength, is `jac_penalty` in `logs` and event files, with the present weights, and a strength that is
            `"auto"`, which needs `targets`, is `jac_strength`. Defaults to None.
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
            second shows a progress bar, with 1 or in a `fit` that shows one. While it starts, one line names the layers
            that are being prepared, with 1 from the first one on, and else after five seconds. Defaults to 0.
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
        check_arguments(
            update_freq=update_freq,
            on_error=on_error,
            regularizer=regularizer,
            on_verdict_change=on_verdict_change,
            log_dir=log_dir,
            verbose=verbose,
            slow_freq=slow_freq,
            positions=positions,
            max_reports=max_reports,
        )
        check_name(name)
        plan = MeasurementPlan.read(JacobianMonitor, probe, layers=layers, targets=targets, options=options)
        self._traced = TracedModel(plan, regularizer, strict=on_error == "raise", verbose=bool(verbose))
        self._schedule = MeasurementSchedule(1 if update_freq == "batch" else update_freq, slow_freq)
        self._log_dir, self._positions = log_dir, positions
        self._in_epochs, self._epochs = is_in_epochs(step, update_freq), -1
        self._max_reports = max_reports
        self._failures = Failures(on_error, max_reports)
        self._log_values = LogValues(read_logs(logs, plan))
        self._announcements = Announcements(verbose, on_verdict_change)
        self._progress = MeasurementProgress()
        self._knows_neighbours = True
        self._given_name = self._name = name
        self._writer: Sink | None = None
        self.reports: list[tuple[int, Report]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy keeps: the options, and nothing of a model."""
        # What a training has made of the parts is no argument of theirs.
        return vars(self) | {
            "_model": None,
            "params": None,
            "_traced": replace(self._traced, plan=self._traced.plan.without_a_model()),
            "_schedule": replace(self._schedule),
            "_failures": replace(self._failures),
            "_log_values": replace(self._log_values),
            "_announcements": replace(self._announcements),
            "_name": self._given_name,
            "_writer": None,
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
        if model is not self._model:
            self._announcements.forget()
        super().set_model(model)
        # A `fit` that has failed may not have come to its end.
        self._traced.let_go()
        if not self._traced.is_of(model):
            if self._traced.has_model and self.reports:
                # In the middle of a program that may have run for days.
                self._attempt("Preparing for a model that has changed", self._traced.prepare, model)
            else:
                self._traced.prepare(model)
        if self._writer is None:
            self._open_writer()

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts a new count; measures nothing yet, since other callbacks may still restore weights here."""
        self._schedule.begin()
        self._failures.begin()
        self._log_values.begin()
        self._announcements.begin()
        self._knows_neighbours = False
        self._take_name([other._name for other in begun_before(self)])  # noqa: SLF001

    def _warn_of_neighbours(self) -> None:
        """Warns once of callbacks in the wrong place, after the first batch, which need not wait for the search."""
        if not self._knows_neighbours:
            self._knows_neighbours = True
            for sentence in misplaced(*neighbours(self)):
                warnings.warn(sentence, stacklevel=3)

    def _take_name(self, taken: Iterable[str | None]) -> None:
        """Takes the given name, numbered if a monitor before this one has it."""
        base = self._given_name or "monitor"
        names = [self._given_name, *(f"{base}_{number}" for number, _ in enumerate(taken, 1))]
        name = next(name for name in names if name not in taken)
        if name != self._name:
            self._name = name
            self._open_writer()

    def _open_writer(self) -> None:
        if self._log_dir is not None:
            self._writer = EventWriter(self._log_dir, positions=self._positions, name=self._name)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Follows the numbering of Keras, which counts batches from 0 in each epoch."""
        self._epochs = epoch - 1
        self._schedule.begin_epoch()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures before the first batch, and prepares the penalty of each batch."""
        if self._schedule.start is None:
            self._schedule.start = iterations_of(self.model) or 0
            self._prepare_penalty()
            self._measure()
        else:
            self._warn_of_neighbours()
        self._prepare_penalty()
        if self._traced.regularized is not None:
            # Not before this hook can raise no more: Keras would not say that the training has ended.
            self._traced.regularized.attach(to_fit=True)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures after every `update_freq` batches."""
        if self._schedule.is_due_after(batch):
            epochs, batches = ((self.params or {}).get(name) for name in ("epochs", "steps"))
            self._measure(last=self._epochs + 2 == epochs and batch + 1 == batches)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures if `update_freq` is `"epoch"`, and adds the newest means to the logs."""
        self._warn_of_neighbours()
        self._warn_of_unused_penalty()
        self._epochs = epoch
        if self._schedule.is_due_after_epoch():
            self._measure(last=epoch + 1 == (self.params or {}).get("epochs"))
        if logs is not None:
            replaced = self._log_values.add_to(logs, self._penalty_values(), self._name)
            if replaced:
                self._announcements.warn_once(
                    "logs",
                    f"In the logs, values of others are replaced by those of this monitor: {sorted(replaced)}. Give it "
                    "another `name`, or the layers other ones.",
                )

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Measures after the last batch, takes the penalty out of the losses and closes the event file."""
        stable = not self.reports or all(v.state == "stable" for v in self.reports[-1][1].verdict.values())
        if self._schedule.is_due_at_end(needs_trials=not stable):
            self._measure(last=True)
        self._traced.let_go()
        if self._writer is not None:
            self._attempt("Closing the event file", self._writer.close)

    def _prepare_penalty(self) -> None:
        """Prepares the penalty of the next batch, counted over the trainings before this one, too."""
        if self._traced.regularized is not None:
            before = (self._schedule.start or 0) * batches_per_iteration(self.model)
            self._attempt(
                "Taking states for the regularizer", self._traced.regularized.begin, before + self._schedule.done
            )

    def _measure(self, *, last: bool = False) -> None:
        """Measures once, and hands the report on to the event file, to `reports` and to the logs of the epoch."""
        meter = self._traced.meter
        if meter is None:
            if self._traced.has_model:
                # It cannot be measured, which the user has been told.
                return
            raise RuntimeError("JacobianMonitor has no model yet. Call `set_model(model)` before `on_train_begin()`.")
        again = self._schedule.is_measured
        slow = self._schedule.next_is_slow(last=last, has_slow=meter.has_slow_measures)
        # Trials take several measurements of a layer, and a training should begin soon.
        suggestions = last or (not self.reports and bool(self._announcements.verbose))
        visible = bool(self._announcements.verbose) or (self.params or {}).get("verbose") == 1
        with self._progress.shown(slow=slow, visible=visible):
            report = self._attempt(
                "Measuring the Jacobians", partial(self._traced.report, meter, slow=slow, suggestions=suggestions)
            )
        if report is None:
            self._log_values.forget()
            return
        if again and self.reports:
            # Without the slow measures, when it was not known that the training would end there.
            self.reports.pop()
        self._hand_on(report, self._step())

    def _hand_on(self, report: Report, step: int) -> None:
        self.reports.append((step, report))
        thin(self.reports, self._max_reports)
        self._log_values.take(report)
        changes = self._attempt("Judging the report", self._announcements.changes, report) or []
        self._write(report, step, changes)
        self._announcements.tell(report, changes, step, self._attempt)

    def _write(self, report: Report, step: int, changes: Sequence[VerdictChange]) -> None:
        """Writes a report to the event file."""
        if self._writer is not None:
            scalars = self._penalty_values()
            sentences = [change.sentence(step) for change in changes]
            at = self._epochs if self._in_epochs else step
            self._attempt("Writing the event file", self._writer.write, report, at, scalars, sentences)

    def _penalty_values(self) -> dict[str, float]:
        """Returns the penalty with the present weights, NaN if it cannot be computed, and a strength that is chosen."""
        regularized = self._traced.regularized
        if regularized is None:
            return {}
        value = self._attempt("Evaluating the penalty", regularized.penalty)
        penalty = {PENALTY: float("nan") if value is None else float(value)}
        return penalty if regularized.strength is None else penalty | {STRENGTH: regularized.strength}

    def _warn_of_unused_penalty(self) -> None:
        """Warns after the first epoch if the training does not look at the penalty."""
        regularized = self._traced.regularized
        if regularized is None or regularized.is_used or not self._schedule.done:
            return
        self._announcements.warn_once(
            PENALTY,
            f"The `JacobianRegularizer` does nothing: the training of the model `{self.model.name}` did not read "
            "`model.losses` in its first epoch, so the penalty is no part of the loss. In a `train_step` or "
            "`compute_loss` of your own add `sum(self.losses)` to the loss, or call `super().compute_loss(...)`.",
        )

    def _attempt(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        return self._failures.attempt(what, self._step, partial(function, *args))

    def _step(self) -> int:
        return self._schedule.step(self.model)
