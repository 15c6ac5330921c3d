"""Adapters from stage to stage through the command line: one base on disk and in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forks import dominie

MINI = Path(__file__).parent / "recipes" / "mini.yaml"
ADAPTERS = [
    f"stages.{stage}.train.lora={{r: 4, alpha: 8, merge: false}}"
    for stage in ("distill", "expert", "align")
]
TASKS = "evaluate.tasks={general: {source: general, split: test}}"


@pytest.mark.full
def test_student_reference_and_expert_are_adapters_over_one_base(tmp_path):
    arguments = ["run", MINI, *ADAPTERS, TASKS, "--only", "align"]
    done = dominie(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "align: distill and expert and the student share one base" in done.stdout.replace(
        "expert and distill", "distill and expert"
    )
    run = tmp_path / "runs" / "mini"
    bases = set()
    for stage in ("distill", "expert", "align"):
        model = run / stage / "model"
        assert not (model / "model.safetensors").exists()
        config = json.loads((model / "adapter_config.json").read_text())
        bases.add(config["base_model_name_or_path"])
        record = json.loads((run / stage / "stage.json").read_text())
        assert record["trainable_parameters"] < 0.2 * record["parameters"]
        assert "base_model_relation" not in (card := (model / "README.md").read_text())
        assert "library_name: peft" in card
        assert "More Information Needed" not in card
        assert "README.md" not in str(record["files"])  # it may be written again
    assert len(bases) == 1
    assert list(json.loads((run / "results.json").read_text())) == ["align"]
    again = dominie(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("already trained") == 4
