"""Models behind servers by their names: scored on tasks and benchmarks, and as a judge."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from fault_server import Answer, Asked, reply
from rich.console import Console
from score_server import ModelScorer

from dominie.core.display import Display
from dominie.core.errors import InputError
from dominie.models.loading import load_frozen, load_tokenizer
from dominie.models.spec import Model
from dominie.recipe import recipe_of
from dominie.toyworld import materialise
from dominie.workflows.pipeline import run_recipe


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> ModelScorer:
    folder = materialise("toyworld:student", tmp_path_factory.mktemp("toy"), seed=0)
    spec = Model(path=str(folder))
    return ModelScorer(load_frozen(spec, device="cpu"), len(load_tokenizer(spec)))


def tree(url: str, folder: Path, **task: Any) -> dict[str, Any]:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"how much is {a} and {b} ?"},
                {"role": "assistant", "content": str(a + b)},
            ],
            "options": [str(a + b), str(a), str(b)],
        }
        for a in range(2, 5)
        for b in range(2, 4)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    big = {"endpoint": url, "model": "org/big", "tokenizer": "toyworld:student", "backoff": 0.001}
    return {
        "name": "toy",
        "models": {"big": big},
        "data": {"asked": {"path": str(path), "test_fraction": 1.0}},
        "evaluate": {
            "models": {"served": "big", "local": "toyworld:student"},
            "tasks": {"sums": {"source": "asked", **task}},
        },
    }


def run(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    made = run_recipe(recipe_of(recipe), folder, Display(Console(file=StringIO(), width=200)))
    found: dict[str, Any] = json.loads((made / "results.json").read_text("utf-8"))
    return found.get("results", found)


def test_options_are_as_likely_on_the_server_as_here(tmp_path, serve, scorer):
    server = serve(scorer)
    run(tree(server.url, tmp_path, metric="choice"), tmp_path)
    told = {}
    for name in ("served", "local"):
        text = (tmp_path / "toy" / "evaluation" / name / "sums.jsonl").read_text()
        told[name] = [json.loads(line)["log_likelihoods"] for line in text.splitlines()]
    assert len(told["served"]) == 6
    for one, other in zip(told["served"], told["local"], strict=True):
        assert one == pytest.approx(other, abs=2e-3)
    before = scorer.scored
    run(tree(server.url, tmp_path, metric="choice"), tmp_path)
    assert scorer.scored == before, "what is scored is not asked for again"


def sums(asked: Asked) -> Answer:
    """The right sum as an answer; 7 as the verdict of a judge."""
    if "how much is" in asked.text and len(asked.text) < 40:
        numbers = [int(word) for word in asked.text.split() if word.isdigit()]
        return reply(str(sum(numbers)), finish_reason="stop")
    return reply("Rating: [[7]]", finish_reason="stop")


def test_a_served_model_answers_the_questions_of_a_task(tmp_path, serve):
    server = serve(sums)
    recipe = tree(server.url, tmp_path, metric="exact_match")
    del recipe["evaluate"]["models"]["local"]
    assert run(recipe, tmp_path)["served"]["sums"]["score"] == 1.0
    assert server.bodies[0]["messages"][-1]["content"].startswith("how much is")
    assert server.bodies[0]["temperature"] == 0.0
    assert len(server.bodies) == 6


def test_a_judge_is_named_as_a_model_is():
    recipe = tree("http://x/v1", Path("/tmp"), metric="exact_match")
    recipe["evaluate"]["benchmarks"] = {
        "talk": {"kind": "mt_bench", "judge": "big", "questions": "q", "prompts": "p"}
    }
    judge = recipe_of(recipe).evaluate.benchmarks["talk"].judge
    assert (judge.endpoint, judge.model, judge.max_tokens) == ("http://x/v1", "org/big", 2048)
    recipe["evaluate"]["benchmarks"]["talk"]["judge"] = {"model": "big", "max_tokens": 9}
    judge = recipe_of(recipe).evaluate.benchmarks["talk"].judge
    assert (judge.endpoint, judge.model, judge.max_tokens) == ("http://x/v1", "org/big", 9)


@pytest.mark.parametrize(
    ("task", "models", "said"),
    [
        ({"metric": "agreement", "teacher": "toyworld:teacher"}, {}, "a model in memory"),
        ({"metric": "exact_match"}, {"tokenizer": None}, "the tokenizer is not known"),
    ],
)
def test_what_a_server_cannot_be_scored_on_is_refused(tmp_path, task, models, said):
    recipe = tree("http://127.0.0.1:9/v1", tmp_path, **task)
    recipe["models"]["big"] |= models
    with pytest.raises(InputError, match=said):
        recipe_of(recipe)


@pytest.mark.parametrize(
    ("behave", "said"),
    [
        (lambda asked: Answer(404, "no"), "no answer|endpoint"),
        (lambda asked: Answer(401, "expired"), "key"),
    ],
)
def test_a_server_without_log_probabilities_scores_no_options(tmp_path, serve, behave, said):
    recipe = tree(serve(behave).url, tmp_path, metric="choice")
    del recipe["evaluate"]["models"]["local"]
    with pytest.raises(InputError, match=said):
        run(recipe, tmp_path)
