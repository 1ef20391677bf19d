"""Watch the state-to-state Jacobians of recurrent Keras models while they train.

The public names are imported when they are first asked for, so that `import keras_jacmon` alone is cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keras_jacmon.explanation import explain
    from keras_jacmon.jacobians.registered_forms import register_jacobian
    from keras_jacmon.jacobians.views import state_jacobian
    from keras_jacmon.meter import JacobianMeter, measure
    from keras_jacmon.monitor import JacobianMonitor
    from keras_jacmon.regularization.regularizer import JacobianRegularizer
    from keras_jacmon.report.layer_report import LayerReport
    from keras_jacmon.report.report import Report

__version__ = "0.1.0"

__all__ = [
    "JacobianMeter",
    "JacobianMonitor",
    "JacobianRegularizer",
    "LayerReport",
    "Report",
    "explain",
    "measure",
    "register_jacobian",
    "state_jacobian",
]

_HOME = {
    "JacobianMeter": "keras_jacmon.meter",
    "JacobianMonitor": "keras_jacmon.monitor",
    "JacobianRegularizer": "keras_jacmon.regularization.regularizer",
    "LayerReport": "keras_jacmon.report.layer_report",
    "Report": "keras_jacmon.report.report",
    "explain": "keras_jacmon.explanation",
    "measure": "keras_jacmon.meter",
    "register_jacobian": "keras_jacmon.jacobians.registered_forms",
    "state_jacobian": "keras_jacmon.jacobians.views",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
