"""What has to be set before anything is imported."""

import os
import subprocess
from pathlib import Path

import pytest

# Two workers with two threads each run many times slower on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Triton decides at its import whether its kernels are interpreted; any test may import it."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        return  # the workers run the tests
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


#: Folders whose tests share what one worker makes once: a run, a process that forks, counted plans.
TOGETHER = ("tests/faults/", "tests/planning/")
#: What takes longest begins first, so that no worker is left alone with it.
LONGEST = (
    *TOGETHER,
    "tests/workflows/test_pipeline",
    "tests/core/test_launch.py",
    "tests/stages/",
    "tests/data/test_child_processes.py",
    "tests/judge/test_judged_run.py",
    "tests/test_real_run.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """A worker takes whole files or folders, so that nothing is made in two workers."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((folder for folder in TOGETHER if file.startswith(folder)), file)

    config.option.loadscopereorder = False  # which begins with many tests, not with long ones
    return Scheduler(config, log)


@pytest.fixture
def run_ranks() -> object:
    """Runs a script once a rank, `SCRIPT ARGUMENT…`, and fails with what the ranks said.

    The ranks meet in a store that this process holds, on a port the system chose: a file or a port
    chosen beforehand is a race.
    """
    import torch.distributed as dist
    from forks import Fork

    if not dist.is_gloo_available():
        pytest.skip("torch is without gloo")

    def run(script: Path, *arguments: object, ranks: int = 2, timeout: float = 240) -> None:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        base = {**os.environ, "WORLD_SIZE": str(ranks), "STORE": str(store.port)}
        workers = [
            Fork(
                *arguments,
                cwd=Path.cwd(),
                program=script,
                environment={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(ranks)
        ]
        try:
            codes = [worker.wait(timeout) for worker in workers]
        except subprocess.TimeoutExpired:
            codes = [worker.poll() for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
            words = ["".join(worker.communicate()) for worker in workers]
        if codes != [0] * ranks:
            told = "\n".join(f"--- rank {r} ---\n{w[-4000:]}" for r, w in enumerate(words))
            pytest.fail(f"the ranks ended with {codes} (None is a hang)\n{told}")

    return run
