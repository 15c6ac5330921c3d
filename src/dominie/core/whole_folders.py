"""Folders that are whole or not there: renamed once all is on the disk, and hashed meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from dominie.core.errors import DominieError, RunError
from dominie.core.io import create, file_sha256, fsync, remove

#: Bytes from which on a piece is hashed in another thread than the one that writes it.
_LARGE = 2**20
#: Bytes after which the disk is asked to take in what a stream has been given.
_SYNCED = 2**26
#: Threads: each hashes or waits for the disk, and neither holds the interpreter's lock.
_THREADS = 8


def publish(scratch: Path, folder: Path) -> None:
    """Give a folder that has been written its name, once everything in it is on disk.

    A reader sees the old folder, the new one or none; never half of one.
    """
    for path in sorted(scratch.rglob("*")):
        if path.is_file():
            fsync(path)
    remove(folder)
    scratch.rename(folder)
    fsync(folder.parent)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within, `folder` is written; where that fails, nothing of it stays to fill the disk.

    Raises:
        RunError: in the place of what the libraries that write raise; all else stays as it is.
    """
    try:
        yield
    except DominieError:
        raise
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        if not _is_of_writing(error):
            raise
        raise RunError(
            "the files cannot be written",
            where=str(folder),
            found=" ".join(str(error).split())[:200],
            do="make room; the same command goes on from the last checkpoint",
        ) from error


def _is_of_writing(error: Exception) -> bool:
    """Whether an error says that files could not be written."""
    from safetensors import SafetensorError

    if isinstance(error, OSError):
        return not isinstance(error, ConnectionError | TimeoutError)
    if isinstance(error, RuntimeError):  # torch.save's
        return any(word in str(error) for word in ("PytorchStreamWriter", "inline_container"))
    return type(error) is Exception or isinstance(error, SafetensorError)  # the former: tokenizers'


class HashedFiles:
    """SHA-256 of the files of a folder that is being written, none of which is read for it alone.

    A stream is hashed as it is written. Files that libraries write are hashed as soon as they are
    whole, while others are written. Meanwhile the disk takes them in, so that the last `fsync` has
    little left to wait for; `manifest` syncs nothing itself.

    Args:
        folder: in which the files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(_THREADS)
        self._hashes: dict[Path, tuple[object, Future[str]]] = {}

    def __enter__(self) -> HashedFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def begin(self) -> None:
        """Hash the files that are there; one that is changed afterwards is hashed again."""
        for path in sorted(self.folder.rglob("*")):
            if not path.is_file():
                continue
            known, state = self._hashes.get(path), _state(path)
            if known is None or known[0] != state:
                self._pool.submit(_sync, path)
                self._hashes[path] = state, self._pool.submit(file_sha256, path)

    @contextlib.contextmanager
    def stream(self, path: Path) -> Iterator[HashedStream]:
        """Context manager: a new file, hashed as it is written.

        Raises:
            OSError: it cannot be written.
        """
        with create(path) as file:
            stream = HashedStream(file, self._pool)
            yield stream
        done: Future[str] = Future()
        done.set_result(stream.sha256())
        self._hashes[path] = _state(path), done

    def manifest(self) -> dict[str, dict[str, Any]]:
        """`{path: {size, sha256}}` of every file of the folder, as `file_manifest` returns it.

        Raises:
            OSError: a file cannot be read.
        """
        self.begin()
        return {
            path.relative_to(self.folder).as_posix(): {
                "size": path.stat().st_size,
                "sha256": hashing.result(),
            }
            for path, (_, hashing) in sorted(self._hashes.items())
            if path.is_file()
        }


class HashedStream:
    """A file that is hashed while it is written; `torch.save` takes it."""

    def __init__(self, file: BinaryIO, pool: ThreadPoolExecutor) -> None:
        self._file, self._pool, self._sha = file, pool, hashlib.sha256()
        self._unsynced = 0
        self._sync: Future[None] | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write and hash at the same time; the bytes may be changed afterwards."""
        size = memoryview(data).nbytes
        if size < _LARGE:
            self._sha.update(data)
            self._file.write(data)
        else:
            hashing = self._pool.submit(self._sha.update, data)
            try:
                self._file.write(data)
            finally:
                hashing.result()
        self._unsynced += size
        if self._unsynced > _SYNCED and (self._sync is None or self._sync.done()):
            self._unsynced = 0
            self._sync = self._pool.submit(_sync, Path(self._file.name))
        return size

    def flush(self) -> None:
        """Hand all on to the system."""
        self._file.flush()

    def sha256(self) -> str:
        """Of what was written so far, in hexadecimal digits."""
        return self._sha.hexdigest()


def _state(path: Path) -> object:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _sync(path: Path) -> None:
    """Have the disk take in what a file has by now; one that it refuses, the last sync finds."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            getattr(os, "fdatasync", os.fsync)(descriptor)
        finally:
            os.close(descriptor)
