"""Assembly of a layer's report from the measured arrays of a call."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from keras_jacmon.measurement.metadata import CallMetadata
from keras_jacmon.measurement.results import CallResults, MeasuredArray, PlannedFlow
from keras_jacmon.measures.gains import Gains, by_span, gains_by_span
from keras_jacmon.measures.kinds import (
    Exponents,
    Flow,
    Loss,
    OverTime,
    PerStep,
    Sensitivity,
    Spectrum,
)
from keras_jacmon.measures.selection import KEYS, Quantity, key_of
from keras_jacmon.measures.sensitivity import Sensitivities
from keras_jacmon.report.layer_report import LayerReport


@dataclass(frozen=True)
class _QuantityValues:
    """The NumPy values of one quantity.

    Attributes:
        quantity: The quantity.
        value: Its values.
        uncertainty: The uncertainties; None for exact values.
    """

    quantity: Quantity
    value: Any
    uncertainty: Any


def report_of(
    metadata: CallMetadata,
    results: CallResults,
    *,
    go_backwards: bool,
    notes: Sequence[str] = (),
    loss_gradient: tf.Tensor | None = None,
) -> LayerReport:
    """Assembles the report, with each value at its position in the input.

    Args:
        metadata: The metadata of the call.
        results: The results of the graph, in the order in which the cell runs.
        go_backwards: Boolean, True if the layer reads its input from the end.
        notes: Sequence of notes on this call alone. Defaults to `()`.
        loss_gradient: `(time, batch)`, norms of the gradient of the loss by position in the input; None if it was
            not measured.
    """
    order = slice(None, None, -1 if go_backwards else 1)
    mask = results.mask.numpy()[order]
    shown = _shown(metadata, results, order, loss_gradient)
    uncertainties = {key: found.uncertainty for key, found in shown.items() if found.uncertainty is not None}
    measures = {key: found.quantity.measure for key, found in shown.items()}
    over_time = {key: m.kind.reduction for key, m in measures.items() if isinstance(m.kind, OverTime)}
    expensive = [key for key, measure in measures.items() if measure.expensive]
    layer = LayerReport(
        cell=metadata.cell,
        units=metadata.units,
        values={key: f.value for key, f in shown.items() if isinstance(measures[key].kind, (PerStep, Loss))},
        mask=mask,
        uncertainties=uncertainties,
        estimated=frozenset(key for key in uncertainties if measures[key].uncertainty == "standard error"),
        sampled={} if results.sampled is None else dict.fromkeys(expensive, results.sampled.numpy()[order]),
        certificate=results.checks.floats().structure_residual if metadata.has_structure else None,
        sequences={key: shown[key].value for key in over_time},
        spectra={key: f.value for key, f in shown.items() if isinstance(measures[key].kind, Spectrum)},
        spectra_at=_places(results.spectra_at, len(mask), go_backwards=go_backwards),
        joint=metadata.joint,
        weight_size=_weight_size(results),
        go_backwards=go_backwards,
        notes=(*metadata.notes, *notes),
        methods={key: _method(metadata, found) for key, found in shown.items()},
        reductions={key: reduction for key, reduction in over_time.items() if reduction is not None},
        may_be_infinite=frozenset(
            key for key, m in measures.items() if isinstance(m.kind, PerStep) and m.kind.may_be_infinite
        ),
    )
    counts = ", ".join(f"{count} of `{key}`" for key, count in layer.nonfinite().items())
    doubts = [f"NaN or Inf among the values: {counts}"] if counts else _undecided(metadata, layer)
    return dataclasses.replace(layer, notes=(*layer.notes, *doubts))


def _shown(
    metadata: CallMetadata, results: CallResults, order: slice, loss_gradient: tf.Tensor | None
) -> dict[str, _QuantityValues]:
    """Returns the values of all quantities by their keys, in the order of the registry."""
    mask = results.mask.numpy()
    everything = [
        _values_of(quantity, array, mask, order)
        for quantity, array in zip(metadata.quantities, results.arrays, strict=True)
    ]
    everything += [*_read_off_flows(metadata, results), *_read_off_sensitivity(metadata, results)]
    if loss_gradient is not None:
        norms = loss_gradient.numpy()
        known_norms = np.where(mask[order], norms, norms.dtype.type(np.nan))
        everything.append(_QuantityValues(KEYS["loss_gradient"], known_norms, None))
    known = {found.quantity: found for found in everything}
    shown = {key: known[quantity] for key, quantity in KEYS.items() if quantity in known}
    chosen = ((label, q.measure.name, q) for label, view in metadata.labels.items() for q in known if q.view == view)
    return shown | {key_of(label, measure): known[quantity] for label, measure, quantity in chosen}


def _read_off_flows(metadata: CallMetadata, results: CallResults) -> list[_QuantityValues]:
    """Returns the values of the quantities that are read off the flows."""
    mask = results.mask.numpy()
    mask = None if mask.all() else mask
    gains: dict[PlannedFlow, Gains] = {}
    for planned, tensor in zip(metadata.flows, results.flows, strict=True):
        numbers = tensor.numpy()
        if metadata.options.exact_flow:
            norms = by_span(numbers[:, 0], mask)
            gains[planned] = Gains(norms, np.zeros_like(norms))
        else:
            gains[planned] = gains_by_span(numbers, mask, planned.plan)
    found = []
    for quantity in metadata.of_flows:
        planned, measure = metadata.flow_of(quantity), quantity.measure
        is_exact = metadata.options.exact_flow or planned.plan.is_exact or measure.uncertainty is None
        error = None if is_exact else gains[planned].standard_error
        found.append(_QuantityValues(quantity, measure.function(gains[planned].log_gain), error))
    return found


def _read_off_sensitivity(metadata: CallMetadata, results: CallResults) -> list[_QuantityValues]:
    """Returns the values of the quantities that are read off the sensitivity."""
    mask = results.mask.numpy()
    mask = None if mask.all() else mask
    found = []
    for (view, plan), result in zip(metadata.sensitivity_plans.items(), results.sensitivities, strict=True):
        known = Sensitivities.of(result.numbers.numpy(), result.state_norm.numpy(), mask, plan)
        for quantity in metadata.of_sensitivity:
            if quantity.view == view:
                value, error = quantity.measure.function(known)
                found.append(_QuantityValues(quantity, value, None if plan.is_exact else error))
    return found


def _method(metadata: CallMetadata, found: _QuantityValues) -> str:
    """Describes the method behind the values, and counts the values that did not reach the tolerance."""
    view, measure = found.quantity
    # The loss is differentiated by a hidden state that need not have a view.
    options, columns = metadata.options, metadata.columns.get(view, metadata.units)
    if isinstance(measure.kind, Flow) and options.exact_flow:
        return "exact, the spectral norm of the products"
    if isinstance(measure.kind, Flow) and metadata.flow_of(found.quantity).plan.is_exact:
        options = dataclasses.replace(options, exact_flow=True)
    how = measure.how(options, columns, uncertain=found.uncertainty is not None)
    if isinstance(measure.kind, Sensitivity) and measure.uncertainty is not None:
        how = "exact" if found.uncertainty is None else how
        return f"{how}, by {', '.join(f'`{name}`' for name in metadata.recurrent_weights)}"
    if measure.uncertainty == "residual" and found.uncertainty is not None:
        unreached = found.uncertainty > metadata.options.tolerance * found.value
        total = np.sum(~np.isnan(found.value))
    elif isinstance(measure.kind, Spectrum) and how != "exact":
        unreached, total = np.isnan(found.value), found.value.size
    else:
        return how
    return f"{how}, not reached by {unreached.sum()} of {total}" if unreached.any() else how


def _undecided(metadata: CallMetadata, layer: LayerReport) -> list[str]:
    """Returns notes on values that are NaN because too few exponents are known, or no step is left for them."""
    warmup = metadata.options.warmup_of(len(layer.mask))
    steps = layer.mask.sum(axis=0)
    after_warmup, notes = steps > warmup, []
    chaotic = {key: KEYS[key] for key in layer.sequences if isinstance(KEYS[key].measure.kind, Exponents)}
    # That a sample is masked throughout is said elsewhere.
    if chaotic and (without := int(((steps > 0) & ~after_warmup).sum())):
        names = " and ".join(f"`{key}`" for key in chaotic)
        why = f"the warm-up of {warmup} steps leaves them no step"
        notes.append(f"{names} of {without} of {len(steps)} samples are NaN: {why}")
    for key, (view, measure) in chaotic.items():
        if not (isinstance(measure.kind, Exponents) and measure.kind.may_be_undecided):
            continue
        undecided = int(np.isnan(layer[key][after_warmup]).sum())
        # With all exponents it is always decided, unless a state is NaN.
        if undecided and metadata.options.exponents < metadata.columns[view]:
            notes.append(
                f"`{key}` is NaN, and not in its mean, for {undecided} of {after_warmup.sum()} samples: their "
                f"{metadata.options.exponents} largest exponents do not decide it; "
                f"`exponents={metadata.columns[view]}` would"
            )
    return notes


def _weight_size(results: CallResults) -> float | None:
    """Returns the root mean square of the recurrent weights; None if their sensitivity was not measured."""
    return float(results.sensitivities[0].weight_size.numpy()) if results.sensitivities else None


def _values_of(quantity: Quantity, array: MeasuredArray, mask: npt.NDArray[np.bool_], order: slice) -> _QuantityValues:
    """Returns the NumPy values of a quantity; values of single steps by position in the input, NaN at skipped steps."""

    def shaped(tensor: tf.Tensor) -> Any:
        values = tensor.numpy()
        if not isinstance(quantity.measure.kind, PerStep):
            return values
        return np.where(mask, values.reshape(mask.shape), values.dtype.type(np.nan))[order]

    return _QuantityValues(quantity, shaped(array.value), None if bool(array.is_exact) else shaped(array.uncertainty))


def _places(spectra_at: tf.Tensor | None, time: int, *, go_backwards: bool) -> Any:
    """Returns position in the input and sample of each spectrum, `(points, 2)`."""
    if spectra_at is None:
        return np.empty((0, 2), np.int64)
    step, sample = spectra_at.numpy().T
    return np.stack([time - 1 - step if go_backwards else step, sample], axis=1)
