"""Whole models drawn at random: their values are those of a plain tape loop, and watching them changes no training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from drawn_models import HALF, DrawnModel, models, recurrent_layers, visits
from draws import DRAWS, each_part_but, for_each_draw
from helpers import MOMENTS, normal, randomize, reference_jacobians, reference_values, rms_singular_value
from hypothesis import strategies as st

from keras_jacmon import JacobianMonitor, measure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

# The spectral norm takes long to trace.
KEYS = st.sampled_from([MOMENTS] * 10 + [("spectral_norm",), ("joint/spectral_norm",)])
TOLERANCE = 1e-3

pytestmark = [
    # A drawn state may depend on no old one. What is left out of the report for that, and why, is tested here.
    pytest.mark.filterwarnings("ignore:Layer `.*`. (new|old) state"),
    pytest.mark.filterwarnings("ignore:Layer `.*` skips all steps of the probe"),
    pytest.mark.filterwarnings("ignore:Layer `.*`. a mask reached the layer below and not this one"),
    # Keras of models inside of models, through which masks get all the same, and of a softmax over one unit.
    pytest.mark.filterwarnings("ignore:(?s).*does not support masking"),
    pytest.mark.filterwarnings("ignore:(?s).*using a softmax over axis"),
]


# Values --------------------------------------------------------------------------------------------------------------


def assert_values(drawn: DrawnModel, keys: tuple[str, ...]) -> None:
    keras.utils.set_random_seed(1)
    model, probe = drawn.make(), drawn.inputs(seed=1)
    # Builds it, and moves the states of stateful layers away from zero.
    model(drawn.inputs(seed=2))
    randomize(model)
    report = measure(model, probe, measures=keys, tolerance=TOLERANCE, max_rows=None)
    exact = model
    if any(piece.dtype in HALF for piece in drawn.pieces):
        exact = drawn.make(widened=True)
        exact(probe)
        exact.set_weights(model.get_weights())
    layers, calls = recurrent_layers(exact), visits(model, probe)
    for actual, call in zip(report.layers.values(), calls, strict=True):
        layer = layers[call.position]
        assert_close(actual, reference_jacobians(layer, call.inputs, states=call.states, mask=call.mask), keys)


def assert_close(actual: Any, jacobians: Mapping[str, NDArray[Any]], keys: tuple[str, ...]) -> None:
    if "joint" not in jacobians:
        keys = tuple(dict.fromkeys(key.removeprefix("joint/") for key in keys))
    expected = reference_values(jacobians, keys)
    assert set(actual.values) <= set(expected)
    for key, value in expected.items():
        J = jacobians["joint" if key.startswith("joint/") else "hidden"]
        np.testing.assert_array_equal(actual.mask, ~np.isnan(value), strict=True)
        if key not in actual.values:
            # No gradient connects the states of this view, and the report says so.
            assert actual.notes
            np.testing.assert_array_equal(J[actual.mask], 0.0)
            continue
        # What an error of 1e-6 in the entries of J, relative to the largest ones, makes of a measure. Where an entry is
        # a sum whose terms nearly cancel, that is the size of the terms: slopes below one, times weights of that order.
        gain = rms_singular_value(J)
        scale = max(0.5, np.nanmax(gain, initial=0.0))
        slack = 1e-6 * scale + (TOLERANCE if "spectral_norm" in key else 1e-4) * value
        if "variance" in key:
            slack = 2e-6 * gain * scale + 1e-6 * scale**2 + 1e-4 * value
        right = np.abs(actual[key] - value)[actual.mask] <= slack[actual.mask]
        assert np.all(right), f"{key}: {actual[key]}, expected {value}"


# One that has half precision in it: a layer must receive what it receives in the model, to the last digit.
@each_part_but(6)
def test_values_are_those_of_the_loop(part: int) -> None:
    for_each_draw(part, DRAWS, assert_values, models(), KEYS)


# Trainings -----------------------------------------------------------------------------------------------------------


def train(drawn: DrawnModel, *callbacks: Any) -> dict[str, NDArray[Any]]:
    """What a training leaves behind."""
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(1)
    model, x, batch = drawn.make(), drawn.inputs(seed=1, batches=3), len(drawn.mask)
    y = normal(*model(x[:batch]).shape, seed=2)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    history = model.fit(x, np.tile(y, (3, *[1] * (y.ndim - 1))), batch_size=batch, verbose=0, callbacks=list(callbacks))
    layers = model._flatten_layers()
    attributes = [value for layer in layers for value in vars(layer).values()]
    left = {
        "weights": model.variables,
        "optimizer": model.optimizer.variables,
        "states": [layer.states for layer in recurrent_layers(model) if layer.stateful],
        "counters": [value for value in attributes if isinstance(value, tf.Variable)],
        "generators": [value.state for value in attributes if isinstance(value, keras.random.SeedGenerator)],
        "history": history.history["loss"],
        "random": [keras.random.uniform(()), tf.random.uniform(())],
    }
    return {
        f"{kind} {k}": keras.ops.convert_to_numpy(value)
        for kind, values in left.items()
        for k, value in enumerate(keras.tree.flatten(values))
    }


def assert_same_training(drawn: DrawnModel) -> None:
    options: dict[str, Any] = {"measures": ["variance"], "update_freq": "batch", "on_error": "raise"}
    monitor = JacobianMonitor(drawn.inputs(seed=3), log_dir=None, **options)
    watched, alone = train(drawn, monitor), train(drawn)
    assert len(monitor.reports) == 4
    assert list(watched) == list(alone)
    for name, value in alone.items():
        np.testing.assert_array_equal(watched[name], value, err_msg=name, strict=True)


# Keras of states that no gradient reaches, with and without a monitor.
@pytest.mark.filterwarnings("ignore:(?s)Gradients do not exist for variables")
# A part with a model of one layer each: training a stack that is called twice takes half a minute.
@each_part_but(4)
def test_watching_changes_no_training(part: int) -> None:
    for_each_draw(part, 2 * DRAWS // 5, assert_same_training, models())
