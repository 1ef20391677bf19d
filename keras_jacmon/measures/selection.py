"""Selection of measures by name: keys, presets and views."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from keras_jacmon.errors import did_you_mean, invalid_argument
from keras_jacmon.measures.kinds import Flow, MeasureKind, OverTime, Sensitivity
from keras_jacmon.measures.registry import MEASURES, SQUARE, Measure
from keras_jacmon.options import VIEWS, ViewName, label_of, states_in


def key_of(view: ViewName, measure: str) -> str:
    """The key of a measure in reports: the view and the name, or the name alone for the hidden view."""
    return measure if view == "hidden" else f"{label_of(view)}/{measure}"


class Quantity(NamedTuple):
    """A measure of the Jacobians of one view.

    Attributes:
        view: String, one of `VIEWS`, or the states that the user chose, such as `"v+a"`; then, for a cell, the
            positions of these states.
        measure: The measure.
    """

    view: ViewName
    measure: Measure

    @property
    def key(self) -> str:
        """Its key in reports."""
        return key_of(self.view, self.measure.name)


# What is measured, in the order of views and measures.
Selection = tuple[Quantity, ...]


# By key, in the order of reports.
KEYS = {key_of(view, m.name): Quantity(view, m) for view in VIEWS for m in MEASURES.values() if view in m.views}

# Those that can be asked for.
_NAMES = [key for key, (_, measure) in KEYS.items() if measure.kind.selectable]


def _preset_views(measure: Measure, views: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(measure.kind, OverTime):
        return (measure.kind.preset_view,)
    return SQUARE if measure.needs_square else views


def _preset(costs: tuple[str, ...], views: tuple[str, ...]) -> tuple[str, ...]:
    """The measures of some costs in some views; those over time of one view alone."""
    return tuple(
        key
        for key, (view, measure) in KEYS.items()
        if key in _NAMES and measure.cost in costs and view in _preset_views(measure, views)
    )


PRESETS = {
    "fast": _preset(("fast",), SQUARE),
    "standard": _preset(("fast", "standard"), SQUARE),
    "full": _preset(("fast", "standard", "full"), VIEWS),
}


def select_measures(names: Iterable[str] | str | None) -> Selection:
    """Selects the measures of these names, in the order of the registry.

    Growth and horizon bring the flow that they are read off, and measures of the sensitivity each other.

    Args:
        names: Names of measures, `"variance"` of the hidden view, `"joint/variance"` of the joint one, `"v+a/variance"`
            of chosen states, and of presets; None for `"standard"`.

    Raises:
        ValueError: If a name is unknown, or there is none.
    """
    expected = f"names out of {list(PRESETS)}, or of {_NAMES}, or measures of one step such as 'v+a/variance' or "
    expected += "'0+1/variance' of chosen states"
    if isinstance(names, Mapping) or not (names is None or isinstance(names, Iterable)):
        raise invalid_argument("measures", expected, repr(names))
    names = ["standard"] if names is None else [names] if isinstance(names, str) else list(names)
    chosen = {name: quantity for name in names if (quantity := _of_chosen_states(name)) is not None}
    unknown = [name for name in names if name not in (*_NAMES, *PRESETS, *chosen)]
    if unknown or not names:
        hints = [did_you_mean(name, [*PRESETS, *_NAMES]) for name in unknown]
        raise invalid_argument("measures", expected, f"{names}{''.join(hints)}")
    wanted = {key for name in names if name not in chosen for key in PRESETS.get(name, (name,))}
    wanted |= {key_of(KEYS[key].view, "flow") for key in wanted if isinstance(KEYS[key].measure.kind, Flow)}
    sensitive = {KEYS[key].view for key in wanted if isinstance(KEYS[key].measure.kind, Sensitivity)}
    wanted |= {key for key, (view, m) in KEYS.items() if view in sensitive and isinstance(m.kind, Sensitivity)}
    return (*(quantity for key, quantity in KEYS.items() if key in wanted), *chosen.values())


def _of_chosen_states(name: object) -> Quantity | None:
    """Returns the measure of one step in a view of chosen states; None for any other name."""
    label, _, measure = name.rpartition("/") if isinstance(name, str) else ("", "", "")
    known = MEASURES.get(measure)
    # What looks like one of the views is misspelt.
    if known is None or not known.kind.selectable or known.kind.over_time or did_you_mean(label, VIEWS):
        return None
    return None if states_in(label) is None else Quantity(label, known)


def filtered(selection: Selection, keep: Callable[[Measure], bool]) -> Selection:
    """The part of a selection whose measures fulfil a condition."""
    return tuple(quantity for quantity in selection if keep(quantity.measure))


def of_kind(selection: Selection, *kinds: type[MeasureKind]) -> Selection:
    """The part of a selection whose measures are of some kinds."""
    return filtered(selection, lambda measure: isinstance(measure.kind, kinds))


def views_of(selection: Selection) -> list[ViewName]:
    """The views in a selection, each once, in order."""
    return list(dict.fromkeys(view for view, _ in selection))
