"""One rank of test_distributed.py: every collective, compared with what it should return."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(folder: Path) -> None:
    import torch.distributed as dist

    from dominie.core import distributed as ranks

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore("127.0.0.1", int(os.environ["STORE"]), is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": str(size)}
    assert ranks.world_size() == size
    assert ranks.is_main_process() == (rank == 0)
    assert ranks.broadcast_from_main(lambda: {"rank": rank}) == {"rank": 0}
    assert ranks.all_gather([rank]) == [[each] for each in range(size)]
    assert ranks.all_reduce_max(rank + 5) == size + 4
    with ranks.main_process_first():
        assert (folder / "first").exists() == (rank > 0)
        (folder / "first").touch()
    with ranks.one_process_at_a_time():
        (folder / "alone").touch(exist_ok=False)
        (folder / "alone").unlink()
    assert ranks.world_mesh().size() == size
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    ranks.end_training()
    assert "ACCELERATE_USE_FSDP" not in os.environ
    assert ranks.all_reduce_max(rank) == size - 1
    ranks.destroy_distributed()
    assert not dist.is_initialized()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
