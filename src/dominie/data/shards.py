"""Byte strings by key, in memory-mapped Arrow files with checksums.

A folder holds `shard-<checksum>.arrow` files: Arrow IPC streams, which `datasets.Dataset.from_file`
opens as they are, with the columns `key` (16 bytes), `tokens` (int32) and `code` (binary). A shard
is named by the hash of its bytes and never changes, so that any number of processes may add shards
to a folder at once, and a shard that is not its name is damaged.

While a shard is written it is called `.writing-…`, one record batch for each call of `add`, handed
to the system at once. What a killed process leaves is recovered by the next writer: at most the
rows in flight are lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from dominie.core.errors import InputError, RunError
from dominie.core.io import fsync

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEY_BYTES = 16
SHARD_BYTES = 2**28

_SCHEMA = pa.schema([("key", pa.binary(KEY_BYTES)), ("tokens", pa.int32()), ("code", pa.binary())])
_WRITING = ".writing-"
_OWNER = b"owner"  # the mark in the metadata of a shard's schema
#: What Arrow raises of bytes that it did not write: names that are no text, sizes beyond memory.
_UNREADABLE = (pa.ArrowException, OSError, EOFError, ValueError, MemoryError)


class Entry(NamedTuple):
    """A row of a shard: its key, the supervised tokens it is of, and the bytes."""

    key: bytes
    tokens: int
    code: bytes


def shard_files(folder: Path) -> list[Path]:
    """The finished shards of a folder."""
    return sorted(folder.glob("shard-*.arrow"))


def damaged_shards(folder: Path, trusted: Collection[str] = ()) -> list[Path]:
    """The shards whose bytes are not what was written. Reads all but those that are trusted."""
    files = (path for path in shard_files(folder) if path.name not in trusted)
    return [path for path in files if path.name != _name(path)]


class Shards:
    """The rows of a folder by key, read where they lie.

    Every byte is read once, when the folder is opened, and compared with the shard's checksum:
    two to five seconds for a gigabyte.

    Args:
        folder: where the shards are.
        remedy: what to do about a damaged one, for the message.
        trusted: names of shards that this process has compared before.
        owner: what the shards have to be marked with.

    Raises:
        InputError: a shard is damaged, or of another owner.
    """

    def __init__(
        self, folder: Path, *, remedy: str, trusted: Collection[str] = (), owner: bytes = b""
    ) -> None:
        self.folder = folder
        files = shard_files(folder)
        damaged = damaged_shards(folder, trusted)
        if damaged:
            raise InputError(
                "a shard is damaged: its bytes are not those that were written",
                where=str(damaged[0]),
                found=f"{len(damaged)} of {len(files)} shards with another checksum",
                do=remedy,
            )
        self._columns: list[_Columns] = []
        self.checked = frozenset(path.name for path in files)
        for path in files:
            self._columns += _mapped(path, remedy, owner)
        starts = np.cumsum([0, *(len(columns.keys) for columns in self._columns)])
        self._starts = starts.astype(np.int64)
        prefixes = [columns.keys[:, :8].copy().view(np.uint64)[:, 0] for columns in self._columns]
        every: NDArray[np.uint64] = np.concatenate([np.zeros(0, np.uint64), *prefixes])
        self._order = np.argsort(every, kind="stable")
        self._prefixes = every[self._order]

    def __len__(self) -> int:
        return len(self._prefixes)

    def __contains__(self, key: bytes) -> bool:
        return self._place(key) is not None

    def get(self, key: bytes) -> Entry | None:
        """The row of a key, None if there is none."""
        place = self._place(key)
        return None if place is None else place[0].entry(place[1])

    @property
    def tokens(self) -> int:
        """Supervised tokens of all rows."""
        return sum(int(columns.tokens.sum()) for columns in self._columns)

    @property
    def code_bytes(self) -> int:
        """Bytes of all codes."""
        return sum(int(c.offsets[-1] - c.offsets[0]) for c in self._columns)

    def _place(self, key: bytes) -> tuple[_Columns, int] | None:
        prefix = np.frombuffer(key[:8], np.uint64)[0]
        at = int(np.searchsorted(self._prefixes, prefix))
        while at < len(self._prefixes) and self._prefixes[at] == prefix:
            row = int(self._order[at])
            number = int(np.searchsorted(self._starts, row, side="right")) - 1
            columns, index = self._columns[number], row - int(self._starts[number])
            if columns.keys[index].tobytes() == key:
                return columns, index
            at += 1
        return None


class _Columns:
    """The columns of one record batch as numpy views of the mapped file."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        keys, tokens, codes = batch.columns
        flat = np.frombuffer(keys.buffers()[1], np.uint8)
        self.keys: NDArray[np.uint8] = flat[: len(batch) * KEY_BYTES].reshape(-1, KEY_BYTES)
        counts = np.frombuffer(tokens.buffers()[1], np.int32)  # `to_numpy` would import pandas
        self.tokens: NDArray[np.int32] = counts[: len(batch)]
        _, offsets, data = codes.buffers()
        self.offsets: NDArray[np.int32] = np.frombuffer(offsets, np.int32)[: len(batch) + 1]
        self.data = data

    def entry(self, index: int) -> Entry:
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        code = self.data[start:end].to_pybytes() if self.data is not None else b""
        return Entry(self.keys[index].tobytes(), int(self.tokens[index]), code)


def _checked(batch: pa.RecordBatch) -> _Columns:
    """The columns of a record batch, once nothing in it leads out of its bytes.

    Raises:
        ValueError: something does.
    """
    batch.validate(full=True)
    if any(column.null_count for column in batch.columns):
        raise ValueError("a row has no value")
    return _Columns(batch)


def _mapped(path: Path, remedy: str, owner: bytes) -> list[_Columns]:
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as batches:
            mark = (batches.schema.metadata or {}).get(_OWNER, b"")
            if batches.schema.equals(_SCHEMA) and mark == owner:
                return [_checked(batch) for batch in batches if len(batch)]
            columns = f"the columns {', '.join(batches.schema.names)}"
            found = f"{columns} of the cache {mark.decode(errors='replace') or '?'}"
    except _UNREADABLE as error:
        found = " ".join(str(error).split())[:200]
    raise InputError(
        "this is not a shard of this cache",
        where=str(path),
        expected=f"the columns {', '.join(_SCHEMA.names)} of the cache {owner.decode() or '?'}",
        found=found,
        do=f"move it away; {remedy}",
    )


class ShardWriter:
    """Adds shards to a folder; a context manager, which closes the last one whatever happens.

    Args:
        folder: made if it is missing.
        shard_bytes: of code, after which another shard is begun.
        owner: what the shards are marked with, see `Shards`.

    Raises:
        RunError: the disk does not take it.
    """

    def __init__(self, folder: Path, *, shard_bytes: int = SHARD_BYTES, owner: bytes = b"") -> None:
        self.folder, self.shard_bytes, self.owner = folder, shard_bytes, owner
        self._open: _OpenShard | None = None
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, entries: Sequence[Entry]) -> None:
        """Write rows, as one record batch. From here on they outlive this process."""
        if not entries:
            return
        with _writing(self.folder):
            self._open = self._open or _OpenShard(self.folder, self.owner)
            self._open.add(entries)
            if self._open.bytes >= self.shard_bytes:
                self.close()

    def close(self) -> None:
        """Give the shard that is being written its name."""
        open_shard, self._open = self._open, None
        if open_shard is not None:
            with _writing(self.folder):
                open_shard.finish()


class _OpenShard:
    """A shard that is being written, locked for as long as its writer lives."""

    def __init__(self, folder: Path, owner: bytes) -> None:
        self.path = folder / f"{_WRITING}{uuid.uuid4().hex}"
        self.bytes = 0
        self._file = self.path.open("xb")
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self._stream = pa.ipc.new_stream(self._file, _SCHEMA.with_metadata({_OWNER: owner}))
        self._is_whole = True

    def add(self, entries: Sequence[Entry]) -> None:
        self._is_whole = False
        keys, tokens, codes = zip(*entries, strict=True)
        columns = [
            pa.array(keys, pa.binary(KEY_BYTES)),
            pa.array(tokens, pa.int32()),
            pa.array(codes, pa.binary()),
        ]
        self._stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))
        self._file.flush()
        self.bytes += sum(map(len, codes))
        self._is_whole = True

    def finish(self) -> None:
        if not self._is_whole:  # stopped within a batch: `recover_unfinished` keeps those before it
            self._file.close()
            return
        self._stream.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self.path.rename(self.path.with_name(_name(self.path)))
        self._file.close()
        fsync(self.path.parent)


def recover_unfinished(
    folder: Path, *, is_intact: Callable[[Entry], bool], owner: bytes = b""
) -> int:
    """Make shards of what writers that were killed have left.

    Args:
        folder: of the shards.
        is_intact: whether a row is whole; others are dropped.
        owner: see `ShardWriter`.

    Returns:
        The rows that were saved.
    """
    saved = 0
    for path in sorted(folder.glob(f"{_WRITING}*")):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # its writer is at work
            with ShardWriter(folder, owner=owner) as writer:
                for batch in _whole_batches(path):
                    intact = [entry for entry in batch if is_intact(entry)]
                    writer.add(intact)
                    saved += len(intact)
            path.unlink()
    return saved


def _whole_batches(path: Path) -> Iterator[list[Entry]]:
    """The record batches of a stream, up to where it was cut off."""
    try:
        with path.open("rb") as file, pa.ipc.open_stream(file) as batches:
            if not batches.schema.equals(_SCHEMA):
                return
            for batch in filter(len, batches):
                columns = _checked(batch)
                yield [columns.entry(index) for index in range(len(batch))]
    except _UNREADABLE:
        return


def _name(path: Path) -> str:
    """What a shard of these bytes is called."""
    checksum = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if path.stat().st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
                checksum.update(whole)
    return f"shard-{checksum.hexdigest()}.arrow"


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            "the cache cannot be written",
            where=str(folder),
            found=error.strerror or str(error),
            do="make room, or choose another place; the same command goes on from what is there",
        ) from error
