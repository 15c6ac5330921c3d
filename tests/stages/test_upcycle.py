"""A mixture of experts as a student, through the command line: made, taught, cut off, scored."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from forks import Fork, dominie
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM

from dominie.core.errors import InputError
from dominie.recipe import load_recipe
from dominie.toyworld.toy_models import word_tokenizer
from dominie.workflows.check import check_recipe

RECIPE = """
name: mixture
data:
  general: {path: "toyworld:general?rows=200", validation_fraction: 0.1, test_fraction: 0.1}
  domain: {path: "toyworld:domain?rows=120", validation_fraction: 0.1, test_fraction: 0.1}
train: {learning_rate: 2e-3, steps: 6, batch: 8, micro_batch: 4, max_length: 64,
  checkpoint_every: 2}
stages:
  expert: {student: "toyworld:student", data: {domain: 1.0}, loss: {next_token: 1.0}}
  two:
    upcycle:
      {model: "toyworld:student", siblings: [expert], gate: hidden_states, source: general}
  four: {upcycle: {model: "toyworld:student", experts: 4, noise: 0.1}}
  distill:
    student: four
    teacher: toyworld:teacher
    data: {general: 1.0}
    loss: {prediction: 1.0, attention: 1.0, router: {weight: 0.01, z_weight: 0.001}}
  align:
    student: two
    data:
      domain: {share: 0.5, teacher: expert}
      general: {share: 0.5, teacher: toyworld:teacher}
    loss: {prediction: 1.0, router: 0.01}
evaluate:
  models: {two: two, distill: distill, align: align}
  tasks:
    agreement: {source: general, metric: agreement, teacher: "toyworld:teacher", split: test}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    cwd = tmp_path_factory.mktemp("finished")
    (cwd / "mixture.yaml").write_text(RECIPE)
    return cwd, dominie("run", "mixture.yaml", cwd=cwd)


def test_a_run_makes_and_teaches_mixtures(finished):
    cwd, done = finished
    assert done.returncode == 0, done.stderr
    run = cwd / "runs" / "mixture"
    for stage, count in (("two", 2), ("four", 4)):
        made = json.loads((run / stage / "stage.json").read_text())
        assert (made["kind"], made["status"]) == ("upcycle", "done")
        config = json.loads((run / stage / "model" / "config.json").read_text())
        assert config["num_local_experts"] == count
        assert made["parameters"] == sum(
            t.numel() for t in load_file(run / stage / "model" / "model.safetensors").values()
        )
    assert "each token goes to all 2 experts" in done.stdout
    for stage, experts, terms in (
        ("distill", 4, {"prediction", "attention", "router"}),
        ("align", 2, {"prediction", "router"}),
    ):
        lines = [json.loads(x) for x in (run / stage / "metrics.jsonl").read_text().splitlines()]
        trained = [line for line in lines if "terms" in line]
        assert set(trained[-1]["terms"]) == terms
        assert all(len(load) == experts for load in trained[-1]["router"]["load"])
    assert trained[-1]["terms"]["router"] == 0.0
    assert set(json.loads((run / "results.json").read_text())) == {"two", "distill", "align"}


@pytest.mark.full
def test_one_that_was_cut_off_ends_in_the_same_weights(finished, tmp_path):
    (tmp_path / "mixture.yaml").write_text(RECIPE)
    run, whole = tmp_path / "runs" / "mixture", finished[0] / "runs" / "mixture"
    process = Fork("run", "mixture.yaml", cwd=tmp_path)
    cut = run / "distill" / "checkpoints" / "checkpoint-2"
    deadline = time.monotonic() + 200
    while not cut.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    resumed = dominie("run", "mixture.yaml", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "two already made" in resumed.stdout
    for stage in ("two", "four", "distill", "align"):
        file = Path(stage) / "model" / "model.safetensors"
        ours, theirs = load_file(run / file), load_file(whole / file)
        assert ours.keys() == theirs.keys()
        assert all(bool((ours[name] == theirs[name]).all()) for name in theirs), stage


def saved_student(folder: Path, *, swapped: bool) -> None:
    """A student of half the width, or of the toy student's shape with two token ids exchanged."""
    tokenizer = word_tokenizer()
    width = 96 if swapped else 48
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    MistralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if swapped:
        file = folder / "tokenizer.json"
        changed = json.loads(file.read_text())
        vocabulary = changed["model"]["vocab"]
        one, other = [word for word in vocabulary if word.isalpha()][:2]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        file.write_text(json.dumps(changed))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("experts: 4", "experts: 1", ["stages.four.upcycle", "at least 2 experts"]),
        ("experts: 4", "experts: 4, experts_per_token: 5", ["from 1 to 4"]),
        ("experts: 4", "expert: 4", ["unknown key", "did you mean experts"]),
        ("source: general", "source: genral", ["unknown source", "did you mean general"]),
        ("siblings: [expert]", "siblings: [exprt]", ["unknown stage or model", "expert?"]),
        (
            'four: {upcycle: {model: "toyworld:student"',
            'four: {upcycle: {model: "toyworld:teacher"',
            ["mixture of experts already", "stages.four.upcycle"],
        ),
        (
            'four: {upcycle: {model: "toyworld:student"',
            "four: {upcycle: {model: two",
            ["mixture of experts already", "two"],
        ),
        ("student: four", "student: toyworld:student", ["no router", "stages.distill.loss.router"]),
        ("siblings: [expert]", 'siblings: ["other"]', ["different shape", "hidden_size"]),
        ("siblings: [expert]", 'siblings: ["swapped"]', ["different tokenizers", "2 ids differ"]),
        (
            "loss: {prediction: 1.0, router: 0.01}",
            "loss: {router: 0.01}",
            ["at least one term beside router"],
        ),
        ("router: 0.01}", "router: {weight: 0.01, z: 1}}", ["unknown key", "z_weight"]),
    ],
)
def test_what_makes_no_mixture_is_one_message(tmp_path, old, new, said):
    (tmp_path / "mixture.yaml").write_text(RECIPE.replace(old, new, 1))
    for name in ("other", "swapped"):
        if name in new:
            saved_student(tmp_path / name, swapped=name == "swapped")
    with pytest.raises(InputError) as refused:
        check_recipe(load_recipe(tmp_path / "mixture.yaml"), tmp_path / "runs")
    for word in said:
        assert word in str(refused.value)
