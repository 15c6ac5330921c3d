"""Starts the processes of a run on this machine, passes signals on, and ends them together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from dominie.core.distributed import ERROR_SHOWN, EXIT_PEER_LOST
from dominie.core.errors import InputError
from dominie.core.hardware import cores

ENGINES = ("ddp", "fsdp2", "zero3")

#: Seconds that processes have to end by themselves after the first has failed or was stopped.
GRACE = 15.0

#: The end of a pipe that closes when the launcher is gone, however it went.
_LAUNCHER = "DOMINIE_LAUNCHER"


def launch(arguments: Sequence[str], processes: int, *, engine: str = "ddp") -> int:
    """Run `dominie` once a process, and wait for all of them.

    Args:
        arguments: of the command line.
        processes: how many; with GPUs, each has its own.
        engine: `ddp`, `fsdp2`, `zero3`, or the file of an accelerate configuration.

    Returns:
        The exit status: the first that was not 0.

    Raises:
        InputError: this machine cannot run them so.
    """
    import torch.distributed as dist

    _check(processes, engine)
    # Held here, on a port that the system chose: one chosen beforehand could be taken by then.
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    with tempfile.TemporaryDirectory(prefix="dominie-") as scratch:
        told = Path(scratch) / "told"
        base = {
            **os.environ,
            **accelerate_environment(engine, processes),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(_threads(processes))),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": str(True),
            ERROR_SHOWN: str(told),
        }
        with started([sys.executable, "-m", "dominie", *arguments], base, processes) as workers:
            codes = waited_for(workers)
        first = _first_to_fail(codes)
        if first is not None and not told.exists():
            print(f"error: {_unsaid(first, codes)}", file=sys.stderr)
    if first is None:
        return 0
    return codes[first] if codes[first] > 0 else 128 - codes[first]


def accelerate_environment(engine: str, processes: int) -> dict[str, str]:
    """What `accelerate launch --config_file` would set for an engine or a configuration's file.

    Raises:
        InputError: the file cannot be read.
    """
    if engine == "ddp":
        return {}
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    path = configuration(engine)
    try:
        options = ["--config_file", str(path), "--num_processes", str(processes), "dominie"]
        args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(options))
        args.main_process_port = 0  # of a port that is not used here
        if args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
            _, made = prepare_deepspeed_cmd_env(args)
        else:
            made = prepare_multi_gpu_env(args)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            "accelerate cannot use the configuration",
            where=str(path),
            found=" ".join(str(error).split())[:200],
            do="write one with `accelerate config --config_file FILE`, or use one of "
            f"{', '.join(ENGINES)}",
        ) from None
    kept = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
    return {name: value for name, value in made.items() if name.startswith(kept)}


def configuration(engine: str) -> Path:
    """The accelerate configuration of an engine: one that ships, or a file."""
    if engine not in ENGINES:
        return Path(engine)
    package = Path(__file__).parents[1]
    shipped = package / "accelerate"  # of an installed package; else this is a checkout
    folder = shipped if shipped.is_dir() else package.parents[1] / "recipes" / "accelerate"
    return folder / f"{engine}.yaml"


def _check(processes: int, engine: str) -> None:
    import torch

    if engine not in ENGINES and not Path(engine).is_file():
        raise InputError(
            "no such engine, and no such file",
            where=f"--engine {engine}",
            expected=f"{', '.join(ENGINES)}, or the file of an accelerate configuration",
        )
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if devices and processes > devices:
        raise InputError(
            "there are not as many devices",
            where=f"--nproc {processes}",
            expected=f"at most {devices}, one process each",
        )
    on_cpus = engine != "fsdp2" and os.environ.get("DS_ACCELERATOR") == "cpu"
    if not devices and engine != "ddp" and not on_cpus:
        raise InputError(
            "weights are sharded over GPUs, and this machine has none",
            where=f"--engine {engine}",
            do="leave --engine out: each process then holds a copy; DeepSpeed shards on CPUs where "
            "the environment variable DS_ACCELERATOR is cpu",
        )


def _threads(processes: int) -> int:
    return max(1, cores() // processes)


@contextlib.contextmanager
def started(
    command: Sequence[str], base: Mapping[str, str], processes: int
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes, in groups of their own so that a terminal's Ctrl-C reaches them but once."""
    reading, writing = os.pipe()  # only this process holds the writing end
    workers: list[subprocess.Popen[bytes]] = []

    def pass_on(signum: int, _: FrameType | None) -> None:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                worker.send_signal(signum)

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in range(processes):
            own = {"RANK": str(number), "LOCAL_RANK": str(number), _LAUNCHER: str(reading)}
            environment = {**base, **own}
            workers.append(
                subprocess.Popen(command, env=environment, pass_fds=[reading], process_group=0)
            )
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        for descriptor in (reading, writing):
            os.close(descriptor)
        for signum, handler in before.items():
            signal.signal(signum, handler)


def waited_for(workers: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Exit statuses; after the first failure, the others have a while before they are killed."""
    deadline = float("inf")
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        if deadline == float("inf") and any(worker.poll() for worker in workers):
            deadline = time.monotonic() + GRACE
        time.sleep(0.05)
    left = {worker.pid for worker in workers if worker.poll() is None}
    for worker in workers:
        worker.kill()
    # One that did not end by itself is not what failed.
    return [0 if worker.pid in left else worker.wait() for worker in workers]


def _first_to_fail(codes: Sequence[int]) -> int | None:
    """The process whose end made the others end: one that a signal ended, one that knows why."""
    failed = [number for number, code in enumerate(codes) if code]
    return min(failed, key=lambda n: (codes[n] > 0, codes[n] == EXIT_PEER_LOST), default=None)


def _unsaid(number: int, codes: Sequence[int]) -> str:
    """What is known of a process that failed without a word."""
    code = codes[number]
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return (
        f"process {number} of {len(codes)} {how}, and the others with it\n"
        "  do        look whether memory ran out (train.micro_batch, train.max_length); the same "
        "command goes on from the last checkpoint"
    )


def end_with_launcher() -> None:
    """Have this process stop, and save, when the launcher that started it is gone."""
    descriptor = os.environ.pop(_LAUNCHER, None)
    if descriptor is None:
        return

    def wait() -> None:
        with contextlib.suppress(OSError):
            os.read(int(descriptor), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def without_options(arguments: Sequence[str], *options: str) -> list[str]:
    """A command line without some options and their values."""
    left: list[str] = []
    items: Any = iter(arguments)
    for item in items:
        if item in options:
            next(items, None)
        elif not item.startswith(tuple(f"{option}=" for option in options)):
            left.append(item)
    return left
