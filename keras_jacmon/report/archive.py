"""Dicts of arrays and plain values in a file, and as JSON knows them. Nothing is ever pickled."""

import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_FORMAT = 1

# In a file, the member with everything that is no array.
_REST = "report"


def plain(value: Any) -> Any:
    """A value in what JSON knows.

    NaN and inf become the strings `"nan"`, `"inf"` and `"-inf"`, complex numbers pairs of real and imaginary part, and
    sets are sorted.
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


def write(path: str | os.PathLike[str], records: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes records of arrays, dicts of them, strings, numbers, tuples and frozensets to an `.npz` file.

    Raises:
        OSError: If the file cannot be written; one that was there stays as it was.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}

    def packed(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            arrays[f"array_{len(arrays)}"] = value
            return {"array": f"array_{len(arrays) - 1}"}
        if isinstance(value, Mapping):
            return {"dict": {key: packed(part) for key, part in value.items()}}
        if isinstance(value, (tuple, frozenset)):
            return {type(value).__name__: sorted(value) if isinstance(value, frozenset) else list(value)}
        return {"value": value}

    rest = {name: {field: packed(value) for field, value in record.items()} for name, record in records.items()}
    arrays[_REST] = np.array(json.dumps({"format": _FORMAT, "records": rest}))
    # Beside it, and then in one step to its place: a full disk leaves no half of a report.
    beside = Path(path).parent / f".{Path(path).name}.{uuid.uuid4().hex}"
    try:
        with beside.open("xb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Reads the records that `write` has written.

    Raises:
        OSError: If there is no such file.
        ValueError: If it was not written by `write`, or by a later version of it.
    """
    with Path(path).open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                found = json.loads(str(arrays[_REST][()]))
                if found["format"] == _FORMAT:
                    return {
                        name: {field: _unpacked(value, arrays) for field, value in record.items()}
                        for name, record in found["records"].items()
                    }
                reason = f"format {found['format']}"
        # ZIP, zlib, NumPy's headers and json fail in many ways each; ValueError is NumPy's for a pickle.
        except Exception as error:  # noqa: BLE001
            reason = f"{type(error).__name__}: {error}"
    raise ValueError(
        "Invalid value for argument `path`. Expected a file that `Report.save` of this version has written. Received: "
        f"path={os.fspath(path)!r} ({reason})"
    )


def _unpacked(packed: Any, arrays: Any) -> Any:
    ((kind, value),) = packed.items()
    if kind == "dict":
        return {key: _unpacked(part, arrays) for key, part in value.items()}
    return {"array": arrays.__getitem__, "tuple": tuple, "frozenset": frozenset, "value": lambda x: x}[kind](value)
