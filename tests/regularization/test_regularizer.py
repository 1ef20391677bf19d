"""`JacobianRegularizer` in a training: it takes effect, it is gone afterwards, and nonsense is refused."""

from __future__ import annotations

import contextlib
import functools
import gc
import re
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import trainings
from event_files import by_tag, read_summaries
from helpers import WeightedCell
from trainings import (
    BATCH,
    FEATURES,
    PROBE,
    SAMPLES,
    STEPS,
    AtBatch,
    CountedDense,
    X,
    Y,
    assert_equal,
    holding,
    values_of,
)

from keras_jacmon import JacobianMonitor, JacobianRegularizer, measure, register_jacobian

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray


def compiled(*layers: Any, **arguments: Any) -> Any:
    return trainings.compiled(*(layers or (keras.layers.SimpleRNN(3, name="rnn"),)), **arguments)


def fit(model: Any, *callbacks: Any, **arguments: Any) -> Any:
    keras.utils.set_random_seed(8)
    return trainings.fit(model, *callbacks, **({"epochs": 2} | arguments))


def weights_of(model: Any) -> list[NDArray[Any]]:
    return values_of(model.trainable_variables)


@functools.cache
def _made_once() -> tuple[Any, JacobianMonitor, list[NDArray[Any]]]:
    model = compiled()
    return model, holding(), values_of([*model.variables, *model.optimizer.variables])


def usual() -> tuple[Any, JacobianMonitor]:
    """A model as it was made, and a monitor that holds it. They are one for all tests, and traced once."""
    model, monitor, start = _made_once()
    for variable, value in zip([*model.variables, *model.optimizer.variables], start, strict=True):
        variable.assign(value)
    return model, monitor


def is_gone(model: Any) -> bool:
    return not model.losses and all(variable.regularizer is None for variable in model.variables)


def raising(error: type[BaseException]) -> Callable[[], None]:
    def action() -> None:
        raise error("by the test")

    return action


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("on_train_batch_begin", ValueError),
        # Of an interrupt, `test_an_interrupt_that_is_kept_is_noticed_in_the_next_training` says the same.
        pytest.param("on_train_batch_end", KeyboardInterrupt, marks=pytest.mark.soak),
        pytest.param("on_train_batch_begin", KeyboardInterrupt, marks=pytest.mark.soak),
        pytest.param("on_train_batch_end", ValueError, marks=pytest.mark.soak),
    ],
)
def test_a_callback_that_raises_leaves_nothing_behind(error: type[BaseException], where: str) -> None:
    model, monitor = usual()
    fit(model)
    without = values_of(model.variables)
    with pytest.raises(error, match="by the test"):
        fit(model, monitor, AtBatch(10, raising(error), where))
    gc.collect()
    # An interrupt is not filtered by Keras: its traceback holds on to the frame of `fit` for as long as it is kept.
    assert is_gone(model) or error is KeyboardInterrupt
    # Not compiled anew: the training function of the held model must be gone too.
    usual()
    fit(model)
    assert is_gone(model)
    assert_equal(values_of(model.variables), without)


def test_an_interrupt_that_is_kept_is_noticed_in_the_next_training() -> None:
    model, monitor = usual()
    try:
        fit(model, monitor, AtBatch(2, raising(KeyboardInterrupt)))
    except KeyboardInterrupt as error:
        kept = error
    assert not is_gone(model)
    counts = []
    fit(model, keras.callbacks.LambdaCallback(on_train_batch_end=lambda *_, **__: counts.append(len(model.losses))))
    # From the first step on.
    assert counts == [0] * 16
    assert is_gone(model)
    assert kept.__traceback__ is not None


def test_data_that_raise_leave_nothing_behind() -> None:
    class Data(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            if index == 5:
                raise ValueError("by the test")
            return X[:BATCH], Y[:BATCH]

    model, monitor = usual()
    with pytest.raises(Exception, match="by the test"):
        model.fit(Data(), verbose=0, callbacks=[monitor])
    assert is_gone(model)


@pytest.mark.parametrize("error", [pytest.param(ValueError, marks=pytest.mark.soak), KeyboardInterrupt])
def test_steps_that_raise_leave_nothing_behind(error: type[BaseException]) -> None:
    class Step(keras.Sequential):
        def train_step(self, _: Any) -> Any:
            raise error("by the test")

    model = Step([keras.Input((STEPS, FEATURES)), keras.layers.SimpleRNN(2), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(error) as kept:
        fit(model, holding())
    assert is_gone(model)
    assert kept.value.args == ("by the test",)


def test_an_evaluation_in_a_callback_does_not_end_it_and_a_stop_does() -> None:
    model, monitor = usual()
    found = []
    evaluate = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: found.append((model.evaluate(X, Y, verbose=0), len(model.losses)))
    )
    fit(model, monitor, evaluate, AtBatch(18, lambda: setattr(model, "stop_training", True)), epochs=9)
    assert [count for _, count in found] == [1, 1, 1]
    assert is_gone(model)


def test_a_regularizer_that_was_there_stays() -> None:
    kept = compiled(keras.layers.SimpleRNN(3, kernel_regularizer=keras.regularizers.L2(0.1), name="rnn"))
    own = kept.layers[0].cell.kernel.regularizer
    with JacobianRegularizer(1.0, 2.0).attached(kept, PROBE) as held:
        np.testing.assert_allclose(
            sum(kept.losses), 0.1 * np.sum(kept.layers[0].cell.kernel.numpy() ** 2) + 2 * held.penalty(), rtol=1e-6
        )
    assert kept.layers[0].cell.kernel.regularizer is own


def test_the_saved_model_knows_nothing_of_it(tmp_path: Path) -> None:
    model, monitor = usual()
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "at.keras")
    fit(model, monitor, checkpoint, epochs=1)
    loaded = keras.models.load_model(tmp_path / "at.keras")
    assert is_gone(loaded)
    assert_equal(weights_of(loaded), weights_of(model))
    np.testing.assert_array_equal(loaded(X), model(X))


def test_strength_and_target_change_in_the_middle_of_an_epoch_without_a_trace() -> None:
    regularizer = JacobianRegularizer(1.0, 0.0)
    losses, traces = [], []

    class Change(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, **_: Any) -> None:
            regularizer.strength = 100.0 if batch in (3, 4) else 0.0
            regularizer.target = 5.0 if batch == 4 else 1.0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            losses.append(logs["loss"] * (batch + 1))
            traces.append(CountedDense.traces)

    model = compiled(keras.layers.SimpleRNN(3, name="rnn"), CountedDense(2), optimizer=keras.optimizers.SGD(0.0))
    fit(model, holding(regularizer), Change(), epochs=1, shuffle=False)
    variances = measure(model, PROBE, measures=["variance"])["rnn"]["variance"]
    without = [float(np.mean((model(X[k : k + 4]) - Y[k : k + 4]) ** 2)) for k in range(0, SAMPLES, BATCH)]
    expected = np.array(without)
    expected[3] += 100 * np.mean((variances - 1) ** 2)
    expected[4] += 100 * np.mean((variances - 5) ** 2)
    # The logs hold the mean so far, in float32.
    np.testing.assert_allclose(np.diff(losses, prepend=0), expected, rtol=1e-4, atol=1e-3)
    assert traces[-1] == traces[0]


def test_schedules_count_batches_also_where_gradients_are_accumulated() -> None:
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, *_: Any, **__: Any) -> None:
            seen.append((regularizer.strength, regularizer.target))

    decay = keras.optimizers.schedules.ExponentialDecay(8.0, 1, 0.5)
    regularizer = JacobianRegularizer(lambda step: 1 + step, decay)
    model = compiled(optimizer=keras.optimizers.SGD(0.01, gradient_accumulation_steps=2))
    monitor = holding(regularizer)
    for _ in range(2):
        fit(model, monitor, Look(), epochs=1)
    assert seen == [(8 * 0.5**step, 1 + step) for step in range(16)]
    # A number takes the place of one schedule alone.
    regularizer.strength = 0.5
    fit(model, monitor, Look(), epochs=1)
    assert seen[16:] == [(0.5, 17 + step) for step in range(8)]


def test_the_measure_moves_to_its_target_and_logs_events_and_validation_carry_the_penalty(tmp_path: Path) -> None:
    model = compiled(optimizer=keras.optimizers.SGD(0.02))
    monitor = holding(JacobianRegularizer(1.0, 10.0, states="fresh"), log_dir=tmp_path)
    history = fit(model, monitor, validation_data=(X, Y), epochs=6).history
    first, *_, last = (report["rnn"]["variance"] for _, report in monitor.reports)
    assert abs(first.mean() - 1) > 0.5
    assert abs(last.mean() - 1) < 0.1
    plain_loss = np.mean((model.predict(X, verbose=0) - Y) ** 2)
    np.testing.assert_allclose(history["val_loss"][-1], plain_loss + 10 * history["jac_penalty"][-1], rtol=1e-5)
    assert len(by_tag(read_summaries(tmp_path / "jacobian"), "jac_penalty")) == len(monitor.reports)
    np.testing.assert_allclose(history["jac_penalty"][-1], np.mean((last - 1) ** 2), rtol=1e-4)


@pytest.mark.fast
def test_targets_by_layer() -> None:
    model = compiled(keras.layers.SimpleRNN(3, return_sequences=True, name="a"), keras.layers.SimpleRNN(3, name="b"))
    report = measure(model, PROBE, measures=["variance"])
    a, b = (report[name]["variance"] for name in ("a", "b"))
    regularizer = JacobianRegularizer({"a": 1.0, "b": 0.5}, 1.0)
    with regularizer.attached(model, PROBE) as held:
        expected = (np.mean((a - 1) ** 2) + np.mean((b - 0.5) ** 2)) / 2
        np.testing.assert_allclose(held.penalty(), expected, rtol=1e-5)
        regularizer.target = {"a": 0.25, "b": 0.5}
        expected = (np.mean((a - 0.25) ** 2) + np.mean((b - 0.5) ** 2)) / 2
        np.testing.assert_allclose(held.penalty(), expected, rtol=1e-5)
        with pytest.raises(ValueError, match="targets for the layers \\['a', 'b'\\], as before"):
            regularizer.target = 1.0
    with JacobianRegularizer({"b": 0.5}, 1.0).attached(model, PROBE) as held:
        np.testing.assert_allclose(held.penalty(), np.mean((b - 0.5) ** 2), rtol=1e-5)


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    layer = keras.layers.SimpleRNN(FEATURES, return_sequences=True, name="rnn")
    inputs = keras.Input((STEPS, FEATURES))
    model = keras.Model(inputs, layer(layer(inputs)))
    report = measure(model, PROBE, measures=["variance"])
    values = [report[key]["variance"] for key in ("rnn", "rnn:1")]
    with JacobianRegularizer(1.0, 1.0).attached(model, PROBE) as held:
        np.testing.assert_allclose(held.penalty(), np.mean((np.array(values) - 1) ** 2), rtol=1e-5)
    with JacobianRegularizer({"rnn:1": 1.0}, 1.0).attached(model, PROBE) as held:
        np.testing.assert_allclose(held.penalty(), np.mean((values[1] - 1) ** 2), rtol=1e-5)


# Kinds of trainings ---------------------------------------------------------------------------------


# Eager trainings are held in `test_auto_strength.py`, and XLA in `test_sharing.py`.
@pytest.mark.soak
@pytest.mark.parametrize(
    ("measured", "states"), [("variance", "cached"), ("spectral_norm", "cached"), ("spectral_norm", "fresh")]
)
def test_kinds_of_compilation_train_alike(measured: str, states: Any) -> None:
    def trained(**arguments: Any) -> list[NDArray[Any]]:
        model = compiled(keras.layers.SimpleRNN(3, name="rnn"), **({"jit_compile": False} | arguments))
        regularizer = JacobianRegularizer(1.0, 10.0, measure=measured, states=states, refresh=100)
        fit(model, holding(regularizer), epochs=1)
        assert is_gone(model)
        return weights_of(model)

    plain = trained()
    kinds: list[dict[str, Any]] = [{"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 4}]
    for arguments in kinds:
        for one, other in zip(plain, trained(**arguments), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6, err_msg=str(arguments))


def test_mixed_precision() -> None:
    before = keras.config.dtype_policy()
    # Its loss is scaled.
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = compiled(
            keras.layers.SimpleRNN(4, return_sequences=True, name="float16"),
            keras.layers.SimpleRNN(4, name="bfloat16", dtype="mixed_bfloat16"),
        )
    finally:
        keras.config.set_dtype_policy(before)
    monitor = holding(JacobianRegularizer(2.0, 100.0))
    fit(model, monitor, epochs=4)
    for name in ("float16", "bfloat16"):
        means = [report[name].mean("variance") for _, report in monitor.reports]
        assert means[-1] > means[0] + 0.01
    assert all(np.isfinite(weight).all() for weight in weights_of(model))


@pytest.mark.soak
def test_gradient_accumulation() -> None:
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    model = compiled(optimizer=optimizer)
    monitor = holding(JacobianRegularizer(1.0, 30.0))
    fit(model, monitor, epochs=4)
    means = [report["rnn"].mean("variance") for _, report in monitor.reports]
    assert means[-1] > means[0] + 0.01


def test_a_loop_of_ones_own() -> None:
    model = compiled()
    optimizer = keras.optimizers.SGD(0.1)
    regularizer = JacobianRegularizer(1.0, 3.0, refresh=3)
    with regularizer.attached(model, PROBE) as held:

        @tf.function
        def step() -> None:
            with tf.GradientTape() as tape:
                model(X[:BATCH])
                loss = tf.add_n(model.losses)
            optimizer.apply_gradients(
                zip(
                    tape.gradient(loss, model.layers[0].trainable_variables),
                    model.layers[0].trainable_variables,
                    strict=True,
                )
            )

        before = held.penalty()
        for batch in range(20):
            held.begin(batch)
            step()
        after = held.penalty()
    assert after < 0.2 * before
    assert is_gone(model)


# What cannot be held --------------------------------------------------------------------------------


def test_frozen_layers_have_no_penalty() -> None:
    model = compiled(keras.layers.SimpleRNN(3, return_sequences=True, name="a"), keras.layers.SimpleRNN(3, name="b"))
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    variances = measure(model, PROBE, measures=["variance"])["b"]["variance"]
    with contextlib.ExitStack() as stack:
        with pytest.warns(UserWarning, match="Layer `a` has no weight that is trained, so it has no penalty"):
            held = stack.enter_context(JacobianRegularizer(1.0, 1.0).attached(model, PROBE))
        np.testing.assert_allclose(held.penalty(), np.mean((variances - 1) ** 2), rtol=1e-5)
        np.testing.assert_allclose(sum(model.losses), held.penalty(), rtol=1e-5)
    model.layers[1].trainable = False
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="Layer `b` has no weight"), pytest.warns(UserWarning, match="Layer `a`"):
        history = fit(model, holding(), epochs=1).history
    assert history["jac_penalty"] == [0.0]


class Coupled(WeightedCell):
    """Each sample feels the mean of all."""

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        z = self.preactivation(inputs, states[0])
        new_h = tf.tanh(z - tf.reduce_mean(z, axis=0, keepdims=True))
        return new_h, [new_h]


def test_dependent_samples_have_no_penalty() -> None:
    model = compiled(keras.layers.RNN(Coupled(3), name="rnn"))
    with contextlib.ExitStack() as stack:
        with pytest.warns(UserWarning, match="Layer `rnn`: what its cell makes of a sample depends on the other"):
            held = stack.enter_context(JacobianRegularizer(1.0, 1.0).attached(model, PROBE))
        assert held.penalty() == 0
        assert float(sum(model.losses)) == 0


class GrowingCell(WeightedCell):
    """Has a variable that its call does not use."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        super().build(input_shape)
        self.error = self.add_weight(shape=(), initializer="zeros", trainable=False, name="error")

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        new_h = tf.tanh(self.preactivation(inputs, states[0]))
        return new_h, [new_h]


def growing_form(cell: GrowingCell, inputs: Any, states: Any, view: str) -> tf.linalg.LinearOperator | None:
    if view != "hidden":
        return None
    slope = 1.0 + cell.error - tf.tanh(cell.preactivation(inputs, states[0])) ** 2
    transposed = tf.linalg.matrix_transpose(tf.convert_to_tensor(cell.recurrent_kernel))
    return tf.linalg.LinearOperatorFullMatrix(slope[:, :, None] * transposed)


def test_a_form_that_becomes_wrong_is_refuted_and_the_training_goes_on() -> None:
    register_jacobian(GrowingCell, growing_form)
    try:
        cell = GrowingCell(3)
        model = compiled(keras.layers.RNN(cell, name="rnn"), optimizer=keras.optimizers.SGD(0.0))
        monitor = holding(JacobianRegularizer(1.0, 10.0, refresh=4), update_freq=100)
        with pytest.warns(UserWarning, match=r"differs from autodiff .*\. It is measured by autodiff from now on"):
            history = fit(model, AtBatch(6, lambda: cell.error.assign(1.0)), monitor).history
    finally:
        register_jacobian(GrowingCell, None)
    variances = measure(model, PROBE, measures=["variance"])["rnn"]["variance"]
    np.testing.assert_allclose(history["jac_penalty"][-1], np.mean((variances - 1) ** 2), rtol=1e-3)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": -1.0}, "`target`. Expected a number of at least 0. Received: target=-1.0"),
        ({"target": 0.0, "scale": "log"}, "`target`. Expected a positive number"),
        ({"target": float("nan")}, "`target`"),
        ({"target": {}}, "`target`. Expected a target for at least one layer"),
        ({"strength": -1.0}, "`strength`. Expected a number of at least 0"),
        ({"strength": "much"}, "`strength`"),
        ({"measure": "horizon"}, "'growth', 'lyapunov']. Received: measure='horizon', which is none of them"),
        ({"measure": "growth", "scale": "log"}, "`scale`. Expected one of ['linear']. Received: scale=log"),
        ({"measure": "flow", "view": "inputs"}, "`view`. Expected one of ['hidden', 'joint']. Received: view=inputs"),
        ({"measure": "nonsense"}, "Received: measure='nonsense'"),
        ({"view": "cell"}, "`view`. Expected one of ['hidden', 'joint', 'inputs']"),
        ({"scale": "square"}, "`scale`"),
        ({"side": "below"}, "`side`"),
        ({"states": "old"}, "`states`"),
        ({"through_states": True}, "`through_states`. Expected False with `states='cached'`"),
        ({"refresh": 0}, "`refresh`"),
        ({"rows": 2.5}, "`rows`"),
        ({"vectors": 1}, "`vectors`"),
        ({"seed": "a"}, "`seed`"),
    ],
)
def test_invalid_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is looked at below
        JacobianRegularizer(**arguments)
    assert message in str(error.value)
    assert str(error.value).startswith("Invalid value for argument")


def test_what_depends_on_the_model_fails_before_the_training() -> None:
    model = compiled()
    with pytest.raises(ValueError, match=re.escape("recurrent layers out of ['rnn']. Received: target=['gru']")):
        fit(model, holding(JacobianRegularizer({"gru": 1.0})))
    with pytest.raises(ValueError, match="Expected a `JacobianRegularizer` or None"):
        JacobianMonitor(PROBE, regularizer=1.0)  # type: ignore[arg-type]
    assert is_gone(model)


@pytest.mark.fast
def test_config() -> None:
    decay = keras.optimizers.schedules.ExponentialDecay(8.0, 10, 0.5)
    regularizer = JacobianRegularizer(
        {"a": 0.1, "b": 2.0}, decay, measure="spectral_norm", view="joint", scale="log", side="at_most", states="fresh",
        through_states=True, refresh=3, rows=17, vectors=5, seed=9,
    )  # fmt: skip
    config = regularizer.get_config()
    again = JacobianRegularizer.from_config(config)
    assert again.get_config() == config
    assert (again.target, again.strength) == ({"a": 0.1, "b": 2.0}, 8.0)
    saved = keras.saving.serialize_keras_object(JacobianRegularizer(0.1, 0.3))
    loaded = keras.saving.deserialize_keras_object(saved)
    assert (loaded.target, loaded.strength) == (0.1, 0.3)
