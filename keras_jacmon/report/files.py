"""Files that are written at once, through the links, devices and modes that are there."""

import errno
import io
import os
import stat
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def write(path: str | os.PathLike[str], ending: str, fill: Callable[[IO[bytes]], Any]) -> str:
    """Writes a file: all of it, or nothing.

    A link stays a link, and the file that it points to is written. A file that is there keeps its mode. A device or a
    pipe is written to.

    Args:
        path: String or path of the file. If it does not end in `ending`, and no file of this name is there, the ending
            is added.
        ending: String, such as `".npz"`.
        fill: Function that writes the content to a binary file.

    Returns:
        String, the path of the file, with the ending if that was added.

    Raises:
        OSError: If the file cannot be written; a regular one that was there stays as it was, unless it has several
            names or its directory cannot be written to. The error names the path.
    """
    given = Path(path)
    if given.name and not given.name.endswith(ending) and (given.is_dir() or not os.path.lexists(given)):
        given = given.with_name(f"{given.name}{ending}")
    try:
        # What a link points to, or the file itself. Before Python 3.13 a loop of links is no OSError.
        try:
            target = given.resolve()
        except RuntimeError as error:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from error
        if _is_filled_in_place(given, target):
            content = io.BytesIO()
            fill(content)
            given.write_bytes(content.getvalue())
        else:
            _replace(target, fill)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), os.fspath(given)) from error
    return os.fspath(given)


def existing(path: str | os.PathLike[str], ending: str) -> Path:
    """Returns the path of the file that `write` has written under a path.

    Args:
        path: String or path, as `write` was given it.
        ending: String, such as `".npz"`.
    """
    given = Path(path)
    full = given.with_name(f"{given.name}{ending}") if given.name else given
    return full if full.exists() and not given.is_file() else given


def _is_filled_in_place(given: Path, target: Path) -> bool:
    """Returns True if another file in the place of the one that is there would not be what its owner means by it."""
    # Behind a name such as /dev/stdout is what a process has open, and not what has a name of its own.
    if given.is_relative_to("/dev") or given.is_relative_to("/proc"):
        return True
    if not target.exists():
        return False
    status = target.stat()
    return not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or not os.access(target.parent, os.W_OK)


def _replace(target: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file beside another one, and moves it to its place in one step: a full disk leaves no half of it."""
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    # As short as can be, since a file system bounds the length of a name.
    beside = target.parent / f".{uuid.uuid4().hex}"
    # Nobody else may read what goes to a private file, at no moment.
    created = 0o666 if mode is None else 0o600
    try:
        with open(beside, "xb", opener=lambda name, flags: os.open(name, flags, created)) as file:
            fill(file)
        if mode is not None:
            beside.chmod(mode)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
