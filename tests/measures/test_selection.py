"""The selection of measures: presets and the parts of a selection."""

from __future__ import annotations

from keras_jacmon.measures.kinds import Flow, PerStep, Sensitivity
from keras_jacmon.measures.registry import MEASURES
from keras_jacmon.measures.selection import PRESETS, filtered, key_of, of_kind, select_measures, views_of


def test_presets_nest() -> None:
    fast, standard, full = (set(PRESETS[name]) for name in ("fast", "standard", "full"))
    assert fast < standard < full
    # Each measure that can be asked for has a preset.
    assert {key.rpartition("/")[-1] for key in full} == set(MEASURES) - {"loss_gradient", "flow_of_all", "state_norm"}


def test_a_selection_is_in_the_order_of_views_and_measures_and_has_what_its_measures_need() -> None:
    selection = select_measures(["joint/growth", "state/variance", "spectral_norm", "sensitivity"])
    keys = ["spectral_norm", "sensitivity", "relative_sensitivity", "state_norm", "joint/flow", "joint/growth"]
    assert [quantity.key for quantity in selection] == [*keys, "state/variance"]
    assert [key_of(view, measure.name) for view, measure in selection] == [*keys, "state/variance"]
    assert views_of(selection) == ["hidden", "joint", "state"]


def test_the_parts_of_a_selection_keep_its_order() -> None:
    selection = select_measures(["joint/growth", "variance", "spectral_norm", "sensitivity"])
    assert [quantity.key for quantity in of_kind(selection, Flow, PerStep)] == [
        "variance",
        "spectral_norm",
        "joint/flow",
        "joint/growth",
    ]
    assert [quantity.key for quantity in filtered(selection, lambda measure: measure.expensive)] == ["spectral_norm"]
    # A measure that comes with the others is of their kind.
    assert len(of_kind(selection, Sensitivity)) == 3
