"""A headless Chromium, and a TensorBoard that it visits."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

HAS_CHROMIUM = Path(CHROMIUM).exists()
NO_CHROMIUM = "there is no Chromium: apt-get install chromium"

# Set where a browser has to be there: then nothing is skipped, and the servers are all that there can be.
REQUIRED = bool(os.environ.get("JACMON_BROWSER"))


@dataclass
class Visit:
    """A page, the frame with our content in it, and what the browser complained of."""

    page: Any
    content: Any
    complaints: list[str]

    def shown(self) -> None:
        self.content.locator("main[data-measured]").wait_for(timeout=60_000)


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """Start the browser."""
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, headless=True, args=FLAGS, viewport={"width": 1440, "height": 1400}
        )
        yield context
        context.close()


@contextlib.contextmanager
def tensorboard(logs: Path, *words: str) -> Iterator[str]:
    """Start TensorBoard on a directory, and return its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--port", "0", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603 - our own words
    try:
        yield address(process)
    finally:
        process.terminate()
        process.communicate()


def address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        found = re.search(r" at (http://\S+)", line)
        if found:
            return found[1]
    raise AssertionError("TensorBoard has not started")


def visit(browser: Any, url: str, *, in_frame: bool = True) -> Visit:
    page = browser.new_page()
    found = Visit(page, page.frame_locator("iframe") if in_frame else page, [])
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    page.on("console", lambda message: note(found.complaints, message))
    page.goto(url)
    found.shown()
    return found


def note(complaints: list[str], message: Any) -> None:
    # TensorBoard's own pages ask for icons that are not there below a prefix.
    own = "keras_jacmon" in message.location.get("url", "") or "Content Security Policy" in message.text
    if message.type == "error" and (own or message.location.get("url", "").startswith("file:")):
        complaints.append(message.text)
