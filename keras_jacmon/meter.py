"""The pipeline from a model and a probe to a report."""

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_jacmon.errors import UnmeasurableError, invalid_argument, message_of, sentence
from keras_jacmon.jacobians.cell_jacobian import Assumptions, Choice
from keras_jacmon.jacobians.checks import diagnose
from keras_jacmon.measurement.assembly import CallMetadata
from keras_jacmon.measurement.call import measure_call
from keras_jacmon.measurement.plan import MeasurementPlan
from keras_jacmon.measurement.results import CallResults
from keras_jacmon.measures.registry import MEASURES, Selection, filtered
from keras_jacmon.model.building import build
from keras_jacmon.model.distribution import check_distribution
from keras_jacmon.model.guard import foreign_variables, put_back, shielded
from keras_jacmon.model.inputs import fit_probe, hint_at_slip
from keras_jacmon.model.internals import tensors_in
from keras_jacmon.model.layers import check_model, find_recurrent_layers, select_layers
from keras_jacmon.model.loss_gradient import LossGradients, loss_gradients
from keras_jacmon.model.recording import Recording, RecurrentCall, record_calls
from keras_jacmon.options import takes_options
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


class _Static(NamedTuple):
    """The Python objects of a trace.

    Attributes:
        calls: Metadata of the calls, by name.
        recording: The recorded calls of the model; must live as long as the graph.
        loss: The gradients of the loss, which must live as long; None without targets.
    """

    calls: dict[str, CallMetadata]
    recording: Recording
    loss: LossGradients | None


class _Results(NamedTuple):
    """The tensors of a measurement, by name of the call: results, and norms of the gradient of the loss."""

    calls: dict[str, CallResults]
    loss_gradients: dict[str, tf.Tensor]


class _Traced(NamedTuple):
    """The pipeline for some measures.

    Attributes:
        function: The traced pipeline.
        foreign: Variables that it writes to and that Keras does not know; they are put back.
    """

    function: Traced[_Static]
    foreign: list[Any]


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
    def of_plan(cls, model: keras.Layer, plan: MeasurementPlan) -> "JacobianMeter":
        """Makes a meter from what has been read already; for internal use."""
        meter = cls.__new__(cls)
        meter._set_up(model, plan)  # noqa: SLF001 - its own
        return meter

    def _set_up(self, model: keras.Layer, plan: MeasurementPlan) -> None:
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
        self._traces = self._measurements = 0
        # Traced here and not at the first call, so that errors and warnings come at once.
        self._trace_measurable(required=plan.layers is not None)
        self._check_calls(required=plan.layers is not None)

    @property
    def layers(self) -> tuple[str, ...]:
        """The keys of the reports: a recurrent layer's path, with `:1` and so on for further calls of it."""
        return tuple(self._traced[True].function.static.calls)

    @property
    def has_slow_measures(self) -> bool:
        """Boolean, True if `meter(slow=False)` leaves something out."""
        return False in self._selections

    @property
    def trace_count(self) -> int:
        """Integer, number of traces: one, or two with slow measures, and as many again after each check that failed."""
        return self._traces

    @property
    def choices(self) -> dict[str, dict[str, list[Choice]]]:
        """Dict by key of dicts by view: the list of `Choice`, one for each block of the Jacobian."""
        return {name: metadata.choices for name, metadata in self._traced[True].function.static.calls.items()}

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
        which = slow or not self.has_slow_measures
        results = self._run(self._traced[which])
        while (assumptions := self._assumptions_after(results)) != self._assumptions:
            self._trace(assumptions)
            results = self._run(self._traced[which])
        self._measurements += 1
        calls = self._traced[which].function.static.calls
        return Report(
            {
                name: metadata.report(results.calls[name], results.loss_gradients.get(name))
                for name, metadata in calls.items()
            }
        )

    def _assumptions_after(self, results: _Results) -> dict[str, Assumptions]:
        """Returns the assumptions that remain after the checks, by key; warns if they are fewer than before."""
        assumptions = dict(self._assumptions)
        for name, found in results.calls.items():
            cell = self._traced[True].function.static.calls[name].cell
            verdict = diagnose(found.checks.floats(), assumptions.get(name, Assumptions()))
            if verdict is None:
                continue
            if verdict.assumptions is None:
                raise ValueError(
                    f"The Jacobians of layer `{name}` ({cell}) cannot be taken; name the other layers in `layers` to "
                    f"leave it out. {verdict.reason}"
                )
            warnings.warn(
                f"Layer `{name}`: {verdict.reason}. {verdict.consequence} from now on, this time included.",
                stacklevel=3,
            )
            assumptions[name] = verdict.assumptions
        return assumptions

    def _trace_measurable(self, *, required: bool) -> None:
        """Traces the measurement without the layers that cannot be measured.

        Raises:
            UnmeasurableError: If the user named the layers, or none is left.
        """
        try:
            self._trace({})
        except UnmeasurableError as error:
            others = tuple(item for item in self._layers if item.layer is not error.layer)
            if required or not others:
                raise
            warnings.warn(f"{str(error).rstrip('.')}. It is not measured.", stacklevel=5)
            self._layers = others
            self._trace_measurable(required=required)

    def _trace(self, assumptions: dict[str, Assumptions]) -> None:
        traced: dict[bool, _Traced] = {}
        specs = [tf.TensorSpec([], tf.int32), *(tf.TensorSpec(t.shape, t.dtype) for t in self._tensors())]
        for which, selection in self._selections.items():
            function = trace(partial(self._measure, selection, assumptions), specs)
            self._traces += 1
            traced[which] = _Traced(function, foreign_variables(function.graph.graph, self._model, []))
        # Assigned last: if tracing fails or is interrupted, the next measurement uses the old traces.
        self._assumptions, self._traced = assumptions, traced

    def _tensors(self) -> list[tf.Tensor]:
        return [*self._inputs, *([] if self._targets is None else keras.tree.flatten(self._targets))]

    def _run(self, traced: _Traced) -> _Results:
        # Keras' variables are shielded while tracing; a `tf.Variable` that a custom cell writes to is put back here.
        with put_back(traced.foreign):
            try:
                # Of numbers of Python TensorFlow keeps a copy on the device, for ever.
                return traced.function(tf.constant(np.int32(self._measurements)), *self._tensors())
            except tf.errors.OpError as error:
                raise RuntimeError(f"Measuring {self._culprit(error)} failed: {_essence(error)}") from error

    def _measure(
        self, selection: Selection, assumptions: Mapping[str, Assumptions], draw: tf.Tensor, *tensors: tf.Tensor
    ) -> tuple[_Results, _Static]:
        """Records the calls of the model on the probe and measures them, in the graph that is being traced."""
        inputs, targets = tensors[: len(self._inputs)], tensors[len(self._inputs) :]
        packed = keras.tree.pack_sequence_as(self._structure, list(inputs))
        with shielded(self._model):
            try:
                recording = record_calls(self._model, packed, self._layers)
            except Exception as error:
                raise self._refusal(inputs, error) from error
            calls: dict[str, CallMetadata] = {}
            results: dict[str, CallResults] = {}
            for position, call in enumerate(recording.calls):
                # The scope's name leads from a failing operation back to its layer.
                with _naming(call), tf.name_scope(f"jacobian_of_call_{position}"):
                    known = assumptions.get(call.name, Assumptions())
                    measured = measure_call(call, selection, self._options, assumptions=known, draw=draw)
                    calls[call.name], results[call.name] = measured
        if self._targets is None:
            return _Results(results, {}), _Static(calls, recording, None)
        with shielded(self._model):
            wanted = keras.tree.pack_sequence_as(self._targets, list(targets))
            loss = self._gradients_of_loss(recording, packed, wanted)
        norms = {name: MEASURES["loss_gradient"].function(gradient) for name, gradient in loss.by_call.items()}
        nothing = float("nan")
        gradients = {
            name: tf.where(results[name].mask, norm, tf.constant(nothing, norm.dtype)) for name, norm in norms.items()
        }
        return _Results(results, gradients), _Static(calls, recording, loss)

    def _gradients_of_loss(self, recording: Recording, inputs: Any, targets: Any) -> LossGradients:
        measured = {call.layer for call in recording.calls}
        layers = {position: item for position, item in enumerate(self._layers) if item.layer in measured}
        # With the losses that layers add, such as activity regularizers; those of weights look for these in the scope.
        weights = [(weight, tf.convert_to_tensor(weight.value)) for weight in self._model.trainable_variables]
        with keras.StatelessScope(state_mapping=weights, collect_losses=True):
            return loss_gradients(self._model, inputs, targets, layers)

    def _check_calls(self, *, required: bool) -> None:
        """Warns of layers that cannot be measured; an error if the user asked for one of them, or none is left."""
        static = self._traced[True].function.static
        unmeasured, calls = static.recording.unmeasured, static.calls
        reasons = "; ".join(f"layer `{name}`: {reason}" for name, reason in unmeasured.items())
        if unmeasured and required:
            raise invalid_argument("layers", "recurrent layers that the model calls on the probe", reasons)
        if not calls:
            raise UnmeasurableError(
                f"No recurrent layer of the model `{self._model.name}` can be measured. {sentence(reasons)}"
            )
        if reasons:
            warnings.warn(f"Some recurrent layers are not measured. {sentence(reasons)}", stacklevel=4)
        for name, metadata in calls.items():
            for note in metadata.notes:
                warnings.warn(f"Layer `{name}`: {note}", stacklevel=4)

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

    def _culprit(self, error: tf.errors.OpError) -> str:
        where = re.search(r"(jacobian_of_call|forward_of_layer)_(\d+)", error.message)
        if where is None:
            return "the model, outside of its recurrent layers,"
        names = self.layers if where[1] == "jacobian_of_call" else [item.name for item in self._layers]
        return f"layer `{names[int(where[2])]}`"


def _essence(error: tf.errors.OpError) -> str:
    """Returns the message without its dozens of lines on the origin of the operation."""
    lines = [line for line in error.message.splitlines() if line.strip() and not line.startswith('  File "')]
    if "only supports the NHWC" in error.message:
        # The first words alone would send the reader to look for them in vain.
        lines.append("TensorFlow has no convolution with `data_format='channels_first'` for this CPU.")
    return "\n".join(
        line for line in lines if not re.match(r"Graph execution error:|Detected at node |<stack traces", line)
    )


@contextlib.contextmanager
def _naming(call: RecurrentCall) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        foreign = ", ".join(f"`{name}`" for name in tensors_in(call.layer.cell))
        hint = f" The cell uses tensors of the model that are neither its inputs nor its states: {foreign}." * bool(
            foreign
        )
        raise UnmeasurableError(
            f"The Jacobians of layer `{call.name}` ({type(call.layer.cell).__name__}) cannot be taken; name the other "
            f"layers in `layers` to leave it out.{hint} The reason: {message_of(error)}",
            call.layer,
        ) from error
