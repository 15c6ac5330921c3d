"""Starts one process a rank on this machine with torch's elastic agent, and prints one error."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from dominie.core.distributed import EXIT_PEER_LOST, LAUNCHER
from dominie.core.errors import InputError

ENGINES = ("ddp", "fsdp2", "zero3")

#: Seconds that ranks have to save and stop after a signal: as long as they take. torch before 2.12
#: does not read it, and gives them 30.
_SHUTDOWN_TIMEOUT = 7 * 24 * 3600


def launch(arguments: Sequence[str], processes: int, *, engine: str = "ddp") -> int:
    """Run a command of `dominie` on several processes of this machine.

    Args:
        processes: how many; with GPUs, one process for each.
        engine: `ddp`, `fsdp2`, `zero3`, or the file of an accelerate configuration.

    Returns:
        The exit status: that of the first process that failed.

    Raises:
        InputError: this machine cannot run them so.
    """
    from dominie.core.hardware import cores

    _check(processes, engine)
    os.environ.update(accelerate_environment(engine, processes))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    return run_ranks([sys.executable, "-m", "dominie", *arguments], processes)


def run_ranks(command: Sequence[str], processes: int) -> int:
    """Run a command once for each rank, pass signals on, and print the first error.

    Returns:
        The exit status: that of the first process that failed, 128 and the signal's number after
        a signal.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, launch_agent

    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SHUTDOWN_TIMEOUT))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    logging.disable(logging.CRITICAL)  # the agent's own messages
    with tempfile.TemporaryDirectory(prefix="dominie-") as scratch:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id="dominie",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",  # the system chooses the port
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=scratch),
            signals_to_handle="SIGINT,SIGTERM",
        )
        try:
            launch_agent(config, command[0], list(command[1:]))
        except ChildFailedError as error:
            # In the order in which they ended; one that lost another rank is not the cause.
            failures = sorted(error.failures.values(), key=lambda f: f.exitcode == EXIT_PEER_LOST)
            rank, code = failures[0].local_rank, failures[0].exitcode
            report = failures[0].error_file_data
            if "status" not in report:
                report = {
                    "message": _unexplained(rank, processes, code),
                    "status": code if code > 0 else 128 - code,
                }
        except SignalException as error:
            text = f"interrupted by {error.sigval.name}; what was done is kept"
            reports = [json.loads(file.read_text()) for file in Path(scratch).rglob("error.json")]
            unreported = {"message": text, "status": 128 + error.sigval}
            report = min(reports, key=lambda each: float(each["timestamp"]), default=unreported)
        else:
            return 0
        finally:
            logging.disable(logging.NOTSET)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    print(f"error: {report['message']}", file=sys.stderr)
    return int(report["status"])


def _unexplained(rank: int, processes: int, code: int) -> str:
    """Return the message for a process that failed without one."""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return (
        f"process {rank} of {processes} {how}, and the others with it\n"
        "  do        look whether memory ran out (train.micro_batch, train.max_length); the same "
        "command goes on from the last checkpoint"
    )


def stop_with_launcher() -> None:
    """Make this rank save and stop, as SIGTERM does, when its launcher has ended."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return

    def watch() -> None:
        while str(os.getppid()) == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def accelerate_environment(engine: str, processes: int) -> dict[str, str]:
    """Return the variables that `accelerate launch --config_file` sets for an engine or a file.

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
        args.main_process_port = 0  # which is not used
        if args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
            _, variables = prepare_deepspeed_cmd_env(args)
        else:
            variables = prepare_multi_gpu_env(args)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            "accelerate cannot use the configuration",
            where=str(path),
            found=" ".join(str(error).split())[:200],
            do="write one with `accelerate config --config_file FILE`, or use one of "
            f"{', '.join(ENGINES)}",
        ) from None
    kept = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
    return {name: value for name, value in variables.items() if name.startswith(kept)}


def configuration(engine: str) -> Path:
    """Return the accelerate configuration of an engine: one that ships, or a file."""
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
            do="leave --engine out: each process then holds a copy; DeepSpeed shards on CPUs if "
            "the environment variable DS_ACCELERATOR is cpu",
        )


def without_options(arguments: Sequence[str], *options: str) -> list[str]:
    """Return a command line without some options and their values."""
    kept: list[str] = []
    items = iter(arguments)
    for item in items:
        if item in options:
            next(items, None)
        elif not item.startswith(tuple(f"{option}=" for option in options)):
            kept.append(item)
    return kept
