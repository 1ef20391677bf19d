"""Times the Jacobian tab: 10,000 measurements of 20 layers with 512 positions, in TensorBoard and headless Chromium.

    pip install '.[dashboard]' playwright && python benchmarks/dashboard.py [measurements] [layers] [positions]

Writes the event files, starts TensorBoard, waits until it has read them, and prints the time from opening the page to
the first heat map, the times from the choice of a layer to its heat map, the size of the largest answer, and the memory
of the server.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import sync_playwright

from keras_jacmon import LayerReport, Report
from keras_jacmon.events.writer import EventWriter

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


def write(logs: Path, measurements: int, layers: int, positions: int) -> None:
    """Writes measurements of one key and the flow."""
    random = np.random.default_rng(0)
    values = np.exp(random.normal(0, 0.3, (positions, 4))).astype(np.float32)
    flow = np.cumsum(random.normal(-0.01, 0.01, (positions, 4)), axis=0).astype(np.float32)
    layer = LayerReport("LSTMCell", 8, {"variance": values}, np.ones(values.shape, bool), sequences={"flow": flow})
    report = Report({f"lstm_{number}": layer for number in range(layers)})
    writer = EventWriter(logs)
    for step in range(measurements):
        writer.write(report, step)
    writer.close()


def time_page(url: str, layers: int) -> None:
    """Prints the times of the page."""
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        options: dict[str, Any] = {"executable_path": "/usr/bin/chromium", "headless": True, "args": FLAGS}
        browser = playwright.chromium.launch_persistent_context(profile, **options)
        page = browser.new_page()
        answers: list[Any] = []
        page.on("response", lambda answer: answers.append(answer) if "plugin/keras_jacmon/" in answer.url else None)
        page.goto(f"{url}data/plugin_entry.html?name=keras_jacmon")
        page.locator("main[data-shown]").wait_for(timeout=600_000)
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            page.reload()
            page.locator("main[data-shown]").wait_for(timeout=60_000)
            times.append(time.perf_counter() - begin)
        print("first paint:", *(f"{one:.2f} s" for one in times))
        page.locator("main[data-measured]").wait_for(timeout=60_000)
        # The bodies of answers before a reload are gone.
        answers.clear()
        # The page has asked for the neighbours of a layer before they are chosen.
        for words, stride in (("a neighbour", 1), ("another layer", 3)):
            changes = [choose(page, number) for number in range(stride, min(6 * stride, layers), stride)]
            print(f"change to {words}:", *(f"{one:.2f} s" for one in changes))
        data = [answer for answer in answers if "json" in answer.headers["content-type"]]
        print(f"largest answer: {max(len(answer.body()) for answer in data) / 1e6:.2f} MB")
        browser.close()


def choose(page: Any, number: int) -> float:
    """Chooses a layer, and returns the seconds until its heat map is there."""
    begin = time.perf_counter()
    page.locator(".layer", has_text=re.compile(f"^.lstm_{number}[^0-9]")).click()
    page.locator(f"main[data-shown*='\"lstm_{number}\"']").wait_for(timeout=60_000)
    seconds = time.perf_counter() - begin
    page.locator(f"main[data-measured*='\"lstm_{number}\"']").wait_for(timeout=60_000)
    page.wait_for_timeout(1000)
    return seconds


def memory(process: int) -> float:
    """Returns the resident memory of a process and its children in MB."""
    lines = subprocess.run(["ps", "-eo", "pid,ppid,rss"], capture_output=True, text=True, check=True).stdout  # noqa: S607 - wherever it is
    table = [[int(word) for word in line.split()] for line in lines.splitlines()[1:]]
    return sum(rss for pid, parent, rss in table if process in (pid, parent)) / 1000


def main(measurements: int = 10_000, layers: int = 20, positions: int = 512) -> None:
    """Runs the benchmark."""
    with tempfile.TemporaryDirectory() as logs:
        write(Path(logs), measurements, layers, positions)
        size = sum(path.stat().st_size for path in Path(logs).rglob("*.tfevents.*"))
        print(f"event files: {size / 1e6:.0f} MB for {measurements} measurements of {layers} layers")
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", logs, "--port", "0"]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603 - our own words
        try:
            found = next(filter(None, (re.search(r" at (http://\S+)", line) for line in server.stderr or ())))
            # Until the server has read the files.
            time.sleep(max(10, size / 1e7))
            time_page(found[1], layers)
            print(f"memory of the server: {memory(server.pid):.0f} MB")
        finally:
            server.terminate()
            server.communicate()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
