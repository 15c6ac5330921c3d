"""Runs `dominie` in forks of one process that has imported everything.

Importing torch and transformers takes seconds, a fork milliseconds. A fork is a process like any
other: it has its own folder, environment and output, ends with a status, and dies of signals. What
a fresh interpreter imports and prints is tested where `sys.executable` is started.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

#: Every fork has these variables: one thread, no GPU.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
#: What libraries import when a model of a test is made, saved or scored.
ALSO = (
    "transformers.generation.streamers",
    "transformers.integrations.mistral",
    "transformers.models.mistral.modeling_mistral",
    "transformers.models.mixtral.modeling_mixtral",
    "jsonschema",
    "pcodec",
)


class Fork:
    """A running `dominie`, with the attributes and methods of `subprocess.Popen` that tests use.

    Args:
        arguments: of the command line.
        cwd: its folder.
        program: source code, or a script, to run in place of `dominie`; `arguments` follow in
            `sys.argv`.
        environment: variables beside `ENVIRONMENT`, not of those that libraries read at import.
    """

    def __init__(
        self,
        *arguments: object,
        cwd: Path,
        program: str | Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        order = {
            "cwd": str(cwd),
            "arguments": [*map(str, arguments)],
            "program": program.read_text() if isinstance(program, Path) else program,
            "script": str(program) if isinstance(program, Path) else "",
            "environment": ENVIRONMENT | (environment or {}),
        }
        self.returncode: int | None = None
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self._socket = _connected(_server(), order, *(file.fileno() for file in self._files))
        self._told = self._socket.makefile("r")
        self.pid = int(self._told.readline())

    def poll(self) -> int | None:
        """Its exit status, minus the signal that ended it; None while it runs."""
        if self.returncode is None and select.select([self._socket], [], [], 0)[0]:
            self.returncode = int(self._told.readline())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it ends."""
        if self.returncode is None:
            if not select.select([self._socket], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("dominie", timeout or 0.0, self._said(0))
            self.poll()
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait, and return what it printed."""
        self.wait(timeout)
        return self._said(0), self._said(1)

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def _said(self, which: int) -> str:
        self._files[which].seek(0)
        return self._files[which].read().decode(errors="replace")


def dominie(
    *arguments: object, cwd: Path, timeout: float = 280, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a `dominie` to its end, as `subprocess.run` would; see `Fork`."""
    fork = Fork(*arguments, cwd=cwd, **options)
    try:
        out, err = fork.communicate(timeout)
    finally:
        fork.kill()
    return subprocess.CompletedProcess([*map(str, arguments)], fork.wait(), out, err)


def _connected(place: str, order: dict[str, Any], out: int, err: int) -> socket.socket:
    """Order a fork: a connection that tells its process id, and in the end its exit status."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(place)
    socket.send_fds(connection, [b"+"], [out, err])
    connection.sendall(json.dumps(order).encode() + b"\n")
    return connection


def interpreter() -> str:
    """A program to stand in for `sys.executable`: `-m dominie …`, or a script, becomes a fork."""
    file = Path(_server()).with_name("python")
    if not file.exists():
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{__file__}" "$0" "$@"\n')
        file.chmod(0o755)
    return str(file)


def _stand_in(place: str, arguments: list[str]) -> int:
    """Order a fork, pass signals on to it, and return its exit status."""
    is_script = arguments[0] != "-m"
    order = {
        "cwd": str(Path.cwd()),
        "arguments": arguments[1:] if is_script else arguments[2:],
        "program": Path(arguments[0]).read_text() if is_script else None,
        "script": arguments[0] if is_script else "",
        "environment": dict(os.environ),
    }
    told = _connected(place, order, 1, 2).makefile("r")
    child = int(told.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: _pass_on(child, received))
    status = int(told.readline())
    return status if status >= 0 else 128 - status


def _pass_on(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(child, number)


def dominie_on_two(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`dominie … --nproc 2`, with forks in place of the interpreters that it starts."""
    program = (
        f"import sys; sys.executable = {interpreter()!r}\nfrom dominie.cli import main\nmain()"
    )
    return dominie(*arguments, "--nproc", 2, cwd=cwd, program=program)


_place: list[str] = []


def _server() -> str:
    """The socket of the process that forks, which is started at the first use."""
    if not _place:
        folder = tempfile.TemporaryDirectory(prefix="forks-")
        place = f"{folder.name}/socket"
        process = subprocess.Popen(
            [sys.executable, __file__, place],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", process.wait()

        def close() -> None:
            process.communicate()  # it ends with its standard input
            folder.cleanup()

        atexit.register(close)
        _place.append(place)
    return _place[0]


# In the process that forks


def _run(order: dict[str, Any], out: int, err: int) -> int:
    """What a fork does; its exit status."""
    os.chdir(order["cwd"])
    for number, descriptor in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, err)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order["environment"])
    if "DOMINIE_LAUNCHER" in os.environ:  # what a rank takes for its parent
        os.environ["DOMINIE_LAUNCHER"] = str(os.getppid())
    sys.argv = [order["script"] or "dominie", *order["arguments"]]
    try:
        if order["program"] is None:
            from dominie.cli import main

            main()
        else:
            sys.path.insert(0, str(Path(order["script"]).parent))
            code = compile(order["program"], order["script"] or "<program>", "exec")
            exec(code, {"__name__": "__main__", "__file__": order["script"]})
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _watch(connection: socket.socket) -> None:
    """Fork a `dominie`, and tell its process id and its exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    _, (out, err), *_ = socket.recv_fds(connection, 1, 2)
    order = json.loads(connection.makefile("r").readline())
    child = os.fork()
    if child == 0:
        connection.close()
        status = 98
        try:
            status = _run(order, out, err)
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    connection.sendall(f"{child}\n".encode())
    _, ended = os.waitpid(child, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(ended)}\n".encode())


def _serve(place: str) -> None:
    """Fork for everyone who connects, until standard input is closed."""
    ready = os.dup(1)
    os.dup2(2, 1)  # libraries that print while they are imported
    import dominie

    for module in pkgutil.walk_packages(dominie.__path__, "dominie."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ALSO:
        importlib.import_module(name)
    gc.freeze()  # a fork need not look through all that was imported
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(place)
    server.listen(16)
    os.write(ready, b"ready\n")
    os.close(ready)
    watching: set[int] = set()
    while server in (came := select.select([server, 0], [], [])[0]):
        connection, _ = server.accept()
        watcher = os.fork()
        if watcher == 0:
            try:
                server.close()
                _watch(connection)
            finally:
                os._exit(0)
        connection.close()
        watching = {pid for pid in watching | {watcher} if os.waitpid(pid, os.WNOHANG)[0] == 0}
    assert 0 in came


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(_stand_in(str(Path(sys.argv[1]).with_name("socket")), sys.argv[2:]))
    _serve(sys.argv[1])
