"""What goes wrong in a long training: it goes on with one warning, and what was measured before is there."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from event_files import by_tag, read_summaries
from helpers import WeightedCell, normal, randomize

from keras_jacmon import JacobianMeter, JacobianMonitor, JacobianRegularizer, measure
from keras_jacmon.regularization import loss_terms

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BATCH, STEPS, FEATURES = 4, 5, 3
X, Y = normal(32, STEPS, FEATURES, seed=1), normal(32, 1, seed=2)
PROBE = normal(BATCH, STEPS, FEATURES, seed=3)


def compiled(*layers: Any, **arguments: Any) -> Any:
    keras.utils.set_random_seed(5)
    layers = layers or (keras.layers.GRU(3, name="gru"),)
    model = keras.Sequential([keras.Input((STEPS, FEATURES)), *layers, keras.layers.Dense(1, name="dense")])
    model.compile("sgd", "mse", **arguments)
    return model


def monitor_of(**arguments: Any) -> JacobianMonitor:
    return JacobianMonitor(PROBE, **({"measures": ["variance"], "log_dir": None, "update_freq": "batch"} | arguments))


def fit(model: Any, *callbacks: Any, **arguments: Any) -> Any:
    return model.fit(
        X, Y, **({"batch_size": BATCH, "epochs": 1, "verbose": 0, "callbacks": list(callbacks)} | arguments)
    )


class AtBatch(keras.callbacks.Callback):
    """Calls a function at the end of the batch with this number."""

    def __init__(self, number: int, function: Callable[[], object]) -> None:
        super().__init__()
        self.number, self.function = number, function

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del logs
        if batch == self.number:
            self.function()


def user_warnings(caught: Any) -> list[str]:
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def steps_of(monitor: JacobianMonitor) -> list[int]:
    return [step for step, _ in monitor.reports]


# Interrupts and errors ----------------------------------------------------------------------------------------------


def test_an_interrupt_during_a_measurement_stops_the_training_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one at the fourth measurement, where the cell's own variable has already moved."""
    measured = JacobianMeter._run
    count = 0

    class Interrupted:
        """In the place of a traced graph: Python notices a signal when TensorFlow returns."""

        def __init__(self, graph: Any) -> None:
            self.graph = graph

        def __call__(self, *arguments: Any) -> Any:
            self.graph(*arguments)
            raise KeyboardInterrupt

    def run(meter: JacobianMeter, traced: Any) -> Any:
        nonlocal count
        count += 1
        return measured(meter, traced._replace(graph=Interrupted(traced.graph)) if count == 4 else traced)

    def trained(*callbacks: Any) -> Any:
        model = compiled(keras.layers.RNN(CountingCell(3), name="rnn"))
        with pytest.raises(KeyboardInterrupt):
            fit(model, *callbacks, shuffle=False)
        return model

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(JacobianMeter, "_run", run)
    monitor = monitor_of(log_dir=tmp_path)
    model, expected = trained(monitor), trained(AtBatch(2, interrupt))
    assert steps_of(monitor) == [0, 1, 2]
    assert [summary.step for summary in by_tag(read_summaries(tmp_path), "rnn/variance")] == [0, 1, 2]
    # As if it had been interrupted at that batch without a monitor.
    for found, wanted in zip(model.variables, expected.variables, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert model.layers[0].cell.calls.numpy() == expected.layers[0].cell.calls.numpy()
    assert "inner_loop" not in vars(model.layers[0])
    fit(model, monitor, shuffle=False)
    fit(expected, shuffle=False)
    for found, wanted in zip(model.variables, expected.variables, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert steps_of(monitor) == [0, 1, 2, *range(3, 12)]


class CountingCell(WeightedCell):
    """Counts its calls in a variable that Keras does not know of."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        super().build(input_shape)
        self.calls = tf.Variable(0.0, trainable=False)

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        self.calls.assign_add(1.0)
        new_h = tf.tanh(self.preactivation(inputs, states[0]))
        return new_h, [new_h]


class RaisingCell(WeightedCell):
    """Raises in Python when it is called in inference, once `broken` is set."""

    broken = False

    def call(self, inputs: Any, states: Any, training: bool = False) -> tuple[Any, list[Any]]:  # noqa: FBT001, FBT002 - Keras' signature
        if self.broken and not training:
            raise ZeroDivisionError("the cell divides by zero")
        new_h = tf.tanh(self.preactivation(inputs, states[0]))
        return new_h, [new_h]


def test_a_cell_that_raises_when_it_is_traced_anew() -> None:
    model = compiled(keras.layers.RNN(RaisingCell(3), name="rnn"))
    monitor = monitor_of()
    fit(model, monitor)
    before = list(monitor.reports)
    model.layers[0].cell.broken = True
    # Keras traces a model anew once it is compiled, and so does the monitor.
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="Preparing for a model that has changed") as caught:
        history = fit(model, monitor).history
    (warning,) = user_warnings(caught)
    assert "the cell divides by zero" in warning
    assert warning.startswith("Preparing for a model that has changed at step 8 failed. ValueError: ")
    assert list(history) == ["loss"]
    assert monitor.reports == before
    assert len(monitor.failures) == 1
    model.layers[0].cell.broken = False
    fit(model, monitor)
    assert steps_of(monitor)[len(before) :] == list(range(8, 17))


def test_a_change_raises_if_told_so() -> None:
    model = compiled(keras.layers.RNN(RaisingCell(3), name="rnn"))
    monitor = monitor_of(on_error="raise")
    fit(model, monitor)
    model.layers[0].cell.broken = True
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="the cell divides by zero"):
        fit(model, monitor)


# Numbers ------------------------------------------------------------------------------------------------------------


def test_exploding_states_and_weights_of_nan(tmp_path: Path) -> None:
    """A linear network whose states leave the range of float32 in the middle of the sequence, then NaN for good."""
    model = compiled(keras.layers.SimpleRNN(2, activation="relu", name="rnn"))
    rnn, weights = model.layers[0], model.get_weights()

    def explode() -> None:
        randomize(rnn)
        rnn.cell.recurrent_kernel.assign(1e30 * np.eye(2))

    def nan() -> None:
        rnn.cell.recurrent_kernel.assign(np.full((2, 2), np.nan))

    def mend() -> None:
        model.set_weights(weights)

    monitor = monitor_of(log_dir=tmp_path, measures=None)
    callbacks = [AtBatch(0, explode), AtBatch(1, nan), AtBatch(2, mend)]
    with pytest.warns(UserWarning, match="Layer `rnn` has NaN or Inf in its Jacobians at step 1") as caught:
        fit(model, *callbacks, monitor, shuffle=False)
    assert len(user_warnings(caught)) == 1
    assert not monitor.failures
    assert steps_of(monitor) == list(range(9))
    finite = [np.isfinite(report["rnn"].mean("variance")) for _, report in monitor.reports]
    assert finite[0]
    assert not finite[1]
    assert not finite[2]
    assert finite[3]
    written = by_tag(read_summaries(tmp_path), "rnn/variance")
    assert [np.isfinite(float(summary.value)) for summary in written] == finite


# Models that change -------------------------------------------------------------------------------------------------


def test_a_model_that_changed_between_two_trainings_is_measured_as_it_is() -> None:
    model = compiled(keras.layers.SimpleRNN(3, name="rnn"))
    monitor = monitor_of(update_freq="epoch")
    fit(model, monitor)
    # The weights stay the same objects.
    model.layers[0].cell.activation = keras.activations.relu
    model.compile("sgd", "mse")
    fit(model, monitor)
    expected = measure(model, PROBE, measures=["variance"])["rnn"]["variance"]
    np.testing.assert_allclose(monitor.reports[-1][1]["rnn"]["variance"], expected, rtol=1e-5)
    before = monitor._meter
    fit(model, monitor)
    assert monitor._meter is before


def test_layers_that_come_and_go() -> None:
    model = keras.Sequential([keras.Input((STEPS, FEATURES)), keras.layers.GRU(3, return_sequences=True, name="below")])
    model.compile("sgd", "mse")
    monitor = monitor_of(update_freq="epoch")

    def fit_sequences() -> Any:
        return model.fit(X, np.repeat(Y[:, None], STEPS, 1), epochs=1, verbose=0, callbacks=[monitor])

    fit_sequences()
    model.add(keras.layers.LSTM(2, return_sequences=True, name="above"))
    model.compile("sgd", "mse")
    fit_sequences()
    assert list(monitor.reports[-1][1]) == ["below", "above"]
    model.pop()
    model.compile("sgd", "mse")
    fit_sequences()
    assert list(monitor.reports[-1][1]) == ["below"]
    count = len(monitor.reports)
    # Without any recurrent layer there is nothing to measure.
    model.pop()
    model.add(keras.layers.Dense(1))
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="Expected a model with at least one recurrent layer") as caught:
        fit_sequences()
    assert len(user_warnings(caught)) == 1
    assert len(monitor.reports) == count


def test_a_layer_that_is_deleted_and_was_asked_for_by_name() -> None:
    model = compiled(keras.layers.GRU(3, return_sequences=True, name="a"), keras.layers.GRU(3, name="b"))
    regularizer = JacobianRegularizer({"b": 1.0}, 1.0)
    monitor = monitor_of(layers=["b"], regularizer=regularizer)
    fit(model, monitor)
    other = compiled(keras.layers.GRU(3, name="a"))
    with pytest.warns(UserWarning, match=r"Expected recurrent layers of the model: \['a'\]. Received: 'b'") as caught:
        fit(other, monitor)
    assert len(user_warnings(caught)) == 1
    assert len(monitor.reports) == 9
    assert not other.losses
    assert not list(loss_terms._FITS)


class Held(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.dense = keras.layers.GRU(3, name="gru"), keras.layers.Dense(1)

    def call(self, x: Any) -> Any:
        return self.dense(self.gru(x))


def test_a_layer_that_is_deleted_while_a_training_runs() -> None:
    """What Keras and the monitor have traced goes on with the weights of the layer."""
    model = Held()
    model.compile("sgd", "mse")

    def delete() -> None:
        del model.gru

    monitor = monitor_of()
    fit(model, AtBatch(2, delete), monitor)
    assert steps_of(monitor) == list(range(9))
    variances = [
        report["held/gru" if "held/gru" in report else "gru"].mean("variance") for _, report in monitor.reports
    ]
    assert len(set(variances)) == 9


# Files --------------------------------------------------------------------------------------------------------------


def test_a_directory_that_becomes_read_only(tmp_path: Path) -> None:
    """The open file goes on, a new one cannot be made, and training goes on."""
    script = """
        import pathlib, sys, warnings
        import keras, numpy as np
        from keras_jacmon import JacobianMonitor

        directory = pathlib.Path(sys.argv[1]) / "logs"
        directory.mkdir()
        model = keras.Sequential([keras.Input((5, 3)), keras.layers.GRU(3, name="gru"), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        x, y = np.ones((32, 5, 3)), np.ones((32, 1))
        monitor = JacobianMonitor(x[:4], log_dir=directory, measures=["variance"], update_freq="batch")

        class Lock(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                if batch == 2:
                    (directory / "jacobian").chmod(0o555)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            model.fit(x, y, batch_size=4, verbose=0, callbacks=[Lock(), monitor])
            assert not [str(w.message) for w in caught if w.category is UserWarning]
            model.fit(x, y, batch_size=4, verbose=0, callbacks=[monitor])
        (sentence,) = [str(w.message) for w in caught if w.category is UserWarning]
        assert sentence.startswith("Writing the event file at step 8 failed. "), sentence
        assert "Permission denied" in sentence or "PermissionDenied" in sentence, sentence
        assert [step for step, _ in monitor.reports] == [*range(9), *range(8, 17)]
        (directory / "jacobian").chmod(0o755)
        model.fit(x, y, batch_size=4, verbose=0, callbacks=[monitor])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    if os.geteuid() == 0:
        # Root may write everywhere, unless it gives that right up.
        command = ["setpriv", "--inh-caps=-dac_override", "--bounding-set=-dac_override", *command]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)  # noqa: S603 - our own words
    assert finished.returncode == 0, finished.stderr[-3000:]
    steps = [summary.step for summary in by_tag(read_summaries(tmp_path), "gru/variance")]
    assert sorted(steps) == sorted([*range(9), *range(16, 25)])
