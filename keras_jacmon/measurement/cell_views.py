"""The views that a cell has, and the reasons why others are missing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keras_jacmon.jacobians.dependencies import Dependencies
from keras_jacmon.jacobians.views import choice_of_states, chosen_view
from keras_jacmon.options import ViewName, states_in


@dataclass(frozen=True)
class CellViews:
    """The views that a cell has, out of those that exist and those that the user asked for.

    Attributes:
        named: Tuple of strings, out of `"hidden"`, `"joint"` and `"inputs"`.
        labels: Dict by name in reports of the views of chosen states that the user asked for.
        left_out: Dict by name of a view of chosen states that the cell does not have, the reason.
        notes: Tuple of sentences on named views that are missing, and on states without influence.
    """

    named: tuple[str, ...]
    labels: dict[str, ViewName]
    left_out: dict[str, str]
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls, asked: Sequence[ViewName], structure: Any, floating: Sequence[int], dependencies: Dependencies
    ) -> "CellViews":
        """Finds the views of a cell.

        Args:
            asked: The views that the user asked for, chosen states by their name in reports.
            structure: The structure of the states.
            floating: Indices of the floating-point states.
            dependencies: The dependencies of new states on old ones.
        """
        named, notes = _named_views(floating, dependencies, with_inputs="inputs" in asked)
        labels, left_out = _chosen_views(asked, structure, floating, dependencies)
        return cls(named, labels, left_out, notes)


def _chosen_views(
    asked: Sequence[ViewName], structure: Any, floating: Sequence[int], dependencies: Dependencies
) -> tuple[dict[str, ViewName], dict[str, str]]:
    """Returns the views of chosen states by their names in reports, and by name the reasons why others are missing.

    Args:
        asked: The views that the user asked for.
        structure: The structure of the states.
        floating: Indices of the floating-point states.
        dependencies: The dependencies of new states on old ones.
    """
    labels: dict[str, ViewName] = {}
    left_out: dict[str, str] = {}
    for label in filter(lambda view: isinstance(view, str), asked):
        states = states_in(str(label))
        if states is None:
            continue
        missing = f"the view `{label}` is left out: "
        try:
            view = chosen_view(states, structure, floating)
        except ValueError:
            left_out[str(label)] = f"{missing}it is not one of different {choice_of_states(structure, floating)}"
            continue
        places = [list(floating).index(int(place)) for place in view]
        if any(dependencies.depends[new][old] for new in places for old in places):
            labels[str(label)] = view
        else:
            left_out[str(label)] = f"{missing}no gradient connects its states"
    return labels, left_out


def _named_views(
    floating: Sequence[int], dependencies: Dependencies, *, with_inputs: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the views with a name of their own, and notes on missing ones and on states without influence.

    Args:
        floating: Indices of the floating-point states.
        dependencies: The dependencies of new states on old ones.
        with_inputs: Boolean, True if the user asked for the inputs view.
    """
    depends = dependencies.depends
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
            f"old state {floating[place]} is carried on and never felt by the output (no gradient connects them): "
            "flow, growth and horizon of the joint view do not see it, `joint/flow_of_all` does"
            for place in dependencies.carried
        ]
    if with_inputs and dependencies.on_inputs:
        views.append("inputs")
    elif with_inputs:
        notes.append("no gradient connects the new state with the inputs, so the inputs view is left out")
    return tuple(views), tuple(notes)
