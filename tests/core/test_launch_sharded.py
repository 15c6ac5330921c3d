"""Whole runs with sharded weights, on two CPU processes, give the weights of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from dominie.core.display import Display
from dominie.recipe import load_recipe
from dominie.training.rollouts import RolloutFiles
from dominie.workflows.pipeline import run_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "ranks.yaml"
WORKER = Path(__file__).parent / "sharded_run.py"


#: Teachers sharded like the student, each reading two of its micro-batches at once.
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
    check_same_weights(tmp_path / "ranks", alone)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("lora", [(), ("{r: 4, target_modules: [q_proj, v_proj]}",)])
def test_a_student_that_is_cut_up_answers_as_a_whole_one_does(run_ranks, tmp_path, lora):
    """The same greedy answers at the first step, under the hash of the same weights."""
    answers = (
        "stages.align.data.domain={share: 0.3, teacher: teacher, on_policy: 0.7}",
        "stages.align.data.general={share: 0.7, teacher: distill, on_policy: 0.2}",
        "stages.align.loss={prediction: 1.0}",
        "stages.align.rollouts={max_new_tokens: 9, temperature: 0.0, every: 2}",
        "stages.align.train.forgetting=false",
        "train.evaluate_every=4",
        *(f"stages.align.train.lora={adapters}" for adapters in lora),
    )
    recipe = load_recipe(RECIPE, answers)
    run = run_recipe(recipe, tmp_path / "one", Display(Console(quiet=True)))
    run_ranks(WORKER, "fsdp2", RECIPE, tmp_path / "two", *answers, timeout=800)
    ours, theirs = (each / "align" for each in (tmp_path / "two" / "ranks", run))
    found, told = (RolloutFiles(each / "rollouts").read(1)[0] for each in (ours, theirs))
    assert len(list((ours / "rollouts").glob("step-00000001.rank-*"))) == 2
    assert found.keys() == told.keys()
    assert sum(found[key] == told[key] for key in told) >= 0.8 * len(told)  # ties go either way
    assert any(0 < len(each.answer) < 9 for each in told.values())
    for one, two in zip(*(losses(each) for each in (theirs, ours)), strict=True):
        assert two == pytest.approx(one, rel=0.2)


def losses(stage: Path) -> list[float]:
    read = map(json.loads, (stage / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line["loss"] for line in read if "sources" in line]


def check_same_weights(run: Path, other: Path) -> None:
    for stage in ("teacher", "distill", "align"):
        ours, theirs = (
            load_file(each / stage / "model" / "model.safetensors") for each in (run, other)
        )
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():  # sums in another order, through four steps of Adam
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-5)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("overrides", [(), TEACHERS])
def test_zero3_does_so_too_and_prints_nothing_of_its_own(alone, tmp_path, overrides):
    zero3(tmp_path, *overrides)
    check_same_weights(tmp_path / "runs" / "ranks", alone)


def zero3(tmp_path: Path, *overrides: str) -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    # The ranks would build DeepSpeed's communication op at once, in one folder.
    build = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load()"
    subprocess.run([sys.executable, "-c", build], env=environment, check=True)
    command = [sys.executable, "-m", "dominie", "run", str(RECIPE), "--nproc", "2"]
    done = subprocess.run(
        [*command, *overrides, "--engine", "zero3", "--json"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"run": "runs/ranks", "results": {}}
    assert "deepspeed" not in done.stderr.lower()


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_adapters_are_merged_into_sharded_weights(run_ranks, tmp_path, engine):
    if engine == "zero3" and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    adapters = "train.lora={r: 4, target_modules: [q_proj, v_proj]}"
    recipe = load_recipe(RECIPE, [adapters])
    run = run_recipe(recipe, tmp_path / "one", Display(Console(quiet=True)))
    if engine == "zero3":
        zero3(tmp_path, adapters)
    else:
        run_ranks(WORKER, engine, RECIPE, tmp_path / "runs", adapters, timeout=300)
    check_same_weights(tmp_path / "runs" / "ranks", run)
