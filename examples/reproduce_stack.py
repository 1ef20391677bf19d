"""Reproduce two claims of "Stabilizing RNN Gradients through Pre-training" (arXiv 2308.12075) about stacks of layers.

1. Before a training, the spectral radius of the Jacobians of each layer, through time and through depth, can be
   brought within 0.08 of a target, 1 or 1/2. `stabilize` tries it, for stacks of two and of five layers.
2. A radius of 1 does not suffice in a deep stack, and 1/2 does. In a stack of L linear layers of one unit, with the
   weight ρ through time and through depth,

       dy_T/dx_t = ρ^(D + L) C(D + L - 1, L - 1),    D = T - t.

   All outputs together feel the first of T = 100 inputs, with L = 10, by C(109, 10) = 42,634,215,112,710 for ρ = 1, and
   by 1 for ρ = 1/2. Here it is the product of the measure `loss_gradient` of the first layer and of its view `inputs`.

    python examples/reproduce_stack.py           # some six minutes on two cores
    python examples/reproduce_stack.py --fast    # one small stack
"""

import argparse
import itertools
from math import comb
from typing import Any

import keras
import numpy as np

from keras_jacmon import measure, stabilize

BATCH, FEATURES, TOLERANCE = 16, 3, 0.08
LAYERS, STEPS = 10, 100
SHOWN = (0, 1, 10, 50, 99)

CELLS: dict[str, Any] = {
    "gru": lambda units: keras.layers.GRU(units, return_sequences=True),
    "sigmoid": lambda units: keras.layers.SimpleRNN(units, activation="sigmoid", return_sequences=True),
}


def bring_to_target(cell: str, depth: int, target: float, units: int, steps: int) -> None:
    """Stabilizes a stack of equal layers, and prints how far its radii are from the target."""
    keras.utils.set_random_seed(0)
    layers = [CELLS[cell](units) for _ in range(depth)]
    model = keras.Sequential([keras.Input((steps, FEATURES)), *layers, keras.layers.Dense(1)])
    probe = np.random.default_rng(0).normal(size=(BATCH, steps, FEATURES)).astype(np.float32)
    targets = {"time": target, "depth": target}
    result = stabilize(model, probe, targets, tolerance=TOLERANCE, verbose=0)
    radii = [
        ", ".join(f"{goal.value(report):.2f}" for goal in result.goals if goal.direction == direction)
        for direction in targets
        for report in (result.before, result.after)
    ]
    farthest = max(abs(goal.value(result.after) - target) for goal in result.goals)
    end = [f"{farthest:.3f}", "yes" if farthest < TOLERANCE else "no", f"{result.history['updates'][-1]:.0f}"]
    print("| " + " | ".join([cell, str(depth), str(target), *radii, *end]) + " |", flush=True)
    assert farthest < TOLERANCE or not result.converged


def make_linear_stack(weight: float) -> keras.Model:
    """Makes the linear stack with one unit in each layer; in float64, as its gradients have 14 digits."""
    constant = keras.initializers.Constant(weight)
    options = {"use_bias": False, "kernel_initializer": constant, "recurrent_initializer": constant}
    layers = [
        keras.layers.SimpleRNN(1, "linear", **options, return_sequences=True, dtype="float64", name=f"layer_{k}")
        for k in range(LAYERS)
    ]
    return keras.Sequential([keras.Input((STEPS, 1), dtype="float64"), *layers])


def felt_by_outputs(model: keras.Model, chosen: slice) -> Any:
    """Returns the derivative of the sum of the chosen outputs by each input, `(STEPS,)`."""
    model.compile(loss=lambda _, y: keras.ops.sum(y[:, chosen, 0], axis=1))
    x = np.zeros((1, STEPS, 1))
    first = measure(model, x, targets=x, layers="layer_0", measures=["inputs/rms_singular_value"])["layer_0"]
    return (first["loss_gradient"] * first["inputs/rms_singular_value"])[:, 0]


def count_paths(weight: float) -> None:
    """Prints derivatives of the linear stack beside their formula."""
    model = make_linear_stack(weight)
    by_distance = felt_by_outputs(model, slice(-1, None))[::-1]
    exact = np.array([weight ** (D + LAYERS) * comb(D + LAYERS - 1, LAYERS - 1) for D in range(STEPS)])
    for D in SHOWN:
        print(f"| {weight} | dy_T/dx_t, D = {D} | {by_distance[D]:.15g} | {exact[D]:.15g} |")
    total = felt_by_outputs(model, slice(None))[0]
    published = {1.0: comb(STEPS + LAYERS - 1, LAYERS), 0.5: 1.0}[weight]
    print(f"| {weight} | all outputs by the first input | {total:.15g} | {published:.15g} |", flush=True)
    np.testing.assert_allclose(by_distance, exact, rtol=1e-10)
    np.testing.assert_allclose(total, published, rtol=1e-10)


def main() -> None:
    """Prints both tables, and asserts the formula."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="one small stack")
    fast = parser.parse_args().fast
    print("| ρ | derivative | ours | formula |\n| --- | --- | --- | --- |")
    for weight in (1.0, 0.5):
        count_paths(weight)
    units, steps = (16, 10) if fast else (128, 30)
    sizes = [("gru", 2, 1.0)] if fast else list(itertools.product(CELLS, (2, 5), (1.0, 0.5)))
    print("\n| cell | depth | target | time: before | after | depth: before | after | farthest | < 0.08 | updates |")
    print("| --- " * 10 + "|")
    for cell, depth, target in sizes:
        bring_to_target(cell, depth, target, units, steps)


if __name__ == "__main__":
    main()
