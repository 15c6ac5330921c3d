"""The processes of a run: which is the first, what it decides for all, what all agree on.

A launcher (`dominie run --nproc`, torchrun, `accelerate launch`) numbers them in `RANK` and
`WORLD_SIZE`. They share the run's folder; the first alone writes what is written once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

#: The slower ranks of a long job may be hours behind; one that is dead is noticed by the launcher.
PATIENCE = timedelta(days=30)

#: Exit status of a process that ended because another was gone.
EXIT_PEER_LOST = 70

#: Where our own launcher wants to know that an error has been told.
ERROR_SHOWN = "DOMINIE_TOLD"


def rank() -> int:
    """The number of this process, 0 where it is alone."""
    return int(os.environ.get("RANK", "0"))


def ranks() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process writes and speaks for all of them."""
    return rank() == 0


def join(*, cpu: bool = False) -> PartialState:
    """Meet the other processes, once; how they stand afterwards.

    Args:
        cpu: train on the CPU though there is something else.
    """
    import torch
    from accelerate import PartialState

    # Where there is no GPU, accelerate takes a process for a lonely one unless it is told.
    return PartialState(cpu=cpu or not torch.accelerator.is_available(), timeout=PATIENCE)


def leave() -> None:
    """Part from the other processes: what comes after training is for the first alone."""
    if ranks() == 1:
        return
    from accelerate.state import AcceleratorState

    join().destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    engines = [name for name in os.environ if name.startswith("ACCELERATE_USE_")]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *engines):
        os.environ.pop(name, None)  # libraries that look for others would wait for them


def decided_by_first(decide: Callable[[], T]) -> T:
    """What the first process finds, on every process; the others do not look.

    Args:
        decide: returns something plain, and may write.
    """
    if ranks() == 1:
        return decide()
    from accelerate.utils import broadcast_object_list

    state = join()
    found = [decide() if state.is_main_process else None]
    broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """Within, the first process comes first; the others find what it has made."""
    if ranks() == 1:
        yield
        return
    with join().main_process_first():
        yield


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Within, there is one process of each machine at a time."""
    if ranks() == 1:
        yield
        return
    state = join()
    mine = state.local_process_index
    for turn in range(largest_of_all(mine) + 1):
        if turn == mine:
            yield
        state.wait_for_everyone()


def mesh_of_all() -> DeviceMesh | None:
    """All processes in a row; None where this one is alone."""
    if ranks() == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(join().device.type, (ranks(),))


def largest_of_all(value: int) -> int:
    """The largest value that any process brings, on every process."""
    if ranks() == 1:
        return value
    import torch

    tensor = torch.tensor(value, device=join().device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return int(tensor)


def speaks_for_all() -> bool:
    """Whether this process is the one that tells what went wrong: the first that comes to it."""
    place = _told()
    if place is None:
        return True
    try:
        os.close(os.open(place, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:
        pass  # rather twice than not at all
    return True


def _told() -> Path | None:
    """A file that is there once an error has been told on this machine."""
    if own := os.environ.get(ERROR_SHOWN):
        return Path(own)
    if ranks() > 1 and (elastic := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        return Path(elastic).parents[1] / "dominie-told"  # beside the folders of torchrun's ranks
    return None


def is_loss_of_another(error: BaseException) -> bool:
    """Whether an error only says that another process is gone, which tells its own."""
    if ranks() == 1:
        return False
    lost = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL")
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, RuntimeError) and any(word in str(chain) for word in lost):
            return True
        chain = chain.__cause__ or chain.__context__
    return False
