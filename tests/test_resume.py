"""Trainings that are killed, begun again and continued: the event files tell one story."""

from __future__ import annotations

import signal
from collections import Counter
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import processes
from event_files import by_tag, read_summaries
from helpers import normal
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from keras_jacmon import JacobianMonitor

if TYPE_CHECKING:
    from pathlib import Path

BATCHES = 8
X, Y = normal(4 * BATCHES, 5, 3, seed=1), normal(4 * BATCHES, 1, seed=2)
TAGS = {f"{layer}/variance{rest}" for layer in ("a", "b") for rest in ("", "/histogram", "/least", "/greatest")}

# Trains 3 epochs of 8 batches, with a backup after each 2 batches; is killed in the middle of the given measurement's
# write.
TRAINING = """
    import os, pathlib, signal, sys
    import keras, numpy as np, tensorflow as tf
    from keras_jacmon import JacobianMonitor

    directory, kill_at = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    write = tf.summary.scalar

    def write_or_die(tag, *arguments, **others):
        if tag.startswith("b/") and tf.summary.experimental.get_step() == kill_at:
            # The first layer of this report has been written, the second one has not.
            if sys.argv[3] == "flushed":
                tf.summary.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(tag, *arguments, **others)

    tf.summary.scalar = write_or_die
    keras.utils.set_random_seed(1)
    model = keras.Sequential([
        keras.Input((5, 3)), keras.layers.SimpleRNN(3, return_sequences=True, name="a"),
        keras.layers.SimpleRNN(3, name="b"), keras.layers.Dense(1),
    ])
    model.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 5, 3)), rng.normal(size=(32, 1))
    monitor = JacobianMonitor(
        x[:4], log_dir=directory / "logs", update_freq="batch", measures=["variance"], on_error="raise"
    )
    backup = keras.callbacks.BackupAndRestore(directory / "backup", save_freq=2)
    model.fit(x, y, batch_size=4, epochs=3, verbose=0, shuffle=False, callbacks=[backup, monitor])
"""


def steps_by_tag(directory: Path) -> dict[str, list[int]]:
    steps: dict[str, list[int]] = {}
    for summary in read_summaries(directory / "logs"):
        if summary.directory == "jacobian" and summary.plugin in ("scalars", "histograms"):
            steps.setdefault(summary.tag, []).append(summary.step)
    return steps


def event_files(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (directory / "logs").rglob("*.tfevents.*")}


def test_a_killed_training_is_readable_and_goes_on(tmp_path: Path) -> None:
    """It is killed before anything of a report has reached the file, goes on, and is killed in the middle of one."""
    killed = processes.run(TRAINING, str(tmp_path), "11", "not flushed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    # All that was measured before, whole.
    first = steps_by_tag(tmp_path)
    assert first == {tag: [*range(11)] for tag in TAGS}
    files = event_files(tmp_path)
    # Of the means, the least and the greatest.
    assert len(files) == 3

    killed = processes.run(TRAINING, str(tmp_path), "21", "flushed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    # From the last backup on; Keras begins the epoch anew that was not over.
    assert {tag: Counter(steps) - Counter(first[tag]) for tag, steps in steps_by_tag(tmp_path).items()} == {
        tag: Counter(range(10, 22 if tag.startswith("a/") else 21)) for tag in TAGS
    }
    # Nothing is overwritten: the new values are in a file of their own.
    both = event_files(tmp_path)
    assert {path: both[path] for path in files} == files
    assert len(both) == 6
    board = EventAccumulator(str(tmp_path / "logs" / "jacobian"), size_guidance={"tensors": 0})
    board.Reload()
    assert {event.step for event in board.Tensors("b/variance")} == set(range(21))


def test_a_file_that_was_cut_off_is_readable_and_the_next_one_goes_on(tmp_path: Path) -> None:
    """What a machine without power leaves: half of a record."""
    model = compiled()
    fit(model, tmp_path, epochs=1)
    (file,) = (tmp_path / "jacobian").glob("*.tfevents.*")
    content = file.read_bytes()
    file.write_bytes(content[:-20])
    fit(model, tmp_path, epochs=1)
    board = EventAccumulator(str(tmp_path / "jacobian"), size_guidance={"tensors": 0})
    board.Reload()
    assert [event.step for event in board.Tensors("rnn/variance")] == [*range(9), *range(8, 17)]
    assert file.read_bytes() == content[:-20]


def compiled() -> Any:
    keras.utils.set_random_seed(2)
    model = keras.Sequential([keras.Input((5, 3)), keras.layers.SimpleRNN(3, name="rnn"), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def fit(model: Any, directory: Path, monitor: JacobianMonitor | None = None, **arguments: Any) -> Any:
    monitor = monitor or JacobianMonitor(
        X[:4], log_dir=directory, update_freq="batch", measures=["variance"], on_error="raise"
    )
    return model.fit(X, Y, batch_size=4, verbose=0, shuffle=False, callbacks=[monitor], **arguments)


def test_initial_epoch_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model, whole = compiled(), compiled()
    monitors = [
        JacobianMonitor(X[:4], log_dir=tmp_path / name, measures=["variance", "lyapunov"], on_error="raise")
        for name in ("parts", "whole")
    ]
    first = fit(model, tmp_path, monitors[0], epochs=2).history
    second = fit(model, tmp_path, monitors[0], initial_epoch=2, epochs=4).history
    together = fit(whole, tmp_path, monitors[1], epochs=4).history
    assert [step for step, _ in monitors[0].reports] == [0, 8, 16, 16, 24, 32]
    assert [step for step, _ in monitors[1].reports] == [0, 8, 16, 24, 32]
    assert first["rnn_jac_variance"] + second["rnn_jac_variance"] == together["rnn_jac_variance"]
    # At the end of the training all is measured, whatever number its last epoch has.
    left, right = (monitor.reports[-1][1]["rnn"]["lyapunov"] for monitor in monitors)
    np.testing.assert_array_equal(left, right)
    written = by_tag(read_summaries(tmp_path / "parts"), "rnn/variance")
    assert sorted(summary.step for summary in written) == [0, 8, 16, 16, 24, 32]
