"""The pipeline from a model and a probe to a report."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_jacmon.errors import UnmeasurableError, invalid_argument, message_of, sentence
from keras_jacmon.jacobians.cell_jacobian import Assumptions, Choice
from keras_jacmon.jacobians.diagnosis import diagnose
from keras_jacmon.measurement.assembly import report_of
from keras_jacmon.measurement.compiled import CompiledMeasurement, CompiledMeasurements
from keras_jacmon.measurement.failures import explaining_failures, unmeasurable
from keras_jacmon.measurement.measurable_call import MeasurableCall, SequenceTensors
from keras_jacmon.measurement.plan import MeasurementPlan
from keras_jacmon.measurement.recorded_model import RecordedModel
from keras_jacmon.measurement.results import CallResults
from keras_jacmon.measurement.trials import Trials, applied, changes_of, copies_with, search, why_not_on_copies
from keras_jacmon.measures.selection import filtered
from keras_jacmon.model.building import build
from keras_jacmon.model.distribution import check_distribution
from keras_jacmon.model.inputs import fit_probe
from keras_jacmon.model.layers import check_model, find_recurrent_layers, select_layers
from keras_jacmon.model.unregistered import registration_hint
from keras_jacmon.options import takes_options
from keras_jacmon.report.layer_report import LayerReport
from keras_jacmon.report.report import Report
from keras_jacmon.report.suggestion import WeightChange
from keras_jacmon.report.verdict import Verdict


@takes_options
def measure(
    model: keras.Layer,
    probe: Any,
    *,
    layers: Iterable[str | keras.Layer] | str | keras.Layer | None = None,
    targets: Any = None,
    **options: Any,
) -> Report:
    """Measures the state-to-state Jacobians of a model once, and tries changes of layers that are not stable.

    The changes are the `suggestions` of a verdict. They are tried on copies of the weights; where copies do not reach a
    cell, on the model, whose weights are put back.

    Example:

    ```python
    report = keras_jacmon.measure(model, x[:32])
    print(report)
    report["lstm"]["variance"]          # (time, batch)
    ```

    Args:
        model: `keras.Model` or layer, compiled or not.
        probe: A batch of model inputs: array, tensor, list or dict of them, or a dataset (its first batch).
        layers: Names of recurrent layers, or layers. Defaults to None, all of them.
        targets: Targets of the probe's samples, for the gradient of the loss. Defaults to None, no such gradient.
        **options: As for `JacobianMeter`.

    Returns:
        `Report`, in plain NumPy.

    Raises:
        ValueError: As for `JacobianMeter`.
    """
    meter = JacobianMeter(model, probe, layers=layers, targets=targets, **options)
    return meter.measured(slow=True, trials=Trials.ON_MODEL)


class JacobianMeter:
    """Measures the Jacobians `ds_t/ds_{t-1}` of a model's recurrent layers, as often as it is called.

    Built and traced once; a call runs the model on the probe with the weights of that moment, unrolls the cells and
    measures every (step, sample). Weights, states, seed generators and statistics stay as they are. Dropout is off;
    a stateful layer starts from a copy of its states. Half-precision layers are unrolled in float32.

    Example:

    ```python
    meter = JacobianMeter(model, x[:32])
    before = meter()
    model.fit(x, y)
    print(meter().scalars())
    ```

    Args:
        model: `keras.Model` or layer. A model that is not built is built by a call on the probe.
        probe: A batch of model inputs: array, tensor, list or dict of them, or a dataset (its first batch).
        layers: Names of recurrent layers, or layers. Defaults to None, all of them.
        targets: Targets of the probe's samples, for the gradient of the loss by the hidden states (`loss_gradient`);
            the model must be compiled. Defaults to None, no gradient of the loss.
        measures: String or list of strings: presets `"fast"`, `"standard"` or `"full"`, or names of measures, such as
            `"variance"` of the hidden view, `"joint/variance"` of all states together and `"inputs/variance"` of the
            inputs. A cell with one state has no joint view of its own. Of chosen states, by position or by the keys of
            their dict, measures of one step are named as `"0+2/variance"` or `"v+a/variance"`: the block of the joint
            view for these states in this order. Defaults to None, `"standard"`.
        seed: Integer, seed of the random vectors. Defaults to 0.
        tolerance: Float in [0, 1), relative tolerance of the iterative measures: spectral norm, spectral radius and
            eigenvalues. Defaults to 0.01.
        max_rows: Integer, maximum number of (step, sample) points for spectral norm, spectral radius and condition
            number, spread evenly in time; None for all points. Defaults to 64.
        spectra: Integer, maximum number of (step, sample) points for whole spectra. Defaults to 16.
        flow_vectors: Integer of at least 2, number of random orthonormal vectors per sample for the flow and the
            sensitivity. As many as there are units give the exact value; so few units that this is cheap get them
            anyway. Defaults to 3.
        exact_flow: Boolean. If True, the flow is the spectral norm of the products, which are formed with n² entries
            for each sample (for tens of units); otherwise it is estimated from random vectors. Defaults to False.
        exponents: Integer, maximum number of Lyapunov exponents, from the largest on. Defaults to 8.
        warmup: Integer, number of steps of each sample that the exponents leave out. Defaults to None, a tenth of the
            sequence.
        qr_every: Integer, number of steps between two QR decompositions. More than 1 is faster, and loses directions
            that fall fast. Defaults to 1.
        max_bytes: Integer, memory for trajectories and derivatives, kept by chunks of points. Defaults to 1 GiB.
        max_entries: Integer. Variance and RMS singular value are exact as long as steps * samples * n² is at most this
            number, and above it unbiased estimates with a standard error. Defaults to 2**26.

    Raises:
        ValueError: If the model has no recurrent layer, a name is unknown, the probe or its targets do not fit the
            model, or a number is out of range.
    """

    @takes_options
    def __init__(
        self,
        model: keras.Layer,
        probe: Any,
        *,
        layers: Iterable[str | keras.Layer] | str | keras.Layer | None = None,
        targets: Any = None,
        **options: Any,
    ) -> None:
        plan = MeasurementPlan.read(JacobianMeter, probe, layers=layers, targets=targets, options=options)
        self._set_up(model, plan)

    @classmethod
    def of_plan(
        cls, model: keras.Layer, plan: MeasurementPlan, on_layer: Callable[[str], object] = str
    ) -> "JacobianMeter":
        """Makes a meter from what has been read already; for internal use.

        Args:
            model: Keras model or layer.
            plan: What has been read.
            on_layer: Called with the key of each layer, in backticks, before its measurement is traced. Defaults to
                nothing.
        """
        meter = cls.__new__(cls)
        meter._set_up(model, plan, on_layer)  # noqa: SLF001 - its own
        return meter

    def _set_up(self, model: keras.Layer, plan: MeasurementPlan, on_layer: Callable[[str], object] = str) -> None:
        check_model(model)
        check_distribution(model)
        self._model, self._options = model, plan.options
        quick = filtered(plan.selection, lambda measure: measure.cost != "full")
        # True: with the slow measures; False: without. If the user names only slow ones, they are always taken.
        self._selections = {True: plan.selection} | ({False: quick} if quick not in ((), plan.selection) else {})
        # Of a preset nobody asks for each measure.
        names = plan.options.measures
        self._named = frozenset([names] if isinstance(names, str) else names or ())
        if plan.targets is not None and not getattr(model, "compiled", False):
            raise invalid_argument(
                "targets",
                "None for a model that is not compiled, which has no loss",
                f"targets of type {type(plan.targets).__name__} for the model `{model.name}`",
            )
        build(model, plan.probe)
        self._layers = select_layers(find_recurrent_layers(model), plan.layers)
        self._measurements = 0
        self._assumptions: dict[str, Assumptions] = {}
        self._compiled = CompiledMeasurements(model, plan.options)
        # Traced here and not at the first call, so that errors and warnings come at once.
        self._recorded = RecordedModel(model, self._layers, fit_probe(model, plan.probe), plan.targets)
        with self._explaining_failures():
            self._refusals = self._recorded.refusals()
        self._calls = self._compile(on_layer, required=plan.layers is not None)

    @property
    def layers(self) -> tuple[str, ...]:
        """The keys of the reports: a recurrent layer's path, with `:1` and so on for further calls of it."""
        return tuple(call.name for call in self._calls)

    @property
    def has_slow_measures(self) -> bool:
        """Boolean, True if `meter(slow=False)` leaves something out."""
        return False in self._selections

    @property
    def trace_count(self) -> int:
        """Integer, number of traced measurements.

        There is one for each kind of call, another one when `meter(slow=False)`, or the trial of a change, first leaves
        measures out, and one more for each check that failed.
        """
        return len(self.graphs)

    @property
    def graphs(self) -> list[tf.Graph]:
        """List of `tf.Graph`, the graphs of the measurements, one for each trace; see `trace_count`."""
        return self._compiled.graphs

    @property
    def choices(self) -> dict[str, dict[str, list[Choice]]]:
        """Dict by key of dicts by view: the list of `Choice`, one for each block of the Jacobian."""
        return {call.name: self._measurement_of(call).metadata.choices for call in self._calls}

    def __call__(self, *, slow: bool = True, suggestions: bool = True) -> Report:
        """Measures with the weights of this moment.

        Where a Jacobian rests on a structure that was found in the cell, points are compared with autodiff: as many as
        fit into memory the first time, some at each later measurement. If they differ, a warning says so, and autodiff
        takes over at once and for good. The second application of autodiff is checked in the same way. The
        independence of the samples is checked at all points, unless it is proven.

        Args:
            slow: Boolean. If False, the measures that only the preset `"full"` has are left out, unless there are no
                others. Defaults to True.
            suggestions: Boolean, True to try changes of each layer that is not stable, on copies of its weights and
                with the inputs that it received. Up to 16 further measurements of such a layer are made, without the
                slow measures. Defaults to True.

        Returns:
            The report, in plain NumPy.

        Raises:
            RuntimeError: If the computation fails; the layer is named where TensorFlow tells.
            ValueError: If the states of a sample depend on those of others, so that it has no Jacobian of its own, or
                if a registered recurrence is not that of its layer.
        """
        return self.measured(slow=slow, trials=Trials.ON_COPIES if suggestions else Trials.NONE)

    def measured(self, *, slow: bool, trials: Trials) -> Report:
        """Measures as a call of the meter does; for internal use.

        Args:
            slow: Boolean, as in a call.
            trials: `Trials`, the place where changes of layers that are not stable are tried.
        """
        with self._explaining_failures():
            sequences, norms, refusals = self._recorded()
        for call in self._calls:
            if call.name in refusals:
                raise unmeasurable(call, ValueError(refusals[call.name]))
        layers = {c.name: self._measure(c, sequences[c.name], norms.get(c.name), slow=slow) for c in self._calls}
        if trials is not Trials.NONE:
            layers = {c.name: self._with_suggestions(c, layers[c.name], sequences[c.name], trials) for c in self._calls}
        self._measurements += 1
        return Report(layers)

    def _measure(
        self, call: MeasurableCall, sequence: SequenceTensors, loss_gradient: tf.Tensor | None, *, slow: bool
    ) -> LayerReport:
        """Measures one call, once more for each check that fails."""
        while True:
            measurement = self._measurement_of(call, slow=slow)
            with self._explaining_failures(call.name):
                results = measurement(self._draw(), sequence, call.kind.values())
            remaining = self._assumptions_after(call, measurement.metadata.cell, results)
            if remaining is None:
                return report_of(
                    measurement.metadata,
                    results,
                    go_backwards=call.go_backwards,
                    notes=(*call.notes, *measurement.metadata.without_square(self._named)),
                    loss_gradient=loss_gradient,
                )
            # Assigned last: if tracing fails or is interrupted, the next measurement uses the old traces.
            try:
                self._measurement_of(call, remaining, slow=slow)
            except Exception as error:
                raise unmeasurable(call, error) from error
            self._assumptions[call.name] = remaining

    def _draw(self) -> tf.Tensor:
        # An array: TensorFlow keeps a copy of every Python number on the device, for ever.
        return tf.constant(np.int32(self._measurements))

    def _with_suggestions(
        self, call: MeasurableCall, layer: LayerReport, sequence: SequenceTensors, trials: Trials
    ) -> LayerReport:
        """Returns the report of a call with suggestions if it is not stable, or with a note on why there are none."""
        before = layer.judge()
        if before is None or before.state == "stable":
            return layer
        reason = why_not_on_copies(call, self._calls)
        if reason and trials is not Trials.ON_MODEL:
            why = f"no change was tried, because {reason}: `keras_jacmon.suggest` tries on the model itself"
            return dataclasses.replace(layer, notes=(*layer.notes, why))

        def verdict_with(change: WeightChange) -> Verdict | None:
            return self._changed(call, change, sequence, on_model=bool(reason)).judge()

        try:
            changes = changes_of(call, self._measurement_of(call).metadata.recurrent_places, self._model)
            found = search(call.name, changes, before, verdict_with)
            names = " and ".join(f"`{name}`" for change in changes for name in change.names)
            why = f"no change of {names} that was tried makes the verdict much better"
            if not changes:
                why = "no change was tried: it has no trained weight that is known to multiply its states"
        except Exception as error:  # noqa: BLE001 - of any kind that a user's cell may raise for other weights
            found, why = (), f"changes of its weights could not be tried: {message_of(error)}"
        return dataclasses.replace(layer, suggestions=found, notes=layer.notes if found else (*layer.notes, why))

    def _changed(
        self, call: MeasurableCall, change: WeightChange, sequence: SequenceTensors, *, on_model: bool
    ) -> LayerReport:
        """Measures a call with changed weights, without the slow measures, and keeps nothing of it."""
        measurement = self._measurement_of(call, slow=False)
        if on_model:
            with applied(self._model, change):
                results = measurement(self._draw(), self._recorded().sequences[call.name], call.kind.values())
        else:
            results = measurement(self._draw(), sequence, copies_with(call, change))
        return report_of(measurement.metadata, results, go_backwards=call.go_backwards)

    def _assumptions_after(self, call: MeasurableCall, cell: str, results: CallResults) -> Assumptions | None:
        """Returns the assumptions that remain after a check that failed, and warns of it; None if none failed."""
        verdict = diagnose(results.checks.floats(), self._assumptions.get(call.name, Assumptions()))
        if verdict is None:
            return None
        if verdict.assumptions is None:
            raise ValueError(
                f"The Jacobians of layer `{call.name}` ({cell}) cannot be taken; name the other layers in `layers` to "
                f"leave it out. {verdict.reason}"
            )
        warnings.warn(
            f"Layer `{call.name}`: {verdict.reason}. {verdict.consequence} from now on, this time included.",
            stacklevel=5,
        )
        return verdict.assumptions

    def _measurement_of(
        self, call: MeasurableCall, assumptions: Assumptions | None = None, *, slow: bool = True
    ) -> CompiledMeasurement:
        known = assumptions or self._assumptions.get(call.name, Assumptions())
        return self._compiled.of(call, self._selections[slow or not self.has_slow_measures], known)

    def _compile(self, on_layer: Callable[[str], object], *, required: bool) -> list[MeasurableCall]:
        """Traces the measurement of each recorded call and returns the calls that can be measured.

        Warns of the others, unless the user named the layers.

        Args:
            on_layer: Called with the name of each call before.
            required: Boolean, True if the user named the layers.

        Raises:
            UnmeasurableError: If no layer can be measured, or one that the user named cannot.
        """
        self._refuse_uncalled(required=required)
        errors: dict[str, UnmeasurableError] = {}
        for call in self._recorded.calls:
            on_layer(f"`{call.name}`")
            if (error := self._error_of(call)) is not None:
                errors[call.name] = error
        calls = [call for call in self._recorded.calls if call.name not in errors]
        if errors and (required or not calls):
            raise next(iter(errors.values()))
        for error in errors.values():
            warnings.warn(f"{str(error).rstrip('.')}. It is not measured.", stacklevel=4)
        self._check_chosen_states(calls)
        for call in calls:
            for note in (*self._measurement_of(call).metadata.notes, *call.notes):
                warnings.warn(f"Layer `{call.name}`: {note}", stacklevel=4)
        return calls

    def _refuse_uncalled(self, *, required: bool) -> None:
        """Warns of layers without a recorded call; raises if the user named one, or if there is no call at all."""
        recorded = self._recorded
        reasons = "; ".join(f"layer `{name}`: {reason}" for name, reason in recorded.unmeasured.items())
        if reasons and required:
            raise invalid_argument("layers", "recurrent layers that the model calls on the probe", reasons)
        if not recorded.calls:
            raise UnmeasurableError(
                f"No recurrent layer of the model `{self._model.name}` can be measured. {sentence(reasons)}"
                f"{registration_hint(self._model)}"
            )
        if reasons:
            warnings.warn(f"Some recurrent layers are not measured. {sentence(reasons)}", stacklevel=5)

    def _check_chosen_states(self, calls: Sequence[MeasurableCall]) -> None:
        """Refuses a view of chosen states that no call has."""
        of_calls = {call.name: self._measurement_of(call).metadata for call in calls}
        found = {label for metadata in of_calls.values() for label in metadata.labels}
        for label in dict.fromkeys(label for metadata in of_calls.values() for label in metadata.left_out):
            if label not in found:
                reasons = "; ".join(f"in layer `{name}` {m.left_out[label]}" for name, m in of_calls.items())
                raise invalid_argument("measures", "chosen states that a recurrent layer has", reasons)

    def _error_of(self, call: MeasurableCall) -> UnmeasurableError | None:
        """Traces the measurement of a call and returns the reason why that fails; None if it does not."""
        if call.name in self._refusals:
            return unmeasurable(call, ValueError(self._refusals[call.name]))
        try:
            self._measurement_of(call)
        except Exception as error:  # noqa: BLE001 - of any kind that a user's cell may raise
            return unmeasurable(call, error)
        return None

    def _explaining_failures(self, name: str | None = None) -> contextlib.AbstractContextManager[None]:
        return explaining_failures([item.name for item in self._layers], name)
