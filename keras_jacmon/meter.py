"""Model and probe in, report out: the whole pipeline on one screen."""

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_jacmon.jacobians.views import Connections, find_connections, floating_states, jacobian_operator, size
from keras_jacmon.measures.options import Options
from keras_jacmon.measures.registry import MEASURES, select_measures
from keras_jacmon.measures.rows import measure_rows
from keras_jacmon.probe.capture import RecurrentCall, drop_masks, record_calls, training_argument
from keras_jacmon.probe.data import fit_probe, read_probe
from keras_jacmon.probe.layers import find_recurrent_layers, select_layers, sublayers
from keras_jacmon.probe.trajectory import unroll
from keras_jacmon.report import LayerReport, Report

# More (row, vector) pairs at once than this do not fit a cache and are no faster.
_MOST_ROWS = 2**14


def measure(model: keras.Layer, probe: Any, **options: Any) -> Report:
    """Measures the state-to-state Jacobians of a model once.

    Example:

    ```python
    report = keras_jacmon.measure(model, x[:32])
    print(report)
    report["lstm"]["variance"]          # (time, batch)
    ```

    Args:
        model: A Keras model, compiled or not.
        probe: A batch of model inputs.
        **options: As for `JacobianMeter`.

    Returns:
        The report.

    Raises:
        ValueError: As for `JacobianMeter`.
    """
    return JacobianMeter(model, probe, **options)()


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
        model: A Keras model, compiled or not. One that is not built is built by calling it on the probe.
        probe: A batch of model inputs: array, tensor, list or dict of them, or a dataset (its first batch).
        layers: Names of recurrent layers, or layers; None for all.
        measures: Out of `"variance"`, `"rms_singular_value"`, `"spectral_norm"`; None for all.
        seed: Integer, for random vectors.
        tolerance: Relative, of the spectral norm.
        max_bytes: Bounds the memory of the derivatives, through chunks over (step, sample).
        max_entries: Variance and RMS singular value are exact as long as steps * samples * n² is at most this, and
            above it unbiased estimates with a standard error. They take one derivative of the cell per step, sample
            and row of J.

    Raises:
        ValueError: If the model has no recurrent layer, a name is unknown, the probe does not fit the model, or a
            number is out of range.
    """

    def __init__(
        self,
        model: keras.Layer,
        probe: Any,
        *,
        layers: Iterable[str | keras.Layer] | str | keras.Layer | None = None,
        measures: Iterable[str] | str | None = None,
        seed: int = 0,
        tolerance: float = 1e-2,
        max_bytes: int = 2**30,
        max_entries: int = 2**26,
    ) -> None:
        check_options(measures=measures, seed=seed, tolerance=tolerance, max_bytes=max_bytes, max_entries=max_entries)
        self._model = model
        self._measures = select_measures(measures)
        self._options = Options(seed=seed, tolerance=tolerance, max_entries=max_entries)
        self._max_bytes = max_bytes
        arrays = read_probe(probe)
        _build(model, arrays)
        self._layers = select_layers(find_recurrent_layers(model), layers)
        inputs = fit_probe(model, arrays)
        self._inputs = keras.tree.flatten(inputs)
        self._structure = keras.tree.map_structure(lambda _: 0, inputs)
        self._calls: dict[str, _CallFacts] = {}
        self._function = tf.function(self._measure, autograph=False)
        # Traced here and not at the first call, so that what cannot be measured is said at once.
        self._graph = self._function.get_concrete_function(*[tf.TensorSpec(t.shape, t.dtype) for t in self._inputs])
        self._check_calls(required=layers is not None)
        own = {id(variable.value) for variable in model.variables}
        self._foreign = [variable for variable in self._graph.graph.variables if id(variable) not in own]

    @property
    def layers(self) -> tuple[str, ...]:
        """The keys of the reports: a recurrent layer's path, with `:1` and so on for further calls of it."""
        return tuple(self._calls)

    @property
    def trace_count(self) -> int:
        """How often the pipeline was traced."""
        return int(self._function.experimental_get_tracing_count())

    def __call__(self) -> Report:
        """Measures with the weights of this moment.

        Returns:
            The report, in plain NumPy.

        Raises:
            RuntimeError: If the computation fails; the layer is named where TensorFlow tells.
        """
        # Keras' variables are shielded while tracing; a `tf.Variable` that a custom cell writes to is put back here.
        saved = [variable.read_value() for variable in self._foreign]
        try:
            results = self._graph(*self._inputs)
        except tf.errors.OpError as error:
            raise RuntimeError(f"Measuring {self._culprit(error)} failed: {_essence(error)}") from error
        finally:
            for variable, value in zip(self._foreign, saved, strict=True):
                variable.assign(value)
        return Report({name: facts.report(results[name]) for name, facts in self._calls.items()})

    def _measure(self, *inputs: tf.Tensor) -> dict[str, Any]:
        with keras.StatelessScope(), _without_masks(self._model):
            packed = keras.tree.pack_sequence_as(self._structure, list(inputs))
            try:
                calls, self._unmeasured = record_calls(self._model, packed, self._layers)
            except Exception as error:
                raise self._refusal(error) from error
            results: dict[str, Any] = {}
            for call in calls:
                # The scope's name leads from a failing operation back to its layer.
                with _naming(call), tf.name_scope(f"jacobian_of_call_{len(results)}"):
                    results[call.name] = self._measure_call(call)
        return results

    def _measure_call(self, call: RecurrentCall) -> dict[str, Any]:
        trajectory = unroll(call)
        inputs, *states = (_as_rows(tensor) for tensor in (trajectory.inputs, *trajectory.states))
        mask = tf.reshape(trajectory.mask, [-1])
        connections = find_connections(trajectory.step, inputs, states)
        facts = _CallFacts.of(call, states, connections)
        dtype = states[floating_states(states)[0]].dtype
        results: dict[str, Any] = {"mask": trajectory.mask}
        for view in facts.views:
            rows = _clip(self._max_bytes // connections.bytes_per_row)
            options = dataclasses.replace(self._options, rows=inputs.shape[0], dtype=dtype, vectors=rows)

            def operator_at(rows: tf.Tensor, view: str = view) -> tf.linalg.LinearOperator:
                here = [tf.gather(state, rows) for state in states]
                return jacobian_operator(trajectory.step, tf.gather(inputs, rows), here, view)

            measured = measure_rows(
                operator_at,
                mask,
                self._measures,
                options,
                chunk=rows,
            )
            for name, (value, uncertainty) in measured.items():
                key = name if view == "hidden" else f"{view}/{name}"
                results[key] = tf.reshape(value, tf.shape(trajectory.mask))
                if uncertainty is not None:
                    results[f"{key} uncertainty"] = tf.reshape(uncertainty, tf.shape(trajectory.mask))
        self._calls[call.name] = facts
        return results

    def _check_calls(self, *, required: bool) -> None:
        """Says which layers cannot be measured; an error if the user asked for one of them, or none is left."""
        reasons = "; ".join(f"layer `{name}`: {reason}" for name, reason in self._unmeasured.items())
        if self._unmeasured and (required or not self._calls):
            raise ValueError(
                "Invalid value for argument `layers`. Expected recurrent layers that the model calls on the probe. "
                f"Received: {reasons}"
            )
        if reasons:
            warnings.warn(f"Some recurrent layers are not measured. {reasons}", stacklevel=4)
        for name, facts in self._calls.items():
            for note in facts.notes:
                warnings.warn(f"Layer `{name}`: {note}", stacklevel=4)

    def _refusal(self, error: Exception) -> ValueError:
        shapes = keras.tree.map_structure(lambda t: tuple(t.shape), self._inputs)
        fixed = {
            item.name: int(keras.tree.flatten(item.layer.states)[0].shape[0])
            for item in self._layers
            if item.layer.stateful and item.layer.states is not None
        }
        expected = "a batch that the model can be called on"
        for name, samples in fixed.items():
            if samples != self._inputs[0].shape[0]:
                expected = f"a batch of {samples} samples, as the stateful layer `{name}` was built for"
        return ValueError(
            f"Invalid value for argument `probe`. Expected {expected}. Received: shapes {shapes}, for which the model "
            f"raised {type(error).__name__}: {error}"
        )

    def _culprit(self, error: tf.errors.OpError) -> str:
        where = re.search(r"(jacobian_of_call|forward_of_layer)_(\d+)", error.message)
        if where is None:
            return "the model, outside of its recurrent layers,"
        names = self.layers if where[1] == "jacobian_of_call" else [item.name for item in self._layers]
        return f"layer `{names[int(where[2])]}`"


@dataclass(frozen=True)
class _CallFacts:
    """What is known of a call before any number is."""

    cell: str
    units: int
    views: tuple[str, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, call: RecurrentCall, states: list[tf.Tensor], connections: Connections) -> "_CallFacts":
        floating = floating_states(states)
        if not floating:
            raise ValueError(f"None of its {len(states)} states is floating-point, so there is no derivative")
        depends = connections.depends
        views, notes = [], []
        if depends[0][0]:
            views.append("hidden")
        else:
            notes.append(
                f"new state {floating[0]} does not depend on the old one (no gradient connects them), "
                "so the hidden view is left out"
            )
        if len(floating) > 1 and any(map(any, depends)):
            views.append("joint")
            notes += [
                f"old state {state} has no influence on the new states (no gradient connects them)"
                for state, influences in zip(floating, zip(*depends, strict=True), strict=True)
                if not any(influences)
            ]
        notes += [
            f"state {k} is of dtype {state.dtype.name}, which has no derivative, and is left out"
            for k, state in enumerate(states)
            if k not in floating
        ]
        cell = type(call.layer.cell).__name__
        return cls(cell, size(states[floating[0]]), tuple(views), tuple(notes))

    def report(self, results: dict[str, tf.Tensor]) -> LayerReport:
        arrays = {key: tensor.numpy() for key, tensor in results.items()}
        mask = arrays.pop("mask")
        values = {key: array for key, array in arrays.items() if not key.endswith(" uncertainty")}
        uncertainties = {key: arrays[f"{key} uncertainty"] for key in values if f"{key} uncertainty" in arrays}
        estimated = {key for key in uncertainties if MEASURES[key.split("/")[-1]].uncertainty == "standard error"}
        layer = LayerReport(self.cell, self.units, values, mask, uncertainties, frozenset(estimated), self.notes)
        broken = layer.nonfinite()
        if not broken:
            return layer
        counts = ", ".join(f"{count} of `{key}`" for key, count in broken.items())
        return dataclasses.replace(layer, notes=(*self.notes, f"NaN or Inf among the values: {counts}"))


def check_options(
    *, measures: Iterable[str] | str | None, seed: int, tolerance: float, max_bytes: int, max_entries: int
) -> None:
    """Checks what can be checked without a model.

    Raises:
        ValueError: If a value is out of range.
    """
    select_measures(measures)
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise ValueError(f"Invalid value for argument `seed`. Expected an integer. Received: seed={seed!r}")
    if not 0 <= tolerance < 1:
        raise ValueError(
            "Invalid value for argument `tolerance`. Expected a relative tolerance from 0 up to, not including, 1. "
            f"Received: tolerance={tolerance}"
        )
    for name, value, least in (("max_bytes", max_bytes, 1), ("max_entries", max_entries, 0)):
        if value < least:
            raise ValueError(
                f"Invalid value for argument `{name}`. Expected an integer of at least {least}. Received: "
                f"{name}={value}"
            )


def _essence(error: tf.errors.OpError) -> str:
    """What went wrong, without the dozens of lines on where the operation was made; those stay in the error itself."""
    lines = [line for line in error.message.splitlines() if line.strip() and not line.startswith('  File "')]
    return "\n".join(line for line in lines if not re.match(r"Graph execution error:|Detected at node ", line))


@contextlib.contextmanager
def _without_masks(model: keras.Layer) -> Iterator[None]:
    try:
        yield
    finally:
        drop_masks(model)


@contextlib.contextmanager
def _naming(call: RecurrentCall) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"The Jacobians of layer `{call.name}` ({type(call.layer.cell).__name__}) cannot be taken; name the other "
            f"layers in `layers` to leave it out. {type(error).__name__}: {error}"
        ) from error


def _build(model: keras.Layer, arrays: Any) -> None:
    """Lets layers that make their weights at the first call make them, without moving any state."""
    if model.built and all(layer.built for layer in _cells(model)):
        return
    # Traced and not run: a cell may write to a `tf.Variable`, which the scope does not shield.
    inputs = fit_probe(model, arrays)
    with keras.StatelessScope():
        tf.function(lambda: model(inputs, **training_argument(model)), autograph=False).get_concrete_function()


def _cells(model: keras.Layer) -> list[Any]:
    recurrent = [layer for layer in sublayers(model) if isinstance(layer, keras.layers.RNN)]
    return [part for layer in recurrent for part in sublayers(layer.cell)]


def _as_rows(tensor: tf.Tensor) -> tf.Tensor:
    """(time, batch, ...) -> (time * batch, ...)."""
    time, batch, *rest = tensor.shape
    rows = time * batch if time is not None and batch is not None else -1
    return tf.reshape(tensor, [rows, *rest])


def _clip(rows: int) -> int:
    return max(1, min(rows, _MOST_ROWS))
