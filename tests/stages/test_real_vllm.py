"""A real vLLM teaches by way of a cache, beside its own weights here, and writes answers."""

from __future__ import annotations

import dataclasses
import json
import os
import urllib.request
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from dominie.core.display import Display
from dominie.core.run_reader import read_stage
from dominie.data.batch import collate
from dominie.models.head import padding_for
from dominie.models.loading import load_frozen
from dominie.models.spec import Model
from dominie.recipe import load_recipe
from dominie.stages.prepare import Preparation
from dominie.stages.run_folder import RunFolder
from dominie.stages.teacher_caches import REMEDY, cache_folder, cache_identity, cache_plans
from dominie.stages.train import PreparedTraining
from dominie.teachers.cache import Cache
from dominie.teachers.cache_writer import fidelity, tiles_of_logits
from dominie.teachers.cached import key_of_row, target_of
from dominie.workflows.pipeline import cache_recipe, run_recipe

URL, WEIGHTS = os.environ.get("DOMINIE_VLLM"), os.environ.get("DOMINIE_VLLM_WEIGHTS")

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not (URL and WEIGHTS),
        reason="DOMINIE_VLLM names no running vLLM (http://127.0.0.1:8000/v1, started with "
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and --max-logprobs 64 or more), and "
        "DOMINIE_VLLM_WEIGHTS no folder of what it serves",
    ),
]

RECIPE = """
name: real
train: {steps: 1, batch: 2, max_length: 128, learning_rate: 1e-6}
models:
  big:
    endpoint: URL
    model: NAME
    tokenizer: WEIGHTS
    local: WEIGHTS
    concurrency: 4
    timeout: 600
  small: {path: WEIGHTS}
data:
  domain: {path: "toyworld:domain?rows=ROWS"}
stages:
  kd:
    student: small
    teacher: big
    data: {domain: 1.0}
    loss: {prediction: 1.0}
    cache: {scheme: top, top_p: 1.0, k_max: 64, levels: 256}
  written:
    answers: {model: big, source: domain, samples: 2, temperature: 0.8, max_new_tokens: 40}
"""


def filled(text: str) -> str:
    """A recipe with the server's address and its model's name and weights."""
    with urllib.request.urlopen(f"{URL}/models", timeout=60) as answer:
        name = json.load(answer)["data"][0]["id"]
    text = text.replace("URL", str(URL)).replace("WEIGHTS", str(WEIGHTS)).replace("NAME", name)
    return text.replace("ROWS", "12")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "real.yaml").write_text(filled(RECIPE))
    return tmp_path / "real.yaml"


def test_its_log_probabilities_are_those_of_its_weights(recipe: Path) -> None:
    out = StringIO()
    display = Display(Console(file=out, width=400, color_system=None))
    loaded = load_recipe(recipe)
    cache_recipe(loaded, recipe.parent / "runs", display)
    folder = RunFolder(loaded, recipe.parent / "runs")
    prepared = Preparation(folder, display).all()
    (plan,) = cache_plans(next(p for p in prepared if isinstance(p, PreparedTraining)))
    identity = cache_identity(folder, plan)
    cache = Cache(cache_folder(folder, plan, identity), identity, remedy=REMEDY)
    tested = cache.manifest["self_test"]
    print(out.getvalue(), cache.manifest["server"], tested)
    assert tested["noise_mean"] <= 0.02
    assert tested["local"]["difference_mean"] < 0.1, "bf16 there, fp32 here"
    assert tested["local"]["kl"] < 0.02
    model = load_frozen(Model(path=str(WEIGHTS)), device=torch.device("cpu"))
    row = next(iter(plan.rows.values()))
    taught = int(np.asarray(row.supervised)[1:].sum())
    target = target_of([cache.decoded(key_of_row(row), taught)], torch.device("cpu"))
    batch = collate([(0, row)], padding=padding_for(model))
    with torch.no_grad():
        logits = torch.cat(
            [t.clone() for t in tiles_of_logits(model, batch, identity.vocabulary, 1)]
        )
    found = fidelity(target, logits)
    print(found, f"{cache.rows.code_bytes / cache.rows.tokens:.1f} bytes a token")
    assert found.excess_kl < 0.02, "of what is stored to the weights, the tail as one outcome"
    shifted = fidelity(target, logits.roll(1, dims=0))
    assert shifted.excess_kl > 10 * found.excess_kl, "at the next position it is another"


def test_it_writes_answers_that_differ(recipe: Path) -> None:
    display = Display(Console(file=StringIO(), width=400, color_system=None))
    loaded = load_recipe(recipe)
    alone = dataclasses.replace(loaded, stages={"written": loaded.stages["written"]})
    run_recipe(alone, recipe.parent / "runs", display)
    file = recipe.parent / "runs" / "real" / "written" / "data" / "answers.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({row["messages"][-1]["content"] for row in rows}) > 4
    assert all(0 < row["origin"]["tokens"] <= 40 for row in rows)


LIVE = """
name: live
train: {steps: 2, batch: 2, max_length: 128, learning_rate: 1e-4, log_every: 1, lora: {r: 8}}
models:
  big: {endpoint: URL, model: NAME, tokenizer: WEIGHTS, concurrency: 4, timeout: 600}
  small: {path: WEIGHTS}
data:
  domain: {path: "toyworld:domain?rows=ROWS"}
stages:
  marked:
    student: small
    teacher: big
    data: {domain: {share: 1.0, on_policy: 1.0}}
    loss: {prediction: 1.0}
    rollouts: {max_new_tokens: 12}
  written:
    student: small
    teacher: small
    data: {domain: {share: 1.0, on_policy: 1.0}}
    loss: {prediction: 1.0}
    rollouts: {max_new_tokens: 12, engine: {endpoint: URL, model: NAME, timeout: 600}}
"""


def test_it_marks_the_students_answers_and_writes_them(recipe: Path, caplog) -> None:
    recipe.write_text(filled(LIVE))
    display = Display(Console(file=StringIO(), width=400, color_system=None))
    folder = run_recipe(load_recipe(recipe), recipe.parent / "runs", display)
    for stage in ("marked", "written"):  # once it has loaded an adapter, it may score no prompts
        text = (folder / stage / "metrics.jsonl").read_text()
        lines = [json.loads(line)["sources"]["domain"] for line in text.splitlines()]
        print(stage, lines)
        assert lines[0]["own"] == 1.0
        assert lines[0]["divergence"] < 0.05, "teacher and student are one model, but for rounding"
    assert read_stage(folder / "marked")["served"]["big"]["self_test"]["noise_mean"] <= 0.02
    print(caplog.text)
    assert "nats from the student's" not in caplog.text, "its tokens are those of the adapter"
