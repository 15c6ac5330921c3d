"""What has to be set before anything is imported."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Two workers with two threads each run many times slower on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Triton decides at its import whether its kernels are interpreted, and any test may import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def run_ranks() -> object:
    """Runs a script once a rank, `SCRIPT ARGUMENT…`, and fails with what the ranks said.

    The ranks meet in a store that this process holds, on a port the system chose: a file or a port
    chosen beforehand is a race. They find it through `meet`.
    """
    import torch.distributed as dist

    if not dist.is_gloo_available():
        pytest.skip("torch is without gloo")

    def run(script: Path, *arguments: object, ranks: int = 2, timeout: float = 240) -> None:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        base = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
        with tempfile.TemporaryDirectory() as said:
            workers = []
            for rank in range(ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "STORE": str(store.port)}
                command = [sys.executable, str(script), *map(str, arguments)]
                with (Path(said) / str(rank)).open("wb") as out:
                    workers.append(
                        subprocess.Popen(command, env=base | own, stdout=out, stderr=out)
                    )
            try:
                codes = [worker.wait(timeout=timeout) for worker in workers]
            except subprocess.TimeoutExpired:
                codes = [worker.poll() for worker in workers]
            finally:
                for worker in workers:
                    worker.kill()
                    worker.wait()
            words = [(Path(said) / str(rank)).read_text(errors="replace") for rank in range(ranks)]
        if codes != [0] * ranks:
            told = "\n".join(f"--- rank {r} ---\n{w[-4000:]}" for r, w in enumerate(words))
            pytest.fail(f"the ranks ended with {codes} (None is a hang)\n{told}")

    return run
