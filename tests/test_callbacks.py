"""A monitor among other callbacks: their order, several monitors, copies, loops of the user's own, foreign losses."""

from __future__ import annotations

import copy
import pickle
import re
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from event_files import names, read_summaries
from helpers import WeightedCell
from trainings import (
    PROBE,
    STEPS,
    AtBatch,
    FailingCell,
    RaisingCell,
    X,
    Y,
    compiled,
    fit,
    quick_monitor,
    steps_of,
    user_warnings,
    usual,
    values_of,
)

from keras_jacmon import JacobianMonitor, JacobianRegularizer
from keras_jacmon.watching.callback_list import begun_before, neighbours

if TYPE_CHECKING:
    from pathlib import Path

FAILED = "The penalty on the Jacobians failed in a step of the training, which goes on without it."
ORDER = "The order that works: [TensorBoard, JacobianMonitor, EarlyStopping, ModelCheckpoint, CSVLogger]."


def rnn() -> Any:
    return keras.layers.SimpleRNN(3, name="rnn")


@pytest.mark.filterwarnings("ignore:Learning rate reduction is conditioned on metric `rnn_jac_variance`")
def test_the_order_of_the_callbacks_is_warned_of(tmp_path: Path) -> None:
    key: dict[str, Any] = {"monitor": "rnn_jac_variance", "mode": "min"}
    blind = [keras.callbacks.CSVLogger(tmp_path / "log.csv"), keras.callbacks.ReduceLROnPlateau(**key)]
    fine = [keras.callbacks.EarlyStopping(monitor="loss"), keras.callbacks.TensorBoard(tmp_path / "before")]
    after = [keras.callbacks.TensorBoard(tmp_path / "after"), keras.callbacks.EarlyStopping(**key)]
    with pytest.warns(UserWarning, match="stands") as caught:
        fit(usual(), *blind, *fine, quick_monitor(), *after)
    told = [message for message in user_warnings(caught) if "stands" in message]
    assert [message.split("`")[1] for message in told] == ["CSVLogger", "ReduceLROnPlateau", "TensorBoard"]
    assert all(message.endswith(ORDER) for message in told)
    # In the order that works there is no warning, which would be an error.
    fit(usual(), fine[1], quick_monitor(), keras.callbacks.EarlyStopping(**key), blind[0])


def test_looking_for_the_other_callbacks_disturbs_no_thread() -> None:
    """A tuple that is about to be made cannot be finished while another thread holds it."""
    alone = keras.callbacks.Callback()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            assert neighbours(alone) == ([], [])

    thread = threading.Thread(target=look)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            assert len(tuple(number for number in range(20_000))) == 20_000
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(before)


def test_callbacks_of_one_training_know_those_that_began_before() -> None:
    one, other, alone = (keras.callbacks.Callback() for _ in range(3))
    for members in ([one, other], [other, one]):
        used = keras.callbacks.CallbackList(members, epochs=1)
        # A list may serve several trainings.
        for _ in range(2):
            assert [begun_before(member) for member in used.callbacks[:2]] == [[], members[:1]]
    # Without a list they are not known to belong together.
    assert [begun_before(alone), begun_before(keras.callbacks.Callback())] == [[], []]


def test_several_monitors_keep_keys_runs_and_tags_apart(tmp_path: Path) -> None:
    def monitor(**arguments: Any) -> JacobianMonitor:
        return quick_monitor(log_dir=tmp_path, **arguments)

    first, second, named, same = monitor(), monitor(), monitor(name="valid"), monitor(name="valid")
    history = fit(usual(), first, second, named, same).history
    prefixes = ["", "monitor_1_", "valid_", "valid_1_"]
    assert [key for key in history if "_jac_" in key] == [f"{prefix}rnn_jac_variance" for prefix in prefixes]
    written = {name for name in names(read_summaries(tmp_path)) if name[1].endswith("variance")}
    written -= {name for name in written if name[0].endswith(("min", "max"))}
    runs = [("jacobian", ""), *((f"jacobian/{run}", f"{run}/") for run in ("monitor_1", "valid", "valid_1"))]
    assert written == {(run, f"{tag}rnn/variance") for run, tag in runs}
    with pytest.raises(ValueError, match=r"letters, digits and `_.-`, or None. Received: name='a/b'"):
        monitor(name="a/b")


def test_a_copy_of_a_used_monitor_keeps_the_options_alone() -> None:
    """As KerasTuner copies it before each trial."""
    model = usual()
    monitor = quick_monitor(layers=[model.layers[0]], update_freq=3)
    fit(model, monitor)
    other = copy.deepcopy(pickle.loads(pickle.dumps(monitor)))  # noqa: S301 - our own
    assert (other.reports, other.failures, other.model) == ([], [], None)
    fit(compiled(rnn()), other)
    assert steps_of(other) == steps_of(monitor) == [0, 3, 6, 8]
    holding = quick_monitor(targets=Y[:4], regularizer=JacobianRegularizer(lambda step: 2.0 + step, 0.5))
    regularizer = copy.deepcopy(holding)._traced.regularizer
    assert isinstance(regularizer, JacobianRegularizer)
    assert regularizer is not holding._traced.regularizer
    assert (regularizer.strength, regularizer.target) == (0.5, 2.0)


def test_a_loop_of_ones_own_that_calls_the_hooks_of_epochs_alone() -> None:
    model, monitor = usual(), quick_monitor()
    with pytest.raises(RuntimeError, match=r"JacobianMonitor has no model yet. Call `set_model\(model\)`"):
        monitor.on_epoch_end(0)
    monitor.set_model(model)
    # Without `on_train_begin`, too.
    for epoch in range(3):
        model.train_on_batch(X, Y)
        logs: dict[str, Any] = {}
        monitor.on_epoch_end(epoch, logs)
        assert "rnn_jac_variance" in logs
    monitor.on_train_end()
    assert steps_of(monitor) == [1, 2, 3]


class OwnStep(keras.Model):
    """A model whose training never reads `losses`; its `test_step` does."""

    def __init__(self, *, reads: bool) -> None:
        super().__init__()
        self.reads = reads
        self.rnn, self.dense = rnn(), keras.layers.Dense(1)

    def call(self, x: Any) -> Any:
        return self.dense(self.rnn(x))

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x, training=True) - y) ** 2) + (sum(self.losses) if self.reads else 0.0)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


class OwnLoss(OwnStep):
    """The same by way of `compute_loss`."""

    train_step = keras.Model.train_step

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, *_: Any, **__: Any) -> Any:
        del x
        return tf.reduce_mean((y - y_pred) ** 2)


@pytest.mark.parametrize("kind", [OwnStep, pytest.param(OwnLoss, marks=pytest.mark.soak)])
def test_a_training_that_never_reads_the_losses_is_warned_of(kind: Any) -> None:
    model = kind(reads=False)
    model.compile("sgd", "mse")
    sentence = (
        f"The `JacobianRegularizer` does nothing: the training of the model `{model.name}` did not read `model.losses` "
        "in its first epoch, so the penalty is no part of the loss. In a `train_step` or `compute_loss` of your own "
        "add `sum(self.losses)` to the loss, or call `super().compute_loss(...)`."
    )
    with pytest.warns(UserWarning, match=re.escape(sentence)) as caught:
        fit(model, quick_monitor(regularizer=JacobianRegularizer(1.0, 0.01)), epochs=2, validation_data=(X, Y))
    assert len(user_warnings(caught)) == 1


def test_a_training_step_of_ones_own_that_reads_the_losses() -> None:
    regularizer = JacobianRegularizer(lambda step: 2.0 + step / 128, 3.0, view="joint")
    model, monitor = OwnStep(reads=True), quick_monitor(regularizer=regularizer)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    fit(model, monitor)
    first, last = (report["rnn"] for _, report in monitor.reports)
    assert (first.targets["variance"], last.targets["variance"], regularizer.target) == (2.0, *[2.0 + 7 / 128] * 2)
    assert last.mean("variance") > first.mean("variance") + 0.1
    assert not model.losses
    # The second training uses what was traced in the first one.
    fit(model, monitor)


def test_a_probe_whose_steps_are_all_masked_is_warned_of() -> None:
    model = compiled(keras.layers.Masking(), rnn())
    monitor = JacobianMonitor(
        np.zeros_like(PROBE), log_dir=None, measures="variance", regularizer=JacobianRegularizer(1.0, 0.01)
    )
    with pytest.warns(UserWarning, match="Layer `rnn`") as caught:
        history = fit(model, monitor, epochs=2).history
    penalty, values = user_warnings(caught)
    assert penalty.startswith("Layer `rnn`: all steps of the probe are masked, or its states are not finite, so it has")
    assert values.startswith("Layer `rnn` skips all steps of the probe, which are masked: there is nothing to measure")
    assert np.isnan(history["rnn_jac_variance"]).all()


class Attending(WeightedCell):
    """Looks at what a model has set on it."""

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        new_h = tf.tanh(self.preactivation(inputs, states[0]))
        weights = tf.nn.softmax(tf.einsum("bsu,bu->bs", self.memory, new_h))
        new_h += tf.einsum("bs,bsu->bu", weights, self.memory)
        return new_h, [new_h]


class Translator(keras.Model):
    def __init__(self, *, measurable: bool) -> None:
        super().__init__()
        self.encoder = keras.layers.GRU(3, return_sequences=True, name="encoder") if measurable else None
        self.decoder = keras.layers.RNN(Attending(3), name="decoder")
        self.dense = keras.layers.Dense(1)

    def call(self, x: Any) -> Any:
        self.decoder.cell.memory = self.encoder(x) if self.encoder else tf.tanh(x)
        return self.dense(self.decoder(x))


@pytest.mark.parametrize("measurable", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_a_layer_that_cannot_be_measured_ends_no_training(measurable: bool) -> None:  # noqa: FBT001 - pytest passes it by name
    model = Translator(measurable=measurable)
    model.compile("sgd", "mse")
    monitor = quick_monitor()
    with pytest.warns(UserWarning, match=r"The Jacobians of layer `decoder` \(Attending\) cannot be taken") as caught:
        history = fit(model, monitor).history
    (told,) = user_warnings(caught)
    assert "tensors of the model that are neither its inputs nor its states: `memory`." in told
    assert told.endswith("It is not measured.") if measurable else told.startswith("The monitor measures nothing")
    assert [set(report) for _, report in monitor.reports] == [{"encoder"}] * 2 * measurable
    assert "loss" in history
    with pytest.raises(ValueError, match="The Jacobians of layer `decoder`"):
        fit(model, quick_monitor(layers=["decoder"]))


def test_a_cell_that_loses_its_tensors_after_the_call_is_not_measured_without_them() -> None:
    class Tidy(Translator):
        def call(self, x: Any) -> Any:
            result = super().call(x)
            self.decoder.cell.memory = None
            return result

    model = Tidy(measurable=True)
    model.compile("sgd", "mse")
    monitor = quick_monitor()
    with pytest.warns(UserWarning, match="set on it as `memory`, and that it holds no more") as caught:
        fit(model, monitor)
    (told,) = user_warnings(caught)
    assert "`decoder`: its cell Attending uses tensors of the model that are neither its inputs nor its states" in told
    assert [set(report) for _, report in monitor.reports] == [{"encoder"}] * 2


def test_building_leaves_the_time_axis_open(tmp_path: Path) -> None:
    model = keras.Sequential([rnn(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    fit(model, JacobianMonitor(PROBE[:, :3], log_dir=None, measures=["variance"]))
    assert model.input_shape == (None, None, PROBE.shape[2])
    model.export(tmp_path / "exported", verbose=False)
    assert tf.saved_model.load(str(tmp_path / "exported")).serve(X).shape == Y.shape
    # A layer above needs the number of steps.
    fixed = keras.Sequential([keras.layers.SimpleRNN(3, return_sequences=True), keras.layers.Flatten()])
    fixed.add(keras.layers.Dense(1))
    fixed.compile("sgd", "mse")
    fit(fixed, quick_monitor())
    assert fixed.input_shape == (None, STEPS, PROBE.shape[2])


def trained_with(cell: Any, *callbacks: Any, **arguments: Any) -> list[str]:
    """Trains to the end with a penalty that fails on the way, and returns the warnings."""
    model = compiled(keras.layers.RNN(cell, name="rnn"), optimizer="sgd")
    monitor = quick_monitor(regularizer=JacobianRegularizer(1.0, 10.0, **arguments), update_freq=100)
    with pytest.warns(UserWarning, match="The penalty on the Jacobians failed in a step") as caught:
        fit(model, *callbacks, monitor)
    assert not model.losses
    assert all(np.isfinite(values).all() for values in values_of(model.variables))
    assert model.optimizer.iterations.numpy() >= 7
    return [message for message in user_warnings(caught) if "The penalty" in message]


# The epoch is short of the batch of the step that failed, and Keras says so.
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.filterwarnings("ignore:Measuring the Jacobians", "ignore:Evaluating the penalty")
def test_a_penalty_that_fails_in_a_step_ends_no_training() -> None:
    cell = FailingCell(3)
    batches = AtBatch(3, lambda: cell.broken.assign(1))
    (told,) = trained_with(cell, batches, states="fresh")
    assert told.startswith(f"{FAILED} The reason: ")
    # All others of the eight are trained on.
    assert batches.seen == 7


def test_a_penalty_that_fails_when_it_is_traced_ends_no_training() -> None:
    cell = RaisingCell(3)

    def break_cell() -> None:
        cell.broken = ZeroDivisionError

    (told,) = trained_with(cell, AtBatch(1, break_cell, "on_train_begin"))
    assert told.startswith(FAILED)
    assert "the cell divides by zero" in told
