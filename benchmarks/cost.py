"""What one measurement costs, in forward passes of the layer and against a Jacobian at every step.

Prints ratios of medians taken in one process: `meter()` over a forward pass of the layer, the loop over
`GradientTape.batch_jacobian` over the same forward pass, and the loop over the meter. All three are compiled with
`tf.function` and warm. Run it with

    python benchmarks/cost.py
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import keras
import numpy as np
import tensorflow as tf

from keras_jacmon import JacobianMeter

BATCH, STEPS, FEATURES = 32, 50, 64
LAYERS = {"SimpleRNN": keras.layers.SimpleRNN, "GRU": keras.layers.GRU, "LSTM": keras.layers.LSTM}
MEASURES = {"all": None, "variance": ["variance"]}


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Returns the median time of a call, after one that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def jacobian_loop(layer: keras.layers.RNN) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns a function of the inputs: the hidden variance at each step, by the tape alone."""
    units = layer.units

    @tf.function
    def variances(inputs: tf.Tensor) -> tf.Tensor:
        states = layer.cell.get_initial_state(BATCH)
        values = tf.TensorArray(tf.float32, STEPS)
        for step in tf.range(STEPS):
            h = states[0]
            with tf.GradientTape() as tape:
                tape.watch(h)
                _, new = layer.cell(inputs[:, step], [h, *states[1:]], training=False)
            J = tape.batch_jacobian(new[0], h)
            values = values.write(step, tf.math.reduce_variance(J, axis=(1, 2)) * units)
            states = new
        return values.stack()

    return variances


def main() -> None:
    """Prints a markdown table."""
    keras.utils.set_random_seed(0)
    probe = tf.constant(np.random.default_rng(0).normal(size=(BATCH, STEPS, FEATURES)), tf.float32)
    print(f"{BATCH} samples, {STEPS} steps, {FEATURES} features; medians\n")
    print("| layer | units | measures | forward pass | meter / forward | loop / forward | loop / meter |")
    print("|---|---|---|---|---|---|---|")
    for name, make in LAYERS.items():
        for units in (64, 128):
            layer = make(units)
            model = keras.Sequential([keras.Input((STEPS, FEATURES)), layer])
            forward = median_seconds(partial(tf.function(partial(layer, training=False)), probe), 15)
            loop = median_seconds(partial(jacobian_loop(layer), probe), 3)
            for label, measures in MEASURES.items():
                meter = median_seconds(JacobianMeter(model, probe, measures=measures), 5)
                print(
                    f"| {name} | {units} | {label} | {forward * 1e3:.1f} ms "
                    f"| {meter / forward:.1f} | {loop / forward:.1f} | {loop / meter:.1f} |"
                )


if __name__ == "__main__":
    main()
