"""Teachers behind a server that are asked while a stage trains, beside the same weights here."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_server import Answer, Asked
from rich.console import Console
from score_server import ModelScorer

from dominie.core.display import Display
from dominie.core.errors import DominieError, InputError
from dominie.core.run_reader import read_stage
from dominie.data.batch import collate
from dominie.data.row_store import Row
from dominie.generation.endpoint import ServedModel
from dominie.models.loading import load_frozen, load_tokenizer
from dominie.models.spec import Model
from dominie.recipe import recipe_of
from dominie.stages.served_caches import LiveScores
from dominie.stages.server_scores import ServerScorer
from dominie.teachers.ahead import ScoredTeacher
from dominie.toyworld import materialise
from dominie.workflows.pipeline import run_recipe


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, int]:
    """The toy teacher, and the ids of its tokenizer."""
    folder = materialise("toyworld:teacher", tmp_path_factory.mktemp("toy"), seed=0)
    spec = Model(path=str(folder))
    return load_frozen(spec, device="cpu"), len(load_tokenizer(spec))


def tree(url: str, *, served: bool = True, **train: Any) -> dict[str, Any]:
    """DAE whose expert is behind a server, and the old self here; half of it on-policy."""
    big = {
        "endpoint": url,
        "model": "org/big",
        "tokenizer": "toyworld:teacher",
        "backoff": 0.001,
        "retries": 2,
    }
    return {
        "name": "live",
        "models": {"big": big} if served else {"big": {"path": "toyworld:teacher"}},
        "data": {
            "domain": {"path": "toyworld:domain?rows=60", "validation_fraction": 0.1},
            "general": "toyworld:general?rows=60",
        },
        "train": {
            "learning_rate": 1e-3,
            "steps": 3,
            "batch": 8,
            "micro_batch": 4,
            "max_length": 48,
            "log_every": 1,
            **train,
        },
        "stages": {
            "align": {
                "student": "toyworld:student",
                "data": {
                    "domain": {"share": 0.5, "teacher": "big", "on_policy": 0.5},
                    "general": {"share": 0.5, "teacher": "toyworld:student"},
                },
                "loss": {"prediction": 1.0},
                "rollouts": {"max_new_tokens": 8},
            }
        },
    }


def run(recipe: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    out = StringIO()
    run_recipe(recipe_of(recipe), folder, Display(Console(file=out, width=400)))
    text = (folder / "live" / "align" / "metrics.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_all_ids_of_a_server_are_the_local_teacher(tmp_path, serve, teacher):
    model, vocabulary = teacher
    server = serve(scorer := ModelScorer(model, vocabulary, cap=vocabulary))
    recipe = tree(server.url)
    recipe["stages"]["align"]["cache"] = {"enabled": False, "k_max": vocabulary}
    mine, local = run(recipe, tmp_path / "a"), run(tree("", served=False), tmp_path / "b")
    assert len(mine) == len(local) > 3
    for one, other in zip(mine, local, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-6)
        if "sources" in one:
            assert one["sources"]["domain"]["own"] == other["sources"]["domain"]["own"]
            assert one["sources"]["general"]["divergence"] == pytest.approx(
                other["sources"]["general"]["divergence"], rel=1e-3, abs=1e-6
            )
    told = read_stage(tmp_path / "a" / "live" / "align")["served"]["big"]
    assert told["server"]["engine"] == "vllm"
    assert told["k"] == vocabulary
    assert told["self_test"]["noise_mean"] == 0.0
    assert server.most_at_once > 1, "the conversations of a step are asked for together"
    assert scorer.scored < 60, "and those of validation once"


@pytest.mark.full
def test_few_ids_and_a_tail_are_a_lower_bound_live_as_from_a_cache(tmp_path, serve, teacher):
    model, vocabulary = teacher
    server = serve(ModelScorer(model, vocabulary))
    found = {}
    for name, cached in (("live", False), ("cached", True), ("local", None)):
        recipe = tree(server.url, served=cached is not None, steps=1)
        domain = recipe["stages"]["align"]["data"]["domain"]
        del domain["on_policy"], recipe["stages"]["align"]["rollouts"]
        if cached is not None:
            domain["cache"] = cached
            recipe["stages"]["align"]["cache"] = {
                "enabled": False, "scheme": "top", "top_p": 1.0, "k_max": 5, "levels": 4096
            }  # fmt: skip
        found[name] = run(recipe, tmp_path / name)[0]["sources"]["domain"]["divergence"]
    assert found["live"] == pytest.approx(found["cached"], rel=1e-3)
    assert found["live"] < 0.98 * found["local"]


def test_a_server_that_is_another_in_the_midst_ends_the_stage(tmp_path, serve, teacher):
    model, vocabulary = teacher
    scorer = ModelScorer(model, vocabulary)
    weights = model.get_output_embeddings().weight.data
    before, broken = weights.clone(), []

    def restarts(asked: Asked) -> Answer:
        if asked.body and scorer.scored >= 9 and not broken:
            broken.append(1)
            weights.copy_(before.flip(0))
            return Answer(body="{", cut=True)
        return scorer(asked)

    recipe = tree(serve(restarts).url, checkpoint_every=1)
    try:
        with pytest.raises(DominieError, match="the server has other weights") as caught:
            run(recipe, tmp_path)
        assert "nats from what it said at first" in str(caught.value)
    finally:
        weights.copy_(before)
    recipe["models"]["big"]["endpoint"] = serve(scorer).url  # an address is no part of it
    assert [line["step"] for line in run(recipe, tmp_path) if "sources" in line] == [1, 2, 3]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(401, "expired"), "the endpoint asks for a"),
        (Answer(body="{}"), "does not score a conversation"),
        (Answer(body='{"choices": [{"text": "x"}]}'), "returns no prompt_logprobs"),
        (Answer(307, headers={"location": "http://evil.test/"}), "leads to http://evil.test"),
        (Answer(body="x" * (50 << 20)), "MiB for one reply"),
        (Answer(500, "no"), "HTTP 500: no"),
    ],
)
def test_a_server_that_fails_in_the_midst_is_one_message(tmp_path, serve, teacher, answer, said):
    scorer = ModelScorer(*teacher)
    server = serve(lambda asked: answer if asked.body and scorer.scored > 1 else scorer(asked))
    served = ServedModel(endpoint=server.url, model="org/big", backoff=0.001, retries=1)
    where: Any = {"where": "models.big", "purpose": "this stage", "kept": "it goes on"}
    asker = ServerScorer(
        served, **where, k=5, longest=48, vocabulary=242, log=tmp_path / "log", show=print
    )
    asker.begin(range(3, 40))
    told = ScoredTeacher(LiveScores(asker))
    rows = [Row(np.arange(3, 20 + n), np.arange(17 + n) > 4) for n in range(4)]
    with pytest.raises(DominieError) as caught:
        told.signal(collate([(0, row) for row in rows]))
    assert said in str(caught.value)
    assert "evil.test" not in str(server.asked)


def test_what_live_scores_cannot_be_is_refused(teacher):
    del teacher
    recipe = tree("http://127.0.0.1:9/v1")
    align = recipe["stages"]["align"]
    align["loss"] = {"prediction": {"kind": "reverse_kl"}}
    with pytest.raises(InputError, match="no states or weights"):
        recipe_of(recipe)
    align["loss"] = {"prediction": 1.0}
    align["data"]["domain"]["cache"] = True
    with pytest.raises(InputError, match="a cached teacher has predicted"):
        recipe_of(recipe)
