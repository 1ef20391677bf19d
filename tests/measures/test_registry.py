"""What the registry promises: methods in words, memory of measures that form J, and what can be held."""

from __future__ import annotations

from collections import Counter
from typing import Any

import keras
import numpy as np
import pytest
from helpers import normal, reference_jacobians, soak_but
from watched_points import WatchedCell, watched_points

from keras_jacmon import JacobianRegularizer, Report, measure
from keras_jacmon.measures.differentiable import DIFFERENTIABLE
from keras_jacmon.measures.differentiable_over_time import DIFFERENTIABLE_OVER_TIME
from keras_jacmon.measures.kinds import Spectrum
from keras_jacmon.measures.registry import MEASURES
from keras_jacmon.options import Options

PROBE = normal(3, 6, 2, seed=11)


def model_of(*layers: Any, steps: int = 6) -> Any:
    keras.utils.set_random_seed(4)
    return keras.Sequential([keras.Input((steps, 2)), *layers])


def test_what_can_be_held_is_what_has_a_derivative() -> None:
    held = {*DIFFERENTIABLE, *DIFFERENTIABLE_OVER_TIME}
    assert {name for name, measure in MEASURES.items() if measure.differentiable} == held
    for name in MEASURES:
        if name in held:
            JacobianRegularizer(measure=name)
        else:
            with pytest.raises(ValueError, match=r"variance.*rms_singular_value.*spectral_norm"):
                JacobianRegularizer(measure=name)


def test_the_report_says_how_each_measure_is_found(tmp_path: Any) -> None:
    model = model_of(keras.layers.SimpleRNN(9, name="rnn"))
    report = measure(model, PROBE, measures="full", warmup=2, exponents=3)
    layer, methods = report["rnn"], report["rnn"].methods
    assert set(methods) == {*layer.values, *layer.sequences, *layer.spectra}
    for key in ("variance", "eigenvalues", "spectral_radius", "spectral_norm"):
        assert methods[key] == "exact"
    assert MEASURES["spectral_norm"].how(Options(), 33, uncertain=True) == "Golub-Kahan-Lanczos, to 0.01"
    assert methods["flow"] == methods["growth"] == "3 random vectors"
    assert methods["lyapunov"] == "3 of 9 directions, QR every step, warm-up 2 steps"
    report.save(tmp_path / "report.npz")
    assert Report.load(tmp_path / "report.npz")["rnn"].methods == methods
    assert "3 of 9 directions, QR every step, warm-up 2 steps" in str(report)


def test_a_tolerance_that_was_not_reached_is_counted() -> None:
    model = model_of(keras.layers.SimpleRNN(33, name="rnn"))
    # To rounding nothing converges.
    (layer,) = measure(model, PROBE, measures=["spectral_norm"], tolerance=0.0).layers.values()
    assert layer.methods["spectral_norm"].startswith("Golub-Kahan-Lanczos, to 0, not reached by ")
    assert layer.methods["spectral_norm"].endswith(" of 18")


def test_the_inputs_have_a_radius_where_they_are_as_many_as_the_units() -> None:
    below, above = (keras.layers.SimpleRNN(4, return_sequences=True, name=name) for name in ("below", "above"))
    report = measure(model_of(below, above), PROBE, measures=["variance", "inputs/spectral_radius"], max_rows=None)
    J = reference_jacobians(above, below(PROBE).numpy(), by_inputs=True)["inputs"]
    expected = np.abs(np.linalg.eigvals(J)).max(axis=-1)
    np.testing.assert_allclose(report["above"]["inputs/spectral_radius"], expected, rtol=1e-4)
    assert list(report["below"]) == ["variance"]


def test_the_inputs_view_of_the_spectrum_is_that_of_lapack() -> None:
    layer = keras.layers.LSTM(4, return_sequences=True, name="lstm")
    found = measure(model_of(layer), PROBE, measures=["inputs/singular_values"], spectra=1000)["lstm"]
    expected = np.linalg.svd(reference_jacobians(layer, PROBE, by_inputs=True)["inputs"], compute_uv=False)
    places = tuple(found.spectra_at.T)
    np.testing.assert_allclose(found["inputs/singular_values"], expected[places], rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    soak_but(
        {"spectral_radius", "eigenvalues"}, ["spectral_radius", "condition_number", "singular_values", "eigenvalues"]
    ),
)
def test_max_bytes_bounds_what_is_formed(name: str) -> None:
    model = model_of(keras.layers.RNN(WatchedCell(64), name="rnn"))

    def measured(max_bytes: int) -> tuple[Any, Counter[int]]:
        """The values, and how often the Jacobians of so many points were formed."""
        with watched_points() as seen:
            values = measure(model, PROBE, measures=[name], max_bytes=max_bytes)["rnn"][name]
        # The checks take all points, and those of one step.
        return values, Counter(map(len, seen)) - Counter([18, 3])

    # Ten copies of three matrices of 64 x 64, in a share of a third, and a little for the cell.
    values, at_once = measured(2**30)
    chunked, by_chunk = measured(3 * 3 * 11 * 64**2 * 4)
    np.testing.assert_allclose(chunked, values, rtol=1e-3)
    # Spectra are taken one by one, of 16 points.
    one_by_one = isinstance(MEASURES[name].kind, Spectrum)
    assert at_once == ({1: 16} if one_by_one else {18: 1})
    assert by_chunk == ({1: 16} if one_by_one else {3: 6})


@pytest.mark.parametrize("masked", [True, False])
def test_exponents_without_a_step_after_the_warm_up_are_a_note(masked: bool) -> None:  # noqa: FBT001 - pytest passes it by name
    probe = PROBE * (np.arange(6) < np.array([6, 2, 0])[:, None])[..., None] if masked else PROBE
    layer = keras.layers.SimpleRNN(6, name="rnn")
    inputs = keras.Input(probe.shape[1:])
    model = keras.Model(inputs, layer(keras.layers.Masking()(inputs)))
    warmup = 2 if masked else 6
    report = measure(model, probe, measures=["lyapunov", "kaplan_yorke"], warmup=warmup)["rnn"]
    # The sample without any step is told of elsewhere.
    who, why = f"{1 if masked else 3} of 3 samples", f"the warm-up of {warmup} steps leaves them no step"
    (note,) = [note for note in report.notes if "warm-up" in note]
    assert note == f"`lyapunov` and `kaplan_yorke` of {who} are NaN: {why}"
    assert np.isnan(report["lyapunov"]).any(axis=0).sum() == (2 if masked else 3)
    report = measure(model, probe, measures=["lyapunov"], warmup=1)["rnn"]
    assert not any("warm-up" in note for note in report.notes)


def test_a_dimension_that_too_few_exponents_leave_open_is_a_note() -> None:
    layer = keras.layers.SimpleRNN(6, activation="linear", name="rnn")
    model = model_of(layer)
    layer.cell.recurrent_kernel.assign(np.diag([2.0, 1.5, 1.2, 0.9, 0.1, 0.01]))
    report = measure(model, PROBE, measures=["kaplan_yorke"], exponents=2, warmup=0)["rnn"]
    assert np.isnan(report["kaplan_yorke"]).all()
    (note,) = report.notes
    assert note == (
        "`kaplan_yorke` is NaN, and not in its mean, for 3 of 3 samples: their 2 largest exponents do not decide it; "
        "`exponents=6` would"
    )
    report = measure(model, PROBE, measures=["kaplan_yorke"], exponents=6, warmup=0)["rnn"]
    assert not report.notes
    assert np.isfinite(report["kaplan_yorke"]).all()
