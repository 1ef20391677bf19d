"""Sensitivity to the recurrent weights: against a plain loop with a tape, finite differences and published formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import BATCH, BY_ID, FEATURES, WeightedCell, build, normal
from sequences import in_graph

from keras_jacmon import JacobianMeter, Report, measure
from keras_jacmon.cell.step import CellStep
from keras_jacmon.jacobians.cell_jacobian import Assumptions, CellJacobian
from keras_jacmon.jacobians.recurrent_weights import RecurrentWeights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

L = keras.layers
STEPS = 6
PROBE = normal(BATCH, STEPS, FEATURES)
LENGTHS = np.array([STEPS, 4, 1])
MASK = np.arange(STEPS)[None] < LENGTHS[:, None]


class MultiplierCell(WeightedCell):
    """Its weight multiplies the state through a function, unit by unit, and a gate of the inputs does too."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        super().build(input_shape)
        self.log_time = self.add_weight(shape=(self.units,), initializer="ones", name="log_time")
        self.shift = self.add_weight(shape=(self.units,), initializer="ones", name="shift")

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        x = inputs @ tf.convert_to_tensor(self.kernel)
        new = tf.exp(-tf.exp(-tf.convert_to_tensor(self.log_time))) * states[0] + x + tf.convert_to_tensor(self.shift)
        return new, [new]


class RolledCell(WeightedCell):
    """Rolls along a negative axis, which `tf.vectorized_map` takes for the axis of the points."""

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        kernel = tf.convert_to_tensor(self.recurrent_kernel)
        new = tf.tanh(inputs @ tf.convert_to_tensor(self.kernel) + tf.roll(states[0] @ kernel, 1, axis=-1) @ kernel)
        return new, [new]


def derivatives(
    layer: Any, probe: NDArray[Any], names: Sequence[str], mask: NDArray[np.bool_], views: Sequence[str]
) -> dict[str, list[NDArray[np.float64]]]:
    """`d s_T / d θ_t` of each sample, `(taken steps, units, weights)`, for weights that are others at each step."""
    cell = layer.cell
    found: dict[str, list[NDArray[np.float64]]] = {view: [] for view in views}
    weights = [weight for weight in cell.weights if weight.name in names]
    order = range(probe.shape[1])[:: -1 if layer.go_backwards else 1]
    for sample in range(len(probe)):
        taken = [step for step in order if mask[sample, step]]
        copies = [[tf.Variable(weight.value) for weight in weights] for _ in taken]
        states = layer.get_initial_state(batch_size=1)
        with tf.GradientTape(persistent=True) as tape:
            for step, own in zip(taken, copies, strict=True):
                pairs = [(weight, tf.convert_to_tensor(copy)) for weight, copy in zip(weights, own, strict=True)]
                with keras.StatelessScope(state_mapping=pairs):
                    _, states = cell(tf.constant(probe[sample : sample + 1, step]), states)
            floating = [tf.reshape(s, [-1]) for s in tf.nest.flatten(states) if s.dtype.is_floating]
            last = {"hidden": floating[0], "joint": tf.concat(floating, 0)}
        for view in views:
            each = tape.jacobian(last[view], copies, unconnected_gradients="zero", experimental_use_pfor=False)
            rows = [np.concatenate([np.reshape(part, [len(part), -1]) for part in parts], axis=1) for parts in each]
            found[view].append(np.stack(rows).astype(np.float64))
    return found


def norms_by_span(steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """The norms of the sums over the last 1, 2, ... steps."""
    return np.linalg.norm(np.cumsum(steps[::-1], axis=0), axis=(1, 2))


@pytest.mark.parametrize(
    ("case_id", "go_backwards", "max_bytes", "views", "names"),
    [
        ("lstm", True, 2**30, ["hidden", "joint"], ["recurrent_kernel"]),
        ("unequal_states", False, 3000, ["hidden"], ["recurrent_kernel", "read", "write"]),
        # No outer products.
        ("rolled", False, 2**30, ["hidden"], ["recurrent_kernel"]),
        pytest.param("multiplier", False, 3000, ["hidden"], ["log_time"], marks=pytest.mark.soak),
        pytest.param("gru_reset_before", False, 2**30, ["hidden"], ["recurrent_kernel"], marks=pytest.mark.soak),
        # Point by point.
        pytest.param("while_loop", False, 2**30, ["hidden"], ["kernel", "recurrent_kernel"], marks=pytest.mark.soak),
    ],
)
def test_it_is_that_of_a_loop_with_a_tape_at_every_span(
    case_id: str,
    go_backwards: bool,  # noqa: FBT001 - pytest passes it by name
    max_bytes: int,
    views: list[str],
    names: list[str],
) -> None:
    own = {"multiplier": MultiplierCell, "rolled": RolledCell}
    settings = {"go_backwards": go_backwards}
    layer = L.RNN(own[case_id](), **settings) if case_id in own else BY_ID[case_id].make(**settings)
    inputs = keras.Input((STEPS, FEATURES))
    model = build(keras.Model(inputs, layer(L.Masking()(inputs))), PROBE)
    probe = PROBE * MASK[..., None]
    keys = {"hidden": "sensitivity", "joint": "joint/sensitivity"}
    # With as many vectors as units it is exact.
    measures = [keys[view] for view in views]
    (found,) = measure(model, probe, measures=measures, flow_vectors=100, max_bytes=max_bytes).layers.values()
    assert found.methods["sensitivity"] == f"exact, by {', '.join(f'`{name}`' for name in names)}"
    expected = derivatives(layer, probe, names, MASK, views)
    for view in views:
        for sample, length in enumerate(LENGTHS):
            spans = found[keys[view]][:, sample]
            np.testing.assert_allclose(
                spans[:length], norms_by_span(expected[view][sample]), rtol=1e-4, atol=1e-6, err_msg=view
            )
            assert np.isnan(spans[length:]).all()
    norms = np.linalg.norm(model(probe), axis=1)
    np.testing.assert_allclose(found["state_norm"], norms, rtol=1e-5)
    whole = found["sensitivity"][LENGTHS - 1, np.arange(BATCH)]
    np.testing.assert_allclose(found["relative_sensitivity"], whole / norms, rtol=1e-5)
    scalars = found.scalars()
    np.testing.assert_allclose(scalars["sensitivity"], np.sqrt(np.mean(whole**2)), rtol=1e-6)
    np.testing.assert_allclose(
        scalars["relative_sensitivity"], np.linalg.norm(whole) / np.linalg.norm(norms), rtol=1e-5
    )


def test_finite_differences_in_double_precision() -> None:
    layer, probe = L.GRU(3, dtype="float64", name="gru"), PROBE[:, :3].astype("float64")
    model = keras.Sequential([keras.Input(probe.shape[1:], dtype="float64"), layer])
    kernel = layer.cell.recurrent_kernel
    before, squares, step = kernel.numpy(), np.zeros(BATCH), 1e-5
    for place in np.ndindex(before.shape):
        lasts = []
        for sign in (1, -1):
            changed = before.copy()
            changed[place] += sign * step
            kernel.assign(changed)
            lasts.append(np.asarray(model(probe)))
        squares += np.sum(((lasts[0] - lasts[1]) / (2 * step)) ** 2, axis=1)
    kernel.assign(before)
    found = measure(model, probe, measures=["sensitivity"])["gru"]
    np.testing.assert_allclose(found["sensitivity"][-1], np.sqrt(squares), rtol=1e-8)


def scalar_model(multiplier: float, steps: int) -> Any:
    """`h' = multiplier h + x`."""
    layer = L.SimpleRNN(1, activation=None, use_bias=False, kernel_initializer="ones", name="rnn")
    model = keras.Sequential([keras.Input((steps, 1)), layer])
    layer.cell.recurrent_kernel.assign([[multiplier]])
    return model


def test_published_formulas_for_white_and_correlated_inputs() -> None:
    r, steps, samples = 0.9, 120, 5_000
    white = normal(samples, steps, 1, seed=5).astype(np.float64)
    # Autocorrelation 0.9^|Δ|, unit variance.
    correlated = white.copy()
    for t in range(1, steps):
        correlated[:, t] = 0.9 * correlated[:, t - 1] + np.sqrt(1 - 0.9**2) * white[:, t]
    probe = np.concatenate([white, correlated]).astype(np.float32)
    model = scalar_model(r, steps)
    report = measure(model, probe, measures=["sensitivity"])
    found = report["rnn"]
    halves = {0.0: slice(0, samples), 0.9: slice(samples, None)}
    for rho, half in halves.items():
        # Zucchet and Orvieto, arXiv 2405.21064.
        of_state = (1 + rho * r) / ((1 - r * rho) * (1 - r**2))
        squared = ((1 + r**2) * (1 - r**2 * rho**2) + 2 * (1 - r**2) * r * rho) / ((1 - r**2) ** 3 * (1 - r * rho) ** 2)
        np.testing.assert_allclose(np.mean(found["state_norm"][half] ** 2), of_state, rtol=0.08)
        np.testing.assert_allclose(np.mean(found["sensitivity"][-1, half] ** 2), squared, rtol=0.08)
    assert "sensitivity" not in found.uncertainties


def test_a_long_memory_is_stable_and_sensitive_and_the_verdict_says_so(tmp_path: Any) -> None:
    model, probe = scalar_model(0.9995, 600), normal(64, 600, 1, seed=6)
    meter = JacobianMeter(model, probe, measures=["sensitivity", "flow"])
    report = meter()
    report.save(tmp_path / "report.npz")
    for known in (report, Report.load(tmp_path / "report.npz")):
        verdict = known.verdict["rnn"]
        assert (verdict.state, verdict.is_sensitive) == ("stable", True)
        # Of a sum of white noise with shares near one: T / sqrt(3).
        assert verdict.sensitivity == pytest.approx(600 / np.sqrt(3), rel=0.3)
        assert verdict.sensitivity == pytest.approx(0.9995 * known["rnn"].scalars()["relative_sensitivity"], rel=1e-5)
        assert str(verdict).startswith("stable, but sensitive to the recurrent weights: -0.0005 nats per step")
        assert "train the recurrent weights with a smaller learning rate" in str(known)
        assert not known.judge(rise=1000.0)["rnn"].is_sensitive
    assert report.scalars()["rnn_jac_sensitivity"] == report["rnn"].scalars()["sensitivity"]
    # With a short memory the same layer is not sensitive; nor is one that forgets within the probe called so.
    for multiplier, state in ((0.9925, "stable"), (0.98, "vanishing")):
        model.layers[0].cell.recurrent_kernel.assign([[multiplier]])
        verdict = meter().verdict["rnn"]
        assert (verdict.state, verdict.is_sensitive) == (state, False)
    assert verdict.sensitivity == pytest.approx(1 / np.sqrt(2) / 0.02, rel=0.3)


def test_random_vectors_have_a_standard_error_in_the_report() -> None:
    model = keras.Sequential([keras.Input((STEPS, FEATURES)), L.SimpleRNN(12, name="rnn")])
    exact = measure(model, PROBE, measures=["sensitivity"], flow_vectors=12)["rnn"]
    found = measure(model, PROBE, measures=["sensitivity"], flow_vectors=4)["rnn"]
    assert found.methods["sensitivity"] == "4 random vectors, by `recurrent_kernel`"
    assert {"sensitivity", "relative_sensitivity"} == found.estimated
    for key in found.estimated:
        assert (np.abs(found[key] - exact[key]) < 4 * found.uncertainties[key]).all()
        assert abs(found.scalars()[key] - exact.scalars()[key]) < 4 * found.standard_error(key)
        assert exact.standard_error(key) == 0
    shown = f"root mean square, ± {found.standard_error('sensitivity'):.2g}, 4 random vectors, by `recurrent_kernel`"
    assert shown in str(Report({"rnn": found}))


@pytest.mark.parametrize(
    ("case_id", "reason"),
    [
        ("plain_object", "the cell has no weights of Keras that could be read"),
        ("tf_function", "the step chooses between branches by values"),
    ],
)
def test_where_it_cannot_be_measured_a_note_says_why(case_id: str, reason: str) -> None:
    model = build(keras.Sequential([keras.Input((STEPS, FEATURES)), BY_ID[case_id].make(name="rnn")]), PROBE)
    with pytest.warns(UserWarning, match=reason):
        found = measure(model, PROBE, measures=["variance", "sensitivity"])["rnn"]
    assert list(found) == ["variance"]
    assert found.notes[-1] == f"the sensitivity is left out: {reason}"


@pytest.mark.fast
def test_the_recurrent_weights_are_the_same_without_trust_in_the_structure() -> None:
    cell = L.GRUCell(3)
    cell.build((None, FEATURES))

    def found(*, structure: bool) -> tf.Tensor:
        x, states = tf.zeros((BATCH, FEATURES)), [tf.zeros((BATCH, 3))]
        jacobian = CellJacobian(CellStep(cell, states), x, states, Assumptions(structure=structure))
        weights = RecurrentWeights.of(jacobian.step, jacobian.graph())
        assert weights.names == ("recurrent_kernel",)
        return tf.constant(len(weights.products))

    assert in_graph(lambda: [found(structure=True), found(structure=False)]) == [1, 1]


def test_a_single_sample() -> None:
    layer, probe = L.RNN(RolledCell(4), name="rnn"), PROBE[:1]
    model = build(keras.Sequential([keras.Input((STEPS, FEATURES)), layer]), probe)
    alone = measure(model, probe, measures=["sensitivity"], flow_vectors=100)["rnn"]["sensitivity"]
    (steps,) = derivatives(layer, probe, ["recurrent_kernel"], np.ones((1, STEPS), bool), ["hidden"])["hidden"]
    np.testing.assert_allclose(alone[:, 0], norms_by_span(steps), rtol=1e-4)
