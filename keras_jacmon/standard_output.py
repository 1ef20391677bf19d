"""Standard output of the commands, which may be closed, full, or of few characters."""

import argparse
import os
import sys
from pathlib import Path

from keras_jacmon.errors import message_of


def write_line(text: str, parser: argparse.ArgumentParser) -> bool:
    """Writes a line to standard output, at once, so that a failure is met here and not when Python ends.

    A character that the terminal does not know becomes a question mark.

    Args:
        text: String, one line or several, without the last line's end.
        parser: The parser of the command, which ends it with exit code 2 and a sentence where nothing can be written.

    Returns:
        True; False if the reader has seen enough, as `head` has.
    """
    try:
        _write(text)
    except BrokenPipeError:
        return False
    except OSError as error:
        parser.exit(2, f"{parser.prog}: error: standard output cannot be written to: {message_of(error)}\n")
    return True


def _write(text: str) -> None:
    out = sys.stdout
    if out is None:
        raise OSError("it is closed")
    encoding = out.encoding or "utf-8"
    try:
        out.write(f"{text}\n".encode(encoding, "replace").decode(encoding))
        out.flush()
    except OSError:
        # What is still in the buffer would fail again when Python ends.
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), out.fileno())
        raise
