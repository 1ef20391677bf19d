"""Reproduce the largest Lyapunov exponent of a random tanh network over its gain, against mean-field theory.

The network `x_t = J tanh(x_{t-1}) + s z_t` has n units, weights J of variance g²/n, and noise z of variance 1. For
n -> ∞ (Sompolinsky, Crisanti, Sommers 1988; with noise Molgedey, Schuchhardt, Schuster 1992)

    D = g² E tanh²(√D z) + s²,        λ_1 = ln g + ½ ln E sech⁴(√D z),        z ~ N(0, 1).

Without noise the network is chaotic for g > 1; noise puts this off. Here the network is a `SimpleRNN`, whose state is
`tanh(x_t)`: the exponents are the same. Both noises are two samples of one probe, and one meter measures all gains,
without a new trace. Without noise and for 1 < g < 1.5 a finite network may settle into a cycle: this is left out.

    python examples/reproduce_mean_field.py --figure mean_field.png    # needs the extra `plot`
    python examples/reproduce_mean_field.py --fast                     # a smaller network, fewer steps
"""

import argparse

import keras
import numpy as np
from numpy.typing import NDArray

from keras_jacmon import JacobianMeter

GAINS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0)
NOISES = (0.0, 1.0)
# λ_1 by (gain, noise): known values of the formula.
KNOWN = {
    (2.0, 0.0): 0.1547,
    (3.0, 0.0): 0.3102,
    (4.0, 0.0): 0.4329,
    (5.0, 0.0): 0.5324,
    (10.0, 0.0): 0.8564,
    (1.0, 1.0): -0.4595,
    (1.5, 1.0): -0.1418,
    (2.0, 1.0): 0.0460,
}

# The standard normal density on a grid, for expectations.
Z = np.linspace(-9, 9, 1001)
WEIGHT = np.exp(-(Z**2) / 2) / np.sqrt(2 * np.pi) * (Z[1] - Z[0])


def theory(gain: float, noise: float) -> float:
    """Returns λ_1 for n -> ∞: D by iteration from above, the expectations by the trapezoidal rule."""
    if gain <= 1 and noise == 0:
        return float(np.log(gain))
    D = gain**2 + noise**2
    for _ in range(1000):
        D = gain**2 * float(WEIGHT @ np.tanh(np.sqrt(D) * Z) ** 2) + noise**2
    return float(np.log(gain) + 0.5 * np.log(WEIGHT @ np.cosh(np.sqrt(D) * Z) ** -4))


def simulate(units: int, steps: int) -> NDArray[np.float64]:
    """Returns λ_1 for each gain and noise, `(gains, noises)`, of one draw of the weights."""
    random = np.random.default_rng(0)
    x = random.normal(size=(len(NOISES), steps, units)) * np.array(NOISES)[:, None, None]
    # The first input puts the network somewhere, also without noise.
    x[:, 0] = random.normal(size=units)
    layer = keras.layers.SimpleRNN(units, kernel_initializer="identity", use_bias=False, name="rnn")
    model = keras.Sequential([keras.Input((steps, units)), layer])
    weights = random.normal(size=(units, units)) / np.sqrt(units)
    meter = JacobianMeter(model, x.astype(np.float32), measures=["lyapunov"], exponents=1, warmup=steps // 5)
    exponents = []
    for gain in GAINS:
        layer.cell.recurrent_kernel.assign(gain * weights)
        exponents.append(meter()["rnn"]["lyapunov"][0])
    return np.array(exponents)


def draw(path: str, simulated: NDArray[np.float64]) -> None:
    """Draws theory and simulation over the gain."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - an extra, and only for the figure

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    fine = np.geomspace(GAINS[0], GAINS[-1], 60)
    for k, noise in enumerate(NOISES):
        (line,) = axes.plot(fine, [theory(gain, noise) for gain in fine], label=f"theory, s = {noise:g}")
        axes.plot(GAINS, simulated[:, k], "o", color=line.get_color(), label=f"SimpleRNN, s = {noise:g}")
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set(xscale="log", xlabel="gain g", ylabel="largest exponent (nats per step)")
    axes.set_xticks(GAINS, [f"{gain:g}" for gain in GAINS], minor=False)
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Prints the table, and asserts that simulation and theory agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a smaller network, fewer steps")
    parser.add_argument("--figure", metavar="FILE", help="draw into this file")
    arguments = parser.parse_args()
    units, steps, near, far = (256, 200, 0.1, 0.1) if arguments.fast else (512, 1000, 0.03, 0.05)
    simulated = simulate(units, steps)
    print(f"{units} units, {steps} steps\n\n| g | s | known | theory | measured | difference |\n" + "| --- " * 6 + "|")
    for k, noise in enumerate(NOISES):
        for gain, value in zip(GAINS, simulated[:, k], strict=True):
            expected, known = theory(gain, noise), KNOWN.get((gain, noise))
            shown = "" if known is None else f"{known:.4f}"
            print(f"| {gain} | {noise} | {shown} | {expected:.4f} | {value:.4f} | {value - expected:+.4f} |")
            assert known is None or abs(known - expected) < 1e-4, "the formula is solved wrongly"
            assert abs(value - expected) < (far if known is None else near), "the network is not that of the theory"
    if arguments.figure:
        draw(arguments.figure, simulated)


if __name__ == "__main__":
    main()
