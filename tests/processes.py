"""Processes of their own: forks of one that has imported TensorFlow, which takes seconds, and has done nothing yet."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import textwrap
import warnings
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["keras", "tensorflow"])


def run(
    script: str, *arguments: str, environment: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Runs a script as `python -c` does, in which a `UserWarning` is an error."""
    with tempfile.TemporaryDirectory() as directory:
        out, err = (Path(directory) / name for name in ("out", "err"))
        process = CONTEXT.Process(target=_execute, args=(script, arguments, environment or {}, out, err))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(script, process.exitcode, out.read_text(), err.read_text())


def _execute(script: str, arguments: tuple[str, ...], environment: dict[str, str], out: Path, err: Path) -> None:
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    warnings.simplefilter("error", UserWarning)
    # TensorBoard before 2.21 imports it.
    warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
    exec(compile(textwrap.dedent(script), "<script>", "exec"), {"__name__": "__main__"})  # noqa: S102 - the script is ours
