"""Facts about the measures that the dashboard shows: reference, unit and scale."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MeasureFacts:
    """The facts about a measure that the page shows.

    Attributes:
        reference: Float, the value of a layer that keeps its gradient; None if there is none.
        unit: String, the unit of the values; empty for dimensionless ones.
        linear: Boolean, True if the values may be negative and are not shown on a logarithmic scale.
    """

    reference: float | None = 1.0
    unit: str = ""
    linear: bool = False


# By measure, for the keys without the view; a test compares them with the registry, which needs TensorFlow.
MEASURE_FACTS = {
    "variance": MeasureFacts(),
    "rms_singular_value": MeasureFacts(),
    "spectral_norm": MeasureFacts(),
    "spectral_radius": MeasureFacts(),
    "condition_number": MeasureFacts(),
    "singular_values": MeasureFacts(),
    "eigenvalues": MeasureFacts(reference=None),
    "flow": MeasureFacts(reference=0.0, unit="nats", linear=True),
    "flow_of_all": MeasureFacts(reference=0.0, unit="nats", linear=True),
    "growth": MeasureFacts(reference=0.0, unit="nats per step", linear=True),
    "horizon": MeasureFacts(reference=float("inf"), unit="steps"),
    "lyapunov": MeasureFacts(reference=0.0, unit="nats per step", linear=True),
    "kaplan_yorke": MeasureFacts(reference=None),
    "sensitivity": MeasureFacts(reference=None, unit="state per unit of weight"),
    "relative_sensitivity": MeasureFacts(reference=None, unit="relative change per unit of weight"),
    "state_norm": MeasureFacts(reference=None, unit="unit of state"),
    "loss_gradient": MeasureFacts(reference=None, unit="loss per unit of state"),
}


def facts_of(key: str) -> MeasureFacts:
    """Returns the facts about the measure of a key, such as `"joint/variance"`."""
    return MEASURE_FACTS.get(key.rpartition("/")[2], MeasureFacts(reference=None))
