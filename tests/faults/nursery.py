"""Forks a `dominie` for every order it reads, each with a fault of its own; not imported by tests.

Importing torch and transformers takes seconds, a fork milliseconds; and a fork that is killed with
SIGKILL is as dead as any other process. This one imports, and runs nothing itself, so that every
fork begins where a fresh interpreter would.

An order is a line of JSON on stdin (see `faults.Nursery.run`), its answer a line on stdout.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
NAMES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}


class Boundaries:
    """Counts the moments at which a folder is about to change, and strikes at one of them.

    Between two of these moments the folder stays as it is but for the bytes that a file grows by,
    so that a process killed at each of them leaves everything that a killed process can leave;
    `torn` adds a file of which half is written.

    Args:
        root: the folder.
        log: a file that every moment is written to.
        at: number of the moment to strike at, 1 the first; None only counts.
        how: `kill`, `torn` (halve the file that is synced, or kill), `full` (no space from there
            on), or `vanish` (the folder is renamed away).
    """

    def __init__(self, root: str, log: str, at: int | None, how: str) -> None:
        self.root, self.at, self.how, self.count = root, at, how, 0
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._striking = False

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        """To be added by `sys.addaudithook`."""
        if self._striking:
            return
        if event == "open":
            path, _, flags = args
            if isinstance(path, int) or not (flags or 0) & WRITING:
                return
            self.reach("open", path)
        elif event == "os.mkdir" and args[-1] == -1 and os.path.isdir(args[0]):
            return  # it is there, nothing will change
        elif event in NAMES:
            folder = args[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1
            self.reach(event.removeprefix("os."), args[0], folder)

    def reach(self, what: str, path: Any, folder: int = -1) -> None:
        """A moment before `what` is done to `path`."""
        place = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fsdecode(path)
        if folder != -1:
            place = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), place)
        place = os.path.abspath(place)
        if not place.startswith(self.root + "/"):
            return
        self.count += 1
        os.write(self._log, f"{what} {os.path.relpath(place, self.root)}\n".encode())
        if self.at is not None and (
            self.count == self.at or (self.how == "full" and self.count > self.at)
        ):
            self._strike(what, place)

    def _strike(self, what: str, place: str) -> None:
        if self.how == "full":
            if what in ("open", "fsync", "mkdir", "link"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)
            return
        self._striking = True
        if self.how == "vanish":
            os.rename(self.root, self.root + "-gone")
            return
        if self.how == "torn" and what == "fsync" and os.path.isfile(place):
            os.truncate(place, os.path.getsize(place) // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def watch(boundaries: Boundaries) -> None:
    """Have boundaries told of, those too that Python's audit hooks do not see."""
    import pyarrow as pa
    import safetensors.torch as st

    sys.addaudithook(boundaries.hook)
    sync, serialize, stream = os.fsync, st.serialize_file, pa.ipc.new_stream

    def fsync(fd: Any) -> None:
        number = fd if isinstance(fd, int) else fd.fileno()
        boundaries.reach("fsync", os.readlink(f"/proc/self/fd/{number}"))
        sync(fd)

    def serialize_file(tensors: Any, filename: Any, *rest: Any, **kwargs: Any) -> Any:
        boundaries.reach("open", filename)
        return serialize(tensors, filename, *rest, **kwargs)

    def new_stream(sink: Any, *rest: Any, **kwargs: Any) -> Any:
        if isinstance(sink, str):
            boundaries.reach("open", sink)
        return stream(sink, *rest, **kwargs)

    os.fsync, st.serialize_file, pa.ipc.new_stream = fsync, serialize_file, new_stream


def count_steps(path: str) -> None:
    """Have every optimiser step write a byte to a file."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    register_optimizer_step_post_hook(lambda *_: os.write(steps, b"."))


def run(order: dict[str, Any], main: Callable[[], None]) -> int:
    """What the fork does: `dominie` with the arguments of the order."""
    os.chdir(order["cwd"])
    said = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.update(order.get("environment", {}))
    count_steps(order["steps"])
    if size := order.get("file_size"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    if order.get("root"):
        how, at = order.get("how", "kill"), order.get("at")
        watch(Boundaries(order["root"], order["log"], at, how))
    sys.argv = ["dominie", *order["arguments"]]
    try:
        main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        return 99
    return 0


def _import_too(modules: list[str]) -> None:
    """Import what a fork came to import on its way, so that others need not."""
    for name in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.freeze()


def serve() -> None:
    """Read orders until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries that print while they are imported
    import dominie.training.train_stage  # noqa: F401
    from dominie.cli import main

    gc.freeze()  # a fork need not look through all that was imported
    for line in sys.stdin:
        order, started = json.loads(line), time.monotonic()
        child = os.fork()
        if child == 0:
            code = 98
            with contextlib.suppress(BaseException):
                signal.alarm(order.get("limit", 120))
                code = run(order, main)
                if order.get("scout"):
                    Path(order["scout"]).write_text("\n".join(sys.modules))
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
        _, ended, used = os.wait4(child, 0)
        status = os.waitstatus_to_exitcode(ended)
        seconds = time.monotonic() - started
        if order.get("scout"):
            _import_too(Path(order["scout"]).read_text().split())
        told = {"status": status, "seconds": seconds, "cpu": used.ru_utime + used.ru_stime}
        answers.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
    serve()
