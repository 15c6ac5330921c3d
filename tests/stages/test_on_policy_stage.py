"""Stages whose student answers: from a recipe to a model, on one process and on two."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dominie.core.display import Display, PlainConsole
from dominie.recipe import recipe_of
from dominie.toyworld.toy_models import word_tokenizer
from dominie.training.rollouts import Rollout, RolloutFiles, RolloutKey
from dominie.workflows.pipeline import run_recipe


def tree(folder: Path, **align: Any) -> dict[str, Any]:
    """A recipe of one stage; the prompts of one of its sources have no answers."""
    asked = [{"prompt": f"how much is {a} and {b} ?"} for a in range(2, 7) for b in range(2, 6)]
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    general, domain = (
        {"path": f"toyworld:{name}?rows=160", "validation_fraction": 0.1}
        for name in ("general", "domain")
    )
    return {
        "name": "mine",
        "data": {
            "general": general,
            "domain": domain,
            "asked": {"path": str(path), "prompts": True},
        },
        "train": {
            "learning_rate": 2e-3,
            "steps": 2,
            "batch": 8,
            "micro_batch": 4,
            "max_length": 48,
            "log_every": 1,
        },
        "stages": {
            "align": {
                "student": "toyworld:student",
                "data": {
                    "domain": {"share": 0.25, "teacher": "toyworld:teacher", "on_policy": 0.5},
                    "general": {"share": 0.25, "teacher": "toyworld:student"},
                    "asked": {"share": 0.5, "teacher": "toyworld:teacher", "on_policy": 1.0},
                },
                "loss": {"prediction": {"kind": "reverse_kl"}},
                "rollouts": {"max_new_tokens": 8},
                **align,
            },
        },
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if "sources" in line]


def answers_of(folder: Path, step: int) -> dict[RolloutKey, Rollout]:
    return RolloutFiles(folder / "rollouts").read(step)[0]


def test_a_recipe_with_prompts_becomes_a_model(tmp_path, capsys):
    folder = run_recipe(recipe_of(tree(tmp_path)), tmp_path, Display(PlainConsole()))
    shown = capsys.readouterr().out
    assert "the student answers 50 % of domain, 100 % of asked, up to 8 tokens each" in shown
    record = json.loads((folder / "align" / "stage.json").read_text("utf-8"))
    assert record["loss_shares"]["asked"] == pytest.approx(0.5, abs=0.2)
    for line in lines(folder / "align"):
        asked = line["sources"]["asked"]
        assert asked["own"] == 1.0
        assert 1 <= asked["answer_tokens"] <= 8
        assert "own" not in line["sources"].get("general", {})
        assert line["generation_seconds"] > 0
        assert 0 < line["teacher_seconds"] < line["seconds"]
    assert (folder / "align" / "model" / "model.safetensors").exists()
    assert all(key.source != "general" for key in answers_of(folder / "align", 1))


def test_the_students_old_self_reads_the_answers_and_marks_its_own(tmp_path, capsys):
    """Of each answer the divergence is that of whole logits, with the data's answer in one."""
    sums = {f"how many is {a} plus {b} ?": str(a + b) for a in range(6) for b in range(4)}
    rows = [{"prompt": question, "completion": answer} for question, answer in sums.items()]
    made = tree(tmp_path)
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made["data"]["sums"] = {"path": str(path)}
    reading = {"model": "toyworld:student", "shows": "answer", "text": "final {answer} first"}
    made["stages"]["align"] |= {
        "data": {
            "sums": {"share": 0.5, "teacher": reading, "on_policy": 0.8},
            "general": {"share": 0.5, "teacher": "toyworld:student"},
        },
        "loss": {"prediction": 1.0},
        "rollouts": {"max_new_tokens": 8, "start_new_tokens": 3},
        "train": made["train"] | {"lora": {"r": 2}, "batch": 16},
    }
    folder = run_recipe(recipe_of(made), tmp_path, Display(PlainConsole()))
    shown = capsys.readouterr().out
    assert "toyworld:student and the student share one base" in shown
    assert "toyworld:student reads the right answers of sums, and the student does not" in shown
    assert "80 % of sums, up to 3 tokens each at first, 8 at last; the answers are kept" in shown
    assert json.loads((folder / "align" / "stage.json").read_text("utf-8"))["shown"] == ["sums"]
    tokenizer = word_tokenizer()
    model = (
        AutoModelForCausalLM.from_pretrained(folder / "toyworld" / "student-seed0").double().eval()
    )
    found = answers_of(folder / "align", 1)
    told = RolloutFiles(folder / "align" / "rollouts").divergences(1)
    assert 2 < len(found) == len(told) < 8
    for key, rollout in found.items():
        assert len(rollout.answer) <= 3
        question = next(q for q in sums if q in tokenizer.decode(rollout.prompt))
        reads = f"<s><|user|> {question} final {sums[question]} first <|end|><|assistant|>"
        reads, asked = tokenizer(reads)["input_ids"], list(rollout.prompt)
        with torch.no_grad():  # the student's adapters have changed nothing yet
            own, other = (
                model(input_ids=torch.tensor([[*prompt, *rollout.answer]])).logits[
                    0, len(prompt) - 1 : -1
                ]
                for prompt in (asked, reads)
            )
        kl = (other.softmax(-1) * (other.log_softmax(-1) - own.log_softmax(-1))).sum(-1)
        assert told[key] == pytest.approx(kl.tolist(), abs=2e-4)
        assert kl.max() > 0.01
    values = lines(folder / "align")[0]["sources"]
    assert values["sums"]["divergence_data"] > 0.01
    assert values["general"]["divergence"] == pytest.approx(0, abs=1e-5)


@pytest.mark.full
def test_two_processes_write_disjoint_parts_of_the_same_answers(tmp_path):
    made = {}
    for processes in (1, 2):
        here = tmp_path / str(processes)
        here.mkdir()
        (here / "recipe.json").write_text(json.dumps(tree(here)), encoding="utf-8")
        (here / "recipe.json").rename(here / "recipe.yaml")
        command = [sys.executable, "-m", "dominie", "run", "recipe.yaml"]
        command += ["--nproc", "2"] if processes == 2 else []
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        made[processes] = here / "runs" / "mine" / "align"
    written = sorted(path.name for path in (made[2] / "rollouts").glob("step-00000001.rank*"))
    assert written == ["step-00000001.rank-0.json", "step-00000001.rank-1.json"]
    assert answers_of(made[1], 1) == answers_of(made[2], 1)
    told = [RolloutFiles(made[n] / "rollouts").divergences(1) for n in (1, 2)]
    assert told[0].keys() == told[1].keys()
    for key, values in told[0].items():
        assert told[1][key] == pytest.approx(values, abs=1e-3)
    for one, two in zip(lines(made[1]), lines(made[2]), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        for source, values in one["sources"].items():
            assert two["sources"][source]["tokens"] == values["tokens"]
