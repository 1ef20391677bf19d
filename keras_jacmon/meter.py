"""The pipeline from a model and a probe to a report."""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_jacmon.cell.trajectory import UnrollInputs
from keras_jacmon.errors import UnmeasurableError, invalid_argument, message_of, sentence
from keras_jacmon.jacobians.cell_jacobian import Assumptions, Choice
from keras_jacmon.jacobians.checks import diagnose
from keras_jacmon.measurement.compiled import (
    CompiledMeasurement,
    CompiledMeasurements,
    MeasurableCall,
    SequenceTensors,
)
from keras_jacmon.measurement.plan import MeasurementPlan
from keras_jacmon.measurement.results import CallResults
from keras_jacmon.measures.registry import MEASURES, filtered
from keras_jacmon.model.building import build
from keras_jacmon.model.distribution import check_distribution
from keras_jacmon.model.guard import foreign_variables, put_back, shielded
from keras_jacmon.model.inputs import fit_probe, hint_at_slip
from keras_jacmon.model.internals import tensors_in
from keras_jacmon.model.layers import check_model, find_recurrent_layers, select_layers
from keras_jacmon.model.loss_gradient import LossGradients, loss_gradients
from keras_jacmon.model.recording import Recording, record_calls
from keras_jacmon.options import takes_options
from keras_jacmon.report.layer_report import LayerReport
from keras_jacmon.report.report import Report
from keras_jacmon.traced_graph import Traced, trace


@takes_options
def measure(
    model: keras.Layer,
    probe: Any,
    *,
    layers: Iterable[str | keras.Layer] | str | keras.Layer | None = None,
    targets: Any = None,
    **options: Any,
) -> Report:
    """Measures the state-to-state Jacobians of a model once.

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
    return JacobianMeter(model, probe, layers=layers, targets=targets, **options)()


class _Recorded(NamedTuple):
    """The recording of a model's calls, known when it is traced.

    Attributes:
        calls: List of the calls.
        recording: The recorded tensors of the model; must live as long as the graph.
    """

    calls: list[MeasurableCall]
    recording: Recording


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
            inputs. A cell with one state has no joint view of its own. Defaults to None, `"standard"`.
        seed: Integer, seed of the random vectors. Defaults to 0.
        tolerance: Float in [0, 1), relative tolerance of the iterative measures: spectral norm, spectral radius and
            eigenvalues. Defaults to 0.01.
        max_rows: Integer, maximum number of (step, sample) points for spectral norm, spectral radius and condition
            number, spread evenly in time; None for all points. Defaults to 64.
        spectra: Integer, maximum number of (step, sample) points for whole spectra. Defaults to 16.
        flow_vectors: Integer of at least 2, number of random orthonormal vectors per sample for the flow. As many as
            there are units give its exact value; so few units that this is cheap get them anyway. Defaults to 3.
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
        self._targets = plan.targets
        if plan.targets is not None and not getattr(model, "compiled", False):
            raise invalid_argument(
                "targets",
                "None for a model that is not compiled, which has no loss",
                f"targets of type {type(plan.targets).__name__} for the model `{model.name}`",
            )
        build(model, plan.probe)
        self._layers = select_layers(find_recurrent_layers(model), plan.layers)
        inputs = fit_probe(model, plan.probe)
        self._inputs = keras.tree.flatten(inputs)
        self._structure = keras.tree.map_structure(lambda _: 0, inputs)
        self._measurements = 0
        self._assumptions: dict[str, Assumptions] = {}
        self._compiled = CompiledMeasurements(model, plan.options)
        # Traced here and not at the first call, so that errors and warnings come at once.
        self._recording = trace(self._record, self._specs(self._inputs))
        self._loss = None if self._targets is None else trace(self._differentiate_loss, self._specs(self._tensors()))
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

        There is one for each kind of call, another one when `meter(slow=False)` first leaves measures out, and one more
        for each check that failed.
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

    def __call__(self, *, slow: bool = True) -> Report:
        """Measures with the weights of this moment.

        Where a Jacobian rests on a structure that was found in the cell, points are compared with autodiff: as many as
        fit into memory the first time, some at each later measurement. If they differ, a warning says so, and autodiff
        takes over at once and for good. The second application of autodiff is checked in the same way. The
        independence of the samples is checked at all points, unless it is proven.

        Args:
            slow: Boolean. If False, the measures that only the preset `"full"` has are left out, unless there are no
                others. Defaults to True.

        Returns:
            The report, in plain NumPy.

        Raises:
            RuntimeError: If the computation fails; the layer is named where TensorFlow tells.
            ValueError: If the states of a sample depend on those of others, so that it has no Jacobian of its own.
        """
        with self._explaining_failures():
            sequences = self._run(self._recording, self._inputs)
            norms = {} if self._loss is None else self._run(self._loss, self._tensors())
        by_name = dict(zip((call.name for call in self._recording.static.calls), sequences, strict=True))
        report = Report({c.name: self._measure(c, by_name[c.name], norms.get(c.name), slow=slow) for c in self._calls})
        self._measurements += 1
        return report

    def _measure(
        self, call: MeasurableCall, sequence: SequenceTensors, loss_gradient: tf.Tensor | None, *, slow: bool
    ) -> LayerReport:
        """Measures one call, once more for each check that fails."""
        # Of numbers of Python TensorFlow keeps a copy on the device, for ever.
        draw = tf.constant(np.int32(self._measurements))
        while True:
            measurement = self._measurement_of(call, slow=slow)
            with self._explaining_failures(call):
                results = measurement(call, draw, sequence)
            remaining = self._assumptions_after(call, measurement.metadata.cell, results)
            if remaining is None:
                return measurement.metadata.report(
                    results, go_backwards=call.layer.go_backwards, notes=call.notes, loss_gradient=loss_gradient
                )
            # Assigned last: if tracing fails or is interrupted, the next measurement uses the old traces.
            self._measurement_of(call, remaining, slow=slow)
            self._assumptions[call.name] = remaining

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

    def _tensors(self) -> list[tf.Tensor]:
        return [*self._inputs, *([] if self._targets is None else keras.tree.flatten(self._targets))]

    @staticmethod
    def _specs(tensors: Sequence[tf.Tensor]) -> list[tf.TensorSpec]:
        return [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors]

    def _run(self, traced: Traced[Any], tensors: Sequence[tf.Tensor]) -> Any:
        """Runs a traced function of the model, and puts back the variables that Keras does not know."""
        with put_back(foreign_variables(traced.graph.graph, self._model, [])):
            return traced(*tensors)

    def _record(self, *inputs: tf.Tensor) -> tuple[list[SequenceTensors], _Recorded]:
        """Records the calls of the model on the probe, in the graph that is being traced."""
        with shielded(self._model):
            try:
                packed = keras.tree.pack_sequence_as(self._structure, list(inputs))
                recording = record_calls(self._model, packed, self._layers)
            except Exception as error:
                raise self._refusal(inputs, error) from error
            sequences = [UnrollInputs.of(call) for call in recording.calls]
            calls = list(map(MeasurableCall.of, recording.calls, sequences))
        return [(part.inputs, part.states, part.mask) for part in sequences], _Recorded(calls, recording)

    def _differentiate_loss(self, *tensors: tf.Tensor) -> tuple[dict[str, tf.Tensor], LossGradients]:
        """Returns the norms of the gradient of the loss, by name of the call, in the graph that is being traced."""
        inputs, targets = tensors[: len(self._inputs)], tensors[len(self._inputs) :]
        with shielded(self._model):
            loss = self._gradients_of_loss(
                keras.tree.pack_sequence_as(self._structure, list(inputs)),
                keras.tree.pack_sequence_as(self._targets, list(targets)),
            )
        return {name: MEASURES["loss_gradient"].function(gradient) for name, gradient in loss.by_call.items()}, loss

    def _gradients_of_loss(self, inputs: Any, targets: Any) -> LossGradients:
        measured = {call.layer for call in self._recording.static.calls}
        layers = {position: item for position, item in enumerate(self._layers) if item.layer in measured}
        # With the losses that layers add, such as activity regularizers; those of weights look for these in the scope.
        weights = [(weight, tf.convert_to_tensor(weight.value)) for weight in self._model.trainable_variables]
        with keras.StatelessScope(state_mapping=weights, collect_losses=True):
            return loss_gradients(self._model, inputs, targets, layers)

    def _compile(self, on_layer: Callable[[str], object], *, required: bool) -> list[MeasurableCall]:
        """Traces the measurement of each recorded call and returns the calls that can be measured.

        Warns of the others, unless the user named the layers.

        Args:
            on_layer: Called with the name of each call before.
            required: Boolean, True if the user named the layers.

        Raises:
            UnmeasurableError: If no layer can be measured, or one that the user named cannot.
        """
        recorded = self._recording.static
        reasons = "; ".join(f"layer `{name}`: {reason}" for name, reason in recorded.recording.unmeasured.items())
        if reasons and required:
            raise invalid_argument("layers", "recurrent layers that the model calls on the probe", reasons)
        if not recorded.calls:
            raise UnmeasurableError(
                f"No recurrent layer of the model `{self._model.name}` can be measured. {sentence(reasons)}"
            )
        if reasons:
            warnings.warn(f"Some recurrent layers are not measured. {sentence(reasons)}", stacklevel=4)
        errors: dict[str, UnmeasurableError] = {}
        for call in recorded.calls:
            on_layer(f"`{call.name}`")
            if (error := self._error_of(call)) is not None:
                errors[call.name] = error
        calls = [call for call in recorded.calls if call.name not in errors]
        if errors and (required or not calls):
            raise next(iter(errors.values()))
        for error in errors.values():
            warnings.warn(f"{str(error).rstrip('.')}. It is not measured.", stacklevel=4)
        for call in calls:
            for note in (*self._measurement_of(call).metadata.notes, *call.notes):
                warnings.warn(f"Layer `{call.name}`: {note}", stacklevel=4)
        return calls

    def _error_of(self, call: MeasurableCall) -> UnmeasurableError | None:
        """Traces the measurement of a call and returns the reason why that fails; None if it does not."""
        try:
            self._measurement_of(call)
        except Exception as error:  # noqa: BLE001 - of any kind that a user's cell may raise
            cell = call.layer.cell
            foreign = ", ".join(f"`{name}`" for name in tensors_in(cell))
            hint = " The cell uses tensors of the model that are neither its inputs nor its states: " if foreign else ""
            refusal = UnmeasurableError(
                f"The Jacobians of layer `{call.name}` ({type(cell).__name__}) cannot be taken; name the other layers "
                f"in `layers` to leave it out.{hint}{foreign}{'.' * bool(foreign)} The reason: {message_of(error)}",
                call.layer,
            )
            refusal.__cause__ = error
            return refusal
        return None

    def _refusal(self, inputs: Sequence[tf.Tensor], error: Exception) -> ValueError:
        shapes = [tuple(tensor.shape) for tensor in inputs]
        fixed = {
            item.name: int(keras.tree.flatten(item.layer.states)[0].shape[0])
            for item in self._layers
            if item.layer.stateful and item.layer.states is not None
        }
        expected = "a batch that the model can be called on"
        for name, samples in fixed.items():
            if samples != inputs[0].shape[0]:
                expected = f"a batch of {samples} samples, as the stateful layer `{name}` was built for"
        hint = hint_at_slip(keras.tree.pack_sequence_as(self._structure, list(inputs)))
        return invalid_argument("probe", expected, f"shapes {shapes}{hint}. The model says: {message_of(error)}")

    @contextlib.contextmanager
    def _explaining_failures(self, call: MeasurableCall | None = None) -> Iterator[None]:
        """Turns an error of TensorFlow into one that names the layer: of a call, or the one where TensorFlow was."""
        try:
            yield
        except tf.errors.OpError as error:
            name = None if call is None else call.name
            where = re.search(r"forward_of_layer_(\d+)", error.message)
            if name is None and where is not None:
                name = self._layers[int(where[1])].name
            culprit = "the model, outside of its recurrent layers," if name is None else f"layer `{name}`"
            raise RuntimeError(f"Measuring {culprit} failed: {_essence(error)}") from error


def _essence(error: tf.errors.OpError) -> str:
    """Returns the message without its dozens of lines on the origin of the operation."""
    lines = [line for line in error.message.splitlines() if line.strip() and not line.startswith('  File "')]
    if re.search("only supports (the )?ND?HWC", error.message):
        # The first words alone would send the reader to look for them in vain.
        lines.insert(
            0,
            "TensorFlow has no convolution with `data_format='channels_first'` for this CPU. Expected "
            "`data_format='channels_last'`, or a GPU. TensorFlow says:",
        )
    return "\n".join(
        line for line in lines if not re.match(r"Graph execution error:|Detected at node |<stack traces", line)
    )
