"""One rank of test_launch_sharded.py: a recipe run with an engine that shards, on CPUs.

Run as ``python sharded_run.py ENGINE RECIPE RUNS``, KEY=VALUE after it. accelerate shards on GPUs
only; here it takes the CPU processes for GPUs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(engine: str, recipe: str, runs: str, *overrides: str) -> None:
    import torch.distributed as dist
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from rich.console import Console

    from dominie.core.display import Display
    from dominie.core.distributed import is_main_process
    from dominie.core.launch import accelerate_environment
    from dominie.recipe import load_recipe
    from dominie.workflows.pipeline import run_recipe

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore("127.0.0.1", int(os.environ["STORE"]), is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, not used
    os.environ |= accelerate_environment(engine, ranks)
    if engine == "fsdp2":
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        found = ("gloo", DistributedType.MULTI_XPU)
        PartialState._prepare_backend = lambda *_, **__: found
    display = Display(Console(quiet=not is_main_process()))
    run_recipe(load_recipe(Path(recipe), overrides), Path(runs), display)


if __name__ == "__main__":
    main(*sys.argv[1:])
