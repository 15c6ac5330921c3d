"""Caches that a server fills: what is stored, what is refused, and that nothing is mixed up."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fault_server import Answer, Asked, Server
from rich.console import Console
from score_server import Scorer

from dominie.core.display import Display
from dominie.core.errors import InputError, RunError
from dominie.core.run_reader import read_stage
from dominie.generation.endpoint import ServedModel
from dominie.planning.plan import machine, plan_recipe
from dominie.recipe import load_recipe
from dominie.stages import served_caches
from dominie.stages.prepare import Preparation
from dominie.stages.run_folder import RunFolder
from dominie.stages.served_caches import ServedTeacher
from dominie.stages.teacher_caches import REMEDY, cache_folder, cache_identity, cache_plans
from dominie.stages.train import PreparedTraining
from dominie.teachers.cache import Cache
from dominie.teachers.cache_sampling import CacheSettings
from dominie.teachers.cached import key_of_row
from dominie.workflows.pipeline import cache_recipe, run_recipe

RECIPE = """
name: toy
train: {steps: 6, batch: 4, max_length: 96}
models:
  big:
    endpoint: URL
    model: org/big
    tokenizer: "toyworld:student"
    concurrency: 4
    backoff: 0.001
    retries: 8
data:
  domain: {path: "toyworld:domain?rows=24"}
stages:
  kd:
    student: "toyworld:student"
    teacher: big
    data: {domain: 1.0}
    loss: {prediction: 1.0}
    cache: {scheme: top, top_p: 1.0, k_max: 7, levels: 4096}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(served_caches, "_CHUNK", 8)
    monkeypatch.setattr(served_caches, "_AT_ONCE", 1)
    return tmp_path / "toy.yaml"


def fill(recipe: Path, server: Server, *overrides: str) -> str:
    recipe.write_text(RECIPE.replace("URL", server.url))
    out = StringIO()
    display = Display(Console(file=out, width=400, color_system=None))
    cache_recipe(load_recipe(recipe, overrides), recipe.parent / "runs", display)
    return out.getvalue()


def opened(recipe: Path, *overrides: str) -> tuple[Cache, dict[bytes, Any]]:
    """The cache of the recipe, and the rows that it is of."""
    folder = RunFolder(load_recipe(recipe, overrides), recipe.parent / "runs")
    (prepared,) = Preparation(folder, Display(Console(file=StringIO()))).all()
    assert isinstance(prepared, PreparedTraining)
    (plan,) = cache_plans(prepared)
    identity = cache_identity(folder, plan)
    return Cache(cache_folder(folder, plan, identity), identity, remedy=REMEDY), plan.rows


def check(cache: Cache, rows: dict[bytes, Any], scorer: Scorer, k: int) -> None:
    """Every position has the likeliest ids, the token itself, and what is left as its tail."""
    for key, row in rows.items():
        ids, taught = np.asarray(row.input_ids), np.asarray(row.supervised)[1:].nonzero()[0]
        stored = cache.decoded(key, len(taught))
        assert stored.tail is not None
        for number, position in enumerate(taught):
            log_p = scorer.log_p[ids[position]]
            here = stored.token == number
            wanted = {int(i) for i in np.argsort(-log_p)[:k]} | {int(ids[position + 1])}
            wanted = {each for each in wanted if each < scorer.vocabulary}
            assert set(stored.ids[here]) == wanted
            p = np.exp(log_p[stored.ids[here]])
            np.testing.assert_allclose(stored.probabilities[here], p, rtol=2e-3)
            assert stored.tail[number] == pytest.approx(1 - p.sum(), rel=2e-3, abs=1e-6)
            assert stored.probabilities[here].sum() + stored.tail[number] == pytest.approx(1)


def paid_once(server: Server, cache: Cache, rows: dict[bytes, Any]) -> bool:
    """Whether each row was scored once, but for the one that the server is recognised by."""
    prompts = [[int(each) for each in row.input_ids] for row in rows.values()]
    asked = [ids for ids in prompts if ids != cache.manifest["probe"]["ids"]]
    return len(asked) > 1 and all(server.paid[json.dumps(ids)] == 1 for ids in asked)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> int:
    from dominie.models.loading import load_tokenizer
    from dominie.models.spec import Model
    from dominie.toyworld import materialise

    folder = materialise("toyworld:student", tmp_path_factory.mktemp("toy"), seed=0)
    return len(load_tokenizer(Model(path=str(folder))))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_rows_are_the_likeliest_tokens_and_a_tail(recipe, vocabulary, serve, engine):
    server = serve(scorer := Scorer(vocabulary, engine=engine))
    printed = fill(recipe, server)
    cache, rows = opened(recipe)
    check(cache, rows, scorer, 7)
    assert len(cache.rows) == len(rows) > 10
    assert scorer.scored == len(rows) + 3, "twice the self-test, and the proof at the end"
    assert "self-test of org/big at http" in printed
    told = json.loads((cache.folder / "manifest.json").read_text())
    assert told["server"]["engine"] == engine
    assert told["server"]["version"] == "0.32.0"
    assert told["self_test"]["noise_mean"] == 0.0
    assert 0 < told["self_test"]["tail_mass"] < 1
    before = sum(server.asked.values())
    fill(recipe, server)
    assert sum(server.asked.values()) == before, "what is there is not asked for again"
    server.close()
    if engine == "vllm":
        run_recipe(load_recipe(recipe), recipe.parent / "runs", Display())  # without the server
        assert read_stage(recipe.parent / "runs" / "toy" / "kd")["status"] == "done"
        plan_recipe(load_recipe(recipe), machine(gpu="h100"))


def test_without_a_word_on_caches_all_that_is_returned_is_stored(recipe, vocabulary, serve):
    server = serve(scorer := Scorer(vocabulary))
    recipe.write_text(RECIPE.replace("URL", server.url))
    loaded = load_recipe(recipe, ["stages.kd.cache="])
    settings = loaded.trained["kd"].cache_on("domain")
    assert settings is not None
    assert (settings.scheme, settings.top_p, settings.k_max) == ("top", 1.0, 64)
    fill(recipe, server, "stages.kd.cache={scheme: top, top_p: 0.5, k_max: 64, levels: 4096}")
    cache, rows = opened(recipe, "stages.kd.cache={scheme: top, top_p: 0.5, levels: 4096}")
    key, row = next(iter(rows.items()))
    taught = np.asarray(row.supervised)[1:].nonzero()[0]
    stored = cache.decoded(key, len(taught))
    mass = np.bincount(stored.token, stored.probabilities)
    assert 0.5 <= mass.min() < 0.9, "as many as reach a half"
    del scorer


def test_an_estimate_asks_the_server_nothing(recipe, serve, vocabulary):
    scorer = Scorer(vocabulary)
    server = serve(scorer)
    recipe.write_text(RECIPE.replace("URL", server.url))
    runs, out = recipe.parent / "runs", StringIO()
    display = Display(Console(file=out, width=400, color_system=None))
    overrides = ["models.big.price={input: 2.0, output: 8.0}"]
    loaded = load_recipe(recipe, overrides)
    (found,) = cache_recipe(loaded, runs, display, estimate=True)["caches"]
    assert not server.asked
    assert "nothing was asked" in out.getvalue()
    (record,) = cache_recipe(loaded, runs, display)["caches"]
    _, rows = opened(recipe, *overrides)
    assert found["tokens"] == sum(len(row.input_ids) + 1 for row in rows.values())
    assert found["supervised_tokens"] == record["supervised_tokens"]
    assert found["requests"] == scorer.scored
    assert found["bytes"] == pytest.approx(record["bytes"], rel=0.5)
    inputs = sum(len(row.input_ids) for row in rows.values())
    assert found["money"] == pytest.approx((2.0 * inputs + 8.0 * len(rows)) / 1e6)


def test_failures_lose_nothing_and_budgets_hold(recipe, vocabulary, serve):
    scorer, count = Scorer(vocabulary), iter(range(100_000))
    faults = (Answer(429, "slow"), Answer(503, "no"), Answer(body='{"choices"', cut=True))

    def flaky(asked: Asked) -> Answer:
        number = next(count) if asked.body else 0
        return faults[number // 5 % 3] if number % 5 == 4 else scorer(asked)

    server = serve(flaky)
    with pytest.raises(RunError, match=r"budget is spent"):
        fill(recipe, server, "models.big.budget={calls: 9}")
    assert sum(server.paid.values()) <= 9 + 1, "the proof that it is the same is beyond it"
    fill(recipe, server, "models.big.budget={calls: 100}")
    cache, rows = opened(recipe)
    check(cache, rows, scorer, 7)
    assert paid_once(server, cache, rows), "rows that were scored are kept"


def test_another_model_after_a_restart_is_not_mixed_in(recipe, vocabulary, serve):
    scorer = Scorer(vocabulary)
    first = scorer.log_p

    def restarts(asked: Asked) -> Answer:
        if scorer.scored == 9:
            scorer.scored += 1
            scorer.seed = 1
            return Answer(body="{", cut=True)
        return scorer(asked)

    server, one = serve(restarts), "models.big.concurrency=1"
    with pytest.raises(RunError, match="the server has other weights") as caught:
        fill(recipe, server, one)
    assert "nats from what it said at first" in str(caught.value)
    with pytest.raises(RunError, match="the server has other weights"):
        fill(recipe, server, one)
    cache, rows = opened(recipe)
    kept = {key: row for key, row in rows.items() if key in cache.rows}
    assert 0 < len(kept) < len(rows)
    scorer.seed = 0
    assert np.array_equal(first, scorer.log_p)
    check(cache, kept, scorer, 7)
    fill(recipe, server, one)
    cache, rows = opened(recipe)
    check(cache, rows, scorer, 7)
    assert paid_once(server, cache, kept)


def test_another_engine_or_weight_version_is_refused(recipe, vocabulary, serve):
    scorer = Scorer(vocabulary, engine="sglang")
    server = serve(lambda asked: Answer(401, "{}") if scorer.scored >= 9 else scorer(asked))
    with pytest.raises(InputError, match="the endpoint asks for a key"):
        fill(recipe, server)
    server.behave, scorer.version = scorer, "0.33.0"
    with pytest.raises(InputError, match="a server with another version"):
        fill(recipe, server)
    scorer.version, scorer.weight_version = "0.32.0", "2"
    with pytest.raises(InputError, match="a server with another weights"):
        fill(recipe, server)


def changed(change: Callable[[dict[str, Any], list[Any]], Any]) -> Callable[..., Answer]:
    """A server whose reply is changed: the choice, and the entries of its positions."""

    def behave(scorer: Scorer, asked: Asked) -> Answer:
        if not asked.body:
            return scorer(asked)
        tree = scorer.tree(asked.body["prompt"], asked.body["prompt_logprobs"])
        choice = tree["choices"][0]
        change(choice, choice["prompt_logprobs"])
        return Answer(body=json.dumps(tree))

    return behave


def set_first(value: float) -> Callable[..., Answer]:
    return changed(lambda _, e: next(iter(e[3].values())).update(logprob=value))


def begin(server: Server, folder: Path, **settings: Any) -> None:
    """Test a server for the rows of one conversation."""
    row = SimpleNamespace(input_ids=np.arange(1, 30, dtype=np.int32), supervised=np.ones(29, bool))
    plan: Any = SimpleNamespace(
        teacher="big",
        stage="kd",
        settings=CacheSettings(scheme="top", top_p=1.0, k_max=7),
        rows={key_of_row(row): row},
        prepared=SimpleNamespace(tokenizer=range(242)),
    )
    settings = {"model": "org/big", "backoff": 0.001, "retries": 1} | settings
    served = ServedModel(endpoint=server.url, **settings)
    run: Any = SimpleNamespace(recipe=SimpleNamespace(served={"big": served}), path=folder)
    ServedTeacher(run, plan, Display(Console(file=StringIO()))).begin()


BAD: dict[str, tuple[Callable[..., Answer], str]] = {
    "text alone": (changed(lambda c, _: c.pop("prompt_logprobs")), "returns no prompt_logprobs"),
    "other tokens": (
        changed(lambda _, e: e.__setitem__(3, {"1": {"logprob": -0.1, "rank": 1}})),
        "the token at position 3 is not among",
    ),
    "one late": (changed(lambda _, e: e.insert(1, e.pop())), "one position later"),
    "one early": (changed(lambda _, e: e.append(e.pop(1))), "one position earlier"),
    "nan": (set_first(float("nan")), "is NaN, infinite or above 0"),
    "minus infinity": (set_first(float("-inf")), "is NaN, infinite or above 0"),
    "vllm's minus infinity": (set_first(-9999.0), "is NaN, infinite or above 0"),
    "null": (set_first(None), "is no number"),  # type: ignore[arg-type]
    "mass": (set_first(0.0), "sum to 1"),
    "fewer": (changed(lambda _, e: [e[3].popitem() for _ in range(4)]), "at position 3"),
    "no first": (
        changed(lambda _, e: [v.update(rank=v["rank"] + 1) for v in e[3].values()]),
        "the likeliest id at position 3 is missing",
    ),
    "shorter": (changed(lambda _, e: e.pop()), "tokens in the place of"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reply_is_one_message(tmp_path, serve, name):
    behave, message = BAD[name]
    scorer = Scorer(242)
    server = serve(lambda asked: behave(scorer, asked))
    with pytest.raises(InputError, match="as a cache needs") as caught:
        begin(server, tmp_path)
    assert message in str(caught.value)


def other_model(scorer: Scorer, asked: Asked) -> Answer:
    scorer.model = "org/other"
    return scorer(asked)


def noisy(scorer: Scorer, asked: Asked) -> Answer:
    scorer.log_p = scorer.log_p + np.random.default_rng(asked.before).normal(0, 0.2)
    scorer.log_p -= np.log(np.exp(scorer.log_p).sum(1, keepdims=True))
    if asked.body:
        scorer.log_p = np.roll(scorer.log_p, 1, axis=0)
    return scorer(asked)


def unlikely(scorer: Scorer, asked: Asked) -> Answer:
    if asked.body:
        for before, token in zip(asked.body["prompt"], asked.body["prompt"][1:], strict=False):
            scorer.log_p[before, token] = -30.0
    return scorer(asked)


@pytest.mark.parametrize(
    ("behave", "message"),
    [
        (other_model, "no such model on the server"),
        (noisy, "something else each time"),
        (unlikely, "less likely than chance"),
        (lambda s, a: s(a) if not a.body else Answer(401, "expired"), "asks for a key"),
        (
            lambda s, a: Answer(307, headers={"location": "http://evil.test/v1"}),
            "the endpoint's URL leads to another",
        ),
        (lambda s, a: Answer(body="[]") if not a.body else s(a), "no server of models"),
        (
            lambda s, a: Answer(404, "no") if a.path == "/version" else s(a),
            "has to return log-probabilities of prompts",
        ),
        (
            lambda s, a: Answer(body="x" * (50 << 20)) if a.body else s(a),
            "MiB for one reply",
        ),
    ],
)
def test_a_server_that_cannot_teach_is_one_message(tmp_path, serve, behave, message):
    scorer = Scorer(242)
    server = serve(lambda asked: behave(scorer, asked))
    with pytest.raises((InputError, RunError)) as caught:
        begin(server, tmp_path)
    assert message in str(caught.value)
    assert "evil.test" not in str(server.asked)


def test_what_the_server_allows_is_said_before_anything_is_spent(tmp_path, serve):
    scorer = Scorer(242, cap=5)
    server = serve(scorer)
    with pytest.raises(InputError, match="--max-logprobs 7"):
        begin(server, tmp_path)
    scorer.longest = 29
    with pytest.raises(InputError, match="--max-model-len"):
        begin(server, tmp_path)
    assert scorer.scored == 0
    scorer.longest, scorer.cap = 30, 7
    begin(server, tmp_path)
    server.close()
    with pytest.raises(InputError, match="cannot be reached"):
        begin(server, tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.kd.loss={prediction: {weight: 1, temperature: 2}}", "at temperature 1 alone"),
        ("stages.kd.loss={prediction: {weight: 1, kind: reverse_kl}}", "no states or weights"),
        ("stages.kd.loss={prediction: 1, attention: 1}", "queries and keys"),
        ("stages.kd.cache={scheme: threshold}", "no samples of the others"),
        ("stages.kd.cache=true", "no samples of the others"),
        ("models.big.tokenizer=", "its tokenizer is not known"),
        ("models.big.request={temperature: 2}", "temperature cannot be chosen"),
        ("models.big.map_tokens=true", "under the same ids"),
        ("models.big.engine=ollama", "the value cannot be used"),
    ],
)
def test_what_a_server_cannot_teach_is_refused_by_name(recipe, override, message):
    recipe.write_text(RECIPE.replace("URL", "http://127.0.0.1:9/v1"))
    with pytest.raises(InputError, match=message):
        load_recipe(recipe, [override])
