"""Whole runs with sharded weights, on two CPU processes, come to what one process comes to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from dominie.display import Display
from dominie.pipeline import run_recipe
from dominie.recipe import load_recipe

RECIPE = Path(__file__).parent / "recipes" / "ranks.yaml"
WORKER = Path(__file__).parent / "sharded_run.py"


#: Teachers shared out beside the student, each reading two of its micro-batches at once.
TEACHERS = (
    "stages.teacher.placement=sharded",
    "stages.distill.placement=sharded",
    "train.teacher_micro_batch=4",
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run of one process."""
    runs = tmp_path_factory.mktemp("one")
    return run_recipe(load_recipe(RECIPE), runs, Display(Console(quiet=True)))


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("engine", "overrides"), [("fsdp2", ()), ("fsdp2", TEACHERS), ("ddp", TEACHERS)]
)
def test_a_mixture_kd_with_attention_and_dae(run_ranks, alone, tmp_path, engine, overrides):
    run_ranks(WORKER, engine, RECIPE, tmp_path, *overrides, timeout=800)
    for stage in ("teacher", "distill", "align"):
        ours, theirs = (
            load_file(each / stage / "model" / "model.safetensors")
            for each in (tmp_path / "ranks", alone)
        )
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():  # sums in another order, through four steps of Adam
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-5)
