"""Archive of records of arrays and plain values: an `.npz` file without pickle, and JSON."""

import itertools
import json
import math
import os
import re
import zipfile
from collections.abc import Collection, Mapping
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from keras_jacmon.errors import invalid_argument, message_of
from keras_jacmon.report import files

# Raised with each change of the records' fields: a file of another format is refused.
_FORMAT = 4

# The member of a file that holds everything except the arrays, and the names of the arrays.
_REST = "report"


def plain(value: Any) -> Any:
    """Returns a value in types that JSON has.

    NaN and inf become the strings `"nan"`, `"inf"` and `"-inf"`, complex numbers pairs of real and imaginary part, and
    sets are sorted.

    Args:
        value: Mapping, tuple, list, frozenset, array, string or number, nested at will.
    """
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(part) for part in value]
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, np.ndarray):
        parts = np.stack([value.real, value.imag], axis=-1) if np.iscomplexobj(value) else value
        return plain(parts.tolist())
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write(path: str | os.PathLike[str], records: Mapping[str, Mapping[str, Any]]) -> str:
    """Writes records to an `.npz` file, whose members have names such as `lstm/values/joint/variance`.

    Args:
        path: String or path of the file, see `files.write`.
        records: Mapping from names to mappings from fields to arrays, dicts of them, strings, numbers, tuples and
            frozensets.

    Returns:
        String, the path of the file.

    Raises:
        OSError: If the file cannot be written; a regular one that was there stays as it was.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    rest = {
        name: {field: _packed(value, f"{name}/{field}", arrays) for field, value in record.items()}
        for name, record in records.items()
    }
    arrays[_REST] = np.array(json.dumps({"format": _FORMAT, "records": rest}))
    return files.write(path, ".npz", lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))


def read(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Reads the records that `write` has written.

    Args:
        path: String or path of the file.

    Raises:
        OSError: If there is no such file.
        ValueError: If it was not written by `write`, or by another version of it.
    """
    with files.existing(path, ".npz").open("rb") as file:
        try:
            return _records_in(file)
        # ZIP, zlib, NumPy's headers and json fail in many ways each.
        except Exception as error:  # noqa: BLE001
            reason = message_of(error)
    raise invalid_argument(
        "path",
        "a file that `Report.save` of this version has written",
        f"path={os.fspath(path)!r} ({reason})",
    )


def _records_in(file: IO[bytes]) -> dict[str, dict[str, Any]]:
    if not zipfile.is_zipfile(file):
        raise ValueError("it is no .npz file")
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        if _REST not in arrays:
            raise ValueError("it holds no report")
        found = json.loads(str(arrays[_REST][()]))
        if found["format"] != _FORMAT:
            raise ValueError(f"format {found['format']}")
        return {
            name: {field: _unpacked(value, arrays) for field, value in record.items()}
            for name, record in found["records"].items()
        }


def _packed(value: Any, name: str, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Returns a value as JSON of its type and content; an array is put to the others, under its name or one like it."""
    if isinstance(value, np.ndarray):
        member = _member(name, arrays)
        arrays[member] = value
        return {"array": member}
    if isinstance(value, Mapping):
        return {"dict": {key: _packed(part, f"{name}/{key}", arrays) for key, part in value.items()}}
    if isinstance(value, (tuple, frozenset)):
        return {type(value).__name__: sorted(value) if isinstance(value, frozenset) else list(value)}
    return {"value": value}


def _member(name: str, taken: Collection[str]) -> str:
    """Returns the name of a member of a ZIP file, where not every character is safe."""
    safe = re.sub(r"[^\w/:.-]", "_", name)
    numbered = (f"{safe}_{number}" for number in itertools.count(1))
    return next(candidate for candidate in itertools.chain([safe], numbered) if candidate not in taken)


def _unpacked(packed: Any, arrays: Any) -> Any:
    ((kind, value),) = packed.items()
    if kind == "dict":
        return {key: _unpacked(part, arrays) for key, part in value.items()}
    return {"array": arrays.__getitem__, "tuple": tuple, "frozenset": frozenset, "value": lambda x: x}[kind](value)
