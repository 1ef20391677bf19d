"""Which measures are there?"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from keras_jacmon.measures import eigen, flow, lyapunov, moments, spectrum
from keras_jacmon.measures.options import Measured, Options

__all__ = [
    "KEYS",
    "MEASURES",
    "PRESETS",
    "VIEWS",
    "Measure",
    "Measured",
    "Options",
    "Selection",
    "key_of",
    "select_measures",
]

# Of a step's Jacobian: which states, see `state_jacobian`.
VIEWS = ("hidden", "joint", "inputs")

_SQUARE = ("hidden", "joint")


@dataclass(frozen=True)
class Measure:
    """A number that says how large a Jacobian is, or a product of Jacobians over time.

    Attributes:
        name: Its key in reports, logs and TensorBoard tags.
        of: What it is a function of. `"step"`: the Jacobian of one step; `function` maps an operator and `Options` to
            `Measured`, `(rows,)`. `"spectrum"`: that too, but `function` maps an operator to `(rows, values)`.
            `"flow"`: the logarithms of the gains by span, `(spans, samples)`. `"exponents"`: the Lyapunov exponents
            `(exponents, samples)`, and the units. `"loss"`: the gradient of the loss by the hidden state, `(samples,
            time, units)`; it is measured where there are targets, and cannot be asked for by name.
        function: Gives its values.
        definition: In a formula or half a sentence.
        unit: Of the values.
        reference: The value of a layer that keeps its gradient; empty if there is none.
        reading: What a value means, in a sentence.
        cost: The first of the presets that has it; measures that only `"full"` has are slow.
        views: Of which Jacobians it makes sense.
        differentiable: Whether a gradient of the values may be asked for.
        uncertainty: What the second array of `Measured` is: `"standard error"` or `"residual"`.
        expensive: Whether `max_rows` bounds the rows that it is measured at.
        vectors: How many vectors it keeps for each row while it is computed.
        warm_start: Whether it can start from vectors of the last time.
    """

    name: str
    of: Literal["step", "spectrum", "flow", "exponents", "loss"]
    function: Callable[..., Any]
    definition: str
    unit: str
    reference: str
    reading: str
    cost: Literal["fast", "standard", "full"]
    views: tuple[str, ...] = _SQUARE
    differentiable: bool = False
    uncertainty: Literal["standard error", "residual"] | None = None
    expensive: bool = False
    vectors: int = 0
    warm_start: bool = False


MEASURES = {
    measure.name: measure
    for measure in (
        Measure(
            "variance",
            "step",
            moments.variance,
            definition="n times the variance of the entries of J (m x n)",
            unit="dimensionless",
            reference="1",
            reading="1 keeps the gradient's size if the entries have mean zero",
            cost="fast",
            views=VIEWS,
            differentiable=True,
            uncertainty="standard error",
        ),
        Measure(
            "rms_singular_value",
            "step",
            moments.rms_singular_value,
            definition="`sqrt(‖J‖² / n)` with the Frobenius norm: the root mean square of the singular values",
            unit="dimensionless",
            reference="1",
            reading="the gain of a random direction",
            cost="fast",
            views=VIEWS,
            differentiable=True,
            uncertainty="standard error",
        ),
        Measure(
            "spectral_norm",
            "step",
            spectrum.spectral_norm,
            definition="the largest singular value of J, to a relative `tolerance` (0.01)",
            unit="dimensionless",
            reference="1",
            reading="the gain of the direction that grows most in one step",
            cost="standard",
            views=VIEWS,
            differentiable=True,
            uncertainty="residual",
            expensive=True,
            vectors=spectrum.MAX_STEPS,
            warm_start=True,
        ),
        Measure(
            "spectral_radius",
            "step",
            eigen.spectral_radius,
            definition="the largest modulus of an eigenvalue of J; above 128 units by Arnoldi's method, to `tolerance`",
            unit="dimensionless",
            reference="1",
            reading="the gain of each step if the same one were repeated for ever",
            cost="full",
            uncertainty="residual",
            expensive=True,
            vectors=2 * eigen.KRYLOV,
        ),
        Measure(
            "condition_number",
            "step",
            eigen.condition_number,
            definition="the largest singular value over the smallest one",
            unit="dimensionless",
            reference="1",
            reading="how unlike the gains of two directions are at most; 1 for an orthogonal J",
            cost="full",
            views=VIEWS,
            expensive=True,
        ),
        Measure(
            "singular_values",
            "spectrum",
            eigen.singular_values,
            definition="all singular values of J, at 16 steps and samples (`spectra`)",
            unit="dimensionless",
            reference="1",
            reading="the gains of all directions; all near 1 is dynamical isometry",
            cost="full",
            views=VIEWS,
        ),
        Measure(
            "eigenvalues",
            "spectrum",
            eigen.eigenvalues,
            definition="all eigenvalues of J, at 16 steps and samples (`spectra`)",
            unit="dimensionless",
            reference="",
            reading="outside of the unit circle a repeated step grows, inside it falls",
            cost="full",
        ),
        Measure(
            "flow",
            "flow",
            lambda log_gain: log_gain,
            definition="`log(‖J_T ... J_{T-k+1}‖ / sqrt(n))` for k = 1, 2, ..., Frobenius norm, from 3 "
            "random vectors (`flow_vectors`)",
            unit="nats",
            reference="0",
            reading="the logarithm of what is left of a gradient after 1, 2, ... steps from the end of the sequence",
            cost="standard",
            uncertainty="standard error",
        ),
        Measure(
            "growth",
            "flow",
            flow.growth,
            definition="the slope of the flow over k",
            unit="nats per step",
            reference="0",
            reading="how fast a gradient grows (> 0) or falls (< 0)",
            cost="standard",
        ),
        Measure(
            "horizon",
            "flow",
            flow.horizon,
            definition="the least k at which the flow is below log 0.01 or above log 100",
            unit="steps",
            reference="inf",
            reading="after so many steps a gradient has fallen to 1 %, or grown 100-fold; inf beyond the sequence",
            cost="standard",
        ),
        Measure(
            "lyapunov",
            "exponents",
            lambda exponents, _: exponents,
            definition="the 8 largest (`exponents`) mean logarithms of `abs(R_ii)` in `Q R = J_t Q`",
            unit="nats per step",
            reference="0",
            reading="how fast nearby states part (> 0, chaos) or meet (< 0, forgetting), in the leading directions",
            cost="full",
        ),
        Measure(
            "kaplan_yorke",
            "exponents",
            lyapunov.kaplan_yorke,
            definition="of how many dimensions a volume neither grows nor shrinks (Kaplan, Yorke 1979)",
            unit="dimensionless",
            reference="",
            reading="the dimension of what the states are drawn to; NaN if more exponents are needed to know it",
            cost="full",
        ),
        Measure(
            "loss_gradient",
            "loss",
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
    """The table of all measures that the README shows."""
    head = ["measure", "preset", "definition", "unit", "keeps", "reading"]
    rows = [
        [f"`{m.name}`", "-" if m.of == "loss" else f'`"{m.cost}"`', m.definition, m.unit, m.reference or "-", m.reading]
        for m in MEASURES.values()
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


# What is measured, by view.
Selection = Mapping[str, tuple[Measure, ...]]


def key_of(view: str, measure: str) -> str:
    """The key of a measure in reports: with the view in front, unless that is the hidden one."""
    return measure if view == "hidden" else f"{view}/{measure}"


# By key, in the order of reports.
KEYS = {key_of(view, m.name): (view, m) for view in VIEWS for m in MEASURES.values() if view in m.views}

# Those that can be asked for.
_NAMES = [key for key, (_, measure) in KEYS.items() if measure.of != "loss"]


def _preset(costs: tuple[str, ...], views: tuple[str, ...]) -> tuple[str, ...]:
    """The measures of some costs in some views; products over time of the joint view alone, which is the true step."""
    return tuple(
        key
        for key, (view, measure) in KEYS.items()
        if key in _NAMES
        and measure.cost in costs
        and view in (("joint",) if measure.of in ("flow", "exponents") else views)
    )


PRESETS = {
    "fast": _preset(("fast",), _SQUARE),
    "standard": _preset(("fast", "standard"), _SQUARE),
    "full": _preset(("fast", "standard", "full"), VIEWS),
}


def select_measures(names: Iterable[str] | str | None) -> Selection:
    """The measures of these names for each view, in the order of the registry.

    Args:
        names: Names of measures, `"variance"` of the hidden view, `"joint/variance"` of the joint one, and of presets;
            None for `"standard"`.

    Raises:
        ValueError: If a name is unknown, or there is none.
    """
    names = ["standard"] if names is None else [names] if isinstance(names, str) else list(names)
    if not names or not all(name in _NAMES or name in PRESETS for name in names):
        raise ValueError(
            f"Invalid value for argument `measures`. Expected names out of {list(PRESETS)}, or of {_NAMES}. "
            f"Received: {names}"
        )
    wanted = {key for name in names for key in PRESETS.get(name, (name,))}
    chosen = [KEYS[key] for key in KEYS if key in wanted]
    return {view: tuple(m for of, m in chosen if of == view) for view in VIEWS if any(of == view for of, _ in chosen)}


def filtered(selection: Selection, keep: Callable[[Measure], bool]) -> Selection:
    """The measures of a selection for which a condition holds."""
    kept = {view: tuple(measure for measure in chosen if keep(measure)) for view, chosen in selection.items()}
    return {view: chosen for view, chosen in kept.items() if chosen}
