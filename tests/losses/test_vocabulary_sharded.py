"""The loss inside a wrapped forward pass: two processes have the gradients of one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from forks import dominie
from torch.testing import assert_close

WORKER = Path(__file__).parent / "sharded_worker.py"


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory):
    result = tmp_path_factory.mktemp("single") / "single.pt"
    assert dominie("single", result, cwd=result.parent, program=WORKER).returncode == 0
    return torch.load(result)


def check_same(found, wanted):
    for tied, gradients in wanted.items():
        assert found[tied].keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert_close(found[tied][name], gradient)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_have_the_gradients_of_one(kind, of_one_process, run_ranks, tmp_path):
    run_ranks(WORKER, kind, tmp_path / "found.pt")
    check_same(torch.load(tmp_path / "found.pt"), of_one_process)


@pytest.mark.full
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_zero3_has_the_gradients_of_one_process(of_one_process, run_ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    # The ranks would build DeepSpeed's communication op at once, in one folder.
    build = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load()"
    subprocess.run([sys.executable, "-c", build], check=True, timeout=240, env=os.environ)
    run_ranks(WORKER, "zero3", tmp_path / "found.pt")
    check_same(torch.load(tmp_path / "found.pt"), of_one_process)
