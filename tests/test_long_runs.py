"""Measurements by the thousand: memory, event files, reports and traces stay bounded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import processes
import pytest
from event_files import by_tag, read_summaries

if TYPE_CHECKING:
    from pathlib import Path

MAX_REPORTS = 50

# In a process of its own, whose memory nothing else moves.
SCRIPT = f"""
import ctypes, gc, json, pathlib, sys, warnings
import keras, numpy as np, tensorflow as tf
from keras_jacmon import JacobianMonitor, JacobianRegularizer

tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)
directory, batches, held = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "held"


class Cell(keras.layers.SimpleRNNCell):
    calls = 0

    def call(self, *arguments, **others):
        # Python runs it when it is traced, and never afterwards.
        self.calls += 1
        return super().call(*arguments, **others)


class Memory(ctypes.Structure):
    "What C's allocator knows of itself."
    words = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(word, ctypes.c_uint) for word in words.split()]


libc = ctypes.CDLL(None)
libc.mallinfo.restype = Memory


def used():
    "Bytes that C has handed out and not got back, and blocks of Python, which have up to 512 bytes."
    gc.collect()
    memory = libc.mallinfo()
    return memory.uordblks + memory.hblkhd + 256 * sys.getallocatedblocks()


model = keras.Sequential([keras.Input((5, 3)), keras.layers.RNN(Cell(3), name="rnn"), keras.layers.Dense(1)])
model.compile("sgd", "mse")
schedule = lambda step: 1e-2 + 1e-6 * step
monitor = JacobianMonitor(
    np.ones((4, 5, 3)), measures=["variance"], update_freq="batch", log_dir=directory, on_error="raise",
    max_reports={MAX_REPORTS},
    regularizer=JacobianRegularizer(1.0, schedule, refresh=7) if held else None,
)
monitor.set_model(model)
monitor.on_train_begin()
monitor.on_epoch_begin(0)
resident, in_use = [], []
kernel = model.layers[0].cell.recurrent_kernel
start = kernel.numpy()
for batch in range(batches):
    # Other values each time, as in a training.
    kernel.assign((1 + np.float32(batch / batches)) * start)
    monitor.on_train_batch_begin(batch)
    model.optimizer.iterations.assign_add(1)
    monitor.on_train_batch_end(batch)
    if batch == 0:
        traced = model.layers[0].cell.calls
    if batch % 100 == 0:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * 4096)
    if batch == 20:
        # What is there by now is not looked at any more.
        gc.freeze()
    if batch % 20 == 0 and batches < 1000:
        in_use.append(used())
# No training reads the penalty here.
warnings.filterwarnings("ignore", "The `JacobianRegularizer` does nothing")
monitor.on_epoch_end(0, {{}})
monitor.on_train_end()
json.dump(
    {{
        "resident": resident,
        "in_use": in_use,
        "traced_later": model.layers[0].cell.calls - traced,
        "steps": [step for step, _ in monitor.reports],
    }},
    sys.stdout,
)
"""


def run(directory: Path, measurements: int, held: str) -> Any:
    """Takes so many measurements, and returns what the script says of them."""
    finished = processes.run(SCRIPT, str(directory), str(measurements), held, timeout=1800)
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    assert found["traced_later"] == 0
    assert len(found["steps"]) <= MAX_REPORTS
    assert found["steps"][0] == 0
    assert found["steps"][-1] == measurements
    return found


def growth(memory: list[int], measurements: int) -> float:
    """The bytes that each measurement takes in the second half of the run."""
    later = np.array(memory[len(memory) // 2 :])
    return float(np.polyfit(measurements / len(memory) * np.arange(later.size), later, 1)[0])


# A report has thousands of bytes, and one number that stays behind has hundreds. What is in use is known to the byte;
# what is resident comes in pages of 4,096, and the allocator settles within some 2,000 measurements.
@pytest.mark.parametrize(
    ("measurements", "memory", "most"),
    [(600, "in_use", 200), pytest.param(100_000, "resident", 20, marks=pytest.mark.soak)],
)
def test_measurements_by_the_thousand(measurements: int, memory: str, most: int, tmp_path: Path) -> None:
    found = run(tmp_path, measurements, "observed")
    assert abs(growth(found[memory], measurements)) < most, found[memory]
    assert [summary.step for summary in by_tag(read_summaries(tmp_path), "rnn/variance")] == [*range(measurements + 1)]


@pytest.mark.soak
@pytest.mark.parametrize(("measurements", "memory", "most"), [(600, "in_use", 200), (4000, "resident", 200)])
def test_memory_is_flat_where_each_report_is_written_and_the_model_is_held(
    measurements: int, memory: str, most: int, tmp_path: Path
) -> None:
    found = run(tmp_path, measurements, "held")
    assert abs(growth(found[memory], measurements)) < most, found[memory]
    assert [summary.step for summary in by_tag(read_summaries(tmp_path), "jac_penalty")] == [*range(measurements + 1)]
