"""Static metadata of a recurrent call; assembles its report from the measured arrays."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from keras_jacmon.cell.cell_graph import CellGraph
from keras_jacmon.cell.step import cell_type
from keras_jacmon.cell.trajectory import UnrollInputs
from keras_jacmon.jacobians.cell_jacobian import CellJacobian, Choice, Method
from keras_jacmon.jacobians.dependencies import Dependencies
from keras_jacmon.jacobians.views import View, floating_states, size
from keras_jacmon.measurement.cell_views import CellViews
from keras_jacmon.measurement.results import CallResults, MeasuredArray, PlannedFlow, PlannedSensitivity
from keras_jacmon.measures.flow import FlowPlan
from keras_jacmon.measures.gains import Gains, by_span, gains_by_span
from keras_jacmon.measures.kinds import (
    Exponents,
    Flow,
    Loss,
    OverTime,
    PerStep,
    Sensitivity,
    Spectrum,
    WholeFlow,
)
from keras_jacmon.measures.registry import KEYS, Quantity, Selection, key_of, views_of
from keras_jacmon.measures.sensitivity import Sensitivities
from keras_jacmon.options import Options, ViewName
from keras_jacmon.report.layer_report import LayerReport


@dataclass(frozen=True)
class _Found:
    """The NumPy values of one quantity.

    Attributes:
        quantity: The quantity.
        value: Its values.
        uncertainty: The uncertainties; None for exact values.
    """

    quantity: Quantity
    value: Any
    uncertainty: Any


@dataclass(frozen=True)
class CallMetadata:
    """Static metadata of a recurrent call; assembles its report from the measured arrays.

    Attributes:
        cell: String, class name of the cell.
        units: Integer, size of the hidden state.
        joint: String, prefix of the keys of the joint view; empty for a cell with one state.
        views: Tuple of the views that the cell has.
        labels: Dict by name in reports of the views of chosen states that the user asked for.
        left_out: Dict by name of a view of chosen states that the cell does not have, the reason.
        choices: Dict by name of a view of lists: the method that was chosen for each block.
        notes: Tuple of sentences that a reader of the numbers must know.
        columns: Dict by view, the number of columns of its Jacobians.
        options: The settings of the measurement.
        flow_plans: Dict by view, the vectors that its flow begins with.
        has_structure: Boolean, True if a measured Jacobian rests on a structure, or on a registered form. Defaults to
            False.
        quantities: The measured quantities, in the order of `CallResults.arrays`. Defaults to none.
        of_flows: The measured quantities that are read off a flow. Defaults to none.
        of_sensitivity: The measured quantities that are read off the sensitivity. Defaults to none.
        sensitivity_plans: Dict by view, the vectors at the last state. Defaults to none.
        recurrent_weights: Tuple of strings, the names of the recurrent weights. Defaults to none.
        recurrent_places: Tuple of integers, the positions of the weights that multiply states among those that the step
            is given; None, the default, if they are not known.
        graphs: Tuple of the graphs of the cell's step, which must live as long as the measurement. Defaults to none.
    """

    cell: str
    units: int
    joint: str
    views: tuple[ViewName, ...]
    labels: dict[str, ViewName]
    left_out: dict[str, str]
    choices: dict[str, list[Choice]]
    notes: tuple[str, ...]
    columns: dict[ViewName, int]
    options: Options
    flow_plans: dict[ViewName, FlowPlan]
    has_structure: bool = False
    quantities: Selection = ()
    of_flows: Selection = ()
    of_sensitivity: Selection = ()
    sensitivity_plans: dict[ViewName, FlowPlan] = dataclasses.field(default_factory=dict)
    recurrent_weights: tuple[str, ...] = ()
    recurrent_places: tuple[int, ...] | None = None
    graphs: tuple[CellGraph, ...] = ()

    @classmethod
    def of(
        cls,
        cell: Any,
        sequence: UnrollInputs,
        jacobian: CellJacobian,
        dependencies: Dependencies,
        *,
        asked: Sequence[ViewName],
        options: Options,
    ) -> "CallMetadata":
        """Collects the metadata of a call.

        Args:
            cell: The cell.
            sequence: The sequence that the cell is unrolled along.
            jacobian: The Jacobians of the cell.
            dependencies: The dependencies of new states on old ones.
            asked: The views that the user asked for, chosen states by their name in reports.
            options: The settings of the measurement.

        Raises:
            ValueError: If no state has a derivative.
        """
        first, states = sequence.of_a_step, sequence.states
        floating = floating_states(states)
        found = CellViews.of(asked, jacobian.step.structure, floating, dependencies)
        views, labels, left_out = found.named, found.labels, found.left_out
        everything: tuple[ViewName, ...] = (*views, *dict.fromkeys(labels.values()))
        choices = {name: jacobian.choices(view) for name, view in (*zip(views, views, strict=True), *labels.items())}
        columns = {view: View.of(view, states).columns(first, states) for view in everything}
        return cls(
            cell_type(cell).__name__,
            size(states[floating[0]]),
            "joint/" if len(floating) > 1 else "",
            everything,
            labels,
            left_out,
            choices,
            (*found.notes, *left_out.values()),
            columns,
            options,
            {
                view: _flow_plan(view, states, choices[view], dependencies.outputs, options)
                for view in views
                if view != "inputs"
            },
        )

    def with_sensitivity(self, quantities: Selection, planned: PlannedSensitivity) -> "CallMetadata":
        """Returns the metadata with the quantities that are read off the sensitivity, or with a note on why not.

        Args:
            quantities: The quantities that the user selected.
            planned: The sensitivity to be measured.
        """
        if planned.weights is None:
            missing = [f"the sensitivity is left out: {planned.missing}"] if planned.missing else []
            return dataclasses.replace(self, notes=(*self.notes, *missing))
        return dataclasses.replace(
            self,
            of_sensitivity=quantities,
            sensitivity_plans=dict(zip(views_of(quantities), planned.plans, strict=True)),
            recurrent_weights=planned.weights.names,
        )

    @property
    def flows(self) -> tuple[PlannedFlow, ...]:
        """The flows to be measured, each once, in the order of `CallResults.flows`."""
        return tuple(dict.fromkeys(map(self._flow_of, self.of_flows)))

    def _flow_of(self, quantity: Quantity) -> PlannedFlow:
        """The flow that a quantity is read off."""
        plan, kind = self.flow_plans[quantity.view], quantity.measure.kind
        return PlannedFlow(
            quantity.view, plan.of_all(self.options.flow_vectors) if isinstance(kind, WholeFlow) else plan
        )

    def report(
        self,
        results: CallResults,
        *,
        go_backwards: bool,
        notes: Sequence[str] = (),
        loss_gradient: tf.Tensor | None = None,
    ) -> LayerReport:
        """Assembles the report, with each value at its position in the input.

        Args:
            results: The results of the graph, in the order in which the cell runs.
            go_backwards: Boolean, True if the layer reads its input from the end.
            notes: Sequence of notes on this call alone. Defaults to `()`.
            loss_gradient: `(time, batch)`, norms of the gradient of the loss by position in the input; None if it was
                not measured.
        """
        order = slice(None, None, -1 if go_backwards else 1)
        mask = results.mask.numpy()[order]
        shown = self._shown(results, order, loss_gradient)
        uncertainties = {key: found.uncertainty for key, found in shown.items() if found.uncertainty is not None}
        measures = {key: found.quantity.measure for key, found in shown.items()}
        over_time = {key: m.kind.reduction for key, m in measures.items() if isinstance(m.kind, OverTime)}
        expensive = [key for key, measure in measures.items() if measure.expensive]
        layer = LayerReport(
            cell=self.cell,
            units=self.units,
            values={key: f.value for key, f in shown.items() if isinstance(measures[key].kind, (PerStep, Loss))},
            mask=mask,
            uncertainties=uncertainties,
            estimated=frozenset(key for key in uncertainties if measures[key].uncertainty == "standard error"),
            sampled={} if results.sampled is None else dict.fromkeys(expensive, results.sampled.numpy()[order]),
            certificate=results.checks.floats().structure_residual if self.has_structure else None,
            sequences={key: shown[key].value for key in over_time},
            spectra={key: f.value for key, f in shown.items() if isinstance(measures[key].kind, Spectrum)},
            spectra_at=_places(results.spectra_at, len(mask), go_backwards=go_backwards),
            joint=self.joint,
            weight_size=_weight_size(results),
            go_backwards=go_backwards,
            notes=(*self.notes, *notes),
            methods={key: self._method(found) for key, found in shown.items()},
            reductions={key: reduction for key, reduction in over_time.items() if reduction is not None},
            may_be_infinite=frozenset(
                key for key, m in measures.items() if isinstance(m.kind, PerStep) and m.kind.may_be_infinite
            ),
        )
        counts = ", ".join(f"{count} of `{key}`" for key, count in layer.nonfinite().items())
        doubts = [f"NaN or Inf among the values: {counts}"] if counts else self._undecided(layer)
        return dataclasses.replace(layer, notes=(*layer.notes, *doubts))

    def _shown(self, results: CallResults, order: slice, loss_gradient: tf.Tensor | None) -> dict[str, _Found]:
        """Returns the values of all quantities by their keys, in the order of the registry."""
        mask = results.mask.numpy()
        everything = [
            _found(quantity, array, mask, order)
            for quantity, array in zip(self.quantities, results.arrays, strict=True)
        ]
        everything += [*self._read_off_flows(results), *self._read_off_sensitivity(results)]
        if loss_gradient is not None:
            norms = loss_gradient.numpy()
            known_norms = np.where(mask[order], norms, norms.dtype.type(np.nan))
            everything.append(_Found(KEYS["loss_gradient"], known_norms, None))
        known = {found.quantity: found for found in everything}
        shown = {key: known[quantity] for key, quantity in KEYS.items() if quantity in known}
        chosen = ((label, q.measure.name, q) for label, view in self.labels.items() for q in known if q.view == view)
        return shown | {key_of(label, measure): known[quantity] for label, measure, quantity in chosen}

    def _read_off_flows(self, results: CallResults) -> list[_Found]:
        """Returns the values of the quantities that are read off the flows."""
        mask = results.mask.numpy()
        mask = None if mask.all() else mask
        gains: dict[PlannedFlow, Gains] = {}
        for planned, tensor in zip(self.flows, results.flows, strict=True):
            numbers = tensor.numpy()
            if self.options.exact_flow:
                norms = by_span(numbers[:, 0], mask)
                gains[planned] = Gains(norms, np.zeros_like(norms))
            else:
                gains[planned] = gains_by_span(numbers, mask, planned.plan)
        found = []
        for quantity in self.of_flows:
            planned, measure = self._flow_of(quantity), quantity.measure
            is_exact = self.options.exact_flow or planned.plan.is_exact or measure.uncertainty is None
            error = None if is_exact else gains[planned].standard_error
            found.append(_Found(quantity, measure.function(gains[planned].log_gain), error))
        return found

    def _read_off_sensitivity(self, results: CallResults) -> list[_Found]:
        """Returns the values of the quantities that are read off the sensitivity."""
        mask = results.mask.numpy()
        mask = None if mask.all() else mask
        found = []
        for (view, plan), result in zip(self.sensitivity_plans.items(), results.sensitivities, strict=True):
            known = Sensitivities.of(result.numbers.numpy(), result.state_norm.numpy(), mask, plan)
            for quantity in self.of_sensitivity:
                if quantity.view == view:
                    value, error = quantity.measure.function(known)
                    found.append(_Found(quantity, value, None if plan.is_exact else error))
        return found

    def _method(self, found: _Found) -> str:
        """Describes the method behind the values, and counts the values that did not reach the tolerance."""
        view, measure = found.quantity
        # The loss is differentiated by a hidden state that need not have a view.
        options, columns = self.options, self.columns.get(view, self.units)
        if isinstance(measure.kind, Flow) and self._flow_of(found.quantity).plan.is_exact:
            options = dataclasses.replace(options, exact_flow=True)
        how = measure.how(options, columns, uncertain=found.uncertainty is not None)
        if isinstance(measure.kind, Sensitivity) and measure.uncertainty is not None:
            how = "exact" if found.uncertainty is None else how
            return f"{how}, by {', '.join(f'`{name}`' for name in self.recurrent_weights)}"
        if measure.uncertainty == "residual" and found.uncertainty is not None:
            unreached = found.uncertainty > self.options.tolerance * found.value
            total = np.sum(~np.isnan(found.value))
        elif isinstance(measure.kind, Spectrum) and how != "exact":
            unreached, total = np.isnan(found.value), found.value.size
        else:
            return how
        return f"{how}, not reached by {unreached.sum()} of {total}" if unreached.any() else how

    def _undecided(self, layer: LayerReport) -> list[str]:
        """Returns notes on values that are NaN because too few exponents are known, or no step is left for them."""
        warmup = len(layer.mask) // 10 if self.options.warmup is None else self.options.warmup
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
            if undecided and self.options.exponents < self.columns[view]:
                notes.append(
                    f"`{key}` is NaN, and not in its mean, for {undecided} of {after_warmup.sum()} samples: their "
                    f"{self.options.exponents} largest exponents do not decide it; `exponents={self.columns[view]}` "
                    "would"
                )
        return notes


def _weight_size(results: CallResults) -> float | None:
    """Returns the root mean square of the recurrent weights; None if their sensitivity was not measured."""
    return float(results.sensitivities[0].weight_size.numpy()) if results.sensitivities else None


def _flow_plan(
    view: str, states: Sequence[tf.Tensor], choices: Sequence[Choice], outputs: Sequence[int], options: Options
) -> FlowPlan:
    """Returns the vectors with which the flow of a square view begins: in the output's states, or in the only one."""
    sizes = tuple(size(states[output]) for output in View.of(view, states).outputs)
    begins = tuple(len(sizes) == 1 or place in outputs for place in range(len(sizes)))
    cheap = all(choice.how is not Method.AUTODIFF for choice in choices)
    return FlowPlan.of(sizes, begins, options.flow_vectors, cheap=cheap)


def _found(quantity: Quantity, array: MeasuredArray, mask: npt.NDArray[np.bool_], order: slice) -> _Found:
    """Returns the NumPy values of a quantity; values of single steps by position in the input, NaN at skipped steps."""

    def shaped(tensor: tf.Tensor) -> Any:
        values = tensor.numpy()
        if not isinstance(quantity.measure.kind, PerStep):
            return values
        return np.where(mask, values.reshape(mask.shape), values.dtype.type(np.nan))[order]

    return _Found(quantity, shaped(array.value), None if bool(array.is_exact) else shaped(array.uncertainty))


def _places(spectra_at: tf.Tensor | None, time: int, *, go_backwards: bool) -> Any:
    """Returns position in the input and sample of each spectrum, `(points, 2)`."""
    if spectra_at is None:
        return np.empty((0, 2), np.int64)
    step, sample = spectra_at.numpy().T
    return np.stack([time - 1 - step if go_backwards else step, sample], axis=1)
