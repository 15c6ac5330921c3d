"""Stages in which a model answers the prompts of a source, on which a later stage trains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dominie.core.display import Display
from dominie.core.errors import InputError, RunError
from dominie.data.conversations import read_conversations
from dominie.data.sources import Source, held_out_prompts, prompt_digest
from dominie.generation.generator import Generation, Sampling
from dominie.generation.local import LocalGenerator
from dominie.generation.prompt_answers import Asked, prompts_of
from dominie.planning.plan import machine, plan_recipe
from dominie.planning.plan_output import as_json, as_lines
from dominie.recipe import dump_recipe, load_recipe, only_models
from dominie.stages.kept_answers import fault
from dominie.workflows.check import check_recipe
from dominie.workflows.lineage import lineage
from dominie.workflows.pipeline import run_recipe

RECIPE = """
name: toy
train: {steps: 1, batch: 4, max_length: 64, seed: 3}
models: {writer: {path: "toyworld:student"}}
data:
  domain: {path: "toyworld:domain?rows=60", validation_fraction: 0.1, test_fraction: 0.2}
  questions: {path: "toyworld:domain?rows=90", test_fraction: 0.5}
stages:
  tuned:
    student: "toyworld:student"
    data: {written: 0.5, domain: 0.5}
    loss: {next_token: 1.0}
  written:
    answers: {model: writer, source: domain, samples: 4, temperature: 0.8, max_new_tokens: 9}
evaluate:
  models: {tuned: tuned, base: "toyworld:student"}
  tasks: {domain: {source: questions, limit: 2, max_new_tokens: 2}}
"""


class Writer:
    """Answers in the place of a model, by the prompt and the seed; may be interrupted."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.most: int | None = None
        self.words: tuple[str, ...] = ("red", "blue", "green", "")

    def generate(self, requests: Any, on_result: Any, **_: Any) -> None:
        for index, request in enumerate(requests):
            if self.most is not None and len(self.prompts) == self.most:
                raise KeyboardInterrupt
            text, sample = request.messages[-1]["content"], request.sampling.seed >> 32
            self.prompts.append(text)
            cut = len(text) % 5 == 0 and sample == 1
            word = self.words[
                len(text) % 2 * sample
            ]  # of half of the prompts they are all the same
            on_result(index, Generation(word, "length" if cut else "stop", [1, 2]))


@pytest.fixture
def writer(monkeypatch) -> Writer:
    found = Writer()
    monkeypatch.setattr(LocalGenerator, "generate", lambda _, *a, **k: found.generate(*a, **k))
    return found


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "toy.yaml").write_text(RECIPE)
    return tmp_path / "toy.yaml"


def run(recipe: Path, *overrides: str, only: tuple[str, ...] = ()) -> str:
    """Run a recipe without its evaluation; what was printed."""
    out = StringIO()
    loaded = load_recipe(recipe, ["evaluate=", *overrides])
    display = Display(Console(file=out, width=400, color_system=None))
    run_recipe(only_models(loaded, only) if only else loaded, recipe.parent / "runs", display)
    return out.getvalue()


def rows(recipe: Path) -> list[dict[str, Any]]:
    file = recipe.parent / "runs" / "toy" / "written" / "data" / "answers.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def record(recipe: Path, stage: str = "written") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (recipe.parent / "runs" / "toy" / stage / "stage.json").read_text()
    )
    return found


def test_a_stage_trains_on_the_answers_of_another(recipe, writer):
    printed = run(recipe)
    assert printed.index("written") < printed.index("done tuned")
    made, found = rows(recipe), record(recipe)
    assert found["conversations"] == len(made) > 0
    assert found["prompts"] * 4 == len(writer.prompts) == len(made) + sum(found["dropped"].values())
    assert set(found["dropped"]) == {"cut off", "empty", "repeated"}
    assert found["skipped"]["held out"] > 0
    assert found["mean_tokens"] == 2.0
    assert found["samples"] == [row["messages"] for row in made[:3]]
    assert (found["models"], found["source"], found["seconds"] >= 0) == (["writer"], "domain", True)
    origin = made[0]["origin"]
    assert origin["fields"].keys() == {"family"}
    assert (origin["model"], origin["temperature"], origin["seed"]) == ("writer", 0.8, 3)
    assert (origin["sample"], origin["stopped"], origin["tokens"]) == (0, "stop", 2)
    assert f"written: writer is asked {found['prompts']} prompts of domain, 4 times each" in printed
    told = f"{len(made)} answers of writer to {found['prompts']} prompts of domain"
    assert told in found["description"]
    assert found["description"] in printed
    trained = record(recipe, "tuned")["data"]
    assert trained["written"]["read"] == trained["written"]["train"] == len(made)
    folder = recipe.parent / "runs" / "toy"
    assert told in (folder / "report.html").read_text()
    card = (folder / "tuned" / "model" / "README.md").read_text()
    assert "| written | toyworld:student | answers: domain |" in card
    assert "learnt from `toyworld:student`" in card


def test_what_any_source_holds_out_is_not_asked(recipe, writer):
    run(recipe, only=("written",))
    folder = recipe.parent / "runs" / "toy" / "toyworld"
    domain = Source(
        name="domain",
        path=str(next(folder.glob("domain-60-*.jsonl"))),
        validation_fraction=0.1,
        test_fraction=0.2,
    )
    questions = Source(
        name="questions", path=str(next(folder.glob("domain-90-*.jsonl"))), test_fraction=0.5
    )
    asked = {c.messages[0]["content"]: prompt_digest(c) for c in read_conversations(domain)}
    kept = held_out_prompts(domain)
    others = {d for d in asked.values() if d in held_out_prompts(questions)} - kept
    assert len(kept) > 3
    assert len(others) > 3, "held out by the other source alone"
    expected = {text for text, digest in asked.items() if digest not in kept | others}
    assert set(writer.prompts) == expected


def test_an_interrupted_stage_goes_on_without_losing_answers(recipe, writer):
    run(recipe, only=("written",))
    whole, count = rows(recipe), len(writer.prompts)
    other = recipe.with_name("other.yaml")
    other.write_text(RECIPE.replace("name: toy", "name: other"))
    writer.prompts.clear()
    writer.most = count // 2
    with pytest.raises(KeyboardInterrupt):
        run(other, only=("written",))
    folder = recipe.parent / "runs" / "other" / "written"
    assert not (folder / "data").exists()
    assert json.loads((folder / "stage.json").read_text())["status"] == "running"
    log = recipe.parent / "runs" / "other" / "cache" / "answers" / "written" / "0.jsonl"
    assert len(log.read_text().splitlines()) == count // 2
    with log.open("a") as file:
        file.write('{"key": "torn')  # as a crash leaves a line
    writer.most = None
    run(other, only=("written",))
    assert len(writer.prompts) == count, "none was written twice"
    assert (folder / "data" / "answers.jsonl").read_text().splitlines() == [
        json.dumps(row, ensure_ascii=False) for row in whole
    ]


def test_answers_that_still_hold_are_not_written_again(recipe, writer):
    run(recipe, "stages.written.answers.samples=2", only=("written",))
    first = len(writer.prompts)
    printed = run(recipe, only=("written",))
    assert "answers.samples: 2 before, 4 now" in printed
    assert len(writer.prompts) == 2 * first, "two further samples of each prompt"
    assert "already written" in run(recipe, "stages.written.answers.batch=5", only=("written",))
    run(recipe, "stages.written.answers.seed=4", only=("written",))
    assert len(writer.prompts) == 4 * first, "all anew"


def test_a_writer_of_nothing_useful_is_an_error(recipe, writer):
    writer.words = ("",) * 4
    with pytest.raises(RunError, match="no answer can be learnt from") as caught:
        run(recipe, only=("written",))
    assert "empty" in str(caught.value)
    assert not (recipe.parent / "runs" / "toy" / "written" / "data").exists()


@pytest.mark.full
def test_two_processes_write_what_one_does(recipe):
    text = RECIPE.replace("model: writer", "model: expert")
    expert = "  expert: {student: writer, data: {domain: 1.0}, loss: {next_token: 1.0}}\n"
    recipe.write_text(text.replace("stages:\n", f"stages:\n{expert}"))
    run(recipe, "stages.expert.train.steps=60", only=("expert",))
    runs, two = recipe.parent / "runs", recipe.parent / "two"
    shutil.copytree(runs, two)
    run(recipe, "stages.expert.train.steps=60", only=("written",))
    command = [sys.executable, "-m", "dominie", "run", str(recipe), "evaluate="]
    command += ["stages.expert.train.steps=60", "--only", "written", "--nproc", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--runs", str(two)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert (two / "toy" / "written" / "data" / "answers.jsonl").read_text().splitlines() == [
        json.dumps(row, ensure_ascii=False) for row in rows(recipe)
    ]
    logs = two / "toy" / "cache" / "answers" / "written"
    shares = [len((logs / f"{rank}.jsonl").read_text().splitlines()) for rank in range(2)]
    assert abs(shares[0] - shares[1]) <= 1 < shares[0]


def test_check_plan_and_lineage_know_the_stage(recipe):
    loaded = load_recipe(recipe)
    assert loaded.stages["written"].sources == ["domain"]
    assert loaded.needs("tuned") == ["written"]
    resolved = recipe.with_name("again.yaml")
    resolved.write_text(dump_recipe(loaded))
    assert load_recipe(resolved) == loaded
    assert "seed: 3" in resolved.read_text().partition("written:")[2], "that of train"
    out = StringIO()
    display = Display(Console(file=out, width=200, color_system=None))
    checked = check_recipe(loaded, recipe.parent / "runs", display)
    assert checked.stages == ("written", "tuned")
    assert ("source written", "stage written makes it, and has not been run") in checked.not_checked
    plan = plan_recipe(loaded, machine(gpu="h100"))
    assert plan.sizes["written"].conversations == 4 * plan.sizes["domain"].conversations
    lines = "\n".join(as_lines(plan))
    assert (
        "written  data, made by answers, not trained: 0.00 GB of 80 GB, fits; 0.00 hours" in lines
    )
    assert as_json(plan)["stages"]["written"]["kind"] == "answers"
    found = lineage(loaded, "tuned")
    assert (found.stages, found.teachers) == (("tuned", "written"), ("writer",))
    assert set(only_models(loaded, ["base"]).stages) == set()
    assert set(only_models(loaded, ["tuned"]).stages) == {"tuned", "written"}


def test_a_plan_grows_with_answers_their_length_and_the_batch(recipe):
    def planned(**changed: int) -> Any:
        overrides = [f"stages.written.answers.{key}={value}" for key, value in changed.items()]
        overrides.append("stages.written.answers.model=toyworld:student?width=512")
        plan = plan_recipe(load_recipe(recipe, overrides), machine(gpu="h100"))
        return plan.stages["written"]

    usual = planned()
    assert planned(samples=8).cost.hours == pytest.approx(2 * usual.cost.hours)
    assert planned(samples=8).weights == usual.weights, "there is no more of it at once"
    assert planned(max_new_tokens=18).cost.hours > usual.cost.hours
    traffic = {size: planned(batch=size).cost.seconds["memory"] for size in (32, 64, 128)}
    saved = traffic[32] - traffic[64], traffic[64] - traffic[128]
    assert saved[0] == pytest.approx(2 * saved[1]), "weights are read once for each batch"
    assert saved[1] > 0
    assert planned(batch=128).weights > usual.weights > planned(batch=32).weights


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.written.answers.temperature=0", "samples 4 has no meaning at temperature 0"),
        ("stages.written.answers={model: writer, source: domain, seed: 1}", "seed 1 has no mean"),
        ("stages.written.answers.samples=0", "samples must be at least 1"),
        ("stages.written.answers.top_p=0", "top_p must be above 0"),
        ("stages.written.answers.seed=-1", "seed must be from 0"),
        ("stages.written.answers.model=tuned", "stages need each other"),
        ("stages.written.answers.source=domian", "did you mean domain"),
        ("stages.written.answers.judge={model: x}", "chooses answers under keep"),
        ("stages.written.answers.model=http://127.0.0.1:1/v1", "an address is no name of a model"),
        ("models.writer={endpoint: x}", "missing key"),
        ("stages.written.answers.sample=2", "did you mean samples"),
        ("evaluate.tasks.domain.source=written", "a stage of kind answers holds nothing out"),
    ],
)
def test_misuse_is_refused_by_name(recipe, override, message):
    with pytest.raises(InputError, match=message):
        load_recipe(recipe, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.written.answers.max_new_tokens=100000", "lower max_new_tokens"),
        ("data.domain.test_fraction=0.9", "there is no prompt to answer"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_anything_runs(recipe, override, message):
    with pytest.raises(InputError, match=message):
        check_recipe(load_recipe(recipe, [override]), recipe.parent / "runs", Display())


def test_prompts_are_conversations_up_to_their_last_answer(tmp_path):
    ask, say = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    given: list[dict[str, Any]] = [
        {"messages": [ask, say], "family": "x"},
        {"messages": [ask, say | {"content": "c"}]},
        {"messages": [ask, say, ask | {"content": "d"}, say]},
        {"messages": [ask, say], "tools": [tool]},
        {"messages": [{"role": "system", "content": "s"}, say]},
        {"messages": [ask | {"content": "out"}, say]},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    source, skipped = Source(name="x", path=str(tmp_path / "x.jsonl")), Counter[str]()
    held_out = {prompt_digest(list(read_conversations(source))[-1])}
    single, several = prompts_of(source, held_out, skipped)
    assert single.messages == [ask]
    assert several.messages == [ask, say, ask | {"content": "d"}]
    assert skipped == {
        "with a prompt that stood before": 1,
        "with tools": 1,
        "without a question": 1,
        "held out": 1,
    }
    answer = {"text": "e", "stopped": "stop", "tokens": 2}
    row = Asked("key", several, Sampling(max_new_tokens=4, seed=2**32 + 7, sample=1), []).row(
        answer, "m"
    )
    (tmp_path / "y.jsonl").write_text(json.dumps(row) + "\n")
    (read,) = read_conversations(Source(name="y", path=str(tmp_path / "y.jsonl")))
    assert read.answer == "e"
    assert read.weights == (1.0, 0.0, 1.0, 1.0), "the earlier answer is not the writer's"
    assert (row["origin"]["seed"], row["origin"]["sample"]) == (7, 1)


def test_answers_are_dropped_that_are_cut_off_empty_or_repeated():
    good = {"stopped": "stop", "text": "red"}
    assert fault(good, {"blue"}) is None
    assert fault(good, {"red"}) == "repeated"
    assert fault(good | {"text": " \n"}, set()) == "empty"
    assert fault(good | {"stopped": "length"}, {"red"}) == "cut off"
