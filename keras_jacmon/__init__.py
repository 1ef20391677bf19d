"""Watch the state-to-state Jacobians of recurrent Keras models while they train.

The public names are imported when they are first asked for, so that `import keras_jacmon` alone is cheap.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keras_jacmon.explanation import explain
    from keras_jacmon.jacobians.registered_forms import register_jacobian
    from keras_jacmon.jacobians.views import state_jacobian
    from keras_jacmon.meter import JacobianMeter, measure
    from keras_jacmon.model.recurrences import Recurrence, register_recurrence
    from keras_jacmon.monitor import JacobianMonitor
    from keras_jacmon.regularization.regularizer import JacobianRegularizer
    from keras_jacmon.report.layer_report import LayerReport
    from keras_jacmon.report.report import Report
    from keras_jacmon.stabilization.chrono import chrono_biases
    from keras_jacmon.stabilization.episodes import FlossingEpisodes
    from keras_jacmon.stabilization.stabilize import stabilize
    from keras_jacmon.stabilization.suggest import suggest

__version__ = "0.1.0"

__all__ = [
    "FlossingEpisodes",
    "JacobianMeter",
    "JacobianMonitor",
    "JacobianRegularizer",
    "LayerReport",
    "Recurrence",
    "Report",
    "chrono_biases",
    "explain",
    "measure",
    "register_jacobian",
    "register_recurrence",
    "stabilize",
    "state_jacobian",
    "suggest",
]

_HOME = {
    "FlossingEpisodes": "keras_jacmon.stabilization.episodes",
    "JacobianMeter": "keras_jacmon.meter",
    "JacobianMonitor": "keras_jacmon.monitor",
    "JacobianRegularizer": "keras_jacmon.regularization.regularizer",
    "LayerReport": "keras_jacmon.report.layer_report",
    "Recurrence": "keras_jacmon.model.recurrences",
    "Report": "keras_jacmon.report.report",
    "chrono_biases": "keras_jacmon.stabilization.chrono",
    "explain": "keras_jacmon.explanation",
    "measure": "keras_jacmon.meter",
    "register_jacobian": "keras_jacmon.jacobians.registered_forms",
    "register_recurrence": "keras_jacmon.model.recurrences",
    "stabilize": "keras_jacmon.stabilization.stabilize",
    "state_jacobian": "keras_jacmon.jacobians.views",
    "suggest": "keras_jacmon.stabilization.suggest",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _HOME[name].startswith("keras_jacmon.report."):
        _check_backend()
    return getattr(importlib.import_module(_HOME[name]), name)


def _check_backend() -> None:
    """Refuses to load what needs TensorFlow beside a Keras with another backend; reports are plain NumPy.

    Raises:
        ImportError: If Keras has another backend.
    """
    try:
        backend = importlib.import_module("keras").config.backend()
    except ModuleNotFoundError as error:
        # Keras imports its backend, which may not be installed.
        if error.name not in ("jax", "torch", "openvino"):
            raise
        # That of NumPy needs JAX.
        backend = os.environ.get("KERAS_BACKEND", error.name)
    if backend != "tensorflow":
        raise ImportError(
            f"keras_jacmon supports the backend `tensorflow` of Keras alone, and Keras is set to `{backend}`. Set the "
            "environment variable KERAS_BACKEND to tensorflow before Keras is imported."
        )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
