"""The header of a GGUF file: what its model is, without a weight being read."""

from __future__ import annotations

import functools
import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dominie.core.errors import InputError

SUFFIX = ".gguf"
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)
#: struct's letters by GGUF's number of a type; 8 is a text and 9 an array.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_TEXT, _ARRAY = 8, 9
_MOST = 2**20  # keys, and tensors; the largest models have some thousands
_MOST_BYTES = 2**28  # of a text
_SIZES = {"block_count": 10_000, "expert_count": 2**16, "_length": 2**24, "head_count": 2**24}
_FLOATS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


def is_gguf(path: str | Path) -> bool:
    """Whether a model's path is the name of a GGUF file."""
    return str(path).lower().endswith(SUFFIX)


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """What a GGUF file says of its model.

    Attributes:
        metadata: its keys with their values; of an array only how long it is.
        shapes: of its tensors by name, the innermost dimension first, as GGUF has them.
        types: of its tensors by name, as ggml calls them: `F32`, `Q4_K`.
    """

    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]

    @property
    def architecture(self) -> str:
        """The family, by llama.cpp's name for it."""
        return str(self.metadata["general.architecture"])

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def rounded(self) -> str | None:
        """The type that most rounded weights have, None if the file holds floats alone."""
        counts: Counter[str] = Counter()
        for name, kind in self.types.items():
            if kind not in _FLOATS and kind != "F64":
                counts[kind] += math.prod(self.shapes[name])
        return counts.most_common(1)[0][0] if counts else None

    @property
    def dtype(self) -> str:
        """The smallest of `fp32`, `bf16` and `fp16` that holds the weights as they are."""
        wide = {self.types[n] for n, shape in self.shapes.items() if len(shape) > 1}
        only = next(iter(wide)) if len(wide) == 1 else "F32"
        return _FLOATS.get(only, "fp32")


def check_package() -> None:
    """Refuse GGUF files if the package that reads them is not installed.

    Raises:
        InputError: says how to install it.
    """
    if find_spec("gguf") is None:
        raise InputError(
            "a model is a GGUF file, and the package that reads them is not installed",
            expected="the package gguf",
            do="pip install 'dominie[gguf]'",
        )


def read_header(path: str | Path) -> GgufHeader:
    """Read the header of a GGUF file, and check that the file is one whole model.

    Raises:
        InputError: no such file, no GGUF file, one that was cut off, a part of several, or one that
            is not a model; or the package gguf is missing.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(
            "there is no such GGUF file",
            where=str(path),
            found="a folder" if file.exists() else "nothing",
            do="correct the path",
        )
    check_package()
    stat = file.stat()
    return _checked(file.absolute(), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _checked(file: Path, size: int, _: int) -> GgufHeader:
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(
                "this is not a GGUF file",
                where=str(file),
                expected="a file that begins with GGUF",
                do="copy or download the file again",
            )
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                header, end = _Reader(content).header()
            except (struct.error, IndexError):
                raise _cut_off(file, size, None) from None
            except (ValueError, UnicodeDecodeError) as error:
                raise InputError(
                    "the header of the GGUF file cannot be read",
                    where=str(file),
                    found=str(error)[:200],
                    do="copy or download the file again; if it is newer than the package gguf, "
                    "install a newer one",
                ) from None
    _check_is_model(file, header)
    if end > size:
        raise _cut_off(file, size, end)
    return header


def _cut_off(file: Path, size: int, end: int | None) -> InputError:
    return InputError(
        "the GGUF file was cut off",
        where=str(file),
        expected=f"{end:,} bytes" if end else "a whole header",
        found=f"{size:,} bytes",
        do="copy or download the file again",
    )


def _check_is_model(file: Path, header: GgufHeader) -> None:
    split = header.metadata.get("split.count", 0)
    part = _PART.search(file.name)
    if part or (isinstance(split, int) and split > 1):
        count = int(part[1]) if part else split
        raise InputError(
            f"the GGUF file is one of {count} parts of a model",
            where=str(file),
            expected="a model in one file",
            do="join the parts: llama-gguf-split --merge FIRST-PART JOINED.gguf, of llama.cpp",
        )
    kind = header.metadata.get("general.type", "model")
    if kind != "model" or "general.architecture" not in header.metadata or not header.shapes:
        raise InputError(
            "the GGUF file holds no model",
            where=str(file),
            expected="general.type model, and weights",
            found=f"general.type {str(kind)[:40]}, {len(header.shapes)} tensors",
            do="name the file of the language model",
        )
    for key, value in header.metadata.items():
        most = next((most for part, most in _SIZES.items() if part in key), None)
        ours = key.startswith(f"{header.architecture}.") and isinstance(value, int)
        if ours and most and not 0 <= value <= most:
            raise InputError(
                "the GGUF file describes a model that nobody can load",
                where=f"{file}: {key}",
                expected=f"at most {most:,}",
                found=str(value),
                do="copy or download the file again",
            )


class _Reader:
    """Walks over a header; version 2 and 3 of the format, little-endian."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.position = content, 4

    def header(self) -> tuple[GgufHeader, int]:
        """The header, and how many bytes the file has to have."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format; 2 and 3 can be read")
        tensors, keys = self._scalar("Q"), self._scalar("Q")
        if tensors > _MOST or keys > _MOST:
            raise ValueError(f"{tensors:,} tensors and {keys:,} keys, more than any model has")
        metadata = {}
        for _ in range(keys):
            name = self._text()
            metadata[name] = self._value(self._scalar("I"))
        shapes, types, end = {}, {}, 0
        for _ in range(tensors):
            name, dimensions = self._text(), self._scalar("I")
            if dimensions > 8:
                raise ValueError(f"{name} has {dimensions} dimensions")
            shape = tuple(self._scalar("Q") for _ in range(dimensions))
            kind = GGMLQuantizationType(self._scalar("I"))
            block, width = GGML_QUANT_SIZES[kind]
            shapes[name], types[name] = shape, kind.name
            end = max(end, self._scalar("Q") + math.prod(shape) // block * width)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
            raise ValueError(f"an alignment of {alignment}")
        begin = -(-self.position // alignment) * alignment
        return GgufHeader(metadata=metadata, shapes=shapes, types=types), begin + end

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind != _ARRAY:
            return self._scalar(_letter(kind))
        inner, count = self._scalar("I"), self._scalar("Q")
        if inner == _TEXT:
            for _ in range(count):
                self._skip_text()
        else:
            self._skip(count * struct.calcsize(f"<{_letter(inner)}"))
        return count

    def _scalar(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self.content, self.position)
        self.position += struct.calcsize(f"<{letter}")
        return value

    def _text(self) -> str:
        begin = self._skip_text()
        return self.content[begin : self.position].decode("utf-8", "replace")

    def _skip_text(self) -> int:
        (size,) = struct.unpack_from("<Q", self.content, self.position)
        if size > _MOST_BYTES:
            raise ValueError(f"a text of {size:,} bytes")
        begin = self.position + 8
        self._skip(8 + size)
        return begin

    def _skip(self, size: int) -> None:
        self.position += size
        if self.position > len(self.content):
            raise IndexError


def _letter(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of type {kind}")
    return _SCALARS[kind]
