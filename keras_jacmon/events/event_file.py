"""Event file: one file of TensorBoard's in a directory, whose failures are OSErrors."""

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_jacmon.errors import invalid_argument


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Raises TensorFlow's errors as OSError.

    A file that cannot grow is an `OutOfRangeError`, which Keras would take for the end of the data.
    """
    try:
        yield
    except tf.errors.OpError as error:
        raise OSError(error.message) from error


class EventFile:
    """An event file in a directory, begun when something is written.

    Args:
        directory: String, made if it is not there.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._writer: Any = None
        self._suffix = ""

    @_as_os_errors()
    def write(self, step: int, content: Callable[[], None]) -> None:
        """Calls a function that writes summaries, and flushes.

        Args:
            step: Integer, the step of the summaries.
            content: Callable without arguments.

        Raises:
            OSError: If TensorFlow cannot write, or the file is gone.
        """
        if self._writer is None:
            self._open()
        # `record_if`: another callback's `TensorBoard(update_freq=...)` switches summaries off between its own.
        with self._writer.as_default(np.int64(step)), tf.summary.record_if(True):  # noqa: FBT003 - positional only
            try:
                content()
                self._writer.flush()
            except tf.errors.OpError:
                # A writer that is open would fail again when the context ends, and stay everybody's default.
                with contextlib.suppress(OSError):
                    self.close()
                raise
        # A removed file is still open: TensorFlow would go on writing to nowhere, without an error.
        if not self._is_there():
            self.close()
            raise FileNotFoundError(f"the event file in {self._directory} was removed, and the events in it are lost")

    @_as_os_errors()
    def close(self) -> None:
        """Closes the file, if it is open.

        Raises:
            OSError: If TensorFlow cannot write the last of it.
        """
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def _open(self) -> None:
        _try_writing(self._directory)
        # The suffix tells the file from those that others write there.
        self._suffix = f".{uuid.uuid4().hex[:8]}.v2"
        self._writer = tf.summary.create_file_writer(self._directory, filename_suffix=self._suffix)

    def _is_there(self) -> bool:
        try:
            return any(name.endswith(self._suffix) for name in tf.io.gfile.listdir(self._directory))
        except tf.errors.NotFoundError:
            return False


def check_writable(log_dir: str | os.PathLike[str], directory: str) -> None:
    """Checks that files can be written, by writing one.

    Args:
        log_dir: String or path, as the user gave it.
        directory: String, the directory to write to; made if it is not there.

    Raises:
        ValueError: If not.
    """
    try:
        _try_writing(directory)
    except (tf.errors.OpError, OSError) as error:
        raise invalid_argument(
            "log_dir",
            "a directory that can be written to, or None to write no event files",
            f"log_dir={os.fspath(log_dir)!r} ({error})",
        ) from error


def _try_writing(directory: str) -> None:
    # TensorFlow's file system also knows buckets.
    tf.io.gfile.makedirs(directory)
    # A name of its own, since others may try at the same time.
    trial = tf.io.gfile.join(directory, f".keras_jacmon.{uuid.uuid4().hex}")
    try:
        with tf.io.gfile.GFile(trial, "w") as file:
            # An empty file fits on a full disk.
            file.write(" " * 4096)
    finally:
        if tf.io.gfile.exists(trial):
            tf.io.gfile.remove(trial)
