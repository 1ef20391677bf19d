"""Bytes of packed summaries, which the event writer writes and the dashboard reads.

It needs NumPy and the standard library alone.
"""

import json
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from keras_jacmon.dashboard.packed import Curve, FloatArray, Packed

# Raised with each change of the layout of the bytes: a summary of another format is refused. The header may gain
# entries, which a reader must not rely on.
FORMAT = 1

# Bytes kept of a mean (relative error up to 2^-16) and of the other numbers (up to 2^-8).
_FINE, _COARSE = 3, 2

_Part = TypeVar("_Part")


def pack(packed: Packed) -> npt.NDArray[np.uint8]:
    """Returns the bytes of a packed summary.

    Args:
        packed: `Packed`.
    """
    curves = {**packed.curves, **packed.flows}
    header = {
        **packed.header,
        "curves": [[key, *_shape(curve)] for key, curve in packed.curves.items()],
        "flows": [[key, *_shape(curve)] for key, curve in packed.flows.items()],
        "spectra": [[key, *array.shape, int(np.iscomplexobj(array))] for key, array in packed.spectra.items()],
    }
    planes = [plane for curve in curves.values() for plane in _planes(curve)]
    planes += [_encoded(_parts(array), _COARSE).tobytes() for array in packed.spectra.values()]
    # The list of layers needs the headers alone.
    head = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    body = zlib.compress(b"".join(planes), 9)
    content = bytes([FORMAT]) + len(head).to_bytes(4, "little") + head + body
    return np.frombuffer(content, np.uint8)


def read_header(content: npt.NDArray[Any]) -> dict[str, Any]:
    """Returns the header of packed bytes.

    Args:
        content: uint8 array, the result of `pack`.

    Raises:
        ValueError: If they are no packed summary, or one of another format.
    """
    head, _ = _split(content)
    return _header(head)


def unpack(content: npt.NDArray[Any], keys: Collection[str] | None = None) -> Packed:
    """Returns the packed summary of bytes.

    Args:
        content: uint8 array, the result of `pack`.
        keys: Keys of the curves, flows and spectra that are wanted. Defaults to None, for all.

    Raises:
        ValueError: If they are no packed summary, or one of another format.
    """
    head, body = _split(content)
    header = _header(head)
    try:
        planes = _Planes(zlib.decompress(body))
        curves = _chosen(header.pop("curves"), keys, planes.one_curve, planes.skip_curve)
        flows = _chosen(header.pop("flows"), keys, planes.one_curve, planes.skip_curve)
        spectra = _chosen(header.pop("spectra"), keys, planes.spectrum, planes.skip_spectrum)
    except (zlib.error, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"a packed summary is damaged: {error}") from error
    return Packed(header, curves, flows, spectra)


def unpack_curves(contents: Sequence[npt.NDArray[Any]], key: str) -> list[tuple[npt.NDArray[np.int64], Curve]]:
    """Returns a curve out of many packed summaries, unpacked at once.

    Args:
        contents: uint8 arrays, results of `pack`.
        key: String, a key of the curves; summaries without it are left out.

    Returns:
        List of pairs, one for each shape of the curve: the places in `contents`, and a `Curve` whose arrays have a
        first axis for these places, with the sums of the counts of NaN and inf.

    Raises:
        ValueError: If one of them is no packed summary, or one of another format.
    """
    groups: dict[tuple[int, int, int], list[tuple[int, bytes, int, int]]] = {}
    try:
        for place, content in enumerate(contents):
            for size, planes, nan, inf in _curve_planes(content, key):
                groups.setdefault(size, []).append((place, planes, nan, inf))
        return [_unpacked_group(size, members) for size, members in groups.items()]
    except (zlib.error, KeyError, TypeError) as error:
        raise ValueError(f"a packed summary is damaged: {error}") from error


def _curve_planes(content: npt.NDArray[Any], key: str) -> Iterator[tuple[tuple[int, int, int], bytes, int, int]]:
    """Yields the sizes of the curve of a key, its bytes and its counts of NaN and inf."""
    head, body = _split(content)
    begin = 0
    for name, bins, count, length, nan, inf in _header(head)["curves"]:
        end = begin + _curve_size(bins, count, length)
        if name == key:
            # What comes after the curve stays compressed.
            yield (bins, count, length), zlib.decompressobj().decompress(body, end)[begin:], nan, inf
        begin = end


def _unpacked_group(
    size: tuple[int, int, int], members: Sequence[tuple[int, bytes, int, int]]
) -> tuple[npt.NDArray[np.int64], Curve]:
    places, planes, nan, inf = zip(*members, strict=True)
    return np.array(places), _Planes(b"".join(planes), len(members)).curve(*size, sum(nan), sum(inf))


def _chosen(
    shapes: list[list[Any]], keys: Collection[str] | None, read: Callable[..., _Part], skip: Callable[..., None]
) -> dict[str, _Part]:
    """Returns the parts of a body that are wanted, by key; all of them are passed, in order."""
    found = {}
    for key, *shape in shapes:
        if keys is None or key in keys:
            found[key] = read(*shape)
        else:
            skip(*shape)
    return found


def _split(content: npt.NDArray[Any]) -> tuple[bytes, bytes]:
    found = content.tobytes() if content.dtype == np.uint8 else b""
    if found[:1] != bytes([FORMAT]):
        raise ValueError(f"expected a packed summary of format {FORMAT}, found the first byte {found[:1]!r}")
    end = 5 + int.from_bytes(found[1:5], "little")
    return found[5:end], found[end:]


def _header(head: bytes) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(zlib.decompress(head))
    except (zlib.error, ValueError) as error:
        raise ValueError(f"the header of a packed summary is damaged: {error}") from error
    return header


def _shape(curve: Curve) -> list[int]:
    return [curve.mean.size, int(curve.present.sum()), curve.length, curve.nan, curve.inf]


def _planes(curve: Curve) -> Iterator[bytes]:
    """Yields the bytes of a curve: which bins are present, then their numbers."""
    present = curve.present
    yield np.packbits(present).tobytes()
    mean = _encoded(curve.mean[present], _FINE)
    # Neighbours are alike: what zlib sees are small differences, byte by byte.
    yield _differences(mean).tobytes()
    others = [curve.low, curve.high, *([curve.least, curve.greatest] if curve.is_binned else [])]
    # What the reader knows of the mean.
    base = _codes(_floats(_codes(curve.mean[present], _FINE), _FINE), _COARSE)
    for other in others:
        yield _bytes(_codes(other[present], _COARSE) - base, _COARSE).tobytes()


class _Planes:
    """The bytes of bodies of one shape, taken one array after another, with a first axis for the bodies.

    Args:
        content: Bytes, the bodies one after another.
        bodies: Integer, the number of bodies. Defaults to 1.
    """

    def __init__(self, content: bytes, bodies: int = 1) -> None:
        self._content = np.frombuffer(content, np.uint8).reshape(bodies, -1)
        self._at = 0

    def _take(self, size: int) -> npt.NDArray[np.uint8]:
        taken = self._content[:, self._at : self._at + size]
        self._at += size
        if taken.shape[1] != size:
            raise ValueError("it ends too early")
        return taken

    def skip_curve(self, *shape: int) -> None:
        self._at += _curve_size(*shape)

    def skip_spectrum(self, *shape: int) -> None:
        self._at += _spectrum_size(*shape)

    def one_curve(self, *shape: int) -> Curve:
        return self.curve(*shape).first()

    def curve(self, bins: int, count: int, length: int, nan: int, inf: int) -> Curve:
        present = np.unpackbits(self._take(-(-bins // 8)), axis=1, count=bins).astype(bool)
        codes = np.cumsum(_numbers(self._take(_FINE * count), _FINE), axis=1, dtype=np.uint32) & _mask(_FINE)
        mean = _floats(codes, _FINE)
        base = _codes(mean, _COARSE)

        def other() -> FloatArray:
            found = (_numbers(self._take(_COARSE * count), _COARSE) + base) & _mask(_COARSE)
            return _spread(_floats(found, _COARSE), present)

        low, high = other(), other()
        whole = _spread(mean, present)
        least, greatest = (other(), other()) if bins < length else (whole, whole)
        return Curve(whole, low, high, least, greatest, present, length, nan, inf)

    def spectrum(self, points: int, values: int, is_complex: int) -> npt.NDArray[Any]:
        parts = _floats(_numbers(self._take(_spectrum_size(points, values, is_complex)), _COARSE), _COARSE)
        (parts,) = parts.view(np.complex64) if is_complex else parts
        return parts.reshape(points, values)


def _curve_size(bins: int, count: int, length: int, *_: int) -> int:
    return -(-bins // 8) + count * (_FINE + _COARSE * (4 if bins < length else 2))


def _spectrum_size(points: int, values: int, is_complex: int) -> int:
    return _COARSE * points * values * (1 + is_complex)


def _parts(array: npt.NDArray[Any]) -> FloatArray:
    """Returns the numbers of a spectrum one after another, of complex ones the real and imaginary parts in turn."""
    kind = np.complex64 if np.iscomplexobj(array) else np.float32
    return np.ascontiguousarray(array.ravel(), kind).view(np.float32)


def _mask(width: int) -> np.uint32:
    return np.uint32(2 ** (8 * width) - 1)


def _codes(values: FloatArray, width: int) -> npt.NDArray[np.uint32]:
    """Returns the first bytes of float32 numbers as integers, rounded; finite numbers stay finite."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    shift = 32 - 8 * width
    rounded = bits + np.uint32(1 << (shift - 1))
    # NaN must not become inf, nor the greatest number, nor -NaN overflow.
    safe = np.isfinite(values) & np.isfinite(rounded.view(np.float32))
    return np.where(safe, rounded, np.where(np.isnan(values), np.uint32(0x7FC00000), bits)) >> np.uint32(shift)


def _floats(codes: npt.NDArray[np.uint32], width: int) -> FloatArray:
    return (codes << np.uint32(32 - 8 * width)).astype(np.uint32).view(np.float32)


def _encoded(values: FloatArray, width: int) -> npt.NDArray[np.uint8]:
    return _bytes(_codes(values, width), width)


def _differences(encoded: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    codes = _numbers(encoded[None], _FINE)[0]
    return _bytes(np.diff(codes, prepend=np.uint32(0)), _FINE)


def _bytes(codes: npt.NDArray[np.uint32], width: int) -> npt.NDArray[np.uint8]:
    """Returns the lowest bytes of integers, all first bytes before all second ones."""
    return np.ascontiguousarray(codes.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width].T).ravel()


def _numbers(planes: npt.NDArray[np.uint8], width: int) -> npt.NDArray[np.uint32]:
    """Returns the integers of bytes, with the first axis of the bytes."""
    bodies = len(planes)
    numbers = np.zeros((bodies, planes.shape[1] // width, 4), np.uint8)
    numbers[..., :width] = planes.reshape(bodies, width, -1).swapaxes(1, 2)
    return numbers.view("<u4")[..., 0].astype(np.uint32)


def _spread(values: FloatArray, present: npt.NDArray[np.bool_]) -> FloatArray:
    """Returns the values at their bins, with NaN where nothing was measured."""
    if present.all():
        return values
    whole = np.full(present.shape, np.nan, np.float32)
    whole[present] = values.ravel()
    return whole
