"""Registry of all measures: names, definitions and methods."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from keras_jacmon.measures import arnoldi, eigen, lyapunov, moments, sensitivity, singular_values, spectral_norm
from keras_jacmon.measures.kinds import (
    Exponents,
    Flow,
    Loss,
    MeasureKind,
    PerStep,
    SensitiveState,
    Sensitivity,
    Spectrum,
    WholeFlow,
)
from keras_jacmon.options import VIEWS, Options
from keras_jacmon.report.curve import growth, horizon

# The views that have a square J in every cell.
SQUARE = ("hidden", "joint")

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
    kind: MeasureKind
    function: Callable[..., Any]
    definition: str
    unit: str
    reference: str
    reading: str
    cost: Literal["fast", "standard", "full"]
    views: tuple[str, ...] = SQUARE
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
            spectral_norm.spectral_norms,
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
            dense_up_to=spectral_norm.EXACT_SIZE,
            kept_vectors=spectral_norm.MAX_STEPS,
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
            kept_vectors=2 * arnoldi.KRYLOV,
        ),
        Measure(
            "condition_number",
            PerStep(may_be_infinite=True),
            singular_values.condition_number,
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
            lambda operator, _: singular_values.singular_values(operator),
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
            definition="the slope of the flow over k, from k = 0 on",
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
