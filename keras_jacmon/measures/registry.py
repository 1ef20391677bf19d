"""Registry of all measures: names, presets, definitions and methods."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from keras_jacmon.errors import did_you_mean, invalid_argument
from keras_jacmon.measures import eigen, lyapunov, moments, sensitivity, spectrum
from keras_jacmon.measures.kinds import (
    Exponents,
    Flow,
    Kind,
    Loss,
    OverTime,
    PerStep,
    SensitiveState,
    Sensitivity,
    Spectrum,
    WholeFlow,
)
from keras_jacmon.options import VIEWS, Options, ViewName, label_of, states_in
from keras_jacmon.report.curve import growth, horizon

_SQUARE = ("hidden", "joint")

# Of a matrix that is formed: products with kernels, their sum, its transpose, and what a decomposition works in. For
# cells of 128 to 512 units 8 to 9 were measured.
_COPIES = 10


def _estimate(*_: object) -> str:
    return f"{moments.ESTIMATE_VECTORS} random vectors"


def _backwards(options: Options, _: int) -> str:
    return "exact" if options.exact_flow else f"{options.flow_vectors} random vectors"


def _by_vectors(options: Options, _: int) -> str:
    return f"{options.flow_vectors} random vectors"


def _qr(options: Options, columns: int) -> str:
    warmup = "a tenth of the sequence" if options.warmup is None else f"{options.warmup} steps"
    every = "step" if options.qr_every == 1 else f"{options.qr_every} steps"
    return f"{min(options.exponents, columns)} of {columns} directions, QR every {every}, warm-up {warmup}"


@dataclass(frozen=True)
class Measure:
    """A measure of the size of a Jacobian, or of a product of Jacobians over time.

    Attributes:
        name: Its key in reports, logs and TensorBoard tags.
        kind: Kind of the measure: the argument of `function`, and the form of its values.
        function: Gives its values.
        definition: In a formula or half a sentence.
        unit: Unit of the values.
        reference: The value of a layer that keeps its gradient; empty if there is none.
        reading: Meaning of a value, in a sentence.
        cost: The smallest preset that contains it; measures that only `"full"` has are slow.
        views: The views that it makes sense for.
        needs_square: True if it makes sense for a square J alone; that of the inputs is square between equal layers of
            a stack. No preset contains such a measure of the inputs.
        method: Function from `Options` and the columns of J to the method in words, where the values are not exact.
        differentiable: True if its values have a gradient, so that a `JacobianRegularizer` can hold it.
        uncertainty: Meaning of the uncertainty, if there is one: `"standard error"` or `"residual"`.
        expensive: True if `max_rows` bounds the number of its points.
        dense_up_to: Maximum number of columns for which J itself is formed; 0 for never, inf for always.
        kept_vectors: Number of vectors kept for each point while it is computed, where J is not formed.
    """

    name: str
    kind: Kind
    function: Callable[..., Any]
    definition: str
    unit: str
    reference: str
    reading: str
    cost: Literal["fast", "standard", "full"]
    views: tuple[str, ...] = _SQUARE
    needs_square: bool = False
    method: Callable[[Options, int], str] = lambda *_: "exact"
    differentiable: bool = False
    uncertainty: Literal["standard error", "residual"] | None = None
    expensive: bool = False
    dense_up_to: float = 0
    kept_vectors: int = 0

    def numbers_kept(self, rows: int, columns: int) -> int:
        """Count of the numbers kept for each J `(rows, columns)` while the measure is computed."""
        return _COPIES * rows * columns if columns <= self.dense_up_to else self.kept_vectors * columns

    def how(self, options: Options, columns: int, *, uncertain: bool) -> str:
        """Describes in words how the values were found.

        Args:
            options: The settings of the measurement.
            columns: Number of columns of J.
            uncertain: True if the values have an uncertainty.
        """
        exact = columns <= self.dense_up_to or (isinstance(self.kind, PerStep) and not uncertain)
        return "exact" if exact else self.method(options, columns)


MEASURES = {
    measure.name: measure
    for measure in (
        Measure(
            "variance",
            PerStep(),
            moments.variance,
            definition="n times the variance of the entries of J (m x n)",
            unit="dimensionless",
            reference="1",
            reading="1 keeps the gradient's size if the entries have mean zero",
            cost="fast",
            views=VIEWS,
            method=_estimate,
            differentiable=True,
            uncertainty="standard error",
        ),
        Measure(
            "rms_singular_value",
            PerStep(),
            moments.rms_singular_value,
            definition="`sqrt(‖J‖² / n)` with the Frobenius norm: the root mean square of the singular values",
            unit="dimensionless",
            reference="1",
            reading="the gain of a random direction",
            cost="fast",
            views=VIEWS,
            method=_estimate,
            differentiable=True,
            uncertainty="standard error",
        ),
        Measure(
            "spectral_norm",
            PerStep(of_several=True),
            spectrum.spectral_norms,
            definition="the largest singular value of J; above 32 columns to a relative `tolerance` (0.01)",
            unit="dimensionless",
            reference="1",
            reading="the gain of the direction that grows most in one step",
            cost="standard",
            views=VIEWS,
            method=lambda options, _: f"Golub-Kahan-Lanczos, to {options.tolerance:g}",
            differentiable=True,
            uncertainty="residual",
            expensive=True,
            dense_up_to=spectrum.EXACT_SIZE,
            kept_vectors=spectrum.MAX_STEPS,
        ),
        Measure(
            "spectral_radius",
            PerStep(),
            eigen.spectral_radius,
            definition="the largest modulus of an eigenvalue of J; above 128 units by Arnoldi's method, to `tolerance`",
            unit="dimensionless",
            reference="1",
            reading="the gain of each step if the same one were repeated for ever",
            cost="full",
            views=VIEWS,
            needs_square=True,
            method=lambda options, _: f"Arnoldi, to {options.tolerance:g}",
            differentiable=True,
            uncertainty="residual",
            expensive=True,
            dense_up_to=eigen.EXACT_SIZE,
            kept_vectors=2 * eigen.KRYLOV,
        ),
        Measure(
            "condition_number",
            PerStep(may_be_infinite=True),
            eigen.condition_number,
            definition="the largest singular value over the smallest one",
            unit="dimensionless",
            reference="1",
            reading="how unlike the gains of two directions are at most; 1 for an orthogonal J",
            cost="full",
            views=VIEWS,
            expensive=True,
            dense_up_to=math.inf,
        ),
        Measure(
            "singular_values",
            Spectrum(),
            lambda operator, _: eigen.singular_values(operator),
            definition="all singular values of J, at 16 steps and samples (`spectra`)",
            unit="dimensionless",
            reference="1",
            reading="the gains of all directions; all near 1 is dynamical isometry",
            cost="full",
            views=VIEWS,
            dense_up_to=math.inf,
        ),
        Measure(
            "eigenvalues",
            Spectrum(
                complex_values=True,
                count=lambda _, columns: columns if columns <= eigen.SPECTRUM_SIZE else eigen.LEADING,
            ),
            eigen.leading_eigenvalues,
            definition="all eigenvalues of J, at 16 steps and samples (`spectra`); above 512 columns the 16 largest by "
            "Arnoldi's method, NaN if not found to `tolerance`",
            unit="dimensionless",
            reference="",
            reading="outside of the unit circle a repeated step grows, inside it falls",
            cost="full",
            method=lambda options, _: f"Arnoldi, the {eigen.LEADING} largest, to {options.tolerance:g}",
            dense_up_to=eigen.SPECTRUM_SIZE,
            kept_vectors=2 * eigen.SPECTRUM_KRYLOV,
        ),
        Measure(
            "flow",
            Flow(reduction=None),
            lambda log_gain: log_gain,
            definition="`log(‖P‖ / sqrt(n))` for k = 1, 2, ..., Frobenius norm; P has the n rows of the output's "
            "states in `J_T ... J_{T-k+1}`; from 3 random orthonormal vectors (`flow_vectors`), without bias",
            unit="nats",
            reference="0",
            reading="the logarithm of what is left of a gradient after 1, 2, ... steps from the end of the sequence",
            cost="standard",
            method=_backwards,
            uncertainty="standard error",
            differentiable=True,
        ),
        Measure(
            "flow_of_all",
            WholeFlow(reduction=None),
            lambda log_gain: log_gain,
            definition="as `flow`, with all rows of `J_T ... J_{T-k+1}`; only where a state is carried and never felt",
            unit="nats",
            reference="0",
            reading="what is left of a gradient that arrives at all states, also at those that the output never feels",
            cost="standard",
            views=("joint",),
            method=_backwards,
            uncertainty="standard error",
        ),
        Measure(
            "growth",
            Flow(reduction="growth"),
            growth,
            definition="the slope of the flow over k",
            unit="nats per step",
            reference="0",
            reading="how fast a gradient grows (> 0) or falls (< 0)",
            cost="standard",
            method=_backwards,
            differentiable=True,
        ),
        Measure(
            "horizon",
            Flow(reduction="horizon"),
            horizon,
            definition="the least k at which the flow is below log 0.01 or above log 100",
            unit="steps",
            reference="inf",
            reading="number of steps until a gradient has fallen to 1 %, or grown 100-fold; inf beyond the sequence",
            cost="standard",
            method=_backwards,
        ),
        Measure(
            "lyapunov",
            Exponents(reduction="first"),
            lambda exponents, _: exponents,
            definition="the 8 largest (`exponents`) mean logarithms of `abs(R_ii)` in `Q R = J_t Q`",
            unit="nats per step",
            reference="0",
            reading="how fast nearby states part (> 0, chaos) or meet (< 0, forgetting), in the leading directions",
            cost="full",
            method=_qr,
            differentiable=True,
        ),
        Measure(
            "kaplan_yorke",
            Exponents(may_be_undecided=True),
            lyapunov.kaplan_yorke,
            definition="of how many dimensions a volume neither grows nor shrinks (Kaplan, Yorke 1979)",
            unit="dimensionless",
            reference="",
            reading="the dimension of what the states are drawn to; NaN if more exponents are needed to know it",
            cost="full",
            method=_qr,
        ),
        Measure(
            "sensitivity",
            Sensitivity(reduction="whole"),
            lambda found: (found.by_span, found.standard_error),
            definition="`‖d s_T / dθ‖` for the recurrent weights θ, which multiply the states, as they act in the last "
            "k = 1, 2, ... steps; its square without bias, from 3 random orthonormal vectors (`flow_vectors`)",
            unit="state per unit of weight",
            reference="",
            reading="how far the last state moves when the recurrent weights do, and how much of this the last 1, 2, "
            "... steps do",
            cost="full",
            method=_by_vectors,
            uncertainty="standard error",
        ),
        Measure(
            "relative_sensitivity",
            Sensitivity(reduction="relative"),
            sensitivity.relative,
            definition="`‖d s_T / dθ‖ / ‖s_T‖`; in all: the root mean squares over the samples divided by each other",
            unit="relative change per unit of weight",
            reference="",
            reading="the relative change of the last state when each recurrent weight moves by one at random",
            cost="full",
            method=_by_vectors,
            uncertainty="standard error",
        ),
        Measure(
            "state_norm",
            SensitiveState(reduction="root_mean_square"),
            lambda found: (found.state_norm, None),
            definition="`‖s_T‖`; comes with the sensitivity",
            unit="unit of state",
            reference="",
            reading="the size of the last state",
            cost="full",
        ),
        Measure(
            "loss_gradient",
            Loss(),
            moments.norms_by_step,
            definition="`‖dLoss/dh_t‖` of the compiled loss, times the number of samples; with `targets` only",
            unit="loss per unit of state",
            reference="",
            reading="how much the loss feels of a step; if it is tiny at the early ones, they are not learnt from",
            cost="fast",
            views=("hidden",),
        ),
    )
}


def markdown_table() -> str:
    """Returns the Markdown table of all measures, for `docs/measures.md`."""
    head = ["measure", "preset", "definition", "unit", "keeps", "can be held", "reading"]
    rows = [
        [
            f"`{m.name}`",
            f'`"{m.cost}"`' if m.kind.selectable else "-",
            m.definition,
            m.unit,
            m.reference or "-",
            "yes" if m.differentiable else "-",
            m.reading,
        ]
        for m in MEASURES.values()
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


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
    return _SQUARE if measure.needs_square else views


def _preset(costs: tuple[str, ...], views: tuple[str, ...]) -> tuple[str, ...]:
    """The measures of some costs in some views; those over time of one view alone."""
    return tuple(
        key
        for key, (view, measure) in KEYS.items()
        if key in _NAMES and measure.cost in costs and view in _preset_views(measure, views)
    )


PRESETS = {
    "fast": _preset(("fast",), _SQUARE),
    "standard": _preset(("fast", "standard"), _SQUARE),
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


def of_kind(selection: Selection, *kinds: type[Kind]) -> Selection:
    """The part of a selection whose measures are of some kinds."""
    return filtered(selection, lambda measure: isinstance(measure.kind, kinds))


def views_of(selection: Selection) -> list[ViewName]:
    """The views in a selection, each once, in order."""
    return list(dict.fromkeys(view for view, _ in selection))
