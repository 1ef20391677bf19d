"""Estimates of moments, of cells without a structure."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from helpers import (
    BATCH,
    BY_ID,
    FEATURES,
    MEASURES,
    MOMENTS,
    STEPS,
    BareStateCell,
    assert_layer,
    make_model,
    normal,
    reference_jacobians,
    sequential,
    variance,
)

from keras_jacmon import JacobianMeter, measure
from keras_jacmon.measurement.chunks import PointSource, measure_points
from keras_jacmon.measures.context import MeasureContext
from keras_jacmon.measures.selection import KEYS
from keras_jacmon.options import Options

L = keras.layers
PROBE = normal(BATCH, STEPS, FEATURES, seed=3)


def test_moments_are_exact_up_to_max_entries() -> None:
    model, layer = make_model(BY_ID["bare_state"], PROBE)
    entries = STEPS * BATCH * 4 * 4
    exact = measure(model, PROBE, measures=[*MEASURES, "flow"], max_entries=entries)[layer.name]
    assert exact.estimated == {"flow"}
    assert_layer(exact, layer, PROBE)
    estimate = measure(model, PROBE, measures=[*MEASURES, "flow"], max_entries=entries - 1)[layer.name]
    assert estimate.estimated == {"variance", "rms_singular_value", "flow"}
    np.testing.assert_allclose(
        estimate["spectral_norm"], MEASURES["spectral_norm"](reference_jacobians(layer, PROBE)["hidden"]), rtol=1e-2
    )


def test_each_view_is_estimated_for_itself() -> None:
    model, layer = make_model(BY_ID["partly_mixing"], PROBE)
    report = measure(model, PROBE, measures=[*MOMENTS, "joint/flow"], max_entries=STEPS * BATCH * 4 * 4)[layer.name]
    # Of the joint view, the blocks that mix units lie side by side and are twice as many entries as the hidden one.
    assert report.estimated == {"joint/variance", "joint/rms_singular_value", "joint/flow"}


def test_an_estimate_is_unbiased_and_knows_its_error() -> None:
    probe, layer = normal(4, 5, FEATURES), L.RNN(BareStateCell(16), name="rnn")
    sequential([layer], (5, FEATURES))
    J = tf.reshape(reference_jacobians(layer, probe)["hidden"], [-1, 16, 16])

    def runs_of(chunk: int) -> tuple[Any, Any]:
        source = PointSource(
            len(J),
            lambda start, stop: {"hidden": tf.linalg.LinearOperatorFullMatrix(J[start:stop])},
            lambda chosen: {"hidden": tf.linalg.LinearOperatorFullMatrix(tf.gather(J, chosen))},
            None,
        )

        @tf.function(autograph=False)
        def run(stream: Any) -> Any:
            context = MeasureContext(Options(max_entries=1), num_points=len(J), stream=stream)
            (found,) = measure_points(source, (KEYS["variance"],), context, chunk)
            return found.value, found.uncertainty

        runs = [run(tf.constant(1000 * k)) for k in range(8)]
        return np.stack([value for value, _ in runs]), np.stack([uncertainty for _, uncertainty in runs])

    values, standard_errors = runs_of(len(J))
    errors = values - variance(J.numpy())
    assert standard_errors.shape == errors.shape == (8, len(J))
    assert np.all(standard_errors > 0)
    # Points of one run may share their random vectors, runs do not.
    means = errors.mean(axis=1)
    assert abs(means.mean()) < 4 * means.std(ddof=1) / np.sqrt(len(means))
    assert 0.5 < np.sqrt(np.mean(np.square(errors / standard_errors))) < 2.0
    # The points have random vectors of their own, also where each is measured by itself.
    for found, uncertainties in ((values, standard_errors), runs_of(1)):
        claimed = np.mean(np.linalg.norm(uncertainties, axis=1) / len(J))
        spread = np.std(found.mean(axis=1), ddof=1)
        # The spread of eight draws is within these bounds but for 2 in 1000 times; without own vectors it is 4 times.
        assert 0.3 < spread / claimed < 1.9


def test_the_same_seed_gives_the_same_estimate() -> None:
    model, layer = make_model(BY_ID["bare_state"], PROBE)
    key = layer.name

    def run(seed: int) -> Any:
        return measure(model, PROBE, measures=["variance"], max_entries=1, seed=seed)[key]["variance"]

    first, again, other = run(1), run(1), run(2)
    np.testing.assert_array_equal(first, again, strict=True)
    assert np.any(first != other)
    meter = JacobianMeter(model, PROBE, measures=["variance"], max_entries=1, seed=1)
    np.testing.assert_array_equal(meter()[key]["variance"], meter()[key]["variance"], strict=True)


def test_an_estimate_does_not_depend_on_the_chunks() -> None:
    model, layer = make_model(BY_ID["bare_state"], PROBE)
    keys = ["variance", "rms_singular_value"]
    whole = measure(model, PROBE, measures=keys, max_entries=1)[layer.name]
    chunked = measure(model, PROBE, measures=keys, max_entries=1, max_bytes=200)[layer.name]
    assert chunked.estimated == whole.estimated == set(keys)
    for key in keys:
        error = np.hypot(whole.uncertainties[key], chunked.uncertainties[key])
        assert np.all(np.abs(chunked[key] - whole[key]) <= 5 * error)
