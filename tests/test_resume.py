"""Trainings that are killed, begun again and continued: the event files tell one story."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections import Counter
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
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
# write, if any.
TRAINING = """
    import os, pathlib, signal, sys
    import keras, numpy as np
    from keras_jacmon import JacobianMonitor
    from keras_jacmon.events import writer as events

    directory, kill_at = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    written = 0
    write_layer = events._write_layer

    def write_or_die(*arguments):
        global written
        if written == 2 * kill_at + 1:
            # The first layer of this report has been written, the second one has not.
            if sys.argv[3] == "flushed":
                monitor._writer._main._writer.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        written += 1
        write_layer(*arguments)

    events._write_layer = write_or_die
    keras.utils.set_random_seed(1)
    model = keras.Sequential([
        keras.Input((5, 3)), keras.layers.SimpleRNN(3, return_sequences=True, name="a"),
        keras.layers.SimpleRNN(3, name="b"), keras.layers.Dense(1),
    ])
    model.compile("adam", "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 5, 3)), rng.normal(size=(32, 1))
    monitor = JacobianMonitor(
        x[:4], log_dir=directory / "logs", update_freq="batch", measures=["variance"], on_error="raise"
    )
    backup = keras.callbacks.BackupAndRestore(directory / "backup", save_freq=2)
    model.fit(x, y, batch_size=4, epochs=3, verbose=0, shuffle=False, callbacks=[backup, monitor])
    print(*[step for step, _ in monitor.reports])
"""


def train(directory: Path, kill_at: int = -1, flushed: str = "not flushed") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(TRAINING)]
    return subprocess.run(  # noqa: S603 - our own words
        [*command, str(directory), str(kill_at), flushed], capture_output=True, text=True, check=False, timeout=300
    )


def steps_by_tag(directory: Path) -> dict[str, list[int]]:
    steps: dict[str, list[int]] = {}
    for summary in read_summaries(directory / "logs"):
        if summary.directory == "jacobian" and summary.plugin in ("scalars", "histograms"):
            steps.setdefault(summary.tag, []).append(summary.step)
    return steps


@pytest.mark.parametrize("flushed", ["flushed", "not flushed"])
def test_a_killed_training_is_readable_and_goes_on(tmp_path: Path, flushed: str) -> None:
    killed = train(tmp_path, 11, flushed)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    first = steps_by_tag(tmp_path)
    # All that was measured before, whole.
    assert first.keys() == TAGS
    for tag, steps in first.items():
        half = flushed == "flushed" and tag.startswith("a/")
        assert steps == list(range(12 if half else 11)), tag
    files = {path: path.read_bytes() for path in (tmp_path / "logs").rglob("*.tfevents.*")}
    # Of the means, the least and the greatest.
    assert len(files) == 3
    if flushed == "not flushed":
        return

    resumed = train(tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    # From the last backup on; Keras begins the epoch anew that was not over.
    steps = [int(step) for step in resumed.stdout.split()]
    assert steps == list(range(10, 10 + 2 * BATCHES + 1))
    # Nothing is overwritten: the new values are in a file of their own.
    assert all(path.read_bytes() == content for path, content in files.items())
    assert len(list((tmp_path / "logs").rglob("*.tfevents.*"))) == 6
    for tag, both in steps_by_tag(tmp_path).items():
        assert Counter(both) == Counter(first[tag]) + Counter(steps)
    board = EventAccumulator(str(tmp_path / "logs" / "jacobian"), size_guidance={"tensors": 0})
    board.Reload()
    assert {event.step for event in board.Tensors("b/variance")} == set(range(27))


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
