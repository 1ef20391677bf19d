"""100,000 measurements: memory, event files, reports and traces stay bounded."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
from event_files import by_tag, read_summaries

if TYPE_CHECKING:
    from pathlib import Path

MEASUREMENTS, THIN_AFTER, MAX_REPORTS = 100_000, 100, 50

# In a process of its own, whose memory nothing else moves.
SCRIPT = f"""
import json, pathlib, sys
import keras, numpy as np
from keras_jacmon import JacobianMonitor

model = keras.Sequential([keras.Input((5, 3)), keras.layers.SimpleRNN(3, name="rnn"), keras.layers.Dense(1)])
model.compile("sgd", "mse")
monitor = JacobianMonitor(
    np.ones((4, 5, 3)), measures=["variance"], update_freq="batch", log_dir=sys.argv[1], on_error="raise",
    thin_after={THIN_AFTER}, max_reports={MAX_REPORTS},
)
monitor.set_model(model)
monitor.on_train_begin()
monitor.on_epoch_begin(0)
monitor.on_train_batch_begin(0)
resident = []
for batch in range({MEASUREMENTS}):
    monitor.on_train_batch_end(batch)
    if batch % 500 == 0:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * 4096)
monitor.on_epoch_end(0, {{}})
monitor.on_train_end()
json.dump(
    {{"resident": resident, "traces": monitor._meter.trace_count, "steps": [step for step, _ in monitor.reports]}},
    sys.stdout,
)
"""


def test_a_hundred_thousand_measurements(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT, str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)  # noqa: S603 - our own words
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    assert found["traces"] == 1
    assert found["steps"][0] == 0
    assert found["steps"][-1] == MEASUREMENTS
    assert len(found["steps"]) <= MAX_REPORTS
    # After warm-up, bytes for each measurement: a report alone has thousands.
    resident = np.array(found["resident"][len(found["resident"]) // 5 :])
    slope = np.polyfit(500.0 * np.arange(resident.size), resident, 1)[0]
    assert abs(slope) < 20, resident
    written = [summary.step for summary in by_tag(read_summaries(tmp_path), "rnn/variance")]
    assert written[:THIN_AFTER] == list(range(THIN_AFTER))
    assert written[-1] == MEASUREMENTS
    assert len(written) <= THIN_AFTER * (np.log2(MEASUREMENTS / THIN_AFTER) + 1) + 1
    (file,) = tmp_path.rglob("*.tfevents.*")
    assert file.stat().st_size < 2**20
