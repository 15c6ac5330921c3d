"""Answers stages whose writer is behind a server: resumed, never paid twice, within a budget."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from fault_server import Answer, Asked, Server, reply
from rich.console import Console

from dominie.core.display import Display
from dominie.core.errors import InputError, RunError
from dominie.generation.prompt_answers import logged_answers
from dominie.planning.plan import machine, plan_recipe
from dominie.recipe import dump_recipe, load_recipe
from dominie.stages.kept_answers import declines
from dominie.workflows.check import check_recipe
from dominie.workflows.pipeline import run_recipe

RECIPE = """
name: toy
train: {steps: 1, batch: 4, max_length: 64}
models:
  writer: {endpoint: URL, model: org/big, concurrency: 4, backoff: 0.001, retries: 8, key_env: KEY}
data:
  domain: {path: "toyworld:domain?rows=40", test_fraction: 0.2}
stages:
  written:
    answers:
      model: writer
      source: domain
      samples: 2
      temperature: 0.7
      top_p: 0.9
      max_new_tokens: 50
      system: Answer in one word.
  tuned: {student: "toyworld:student", data: {written: 1.0}, loss: {next_token: 1.0}}
"""


def say(asked: Asked) -> Answer:
    """A word that the prompt and the attempt choose; of some prompts a bad one."""
    number = len(asked.text) % 7
    if number == 0 and not asked.before:
        return reply("cut off", finish_reason="length")
    if number == 1:
        return reply("", finish_reason="content_filter")
    return reply(f"<think>so</think>word {asked.before}", finish_reason="stop")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEY", "secret-key")
    return tmp_path / "toy.yaml"


def run(recipe: Path, server: Server, *overrides: str) -> str:
    recipe.write_text(RECIPE.replace("URL", server.url))
    out = StringIO()
    display = Display(Console(file=out, width=400, color_system=None))
    run_recipe(load_recipe(recipe, overrides), recipe.parent / "runs", display)
    return out.getvalue()


def rows(recipe: Path) -> list[dict[str, Any]]:
    file = recipe.parent / "runs" / "toy" / "written" / "data" / "answers.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_server_writes_what_a_later_stage_learns(recipe, serve: Callable[..., Server]):
    server = serve(say)
    printed = run(recipe, server)
    made = rows(recipe)
    record = json.loads((recipe.parent / "runs/toy/written/stage.json").read_text())
    assert sum(server.asked.values()) == 2 * record["prompts"] == sum(server.paid.values())
    assert record["conversations"] == len(made) > 10
    assert len(made) + sum(record["dropped"].values()) == 2 * record["prompts"]
    assert {"cut off", "refused by the server"} <= record["dropped"].keys()
    assert record["thoughts_left_out"] == len(made)
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["top_p"]) == ("org/big", 0.7, 0.9)
    assert (body["max_tokens"], body["messages"][0]["content"]) == (50, "Answer in one word.")
    row = made[0]
    assert row["messages"][0]["role"] == "user", "the system prompt is the writer's alone"
    origin = row["origin"]
    assert (origin["served_as"], origin["tokens"], origin["stopped"]) == ("org/big", 10, "stop")
    assert origin["at"].endswith("Z")
    assert "seed" not in origin
    assert {each["origin"]["sample"] for each in made} == {0, 1}
    assert "written by org/big: some licences and terms of use forbid" in printed
    card = (recipe.parent / "runs/toy/tuned/model/README.md").read_text()
    assert "The licence of the teacher org/big could not be read" in card
    everything = "".join(p.read_text(errors="ignore") for p in recipe.parent.rglob("*.json*"))
    assert "secret-key" not in everything + printed
    resolved = recipe.with_name("again.yaml")
    resolved.write_text(dump_recipe(load_recipe(recipe)))
    assert load_recipe(resolved) == load_recipe(recipe)
    before = sum(server.asked.values())
    assert "already written" in run(recipe, server)
    assert sum(server.asked.values()) == before


def test_one_failed_request_in_five_loses_and_repeats_nothing(recipe, serve):
    count = iter(range(10_000))

    def flaky(asked: Asked) -> Answer:
        faults = (Answer(429, "slow"), Answer(500, "oops"), Answer(body='{"choices": [', cut=True))
        number = next(count)
        return faults[number // 5 % 3] if number % 5 == 4 else say(asked)

    server = serve(flaky)
    run(recipe, server, "stages.tuned.train.steps=1")
    record = json.loads((recipe.parent / "runs/toy/written/stage.json").read_text())
    assert sum(server.paid.values()) == 2 * record["prompts"]
    assert "not answered" not in record["dropped"]


def test_a_budget_ends_the_stage_and_a_larger_one_goes_on(recipe, serve):
    server = serve(say)
    with pytest.raises(RunError, match="the budget is spent") as caught:
        run(recipe, server, "models.writer.budget={calls: 7}")
    assert "models.writer.budget.calls" in str(caught.value)
    assert sum(server.paid.values()) == 7
    with pytest.raises(RunError, match=r"budget\.tokens"):
        run(recipe, server, "models.writer.budget={tokens: 2000}")
    assert 1500 < 110 * sum(server.paid.values()) <= 2000
    price = "models.writer.price={input: 1000000, output: 0}"  # 100 a call
    with pytest.raises(RunError, match=r"budget\.money"):
        run(recipe, server, price, "models.writer.budget={money: 2500}")
    run(recipe, server)
    prompts = json.loads((recipe.parent / "runs/toy/written/stage.json").read_text())["prompts"]
    assert sum(server.paid.values()) == 2 * prompts, "none was paid twice"


@pytest.mark.full
def test_a_killed_stage_pays_for_no_answer_twice(recipe, serve):
    server = serve(lambda asked: Answer(**{**vars(say(asked)), "hang": 0.02}))
    recipe.write_text(RECIPE.replace("URL", server.url))
    command = [sys.executable, "-m", "dominie", "run", str(recipe), "--only", "written"]
    started = subprocess.Popen(
        [*command, "--runs", str(recipe.parent / "runs")],
        stdout=subprocess.DEVNULL,
        stderr=(errors := (recipe.parent / "errors.txt").open("w+")),
    )
    deadline = time.monotonic() + 120
    while sum(server.paid.values()) < 12 and time.monotonic() < deadline:
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    started.wait()
    under_way = 4
    paid = sum(server.paid.values())
    errors.seek(0)
    assert paid >= 12, errors.read()
    run(recipe, server)
    prompts = json.loads((recipe.parent / "runs/toy/written/stage.json").read_text())["prompts"]
    assert 2 * prompts <= sum(server.paid.values()) <= 2 * prompts + under_way
    assert paid < sum(server.paid.values())


CHOSEN = """
name: toy
models:
  writer: {endpoint: URL, model: org/big, backoff: 0.001}
  judge: {endpoint: URL, model: org/judge, backoff: 0.001}
data: {sums: {path: sums.jsonl, test_fraction: 0.2}}
stages:
  written:
    answers: {model: writer, source: sums, samples: 3, temperature: 0.7, keep: KEEP}
evaluate:
  models: {one: "toyworld:student"}
  tasks: {right: {source: sums, metric: exact_match}}
"""


def sums(asked: Asked) -> Answer:
    """Sums, every second one right; thoughts in a field; verdicts of the judge, high if right."""
    if asked.body["model"] == "org/judge":
        return reply(f"Rating: [[{9 if is_right(asked.text) else 2}]]")
    a, b = (int(word) for word in asked.text.split() if word.isdigit())
    wrong = (len(asked.text) + asked.before) % 2
    text = str(a + b + wrong + (asked.before == 2) * wrong)
    answer = reply(text, finish_reason="stop")
    tree = json.loads(answer.body)
    tree["choices"][0]["message"]["reasoning_content"] = "so it is"
    return Answer(body=json.dumps(tree))


def is_right(text: str) -> bool:
    """Whether the answer that a judge is shown is the sum."""
    asked = next(line for line in text.splitlines() if line.startswith("how much"))
    answer = next(line for line in text.splitlines() if line.isdigit())
    return sum(int(word) for word in asked.split() if word.isdigit()) == int(answer)


@pytest.mark.parametrize("keep", ["{task: right, best: 1}", "{judge: judge, best: 1}"])
def test_answers_are_chosen_by_a_task_or_a_judge(tmp_path, serve, keep):
    rows = [
        {"prompt": f"how much is {a} and {b} ?", "completion": str(a + b)}
        for a in range(2, 8)
        for b in range(2, 6)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server, file = serve(sums), tmp_path / "toy.yaml"
    file.write_text(CHOSEN.replace("URL", server.url).replace("KEEP", keep))
    recipe = load_recipe(file, ["stages.written.answers.keep_thoughts=true"])
    folder = run_recipe(recipe, tmp_path / "runs", Display()) / "written"
    made = [json.loads(x) for x in (folder / "data/answers.jsonl").read_text().splitlines()]
    record = json.loads((folder / "stage.json").read_text())
    assert len(made) == record["prompts"] > 5, "one answer to each prompt"
    for row in made:
        thoughts, answer = row["messages"][-1]["content"].split("\n</think>\n\n")
        assert thoughts == "<think>\nso it is"
        a, b = (int(word) for word in row["messages"][0]["content"].split() if word.isdigit())
        assert int(answer) == a + b
        assert row["origin"]["score"] == (1.0 if "task" in keep else 9.0)
    dropped = record["dropped"]
    assert dropped["below keep.at_least"] > 0
    assert len(made) + sum(dropped.values()) == 3 * record["prompts"]
    asked = len(server.bodies)
    (folder / "stage.json").unlink()
    run_recipe(recipe, tmp_path / "runs", Display())
    assert len(server.bodies) == asked, "no answer and no verdict is paid twice"


def test_what_declines_is_told():
    assert declines("I'm sorry, but I can't help with that.")
    assert declines("As an AI language model, I have no")
    assert not declines("The shop is sorry for the delay.")
    assert not declines("7")


WRITER = """
import sys
from pathlib import Path

from dominie.data.sources import Source
from dominie.generation.endpoint import ServedModel
from dominie.generation.prompt_answers import Answers, prompts_of, server_answers

url, folder = sys.argv[1], Path(sys.argv[2])
settings = {"model": "writer", "source": "asked", "samples": 2, "temperature": 0.7}
prompts = list(prompts_of(Source(name="asked", path=str(folder / "asked.jsonl")), frozenset()))
served = ServedModel(endpoint=url, model="org/big", concurrency=8, backoff=0.001)
server_answers(Answers(**settings), served, prompts, folder / "logs", print, lambda *_: None)
"""


@pytest.mark.full
def test_two_thousand_answers_with_thirty_kills_are_paid_once_and_none_is_lost(tmp_path, serve):
    chats = [
        [{"role": "user", "content": f"{n} ?"}, {"role": "assistant", "content": "."}]
        for n in range(1000)
    ]
    lines = [json.dumps({"messages": chat}) + "\n" for chat in chats]
    (tmp_path / "asked.jsonl").write_text("".join(lines))
    server = serve(lambda asked: Answer(**{**vars(say(asked)), "hang": 0.01}))
    server.remembered = set()  # a gateway that bills a call once: those under way at a kill
    command = [sys.executable, "-c", WRITER, server.url, str(tmp_path)]
    kills = 0
    while True:
        before = sum(server.asked.values())
        with (tmp_path / "errors.txt").open("w+") as errors:
            process = subprocess.Popen(command, stderr=errors, stdout=subprocess.DEVNULL)
            while process.poll() is None and (
                kills >= 30 or sum(server.asked.values()) < before + 40
            ):
                time.sleep(0.002)
            if process.poll() is not None:
                errors.seek(0)
                assert process.returncode == 0, errors.read()
                break
            process.kill()
            process.wait()
        kills += 1
    assert kills == 30
    assert len(server.remembered) == sum(server.paid.values()) == 2000
    assert set(server.paid.values()) == {2}, "none was paid twice"
    assert sum(server.asked.values()) <= 2000 + 30 * 8, "but for those under way at a kill"
    assert len(logged_answers(tmp_path / "logs")) == 2000, "none was lost"


def test_a_server_that_stops_answering_keeps_what_it_wrote(recipe, serve):
    count = iter(range(10_000))
    server = serve(lambda asked: say(asked) if next(count) < 9 else Answer(401, "expired key"))
    with pytest.raises(InputError, match="the endpoint refuses the key"):
        run(recipe, server)
    server.behave = say
    run(recipe, server)
    prompts = json.loads((recipe.parent / "runs/toy/written/stage.json").read_text())["prompts"]
    assert sum(server.paid.values()) == 2 * prompts


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.written.answers.seed=1", "servers differ in what a seed means"),
        ("models.writer.request={temperature: 1}", "would be overwritten"),
        ("models.writer.path=x", "a model is in a folder"),
        ("models.writer.placement=cpu", "the server holds the weights"),
        ("models.writer.key_env=sk-abc", "never the key itself"),
        ("models.writer.tokeniser=x", "did you mean tokenizer"),
        ("stages.tuned.student=writer", "its weights are not at hand"),
        ("stages.written.answers.budget={calls: 1}", "stand under models"),
        ("stages.written.answers.keep={}", "either a task or a judge"),
        ("stages.written.answers.keep={task: x}", "whose metric scores answers"),
        ("stages.written.answers.keep={judge: tuned}", "judged by a model behind a server"),
        ("stages.written.answers.judge=writer", "chooses answers under keep"),
        ("stages.m={merge: {models: {writer: 1.0}}}", "its weights are not at hand"),
        ("evaluate.models={a: writer}", "the tokenizer is not known"),
    ],
)
def test_misuse_is_refused_by_name(recipe, override, message):
    recipe.write_text(RECIPE.replace("URL", "http://127.0.0.1:9/v1"))
    overrides = [override]
    if override.startswith("evaluate"):
        overrides.append("evaluate.tasks={t: {source: domain}}")
    with pytest.raises(InputError, match=message):
        load_recipe(recipe, overrides)


def test_check_and_plan_ask_no_server(recipe):
    recipe.write_text(RECIPE.replace("URL", "http://127.0.0.1:9/v1"))
    loaded = load_recipe(recipe)
    assert check_recipe(loaded, recipe.parent / "runs", Display()).stages == ("written", "tuned")
    plan = plan_recipe(loaded, machine(gpu="h100"))
    assert plan.stages["written"].weights == 0.0
