"""Reproduce the table of a document that asks for `dh_t/dh_{t-1}`, with the model of the document.

    h_t = W_h f(h_{t-1})            (with bias)
    c_t = c_{t-1} - h_{t-1} + h_t
    o_t = sigmoid(W_o x_t + c_t)

The model is stateful and takes its states as inputs. The document makes it anew at each step, runs one step under a
gradient tape, and prints `np.var(J) * units`. With Glorot weights this is 1/2 on average for f = ReLU, since half of
the units pass the gradient on, and 1 for f = identity. The first table has these numbers, by the tape of the document
and by `measure`. The second table has one model for all steps, by `measure`, by `state_jacobian` on the cell, and by
the tape; the third has its means.

    python examples/reproduce_seed.py           # half a minute on two cores
    python examples/reproduce_seed.py --fast    # one draw of weights in the second table
"""

import argparse
import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_jacmon import measure, state_jacobian

UNITS, STEPS = 100, 4

# Expected value and standard deviation of one draw. The value is published; the deviation is between those of
# Monte-Carlo runs with 64 and 128 units (Gaussian weights: 0.063 and 0.042 with a ReLU, 0.022 and 0.010 without).
THEORY = {"relu": (0.5, 0.05), "linear": (1.0, 0.015)}

# The steps of the document's table. Its random numbers are those of its own script, so only their spread compares.
DOCUMENT = {"relu": [0.446, 0.529, 0.469, 0.551], "linear": [0.985, 1.009, 0.999, 0.999]}


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


def make_model(activation: str, steps: int) -> keras.Model:
    """Makes the model: inputs x, h, c; outputs o, h, c after these steps."""
    inputs = [keras.Input(batch_shape=(1, *shape)) for shape in ((steps, 2), (UNITS,), (UNITS,))]
    rnn = keras.layers.RNN(TwoStateCell(UNITS, activation), return_state=True, stateful=True, name="two_state")
    return keras.Model(inputs, rnn(inputs[0], initial_state=inputs[1:]))


def draw_inputs() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Draws x, h_0 and c_0."""
    x, h, c = (tf.random.normal(shape) for shape in ((1, STEPS, 2), (1, UNITS), (1, UNITS)))
    return x, h, c


def print_head() -> None:
    """Prints the head of a Markdown table."""
    print(
        "\n| f | computed by | "
        + " | ".join(f"step {step}" for step in range(STEPS))
        + " |\n"
        + "| --- " * (2 + STEPS)
        + "|"
    )


def print_row(activation: str, name: str, values: Any) -> None:
    """Prints one value for each step."""
    print(f"| {activation} | {name} | " + " | ".join(f"{value:.5f}" for value in values) + " |", flush=True)


def as_in_the_document(activation: str) -> None:
    """Prints the values of a model that is made anew at each step, beside those of the document, and compares them."""
    keras.utils.set_random_seed(42)
    x, h, c = draw_inputs()
    taped, measured = [], []
    for t in range(STEPS):
        model, x_t = make_model(activation, 1), x[:, t : t + 1]
        measured.append(measure(model, [x_t, h, c], measures=["variance"])["two_state"].mean("variance"))
        with tf.GradientTape() as tape:
            tape.watch(h)
            _, new_h, c = model([x_t, h, c])
        taped.append(np.var(tape.batch_jacobian(new_h, h)) * UNITS)
        h = new_h
    print_row(activation, "document", DOCUMENT[activation])
    print_row(activation, "its tape, new weights", taped)
    print_row(activation, "measure, the same", measured)
    np.testing.assert_allclose(measured, taped, rtol=1e-5)
    expected, spread = THEORY[activation]
    np.testing.assert_allclose([DOCUMENT[activation], taped], expected, atol=4 * spread)


def with_one_model(activation: str, draws: int) -> float:
    """Prints the values of one model for all steps, with new weights in each draw, and returns their mean."""
    means = []
    for draw in range(draws):
        keras.utils.set_random_seed(42 + draw)
        x, h, c = draw_inputs()
        model = make_model(activation, STEPS)
        measured = measure(model, [x, h, c], measures=["variance"])["two_state"]["variance"][:, 0]
        cell = model.get_layer("two_state").cell
        operated, taped = [], []
        for t in range(STEPS):
            J = state_jacobian(cell, x[:, t], [h, c], view="hidden").to_dense()
            operated.append(np.var(J) * UNITS)
            with tf.GradientTape() as tape:
                tape.watch(h)
                _, [new_h, c] = cell(x[:, t], [h, c])
            taped.append(np.var(tape.batch_jacobian(new_h, h)) * UNITS)
            h = new_h
        for name, values in (("measure", measured), ("state_jacobian", operated), ("tape", taped)):
            print_row(activation, f"draw {draw}, {name}", values)
        np.testing.assert_allclose(measured, taped, rtol=1e-5)
        np.testing.assert_allclose(operated, taped, rtol=1e-5)
        means.append(measured.mean())
    return float(np.mean(means))


def main() -> None:
    """Prints both tables, and asserts that the ways agree and that the values are those of the theory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="one draw of weights in the second table")
    draws = 1 if parser.parse_args().fast else 4
    # Keras warns about each layer that makes its weights at the first call.
    warnings.filterwarnings("ignore", message="`build\\(\\)` was called on layer")
    print_head()
    for activation in THEORY:
        as_in_the_document(activation)
    print_head()
    means = {activation: with_one_model(activation, draws) for activation in THEORY}
    print("\n| f | mean | published theory |\n| --- | --- | --- |")
    for activation, (expected, spread) in THEORY.items():
        # Only the draws are independent; the steps of one draw share their weights.
        tolerance = 4 * spread / draws**0.5
        print(f"| {activation} | {means[activation]:.4f} | {expected} ± {tolerance:.3f} |")
        np.testing.assert_allclose(means[activation], expected, atol=tolerance)


if __name__ == "__main__":
    main()
