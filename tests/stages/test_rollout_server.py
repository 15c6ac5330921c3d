"""Answers of a student that a server generates with its adapter, beside those generated here."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from fault_server import Answer, Asked
from lora_server import LoraServer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from dominie.core.display import Display
from dominie.core.errors import DominieError, InputError
from dominie.generation.endpoint import RolloutServer
from dominie.recipe import recipe_of
from dominie.toyworld import materialise
from dominie.training.rollouts import RolloutKey, RolloutSettings
from dominie.training.server_answers import ServerAnswers
from dominie.training.student_answers import AskedAnswer
from dominie.workflows.pipeline import run_recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(materialise("toyworld:student", tmp_path_factory.mktemp("toy"), seed=0))


def tree(engine: Any = "local", **train: Any) -> dict[str, Any]:
    return {
        "name": "mine",
        "data": {"domain": "toyworld:domain?rows=40"},
        "train": {
            "learning_rate": 1e-2,
            "lora": {"r": 4},
            "steps": 3,
            "batch": 4,
            "max_length": 48,
            "log_every": 1,
            "checkpoint_every": 1,
            **train,
        },
        "stages": {
            "align": {
                "student": "toyworld:student",
                "teacher": "toyworld:teacher",
                "data": {"domain": {"share": 1.0, "on_policy": 1.0}},
                "loss": {"prediction": 1.0},
                "rollouts": {"max_new_tokens": 6, "temperature": 0.0, "engine": engine},
            }
        },
    }


def at(url: str, **settings: Any) -> dict[str, Any]:
    return {"endpoint": url, "model": "org/student", "backoff": 0.001, "retries": 1, **settings}


def run(recipe: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    run_recipe(recipe_of(recipe), folder, Display(Console(file=StringIO(), width=400)))
    text = (folder / "mine" / "align" / "metrics.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(one) == len(other) == 3
    for a, b in zip(one, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        keys = ("own", "answer_tokens", "divergence")
        for key in keys:
            assert a["sources"]["domain"][key] == pytest.approx(
                b["sources"]["domain"][key], rel=1e-3
            )


def test_a_server_answers_as_this_process_does_and_after_an_end_goes_on(tmp_path, serve, base):
    local = run(tree(), tmp_path / "local")
    lora, stopped = LoraServer(base), []

    def stops(asked: Asked) -> Answer:
        if asked.path == "/v1/completions" and lora.generated >= 8 and not stopped:
            return Answer(503, "gone")
        return lora(asked)

    server = serve(stops)
    with pytest.raises(DominieError, match="does not answer"):
        run(tree(at(server.url)), tmp_path / "served")
    stopped.append(True)
    lora.loaded.clear()  # as a server that is started anew
    kept = tmp_path / "served" / "mine" / "align"
    assert sorted(path.name for path in (kept / "checkpoints").glob("checkpoint-*"))
    same(run(tree(at(server.url)), tmp_path / "served"), local)
    assert len(set(lora.names)) == 2, "other weights have another name; warming up keeps them"
    assert len(lora.loaded) == 1, "those before are unloaded"
    assert [path.name for path in (kept / "rollouts" / "adapters").iterdir()] == list(lora.loaded)
    body = next(each for each in server.bodies if "stop_token_ids" in each)
    assert isinstance(body["prompt"][0], int)
    assert body["top_k"] == -1, "no sampling default of the model's"


def changed(**fields: Any) -> Any:
    """A server whose reply has other fields of its choice; `model` is that of the whole."""

    def behave(lora: LoraServer, asked: Asked) -> Answer:
        answer = lora(asked)
        if asked.path != "/v1/completions":
            return answer
        reply = json.loads(answer.body)
        reply["model"] = fields.get("model", reply["model"])
        reply["choices"][0] |= {key: value for key, value in fields.items() if key != "model"}
        return Answer(body=json.dumps(reply))

    return behave


def other_weights(lora: LoraServer, asked: Asked) -> Answer:
    answer = lora(asked)
    for model in lora.loaded.values():
        weight = model.get_output_embeddings().weight.data
        weight.copy_(weight.flip(0) if asked.path == "/v1/load_lora_adapter" else weight)
    return answer


def only(path: str, answer: Answer) -> Any:
    return lambda lora, asked: answer if asked.path == path else lora(asked)


BAD: dict[str, tuple[Any, str]] = {
    "another model": (only("/v1/models", Answer(body='{"data": [{"id": "a"}]}')), "no such model"),
    "no server": (only("/v1/models", Answer(body="[]")), "no server of models"),
    "no adapters": (only("/v1/load_lora_adapter", Answer(404, "no")), "ALLOW_RUNTIME_LORA"),
    "rank": (
        only("/v1/load_lora_adapter", Answer(500, "LoRA rank 4 is greater than max_lora_rank 2")),
        "does not take the student's adapter",
    ),
    "key": (only("/v1/load_lora_adapter", Answer(401, "expired")), "asks for a key"),
    "redirect": (
        only("/v1/models", Answer(307, headers={"location": "http://evil.test/"})),
        "leads to another",
    ),
    "answers as the base": (changed(model="org/student"), "it answers as another model"),
    "text alone": (changed(token_ids=None, logprobs=None), "no token ids"),
    "other tokens": (changed(token_ids=[99999], logprobs={"token_logprobs": [-1.0]}), "not the st"),
    "another prompt": (changed(prompt_token_ids=[1]), "it read another prompt"),
    "nan": (changed(token_ids=[3], logprobs={"token_logprobs": [float("nan")]}), "no number"),
    "no end": (
        changed(token_ids=[20], logprobs={"token_logprobs": [-1.0]}, finish_reason="stop"),
        "no token that ends one",
    ),
}


@pytest.fixture(scope="module")
def student(base: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_answer_of_the_student_is_refused(tmp_path, serve, base, student, name):
    behave, said = BAD[name]
    lora = LoraServer(base)
    server = serve(lambda asked: behave(lora, asked))
    settings = RolloutSettings(engine=RolloutServer(**at(server.url)))
    folder = tmp_path / "align" / "rollouts"
    with pytest.raises(DominieError) as caught:
        ServerAnswers(
            student, range(242), ends=[2], settings=settings, seed=0, folder=folder
        ).write([AskedAnswer(RolloutKey(1, "domain", 0), [5, 6, 7], 4)])
    assert said in str(caught.value)
    assert "evil.test" not in str(server.asked)


def test_answers_of_other_weights_end_the_stage(tmp_path, serve, base):
    lora = LoraServer(base)
    server = serve(lambda asked: other_weights(lora, asked))
    with pytest.raises(DominieError, match="the answers are not the student's") as caught:
        run(tree(at(server.url)), tmp_path)
    assert "lower rate" not in str(caught.value), "the step is at no fault"


@pytest.mark.parametrize(
    ("engine", "train", "said"),
    [
        ("vllm", {}, "rollouts.engine: the value cannot be used"),
        (at("http://x/v1", price={"input": 1, "output": 1}), {}, "costs nothing by the token"),
        (at("http://x/v1", request={"seed": 1}), {}, "seed is set by"),
        (at("http://x/v1", path="x"), {}, "unknown key"),
        (at("ftp://x"), {}, "endpoint is a URL"),
        (at("http://x/v1"), {"lora": None}, "trains all weights"),
        (at("http://x/v1"), {"lora": {"modules_to_save": ["lm_head"]}}, "trained in full"),
    ],
)
def test_what_no_server_can_do_is_refused_by_name(engine, train, said):
    with pytest.raises(InputError) as caught:
        recipe_of(tree(engine, **train))
    assert said in str(caught.value)
