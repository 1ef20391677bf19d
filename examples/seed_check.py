"""Check the numbers on a cell whose Jacobian has a known variance.

    h_t = W_h f(h_{t-1})            (with bias)
    c_t = c_{t-1} - h_{t-1} + h_t
    o_t = sigmoid(W_o x_t + c_t)

With Glorot weights, `Var(dh_t/dh_{t-1}) * units` is 1/2 for f = ReLU, since half of the units pass the gradient on, and
1 for f = identity. Each number is computed in three ways: by `measure` on a model, by `state_jacobian` on the cell, and
by a plain loop over `GradientTape.batch_jacobian`.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_jacmon import measure, state_jacobian

UNITS, STEPS, DRAWS = 100, 4, 4

# Expected value and standard deviation of one draw. The value is published; the deviation is between those of
# Monte-Carlo runs with 64 and 128 units (Gaussian weights: 0.063 and 0.042 with a ReLU, 0.022 and 0.010 without).
THEORY = {"relu": (0.5, 0.05), "linear": (1.0, 0.015)}


class TwoStateCell(keras.layers.Layer):
    """The cell above. It has no `build()`, so its weights appear at the first call."""

    def __init__(self, units: int, activation: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.state_size = [units, units]
        self.output_size = units
        self.activation = keras.activations.get(activation)
        self.hidden = keras.layers.Dense(units)
        self.output_kernel = keras.layers.Dense(units, use_bias=False)

    def call(self, inputs: tf.Tensor, states: list[tf.Tensor]) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Returns the output and the new states of one step."""
        h, c = states
        new_h = self.hidden(self.activation(h))
        new_c = c - h + new_h
        return tf.sigmoid(self.output_kernel(inputs) + new_c), [new_h, new_c]


def tape_step(cell: TwoStateCell, x: tf.Tensor, h: tf.Tensor, c: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the new states of one step and dh_t/dh_{t-1}, by a gradient tape."""
    with tf.GradientTape() as tape:
        tape.watch(h)
        _, [new_h, new_c] = cell(x, [h, c])
    return new_h, new_c, tape.batch_jacobian(new_h, h)


def operator_step(
    cell: TwoStateCell, x: tf.Tensor, h: tf.Tensor, c: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the same, by the operator of this package."""
    _, [new_h, new_c] = cell(x, [h, c])
    return new_h, new_c, state_jacobian(cell, x, [h, c], view="hidden").to_dense()


def loop(step: Callable[..., Any], cell: TwoStateCell, x: tf.Tensor, h: tf.Tensor, c: tf.Tensor) -> list[float]:
    """Returns `np.var(J) * units` of each step."""
    # Without `tf.function`, TensorFlow would trace each Jacobian anew.
    compiled = tf.function(partial(step, cell))
    values = []
    for t in range(STEPS):
        h, c, J = compiled(x[:, t], h, c)
        values.append(float(np.var(J) * UNITS))
    return values


def check(activation: str) -> None:
    """Prints and asserts the values for one activation, with new weights in each draw."""
    expected, spread = THEORY[activation]
    means = []
    for draw in range(DRAWS):
        keras.utils.set_random_seed(42 + draw)
        x, h, c = (tf.random.normal(shape) for shape in ((1, STEPS, 2), (1, UNITS), (1, UNITS)))
        cell = TwoStateCell(UNITS, activation)
        inputs = [keras.Input((STEPS, 2)), keras.Input((UNITS,)), keras.Input((UNITS,))]
        outputs = keras.layers.RNN(cell, name="two_state")(inputs[0], initial_state=inputs[1:])
        report = measure(keras.Model(inputs, outputs), [x, h, c])

        measured = report["two_state"]["variance"][:, 0]
        operated = loop(operator_step, cell, x, h, c)
        looped = loop(tape_step, cell, x, h, c)
        for name, values in (("measure", measured), ("state_jacobian", operated), ("plain loop", looped)):
            print(f"{activation:10} {draw:4}  {name:15}" + "".join(f"{value:10.6f}" for value in values))
        np.testing.assert_allclose(measured, looped, rtol=1e-5)
        np.testing.assert_allclose(operated, looped, rtol=1e-5)
        np.testing.assert_allclose(measured, expected, atol=4 * spread)
        means.append(measured.mean())
    # Only the draws are independent; the steps of one draw share their weights.
    print(f"{activation:10} mean  {np.mean(means):.4f}, expected {expected} +- {4 * spread / DRAWS**0.5:.3f}\n")
    np.testing.assert_allclose(np.mean(means), expected, atol=4 * spread / DRAWS**0.5)


def main() -> None:
    """Checks each activation."""
    # Keras warns about each layer that makes its weights at the first call.
    warnings.filterwarnings("ignore", message="`build\\(\\)` was called on layer")
    print("activation draw  computed by     " + "".join(f"    step {step}" for step in range(STEPS)))
    for activation in THEORY:
        check(activation)


if __name__ == "__main__":
    main()
