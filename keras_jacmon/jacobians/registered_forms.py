"""Forms that users register for the Jacobians of their cells."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_jacmon.errors import invalid_argument

Form = Callable[[Any, tf.Tensor, Any, str], tf.linalg.LinearOperator | None]

_FORMS: dict[type, Form] = {}


def register_jacobian(cell_type: type, form: Form | None) -> None:
    """Registers a form for the Jacobians of a type of cell. Rarely needed: see `explain`.

    Example:

    ```python
    def form(cell, inputs, states, view):
        if view != "hidden":
            return None
        slope = 1.0 - tf.tanh(inputs @ cell.kernel + states[0] @ cell.recurrent_kernel) ** 2
        kernel = tf.linalg.matrix_transpose(cell.recurrent_kernel)
        return tf.linalg.LinearOperatorFullMatrix(slope[:, :, None] * kernel)

    register_jacobian(MyCell, form)
    ```

    Args:
        cell_type: The class itself. A subclass needs a form of its own, since it may override `call`.
        form: A function of the cell, `inputs` `(points, ...)`, `states` in the cell's structure and the view
            (`"hidden"`, `"joint"` or `"inputs"`). It returns a `tf.linalg.LinearOperator` of batch shape `(points,)`,
            `J[b, i, k] = d new[b, i] / d old[b, k]`, or None to leave the view to discovery. The form is compared with
            autodiff like a structure that was found. None removes the form of the class.

    Raises:
        ValueError: If `cell_type` is no class, or `form` cannot be called.
    """
    if not isinstance(cell_type, type):
        raise invalid_argument("cell_type", "a class", f"cell_type={cell_type!r}")
    if form is None:
        _FORMS.pop(cell_type, None)
        return
    if not callable(form):
        raise invalid_argument("form", "a function of a cell, inputs, states and a view, or None", f"form={form!r}")
    _FORMS[cell_type] = form


def registered_form(cell: Any) -> Form | None:
    """The form that is registered for the class of a cell; None if there is none."""
    return _FORMS.get(type(cell))
