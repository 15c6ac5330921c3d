"""Pictures of pages made small: a PNG of many colours written again with a palette of 256."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def make_small(path: Path) -> None:
    """Writes an 8-bit PNG again in place, in its 256 commonest colours, alpha left out."""
    write_with_palette(path, read_pixels(path))


def read_pixels(path: Path) -> NDArray[np.uint8]:
    """The pixels of an 8-bit PNG without interlace as red, green and blue, [height, width, 3]."""
    data, packed, header = path.read_bytes()[len(_SIGNATURE) :], b"", b""
    while data:
        (length,), kind = struct.unpack(">I", data[:4]), data[4:8]
        body, data = data[8 : 8 + length], data[12 + length :]
        if kind == b"IHDR":
            header = body
        elif kind == b"IDAT":
            packed += body
    wide, high, _, colours = struct.unpack(">IIBB", header[:10])
    depth = {2: 3, 6: 4}[colours]
    lines = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(high, 1 + wide * depth)
    rows = np.zeros((high + 1, wide, depth), np.uint8)
    for y, line in enumerate(lines):
        rows[y + 1] = _unfiltered(int(line[0]), line[1:].reshape(wide, depth), rows[y])
    return rows[1:, :, :3]


def write_with_palette(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Writes pixels as a PNG of at most 256 colours, every other one as the nearest of these."""
    high, wide, _ = pixels.shape
    packed = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    colours, inverse, counts = np.unique(packed, return_inverse=True, return_counts=True)
    kept = colours[np.argsort(-counts, kind="stable")[:256]]
    apart = _rgb(colours)[:, None, :] - _rgb(kept)[None, :, :]
    nearest = (apart * apart).sum(-1).argmin(-1).astype(np.uint8)
    lines = np.zeros((high, 1 + wide), np.uint8)
    lines[:, 1:] = nearest[inverse].reshape(high, wide)
    header = struct.pack(">IIBBBBB", wide, high, 8, 3, 0, 0, 0)
    palette = _rgb(kept).astype(np.uint8).tobytes()
    body = zlib.compress(lines.tobytes(), 9)
    chunks = ((b"IHDR", header), (b"PLTE", palette), (b"IDAT", body), (b"IEND", b""))
    path.write_bytes(_SIGNATURE + b"".join(_chunk(kind, data) for kind, data in chunks))


def _rgb(packed: NDArray[np.uint32]) -> NDArray[np.int32]:
    return np.stack([packed >> 16, packed >> 8 & 255, packed & 255], -1).astype(np.int32)


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def _unfiltered(kind: int, line: NDArray[np.uint8], above: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A line of pixels before one of PNG's five filters (ISO 15948, section 9)."""
    if kind == 0:
        return line
    if kind == 1:
        return np.cumsum(line, axis=0, dtype=np.uint8)
    if kind == 2:
        return line + above
    row, left, corner = line.astype(int), np.zeros(line.shape[1], int), np.zeros(line.shape[1], int)
    for x, up in enumerate(above.astype(int)):
        guess = (left + up) // 2 if kind == 3 else _nearest(left, up, corner)
        left, corner = (row[x] + guess) % 256, up
        row[x] = left
    return row.astype(np.uint8)


def _nearest(
    left: NDArray[np.int_], up: NDArray[np.int_], corner: NDArray[np.int_]
) -> NDArray[np.int_]:
    guess = left + up - corner
    of_left, of_up, of_corner = abs(guess - left), abs(guess - up), abs(guess - corner)
    first = (of_left <= of_up) & (of_left <= of_corner)
    return np.where(first, left, np.where(of_up <= of_corner, up, corner))
