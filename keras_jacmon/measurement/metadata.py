"""Static metadata of a recurrent call, known when its measurement is traced."""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from keras_jacmon.cell.cell_graph import CellGraph
from keras_jacmon.cell.step import cell_type
from keras_jacmon.cell.trajectory import UnrollInputs
from keras_jacmon.jacobians.cell_jacobian import CellJacobian, Choice, JacobianMethod
from keras_jacmon.jacobians.dependencies import Dependencies
from keras_jacmon.jacobians.views import View, floating_states, size
from keras_jacmon.measurement.cell_views import CellViews
from keras_jacmon.measurement.results import PlannedFlow, PlannedSensitivity
from keras_jacmon.measures.flow import FlowPlan
from keras_jacmon.measures.kinds import (
    WholeFlow,
)
from keras_jacmon.measures.selection import KEYS, Quantity, Selection, views_of
from keras_jacmon.options import Options, ViewName


@dataclass(frozen=True)
class CallMetadata:
    """Static metadata of a recurrent call.

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

    def without_square(self, keys: Collection[str]) -> tuple[str, ...]:
        """Returns a note for each of these measures that needs a square Jacobian where that by the inputs is none.

        Args:
            keys: Keys of measures.
        """
        columns = self.columns.get("inputs")
        if columns is None or columns == self.units:
            return ()
        return tuple(
            f"`{key}` is left out: it needs a square Jacobian, and that by the inputs is {self.units} x {columns}"
            for key, quantity in KEYS.items()
            if key in keys and quantity.view == "inputs" and quantity.measure.needs_square
        )

    @property
    def flows(self) -> tuple[PlannedFlow, ...]:
        """The flows to be measured, each once, in the order of `CallResults.flows`."""
        return tuple(dict.fromkeys(map(self.flow_of, self.of_flows)))

    def flow_of(self, quantity: Quantity) -> PlannedFlow:
        """The flow that a quantity is read off."""
        plan, kind = self.flow_plans[quantity.view], quantity.measure.kind
        return PlannedFlow(
            quantity.view, plan.of_all(self.options.flow_vectors) if isinstance(kind, WholeFlow) else plan
        )


def _flow_plan(
    view: str, states: Sequence[tf.Tensor], choices: Sequence[Choice], outputs: Sequence[int], options: Options
) -> FlowPlan:
    """Returns the vectors with which the flow of a square view begins: in the output's states, or in the only one."""
    sizes = tuple(size(states[output]) for output in View.of(view, states).outputs)
    begins = tuple(len(sizes) == 1 or place in outputs for place in range(len(sizes)))
    cheap = all(choice.how is not JacobianMethod.AUTODIFF for choice in choices)
    return FlowPlan.of(sizes, begins, options.flow_vectors, cheap=cheap)
