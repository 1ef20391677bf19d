"""A headless Chromium, and a TensorBoard that it visits."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import processes
from playwright.sync_api import sync_playwright
from tensorboard import program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

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
    ours, theirs = processes.CONTEXT.Pipe()
    server = processes.CONTEXT.Process(target=serve, args=(theirs, "--logdir", str(logs), "--port", "0", *words))
    server.start()
    theirs.close()
    with ours:
        yield ours.recv()
    server.join()


def serve(connection: Connection, *words: str) -> None:
    """Serve until the other end of the connection is closed."""
    board = program.TensorBoard()
    board.configure(argv=["tensorboard", *words])
    connection.send(board.launch())
    connection.poll(None)


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
