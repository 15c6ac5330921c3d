"""The pictures of the README: small, and what makes them so."""

import importlib
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
small_png = importlib.import_module("small_png")


def filtered_png(path: Path, pixels: np.ndarray, kinds: list[int]) -> None:
    """A PNG whose lines are filtered one by one as the standard says."""
    high, wide, depth = pixels.shape
    lines = b""
    for y in range(high):
        above = pixels[y - 1] if y else np.zeros_like(pixels[0])
        line = np.zeros_like(pixels[0])
        for x in range(wide):
            for c in range(depth):
                left = int(pixels[y, x - 1, c]) if x else 0
                corner = int(above[x - 1, c]) if x else 0
                up = int(above[x, c])
                guess = left + up - corner
                paeth = min((left, up, corner), key=lambda value: abs(guess - value))
                expected = (0, left, up, (left + up) // 2, paeth)[kinds[y]]
                line[x, c] = (int(pixels[y, x, c]) - expected) % 256
        lines += bytes([kinds[y]]) + line.tobytes()
    header = struct.pack(">IIBBBBB", wide, high, 8, {3: 2, 4: 6}[depth], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize("depth", [3, 4])
def test_every_filter_is_undone(tmp_path, depth):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, depth), dtype=np.uint8)
    filtered_png(tmp_path / "a.png", pixels, [0, 1, 2, 3, 4])
    assert (small_png.read_pixels(tmp_path / "a.png") == pixels[..., :3]).all()


def test_a_palette_keeps_what_is_common_and_comes_near_the_rest(tmp_path):
    pixels = np.full((40, 40, 3), 250, np.uint8)
    pixels[0] = np.arange(40)[:, None] * 6
    pixels[1:11] = np.random.default_rng(0).integers(100, 140, (10, 40, 3))
    small_png.write_with_palette(tmp_path / "a.png", pixels)
    data = (tmp_path / "a.png").read_bytes()
    palette = data[data.index(b"PLTE") - 4 :]
    assert struct.unpack(">I", palette[:4])[0] == 3 * 256
    (length,) = struct.unpack(">I", data[data.index(b"IDAT") - 4 : data.index(b"IDAT")])
    start = data.index(b"IDAT") + 4
    lines = np.frombuffer(zlib.decompress(data[start : start + length]), np.uint8).reshape(40, 41)
    colours = np.frombuffer(palette[8 : 8 + 3 * 256], np.uint8).reshape(256, 3)
    shown = colours[lines[:, 1:]]
    assert (shown[11:] == 250).all(), "the common colour is exact"
    apart = abs(shown[1:11].astype(int) - pixels[1:11]).max(axis=-1)
    assert np.median(apart) <= 8


@pytest.mark.parametrize("name", ["report.png", "report-dark.png"])
def test_the_pictures_are_small(name):
    assert (ROOT / "docs" / name).stat().st_size < 200_000
