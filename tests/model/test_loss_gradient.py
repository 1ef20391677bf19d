"""How the loss feels each step, against a loop over the cell with zeros added to its states, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import BareStateCell

from keras_jacmon import JacobianMeter, JacobianMonitor, measure

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

TIME, SAMPLES, FEATURES = 6, 3, 2
RNG = np.random.default_rng(0)
# In the precision of Keras' inputs and targets.
PROBE = RNG.normal(size=(SAMPLES, TIME, FEATURES)).astype("float32")
LAST = RNG.normal(size=(SAMPLES, 4)).astype("float32")
EACH = RNG.normal(size=(SAMPLES, TIME, 4)).astype("float32")


def compiled(*layers: keras.Layer) -> keras.Model:
    model = keras.Sequential([keras.Input((TIME, FEATURES)), *layers])
    model.compile("sgd", keras.losses.MeanSquaredError(dtype=layers[-1].dtype))
    return model


def by_hand(layer: Any, probe: NDArray[Any], targets: NDArray[Any], mask: NDArray[np.bool_] | None = None) -> Any:
    """`‖dL/dh_t‖ * samples` of a mean squared error of the outputs of the only layer, `(time, samples)`."""
    cell, time = layer.cell, probe.shape[1]
    mask = np.ones(probe.shape[:2], bool) if mask is None else mask
    states = keras.tree.flatten(layer.get_initial_state(batch_size=probe.shape[0]))
    units = int(states[0].shape[-1])
    zeros = [tf.zeros([probe.shape[0], units], tf.float64) for _ in range(time)]
    outputs: dict[int, Any] = {}
    with tf.GradientTape() as tape:
        tape.watch(zeros)
        previous = tf.zeros([probe.shape[0], units], tf.float64)
        for t in range(time)[:: -1 if layer.go_backwards else 1]:
            _, new = cell(tf.constant(probe[:, t], tf.float64), states)
            first, *others = keras.tree.flatten(new)
            moved = [first + zeros[t], *others]
            here = tf.constant(mask[:, t])[:, None]
            states = [tf.where(here, m, s) for m, s in zip(moved, states, strict=True)]
            previous = outputs[t] = tf.where(here, moved[0], previous)
        order = sorted(outputs, reverse=layer.go_backwards)
        found = tf.stack([outputs[t] for t in order], axis=1) if layer.return_sequences else previous
        loss = tf.reduce_mean((found - targets) ** 2)
    gradients = tape.gradient(loss, zeros, unconnected_gradients="zero")
    return np.where(mask.T, np.stack([tf.norm(g, axis=-1).numpy() for g in gradients]) * probe.shape[0], np.nan)


LAYERS: dict[str, Callable[..., Any]] = {
    "lstm": lambda **kwargs: keras.layers.LSTM(4, dtype="float64", **kwargs),
    "gru": lambda **kwargs: keras.layers.GRU(4, reset_after=False, dtype="float64", **kwargs),
    "simple_rnn": lambda **kwargs: keras.layers.SimpleRNN(4, dtype="float64", **kwargs),
    "rnn": lambda **kwargs: keras.layers.RNN(BareStateCell(4, dtype="float64"), dtype="float64", **kwargs),
}


@pytest.mark.parametrize(
    ("name", "sequences"),
    [("lstm", True), ("simple_rnn", True), ("rnn", False), pytest.param("gru", False, marks=pytest.mark.soak)],
)
def test_it_is_the_gradient_of_a_loop_with_zeros_added_to_the_states(name: str, *, sequences: bool) -> None:
    layer = LAYERS[name](return_sequences=sequences, name="layer")
    targets = EACH if sequences else LAST
    report = measure(compiled(layer), PROBE, measures="variance", targets=targets)
    np.testing.assert_allclose(report["layer"]["loss_gradient"], by_hand(layer, PROBE, targets), rtol=1e-10)


@pytest.mark.parametrize(
    "options", [{"go_backwards": True}, pytest.param({"unroll": True}, marks=pytest.mark.soak)], ids=str
)
def test_it_is_in_the_order_of_the_input(options: dict[str, bool]) -> None:
    layer = LAYERS["lstm"](return_sequences=True, name="layer", **options)
    report = measure(compiled(layer), PROBE, measures="variance", targets=EACH)
    np.testing.assert_allclose(report["layer"]["loss_gradient"], by_hand(layer, PROBE, EACH), rtol=1e-10)


@pytest.mark.parametrize("name", [pytest.param("lstm", marks=pytest.mark.soak), "gru"])
def test_masked_steps_are_nan_and_skipped(name: str) -> None:
    probe = PROBE.copy()
    mask = np.ones((SAMPLES, TIME), bool)
    mask[0, 4:] = mask[1, :2] = False
    probe[~mask] = 0
    layer = LAYERS[name](name="layer")
    report = measure(compiled(keras.layers.Masking(dtype="float64"), layer), probe, measures="variance", targets=LAST)
    found = report["layer"]["loss_gradient"]
    np.testing.assert_array_equal(np.isnan(found), ~mask.T)
    np.testing.assert_allclose(found, by_hand(layer, probe, LAST, mask), rtol=1e-10)


def test_in_a_stack_the_lower_layer_is_felt_through_the_upper_one() -> None:
    lower = LAYERS["simple_rnn"](return_sequences=True, name="lower")
    upper = LAYERS["simple_rnn"](name="upper")
    report = measure(compiled(lower, upper), PROBE, measures="variance", targets=LAST)
    kernels = [layer.cell.recurrent_kernel.numpy() for layer in (lower, upper)]
    inputs, bias = ([getattr(layer.cell, name).numpy() for layer in (lower, upper)] for name in ("kernel", "bias"))
    h = np.zeros((2, SAMPLES, 4))
    slopes = []
    for t in range(TIME):
        h[0] = np.tanh(PROBE[:, t] @ inputs[0] + bias[0] + h[0] @ kernels[0])
        h[1] = np.tanh(h[0] @ inputs[1] + bias[1] + h[1] @ kernels[1])
        slopes.append(1 - h**2)
    expected = np.empty((2, TIME, SAMPLES))
    below, above = np.zeros((SAMPLES, 4)), 2 * (h[1] - LAST) / LAST.size * SAMPLES
    for t in reversed(range(TIME)):
        below = below + (above * slopes[t][1]) @ inputs[1].T
        expected[:, t] = np.linalg.norm(below, axis=-1), np.linalg.norm(above, axis=-1)
        below, above = (below * slopes[t][0]) @ kernels[0].T, (above * slopes[t][1]) @ kernels[1].T
    np.testing.assert_allclose(report["lower"]["loss_gradient"], expected[0], rtol=1e-10)
    np.testing.assert_allclose(report["upper"]["loss_gradient"], expected[1], rtol=1e-10)


def test_a_contracting_layer_falls_by_its_factor_toward_the_beginning() -> None:
    layer = keras.layers.SimpleRNN(4, activation="linear", name="layer")
    model = compiled(layer)
    layer.cell.recurrent_kernel.assign(0.5 * np.eye(4))
    report = measure(model, PROBE, measures="variance", targets=LAST)
    found = report["layer"]["loss_gradient"]
    np.testing.assert_allclose(found[1:] / found[:-1], 2, rtol=1e-5)
    head = f"{np.mean(found[0]):.4g}"
    assert head in str(report), "the least step is in the table"


def test_every_way_of_calling_a_layer() -> None:
    x = keras.Input((TIME, FEATURES))
    encoder = keras.layers.LSTM(4, return_state=True, name="encoder")
    encoded, *states = encoder(x)
    decoder = keras.layers.LSTM(4, return_sequences=True, name="decoder")
    twice = keras.layers.SimpleRNN(4, return_sequences=True, name="twice")
    both = keras.layers.Bidirectional(keras.layers.SimpleRNN(4, name="rnn"), name="both")
    stack = keras.layers.RNN([keras.layers.LSTMCell(3), keras.layers.SimpleRNNCell(4)], name="stack")
    decoded = twice(twice(decoder(x, initial_state=states)))
    model = keras.Model(x, [both(decoded), stack(decoded), encoded])
    model.compile("sgd", loss=["mse"] * 3)
    targets = [RNG.normal(size=(SAMPLES, n)) for n in (8, 4, 4)]
    report = measure(model, PROBE, measures="variance", targets=targets)
    assert set(report) == {
        "encoder", "decoder", "twice", "twice:1", "both/forward_rnn", "both/backward_rnn", "stack",
    }  # fmt: skip
    for name in report:
        found = report[name]["loss_gradient"]
        assert found.shape == (TIME, SAMPLES), name
        assert (found > 0).all(), name
    # A loss of several outputs has metrics of its own; they are as they would be without us.
    model.evaluate(PROBE, targets, verbose=0)


def test_a_state_that_no_later_loss_depends_on_is_not_felt() -> None:
    first = keras.layers.Lambda(lambda outputs: outputs[:, 2])
    layer = keras.layers.SimpleRNN(4, return_sequences=True, name="layer")
    found = measure(compiled(layer, first), PROBE, measures="variance", targets=LAST)["layer"]["loss_gradient"]
    assert (found[:3] > 0).all()
    assert (found[3:] == 0).all()


def test_activity_regularizers_count_and_weights_do_not() -> None:
    def found(**kwargs: Any) -> NDArray[Any]:
        keras.utils.set_random_seed(0)
        layer = keras.layers.LSTM(4, name="layer", **kwargs)
        return measure(compiled(layer), PROBE, measures="variance", targets=LAST)["layer"]["loss_gradient"]

    plain = found()
    np.testing.assert_array_equal(found(kernel_regularizer=keras.regularizers.L2(1.0)), plain)
    assert (found(activity_regularizer=keras.regularizers.L2(1.0)) != plain).all()


def test_the_monitor_logs_it_and_the_training_stays_as_it_is() -> None:
    def train(*callbacks: keras.callbacks.Callback) -> tuple[list[Any], dict[str, Any]]:
        keras.utils.set_random_seed(1)
        model = compiled(
            keras.layers.SimpleRNN(4, dropout=0.3, recurrent_dropout=0.3, activity_regularizer="l2", name="rnn"),
            keras.layers.Dense(4),
        )
        model.compile("sgd", "mse", metrics=["mae"])
        history = model.fit(PROBE, LAST, epochs=3, batch_size=2, verbose=0, callbacks=[*callbacks])
        return [v.numpy() for v in (*model.variables, *model.optimizer.variables)], history.history

    monitor = JacobianMonitor(PROBE, targets=LAST, measures="variance", log_dir=None, update_freq=1, logs="all")
    plain, plain_history = train()
    weights, history = train(monitor)
    for one, other in zip(plain, weights, strict=True):
        np.testing.assert_array_equal(one, other)
    assert {key: history[key] for key in plain_history} == plain_history
    assert len(history["rnn_jac_loss_gradient"]) == 3
    assert not monitor.failures
    last = monitor.reports[-1][1]["rnn"]
    assert history["rnn_jac_loss_gradient"][-1] == last.mean("loss_gradient")


def test_a_model_compiled_anew_is_measured_with_its_new_loss() -> None:
    model = compiled(keras.layers.SimpleRNN(4, name="rnn"))
    monitor = JacobianMonitor(PROBE, targets=LAST, measures="variance", log_dir=None)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(PROBE, LAST, verbose=0, callbacks=[monitor])
    before = monitor.reports[-1][1]["rnn"]["loss_gradient"]
    model.compile(keras.optimizers.SGD(0.0), "mse", loss_weights=3.0)
    model.fit(PROBE, LAST, verbose=0, callbacks=[monitor])
    np.testing.assert_allclose(monitor.reports[-1][1]["rnn"]["loss_gradient"], 3 * before, rtol=1e-5)


def test_without_targets_there_is_none() -> None:
    report = measure(compiled(keras.layers.SimpleRNN(4, name="rnn")), PROBE, measures="variance")
    assert "loss_gradient" not in report["rnn"].values


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (LAST[:2], "Expected one target for each of the 3 samples of the probe. Received: targets of \\[2\\] samples"),
        (["a", "b", "c"], "Expected arrays of numbers"),
        (LAST[:, :3], "Expected targets that the loss of the model takes. Received: shapes \\(3, 3\\)"),
        ([], "Expected one target for each of the 3 samples"),
    ],
)
def test_targets_that_do_not_fit_are_refused(targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"Invalid value for argument `targets`. {message}"):
        JacobianMeter(compiled(keras.layers.SimpleRNN(4)), PROBE, targets=targets)


def test_a_model_without_a_loss_is_refused() -> None:
    model = keras.Sequential([keras.Input((TIME, FEATURES)), keras.layers.SimpleRNN(4)])
    with pytest.raises(ValueError, match="Expected None for a model that is not compiled"):
        measure(model, PROBE, targets=LAST)


def test_it_cannot_be_asked_for_by_name() -> None:
    with pytest.raises(ValueError, match="Invalid value for argument `measures`"):
        measure(compiled(keras.layers.SimpleRNN(4)), PROBE, measures="loss_gradient")


def test_half_precision_does_not_make_it_zero() -> None:
    def found(policy: str) -> NDArray[Any]:
        keras.utils.set_random_seed(0)
        layer = keras.layers.SimpleRNN(4, name="layer", dtype=policy)
        report = measure(compiled(layer, keras.layers.Dense(4)), PROBE, measures="variance", targets=LAST)
        gradient: NDArray[Any] = report["layer"]["loss_gradient"]
        return gradient

    np.testing.assert_allclose(found("mixed_float16"), found("float32"), rtol=0.02)
