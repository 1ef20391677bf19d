"""What is known of a call before any number is, and the report that it becomes with the numbers."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from keras_jacmon.jacobians.cell_jacobian import CellJacobian, Choice
from keras_jacmon.jacobians.dependencies import Dependencies
from keras_jacmon.jacobians.views import View, floating_states, size
from keras_jacmon.measurement.per_step import Results
from keras_jacmon.measures.advice import SUGGESTION_MEASURES
from keras_jacmon.measures.advice import facts as advice_facts
from keras_jacmon.measures.registry import KEYS
from keras_jacmon.model.recording import RecurrentCall
from keras_jacmon.options import Options
from keras_jacmon.report.layer_report import LayerReport

# Key of the mask of the rows at which expensive measures are taken, if not at all.
SAMPLED = "sampled"

# And of the places of spectra.
SPECTRA_AT = "spectra_at"

# And of `CheckResults`.
CHECKS = "checks"


@dataclass(frozen=True)
class CallMetadata:
    """What is known of a call before any number is.

    Attributes:
        cell: Class of the cell.
        units: Size of the hidden state.
        joint: What stands in front of the keys of the joint view.
        go_backwards: Whether the layer reads its input from the end.
        views: Those that there are.
        choices: By view, how each of its blocks is taken.
        notes: What a reader of the numbers must know.
        jacobian: Must live as long as what it has given operators to.
        columns: By view, those of its Jacobians.
        options: How it is measured.
        has_structure: Whether something that is measured rests on a structure, or on a registered form.
    """

    cell: str
    units: int
    joint: str
    go_backwards: bool
    views: tuple[str, ...]
    choices: dict[str, list[Choice]]
    notes: tuple[str, ...]
    jacobian: CellJacobian
    columns: dict[str, int]
    options: Options
    has_structure: bool = False

    @classmethod
    def of(
        cls,
        call: RecurrentCall,
        states: Sequence[tf.Tensor],
        jacobian: CellJacobian,
        connections: Dependencies,
        *,
        asked: Iterable[str],
        options: Options,
    ) -> "CallMetadata":
        """The facts of a call; `asked` are the views that numbers are wanted of, and `options` how.

        Raises:
            ValueError: If no state has a derivative.
        """
        floating = floating_states(states)
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
        if "inputs" in asked and connections.on_inputs:
            views.append("inputs")
        elif "inputs" in asked:
            notes.append("no gradient connects the new state with the inputs, so the inputs view is left out")
        choices = {view: jacobian.choices(view) for view in views}
        columns = {view: View.of(view, states).columns(call.inputs[:, 0], states) for view in views}
        return cls(
            type(call.layer.cell).__name__,
            size(states[floating[0]]),
            "joint/" if len(floating) > 1 else "",
            call.layer.go_backwards,
            tuple(views),
            choices,
            tuple(notes),
            jacobian,
            columns,
            options,
        )

    def _method(self, key: str, values: Any, uncertainty: Any) -> str:
        """How it was found, in words, and of how many values the tolerance was not reached."""
        view, measure = KEYS[key]
        # The loss is differentiated by a hidden state that need not have a view.
        how = measure.how(self.options, self.columns.get(view, self.units), uncertain=uncertainty is not None)
        if measure.uncertainty == "residual" and uncertainty is not None:
            unreached, total = uncertainty > self.options.tolerance * values, np.sum(~np.isnan(values))
        elif measure.of == "spectrum" and how != "exact":
            unreached, total = np.isnan(values), values.size
        else:
            return how
        return f"{how}, not reached by {unreached.sum()} of {total}" if unreached.any() else how

    def _undecided(self, layer: LayerReport) -> list[str]:
        """What a reader must know of Kaplan-Yorke dimensions that are NaN."""
        time = len(layer.mask)
        # A sample that ends before has no exponents at all.
        after_warmup = layer.mask.sum(axis=0) > (time // 10 if self.options.warmup is None else self.options.warmup)
        notes = []
        for key in layer.sequences:
            view, measure = KEYS[key]
            undecided = int(np.isnan(layer[key][after_warmup]).sum()) if measure.name == "kaplan_yorke" else 0
            # All of them always decide it, unless a state is NaN.
            if undecided and self.options.exponents < self.columns[view]:
                notes.append(
                    f"`{key}` is NaN, and not in its mean, for {undecided} of {after_warmup.sum()} samples: their "
                    f"{self.options.exponents} largest exponents do not decide it; `exponents={self.columns[view]}` "
                    "would"
                )
        return notes

    def report(self, results: Results) -> LayerReport:
        """The report of the numbers."""
        checks = results[CHECKS].floats()
        arrays = {key: tensor.numpy() for key, tensor in results.items() if key != CHECKS}
        mask, sampled, spectra_at = arrays.pop("mask"), arrays.pop(SAMPLED, None), arrays.pop(SPECTRA_AT, None)
        helpers = {
            key.split("/")[1]: arrays.pop(key)[mask]
            for key in list(arrays)
            if key.split("/")[-1] in SUGGESTION_MEASURES
        }
        variances, gains = (
            arrays[key][mask] if key in arrays else []
            for key in ("hidden/variance", f"{self.joint or 'hidden/'}rms_singular_value")
        )
        facts = advice_facts(helpers, variances, gains)
        named = {key.removeprefix("hidden/"): array for key, array in arrays.items()}
        keys = [key for key in KEYS if key in named]
        uncertainties = {key: named[f"{key}/uncertainty"] for key in keys if f"{key}/uncertainty" in named}
        estimated = {key for key in uncertainties if KEYS[key][1].uncertainty == "standard error"}

        def of(*kinds: str) -> dict[str, Any]:
            return {key: named[key] for key in keys if KEYS[key][1].of in kinds}

        expensive = [key for key in of("step") if KEYS[key][1].expensive]
        layer = LayerReport(
            self.cell,
            self.units,
            of("step", "loss"),
            mask,
            uncertainties,
            frozenset(estimated),
            {} if sampled is None else dict.fromkeys(expensive, sampled),
            checks.structure_residual if self.has_structure else None,
            of("flow", "exponents"),
            of("spectrum"),
            np.empty((0, 2), np.int64) if spectra_at is None else spectra_at,
            self.joint,
            facts,
            self.go_backwards,
            self.notes,
            {key: self._method(key, named[key], uncertainties.get(key)) for key in keys},
            {key: reduction for key in of("flow", "exponents") if (reduction := KEYS[key][1].reduction)},
            frozenset(key for key in of("step") if KEYS[key][1].may_be_infinite),
        )
        counts = ", ".join(f"{count} of `{key}`" for key, count in layer.nonfinite().items())
        notes = [f"NaN or Inf among the values: {counts}"] if counts else self._undecided(layer)
        return dataclasses.replace(layer, notes=(*self.notes, *notes))
