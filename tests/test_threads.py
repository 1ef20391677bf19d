"""Several models at once, and a TensorBoard beside them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import processes
import tensorflow as tf
from event_files import read_summaries
from helpers import WeightedCell, normal

from keras_jacmon import JacobianMonitor, JacobianRegularizer, measure

if TYPE_CHECKING:
    from pathlib import Path

X, Y = normal(32, 5, 3, seed=1), normal(32, 1, seed=2)


def make(layer: type[Any], log_dir: Path, *, held: bool) -> tuple[Any, JacobianMonitor]:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((5, 3)), layer(3, name="rnn"), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    regularizer = JacobianRegularizer(1.0, 1.0, refresh=3) if held else None
    monitor = JacobianMonitor(
        X[:4],
        log_dir=log_dir,
        measures=["variance"],
        update_freq="batch",
        on_error="raise",
        regularizer=regularizer,
    )
    return model, monitor


def test_two_models_in_two_threads(tmp_path: Path) -> None:
    def pair(directory: Path) -> list[tuple[Any, JacobianMonitor]]:
        return [
            make(keras.layers.LSTM, directory / "a", held=False),
            make(keras.layers.SimpleRNN, directory / "b", held=True),
        ]

    def fit(model: Any, monitor: JacobianMonitor, history: dict[int, Any]) -> None:
        arguments = {"batch_size": 4, "epochs": 1, "shuffle": False, "verbose": 0}
        history[id(model)] = model.fit(X, Y, callbacks=[monitor], **arguments).history

    alone, together = pair(tmp_path / "alone"), pair(tmp_path / "together")
    history: dict[int, Any] = {}
    for model, monitor in alone:
        fit(model, monitor, history)
    threads = [threading.Thread(target=fit, args=(*one, history)) for one in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (model, monitor), (other, its_monitor) in zip(alone, together, strict=True):
        assert history[id(model)] == history[id(other)]
        assert not other.losses
        for left, right in zip(model.variables, other.variables, strict=True):
            np.testing.assert_array_equal(left, right)
        assert [step for step, _ in its_monitor.reports] == list(range(9))
        for (_, left_report), (_, right_report) in zip(monitor.reports, its_monitor.reports, strict=True):
            assert left_report.scalars() == right_report.scalars()
    for name in ("a", "b"):
        left, right = (
            [(summary.tag, summary.step, summary.value.tolist()) for summary in read_summaries(tmp_path / where / name)]
            for where in ("alone", "together")
        )
        assert left == right


def test_measuring_changes_nothing_that_holds_for_all_threads() -> None:
    """A training in another thread would run without its graph meanwhile, and be rounded in another way."""
    eagerly = []

    class Cell(WeightedCell):
        def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
            eagerly.append(tf.config.functions_run_eagerly())
            new_h = tf.tanh(self.preactivation(inputs, states[0]))
            return new_h, [new_h]

    model = keras.Sequential([keras.Input((5, 3)), keras.layers.RNN(Cell(4))])
    before = len(eagerly)
    measure(model, X[:4], measures="fast")
    assert len(eagerly) > before
    assert not any(eagerly)


def test_a_running_tensorboard_in_the_same_process(tmp_path: Path) -> None:
    script = """
        import json, sys, time, urllib.parse, urllib.request
        from tensorboard import program

        board = program.TensorBoard()
        board.configure(argv=[None, "--logdir", sys.argv[1], "--port", "0", "--reload_interval", "1"])
        url = board.launch()

        import keras, numpy as np
        from keras_jacmon import JacobianMonitor

        model = keras.Sequential([keras.Input((5, 3)), keras.layers.GRU(3, name="gru"), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        x, y = np.ones((32, 5, 3)), np.ones((32, 1))
        monitor = JacobianMonitor(
            x[:4], log_dir=sys.argv[1], measures=["variance"], update_freq="batch", on_error="raise"
        )
        tensorboard = keras.callbacks.TensorBoard(sys.argv[1], update_freq="batch")
        query = urllib.parse.urlencode({"run": "jacobian", "tag": "gru/variance"})

        def shown():
            try:
                with urllib.request.urlopen(f"{url}data/plugin/scalars/scalars?{query}") as answer:
                    return [step for _, step, _ in json.load(answer)]
            except urllib.error.HTTPError:
                return []

        for end in (8, 16):
            model.fit(x, y, batch_size=4, verbose=0, callbacks=[tensorboard, monitor])
            deadline = time.monotonic() + 60
            while end not in shown():
                assert time.monotonic() < deadline, shown()
                time.sleep(0.5)
        assert set(shown()) == set(range(17)), shown()
    """
    finished = processes.run(script, str(tmp_path))
    assert finished.returncode == 0, finished.stderr[-3000:]
