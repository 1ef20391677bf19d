"""Faults during a training: it goes on with one warning, and what was measured before is there."""

from __future__ import annotations

import _thread
import itertools
import re
import resource
import shutil
import signal
import threading
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import processes
import pytest
import tensorflow as tf
from event_files import by_tag, read_summaries
from helpers import randomize, soak_but
from trainings import (
    FEATURES,
    PROBE,
    STEPS,
    AtBatch,
    AtInference,
    CountingCell,
    FailingCell,
    RaisingCell,
    X,
    Y,
    assert_equal,
    compiled,
    fit,
    quick_monitor,
    steps_of,
    user_warnings,
    usual,
    values_of,
)

from keras_jacmon import JacobianMeter, JacobianMonitor, JacobianRegularizer, measure

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def monitor_of(**arguments: Any) -> JacobianMonitor:
    return quick_monitor(**({"update_freq": "batch"} | arguments))


# A measurement that fails -------------------------------------------------------------------------------------------


def fit_until_broken(monitor: JacobianMonitor, *callbacks: Any) -> Any:
    """A training of two epochs in which measuring fails from the third batch on."""
    model = compiled(keras.layers.RNN(FailingCell(3), name="rnn"))
    broken = model.get_layer("rnn").cell.broken
    return fit(model, AtBatch(3, lambda: broken.assign(1)), monitor, *callbacks, epochs=2)


def assert_warned_once(caught: Any, monitor: JacobianMonitor, what: str, times: int, error: str) -> None:
    """One warning names the step and the error; what failed later is kept."""
    (warning,) = user_warnings(caught)
    rest = "\nTraining goes on. Further failures are not warned of, but kept in `JacobianMonitor.failures`."
    assert re.fullmatch(f"{what} at step 3 failed: {error}{re.escape(rest)}", warning), warning
    assert len(monitor.failures) == times
    assert monitor.failures[0] == warning.removesuffix(rest)
    assert all(failure.startswith(f"{what} at step ") for failure in monitor.failures)


# TensorFlow's own message goes on for dozens of lines.
FAILED = r"Measuring layer `rnn` failed: assertion failed: \[the cell is broken\].*(\n.*){,2}"


@pytest.mark.fast
def test_a_failing_measurement_warns_once_and_training_goes_on() -> None:
    monitor = monitor_of()
    with pytest.warns(UserWarning, match="failed") as caught:
        history = fit_until_broken(monitor).history
    assert_warned_once(caught, monitor, "Measuring the Jacobians", 14, FAILED)
    assert steps_of(monitor) == [0, 1, 2]
    assert len(history["loss"]) == 2
    # Not the values of step 2: nothing is known of the weights at the end of the epoch.
    assert np.isnan(history["rnn_jac_variance"]).all()


def test_a_failing_measurement_raises_if_told_so() -> None:
    monitor = monitor_of(on_error="raise")
    with pytest.raises(RuntimeError, match=f"^{FAILED}"):
        fit_until_broken(monitor)
    assert steps_of(monitor) == [0, 1, 2]


def test_a_failure_names_the_layer_that_it_is_in() -> None:
    model = compiled(
        keras.layers.SimpleRNN(3, return_sequences=True, name="fine"),
        keras.layers.RNN(FailingCell(3), name="rnn"),
    )
    meter = JacobianMeter(model, PROBE, measures=["variance"], layers=["rnn"])
    model.get_layer("rnn").cell.broken.assign(1)
    # Whether the model's own pass or the measurement fails first is up to TensorFlow's scheduler.
    for _ in range(5):
        with pytest.raises(RuntimeError, match=f"^{FAILED}$"):
            meter()


def test_a_failure_outside_of_the_recurrent_layers_says_so() -> None:
    class Broken(keras.layers.Layer):
        broken = tf.Variable(initial_value=False)

        def call(self, x: Any) -> Any:
            with tf.control_dependencies([tf.debugging.assert_equal(self.broken, False, "out of order")]):  # noqa: FBT003
                return tf.identity(x)

    broken = Broken()
    meter = JacobianMeter(compiled(broken, keras.layers.SimpleRNN(3)), PROBE, measures=["variance"])
    broken.broken.assign(True)  # noqa: FBT003 - the only way
    with pytest.raises(
        RuntimeError, match=r"^Measuring the model, outside of its recurrent layers, failed: .*out of order"
    ):
        meter()


def test_a_training_after_a_failure_warns_again() -> None:
    model = compiled(keras.layers.RNN(FailingCell(3), name="rnn"))
    monitor = quick_monitor(update_freq=100)
    fit(model, monitor)
    model.get_layer("rnn").cell.broken.assign(1)
    for _ in range(2):
        with pytest.warns(UserWarning, match="failed") as caught:
            fit(model, monitor)
        (warning,) = user_warnings(caught)
        assert re.search(FAILED, warning)
    assert len(monitor.failures) == 4


# Interrupts and errors ----------------------------------------------------------------------------------------------


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Gives Ctrl+C the meaning that it has in Python; programs that a script starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_during_a_measurement_stops_the_training_and_loses_nothing(tmp_path: Path) -> None:
    """The first one at the fourth measurement, where the cell's own variable has already moved."""
    count = itertools.count(1)

    def press_a_key() -> None:
        """Python notices a signal when TensorFlow returns; one in this function would be an error of TensorFlow."""
        if next(count) != 4:
            return
        if threading.current_thread() is threading.main_thread():
            threading.Timer(0.002, _thread.interrupt_main).start()
        else:
            _thread.interrupt_main()

    def trained(*callbacks: Any) -> Any:
        model = compiled(AtInference(press_a_key), keras.layers.RNN(CountingCell(3), name="rnn"))
        with pytest.raises(KeyboardInterrupt):
            fit(model, *callbacks, shuffle=False)
        return model

    def interrupt() -> None:
        raise KeyboardInterrupt

    monitor = monitor_of(log_dir=tmp_path)
    model, expected = trained(monitor), trained(AtBatch(3, interrupt))
    rnn, expected_rnn = (one.get_layer("rnn") for one in (model, expected))
    assert steps_of(monitor) == [0, 1, 2]
    assert [summary.step for summary in by_tag(read_summaries(tmp_path), "rnn/variance")] == [0, 1, 2]
    # As if it had been interrupted at that batch without a monitor.
    assert_equal(values_of(model.variables), values_of(expected.variables))
    assert rnn.cell.calls.numpy() == expected_rnn.cell.calls.numpy()
    assert "inner_loop" not in vars(rnn)
    fit(model, monitor, shuffle=False)
    fit(expected, shuffle=False)
    assert_equal(values_of(model.variables), values_of(expected.variables))
    assert steps_of(monitor) == [0, 1, 2, *range(3, 12)]


def test_a_cell_that_raises_when_it_is_traced_anew() -> None:
    model = compiled(keras.layers.RNN(RaisingCell(3), name="rnn"))
    monitor = monitor_of()
    fit(model, monitor)
    before = list(monitor.reports)
    model.layers[0].cell.broken = ZeroDivisionError
    # Keras traces a model anew once it is compiled, and so does the monitor.
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="Preparing for a model that has changed") as caught:
        history = fit(model, monitor).history
    (warning,) = user_warnings(caught)
    assert "the cell divides by zero" in warning
    assert warning.startswith("Preparing for a model that has changed at step 8 failed: ")
    assert list(history) == ["loss"]
    assert monitor.reports == before
    assert len(monitor.failures) == 1
    model.layers[0].cell.broken = None
    fit(model, monitor)
    assert steps_of(monitor)[len(before) :] == list(range(8, 17))


@pytest.mark.parametrize(
    ("error", "on_error", "raised"),
    [
        (KeyboardInterrupt, "warn", KeyboardInterrupt),
        pytest.param(ZeroDivisionError, "raise", ValueError, marks=pytest.mark.soak),
    ],
)
def test_a_change_raises_if_told_so_or_interrupted(
    error: type[BaseException], on_error: str, raised: type[BaseException]
) -> None:
    model = compiled(keras.layers.RNN(RaisingCell(3), name="rnn"))
    monitor = monitor_of(on_error=on_error, update_freq="epoch")
    fit(model, monitor)
    model.layers[0].cell.broken = error
    model.compile("sgd", "mse")
    with pytest.raises(raised, match="the cell divides by zero"):
        fit(model, monitor)


# Numbers ------------------------------------------------------------------------------------------------------------


def test_exploding_states_and_weights_of_nan(tmp_path: Path) -> None:
    """A linear network whose states leave the range of float32 in the middle of the sequence, then NaN for good."""
    # An optimizer without moments, which would stay NaN.
    model = compiled(keras.layers.SimpleRNN(2, activation="relu", name="rnn"), optimizer="sgd")
    rnn, weights = model.layers[0], model.get_weights()

    def explode() -> None:
        randomize(rnn)
        rnn.cell.recurrent_kernel.assign(1e30 * np.eye(2))

    def nan() -> None:
        rnn.cell.recurrent_kernel.assign(np.full((2, 2), np.nan))

    def mend() -> None:
        model.set_weights(weights)

    monitor = monitor_of(log_dir=tmp_path)
    callbacks = [AtBatch(1, explode), AtBatch(2, nan), AtBatch(3, mend)]
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


def test_nan_is_logged_as_nan_and_named() -> None:
    model = compiled(
        keras.layers.SimpleRNN(3, return_sequences=True, name="fine"), keras.layers.SimpleRNN(3, name="exploded")
    )
    weights = model.get_layer("exploded").trainable_weights

    def explode() -> None:
        for weight in weights:
            weight.assign(np.full(weight.shape, np.nan))

    monitor = quick_monitor(measures=["variance", "rms_singular_value", "spectral_norm"])
    with pytest.warns(UserWarning, match="exploded") as caught:
        history = fit(model, AtBatch(8, explode), monitor).history
    [message] = user_warnings(caught)
    assert message == (
        "Layer `exploded` has NaN or Inf in its Jacobians at step 8: 20 of `variance`, 20 of `rms_singular_value`, "
        "20 of `spectral_norm`. They are logged as they are; later ones of this layer are not warned of."
    )
    assert np.isnan(history["exploded_jac_variance"]).all()
    assert np.isfinite(history["fine_jac_variance"]).all()
    assert steps_of(monitor) == [0, 8]


def test_infinite_values_do_not_raise_even_if_errors_do() -> None:
    model = usual()
    model.set_weights([np.full_like(weight, np.inf) for weight in model.get_weights()])
    with pytest.warns(UserWarning, match="rnn"):
        history = fit(model, quick_monitor(on_error="raise")).history
    assert not np.isfinite(history["rnn_jac_variance"]).any()


# Models that change -------------------------------------------------------------------------------------------------


def test_a_model_that_changed_between_two_trainings_is_measured_as_it_is() -> None:
    traces = itertools.count()

    def counted_relu(x: Any) -> Any:
        next(traces)
        return keras.activations.relu(x)

    model = compiled(keras.layers.SimpleRNN(3, name="rnn"))
    monitor = monitor_of(update_freq="epoch")
    fit(model, monitor)
    # The weights stay the same objects.
    model.layers[0].cell.activation = counted_relu
    model.compile("sgd", "mse")
    fit(model, monitor)
    expected = measure(model, PROBE, measures=["variance"])["rnn"]["variance"]
    np.testing.assert_allclose(monitor.reports[-1][1]["rnn"]["variance"], expected, rtol=1e-5)
    before = next(traces)
    fit(model, monitor)
    assert next(traces) == before + 1


def test_layers_that_come_and_go() -> None:
    model = keras.Sequential(
        [keras.Input((STEPS, FEATURES)), keras.layers.SimpleRNN(3, return_sequences=True, name="below")]
    )
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
    model = compiled(keras.layers.SimpleRNN(3, return_sequences=True, name="a"), keras.layers.SimpleRNN(3, name="b"))
    regularizer = JacobianRegularizer({"b": 1.0}, 1.0)
    monitor = monitor_of(layers=["b"], regularizer=regularizer)
    fit(model, monitor)
    other = compiled(keras.layers.SimpleRNN(3, name="a"))
    with pytest.warns(UserWarning, match=r"Expected recurrent layers of the model: \['a'\]. Received: 'b'") as caught:
        fit(other, monitor)
    assert len(user_warnings(caught)) == 1
    assert len(monitor.reports) == 9
    assert not other.losses
    assert not model.losses


class Held(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.dense = keras.layers.SimpleRNN(3, name="rnn"), keras.layers.Dense(1)

    def call(self, x: Any) -> Any:
        return self.dense(self.rnn(x))


def test_a_layer_that_is_deleted_while_a_training_runs() -> None:
    """What Keras and the monitor have traced goes on with the weights of the layer."""
    model = Held()
    model.compile("sgd", "mse")

    def delete() -> None:
        del model.rnn

    monitor = monitor_of()
    fit(model, AtBatch(3, delete), monitor)
    assert steps_of(monitor) == list(range(9))
    variances = [
        report["held/rnn" if "held/rnn" in report else "rnn"].mean("variance") for _, report in monitor.reports
    ]
    assert len(set(variances)) == 9


# Files --------------------------------------------------------------------------------------------------------------


def full_disk() -> None:
    """No file may grow beyond a size that the event file has already reached."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def _disk_is_emptied() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.fast
@pytest.mark.usefixtures("_disk_is_emptied")
def test_a_full_disk_warns_once_and_training_goes_on(tmp_path: Path) -> None:
    monitor = monitor_of(log_dir=tmp_path)
    with pytest.warns(UserWarning, match="failed") as caught:
        history = fit(usual(), AtBatch(3, full_disk), monitor).history
    assert_warned_once(caught, monitor, "Writing the event file", 6, r".*File too large.*(\n.*)*")
    assert not tf.summary.should_record_summaries()
    assert steps_of(monitor) == list(range(9))
    assert np.isfinite(history["rnn_jac_variance"]).all()


@pytest.mark.parametrize("what", soak_but({"directory"}, ["directory", "directory, and made again", "file"]))
def test_a_log_directory_that_is_removed_warns_once(tmp_path: Path, what: str) -> None:
    monitor, directory = monitor_of(log_dir=tmp_path), tmp_path / "jacobian"

    def remove() -> None:
        if what == "file":
            (file,) = directory.glob("*.tfevents.*")
            file.unlink()
            return
        shutil.rmtree(directory)
        if what != "directory":
            directory.mkdir()

    with pytest.warns(UserWarning, match="Writing the event file") as caught:
        fit(usual(), AtBatch(3, remove), monitor, epochs=2)
    lost = f"the event file in {directory} was removed, and the events in it are lost"
    assert_warned_once(caught, monitor, "Writing the event file", 1, re.escape(lost))
    # From the next report on there is a new file.
    assert steps_of(monitor) == list(range(17))
    assert [summary.step for summary in by_tag(read_summaries(tmp_path), "rnn/variance")] == list(range(4, 17))


@pytest.mark.usefixtures("_disk_is_emptied")
def test_a_full_disk_raises_if_told_so(tmp_path: Path) -> None:
    monitor = monitor_of(log_dir=tmp_path, on_error="raise")
    # Keras takes an `OutOfRangeError`, which is what TensorFlow makes of this one, for the end of the data.
    with pytest.raises((RuntimeError, OSError), match="File too large"):
        fit(usual(), AtBatch(3, full_disk), monitor)


def test_a_directory_that_becomes_read_only(tmp_path: Path) -> None:
    """The open file goes on, a new one cannot be made, and training goes on."""
    script = """
        import ctypes, pathlib, sys, warnings
        import keras, numpy as np
        from keras_jacmon import JacobianMonitor

        # Root may write everywhere, unless it gives that right up, CAP_DAC_OVERRIDE.
        libc, head, rights = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
        assert libc.capget(head, rights) == 0
        rights[:3] = [right & ~2 for right in rights[:3]]
        assert libc.capset(head, rights) == 0
        directory = pathlib.Path(sys.argv[1]) / "logs"
        directory.mkdir()
        model = keras.Sequential([keras.Input((5, 3)), keras.layers.SimpleRNN(3, name="rnn"), keras.layers.Dense(1)])
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
        assert sentence.startswith("Writing the event file at step 8 failed: "), sentence
        assert "Permission denied" in sentence or "PermissionDenied" in sentence, sentence
        assert [step for step, _ in monitor.reports] == [*range(9), *range(8, 17)]
        (directory / "jacobian").chmod(0o755)
        model.fit(x, y, batch_size=4, verbose=0, callbacks=[monitor])
    """
    finished = processes.run(script, str(tmp_path))
    assert finished.returncode == 0, finished.stderr[-3000:]
    steps = [summary.step for summary in by_tag(read_summaries(tmp_path), "rnn/variance")]
    assert sorted(steps) == sorted([*range(9), *range(16, 25)])


def test_a_convolution_that_the_cpu_does_not_have() -> None:
    """In float64 no library stands in for it, on any CPU; Keras does not train there either."""
    model = keras.Sequential(
        [
            keras.Input((2, 1, 2, 2), dtype="float64"),
            keras.layers.ConvLSTM2D(1, 1, data_format="channels_first", name="conv", dtype="float64"),
        ]
    )
    model.compile("sgd", "mse")
    x, y = np.ones((1, 2, 1, 2, 2)), np.ones((1, 1, 2, 2))
    sentence = (
        "Measuring layer `conv` failed: TensorFlow has no convolution with `data_format='channels_first'` for this "
        "CPU. Expected `data_format='channels_last'`, or a GPU. TensorFlow says:\n"
    )
    with pytest.raises(RuntimeError, match=f"^{sentence}"):
        measure(model, x, measures=["variance"])
    monitor = JacobianMonitor(x, measures=["variance"])
    with (
        pytest.warns(UserWarning, match=f"^Measuring the Jacobians at step 0 failed: {sentence}"),
        pytest.raises(tf.errors.InvalidArgumentError, match="Conv2D"),
    ):
        model.fit(x, y, verbose=0, callbacks=[monitor])
