"""Ranks of a run: main process, broadcasts and reductions, errors after the loss of a peer."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dominie.core.errors import printable

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

#: Slow ranks of a long job may be hours behind; the launcher notices those that are dead.
COLLECTIVE_TIMEOUT = timedelta(days=30)

#: Exit status of a process that ended because it lost another one.
EXIT_PEER_LOST = 70

#: Environment variable of ranks: the process number of the `dominie run --nproc` above them.
LAUNCHER = "DOMINIE_LAUNCHER"


def rank() -> int:
    """Return the rank of this process, as a launcher sets it; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes, as a launcher sets it; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this is rank 0, which alone prints and writes what is written once."""
    return rank() == 0


def is_sharded(arguments: Mapping[str, Any]) -> bool:
    """Return whether FSDP or DeepSpeed cuts up what is trained.

    Args:
        arguments: of transformers.TrainingArguments, which may ask for either as a launcher may.
    """
    launched = any(os.environ.get(f"ACCELERATE_USE_{kind}") for kind in ("FSDP", "DEEPSPEED"))
    return launched or bool(arguments.get("fsdp") or arguments.get("deepspeed"))


def is_fsdp2(arguments: Mapping[str, Any]) -> bool:
    """Return whether it is FSDP2 that cuts up what is trained, as a launcher asks for it.

    Args:
        arguments: as of `is_sharded`.
    """
    asked = arguments.get("fsdp") or arguments.get("deepspeed")
    launched = os.environ.get("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION") == "2"
    return bool(launched and not asked and not os.environ.get("ACCELERATE_USE_DEEPSPEED"))


def init_distributed(*, cpu: bool = False) -> PartialState:
    """Initialise the process group, on the first call, and return accelerate's state.

    Args:
        cpu: train on the CPU although there is an accelerator.
    """
    import torch
    from accelerate import PartialState

    # Without a GPU, accelerate ignores the other processes unless `cpu` is set.
    return PartialState(cpu=cpu or not torch.accelerator.is_available(), timeout=COLLECTIVE_TIMEOUT)


def end_training() -> None:
    """Make accelerate and transformers forget the engine of training; the process group stays."""
    if world_size() == 1:
        return
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_USE_")]:
        del os.environ[name]


def destroy_distributed() -> None:
    """Destroy the process group, if there is one, once every process has come to this point."""
    import torch.distributed

    if world_size() == 1 or not torch.distributed.is_initialized():
        return
    from accelerate.state import AcceleratorState

    state = init_distributed()
    state.wait_for_everyone()
    state.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def broadcast_from_main(compute: Callable[[], T]) -> T:
    """Call a function on the main process only, and return its result on every process.

    Args:
        compute: returns an object that can be pickled; may write files.
    """
    if world_size() == 1:
        return compute()
    from accelerate.utils import broadcast_object_list

    state = init_distributed()
    found = [compute() if state.is_main_process else None]
    broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]


def all_gather(part: T) -> list[T]:
    """Return the objects that processes pass, pickled, in the order of ranks, on every process."""
    if world_size() == 1:
        return [part]
    import torch.distributed

    init_distributed()
    parts: list[T] = [part] * world_size()
    torch.distributed.all_gather_object(parts, part)
    return parts


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block on the main process, then on the others, which find what it has written."""
    if world_size() == 1:
        yield
        return
    with init_distributed().main_process_first():
        yield


@contextlib.contextmanager
def one_process_at_a_time() -> Iterator[None]:
    """Run the block on one process of each machine at a time."""
    if world_size() == 1:
        yield
        return
    state = init_distributed()
    local_rank = state.local_process_index
    for current in range(all_reduce_max(local_rank) + 1):
        if current == local_rank:
            yield
        state.wait_for_everyone()


def world_mesh() -> DeviceMesh | None:
    """Return the one-dimensional mesh of all processes; None if there is one process."""
    if world_size() == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(init_distributed().device.type, (world_size(),))


def all_reduce_max(value: int) -> int:
    """Return the largest value of all processes, on every process."""
    if world_size() == 1:
        return value
    import torch

    tensor = torch.tensor(value, device=init_distributed().device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return int(tensor)


def report_error(message: str, status: int) -> None:
    """Print the error that ends this process, once for all ranks of this machine.

    The launcher of `dominie run --nproc` prints the error of the rank that failed first; it gets
    message and exit status in the file that torch's elastic agent reads. Any other launcher leaves
    it to the ranks: the first prints.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is not None and os.environ.get(LAUNCHER) == str(os.getppid()):
        report = {"message": message, "timestamp": time.time(), "status": status}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps(report), encoding="utf-8")
            return
    if file is None or world_size() == 1 or _is_first_to_create(Path(file).parents[1]):
        print(f"error: {printable(message)}", file=sys.stderr)


def _is_first_to_create(folder: Path) -> bool:
    """Return whether no other rank has created the marker of a printed error in this folder."""
    try:
        (folder / "dominie-error-shown").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass  # printing twice is better than not at all
    return True


def is_peer_loss(error: BaseException) -> bool:
    """Return whether an error only reports that another process is gone."""
    if world_size() == 1:
        return False
    lost = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL")
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, RuntimeError) and any(text in str(chain) for text in lost):
            return True
        chain = chain.__cause__ or chain.__context__
    return False
