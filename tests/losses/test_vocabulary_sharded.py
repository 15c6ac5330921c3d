"""The loss inside a wrapped forward pass: two processes have the gradients of one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

WORKER = Path(__file__).parent / "sharded_worker.py"
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is without gloo")


def gradients(kind, ranks, folder):
    result = folder / f"{kind}.pt"
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER, kind, str(rank), folder / f"{kind}.rendezvous", result],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    for worker in workers:
        errors = worker.communicate(timeout=120)[1]
        assert worker.returncode == 0, errors
    return torch.load(result)


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory):
    return gradients("single", 1, tmp_path_factory.mktemp("single"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_have_the_gradients_of_one(kind, of_one_process, tmp_path):
    for found, wanted in zip(gradients(kind, 2, tmp_path), of_one_process, strict=True):
        assert_close(found, wanted)
