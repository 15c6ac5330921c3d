"""`dominie chat`: which models answer, what is remembered, and what is refused."""

from __future__ import annotations

import io
import shutil

import pytest
import torch
from rich.console import Console

from dominie.generation.generator import GenerationRequest, Sampling, generate_all
from dominie.generation.local import LocalGenerator, configured_stops
from dominie.models.loading import load_frozen, load_tokenizer
from dominie.models.spec import Model
from dominie.recipe import dump_recipe, load_recipe
from dominie.toyworld.toy_models import save_model
from dominie.workflows.chat import ChatSession, chat_model
from dominie.workflows.chat_screens import Columns

ASKED = "copy 1 2"
SHORT = ("--max-new-tokens", "6")


@pytest.fixture
def run(work):
    """The folder of a run whose stage `s` is done and whose stage `t` is not."""
    stage = "stages.t={student: s, data: {d: 1.0}, loss: {next_token: 1.0}}"
    folder = work / "runs" / "small"
    (folder / "s").mkdir(parents=True)
    recipe = load_recipe(work / "r.yaml", [stage, "evaluate.models={s: s, before: m}"])
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    save_model("student", folder / "s" / "model", seed=1)
    (folder / "s" / "stage.json").write_text("{}")
    return folder


@pytest.fixture
def typed(monkeypatch):
    def lines(*texts: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{text}\n" for text in texts)))

    return lines


def loaded_model():
    return chat_model("m", load_frozen(Model(path="m")), load_tokenizer(Model(path="m")))


def answered(model, *conversation: str) -> str:
    """The answer of the shared generator."""
    loaded, tokenizer = load_frozen(Model(path=str(model))), load_tokenizer(Model(path=str(model)))
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": c} for i, c in enumerate(conversation)]
    request = GenerationRequest(messages=messages, sampling=Sampling(max_new_tokens=6))
    (result,) = generate_all(LocalGenerator(lambda: (loaded, tokenizer)), [request])
    return result.text


def test_it_answers_remembers_and_forgets(work, run, dominie, typed):
    typed(ASKED, "", "again", "/reset", ASKED, "/quit", "never asked")
    shown = dominie("chat", "runs/small:s", *SHORT)
    assert shown.status == 0, shown.err
    first = answered(run / "s" / "model", ASKED)
    second = answered(run / "s" / "model", ASKED, first, "again")
    assert first
    assert shown.out.splitlines() == [first, second, "forgotten", first]


def test_several_models_answer_under_their_names(work, run, dominie, typed):
    shutil.copytree(run, work / "runs" / "other")
    typed(ASKED)
    shown = dominie("chat", "small:s,before", *SHORT)
    expected = {"s": answered(run / "s" / "model", ASKED), "before": answered(work / "m", ASKED)}
    assert shown.out.splitlines() == [f"{name}: {text}" for name, text in expected.items()]
    typed(ASKED)
    shown = dominie("chat", "small:s", "runs/other:s", *SHORT)
    assert [line.partition(": ")[0] for line in shown.out.splitlines()] == ["small:s", "other:s"]


def test_the_folder_of_a_model_serves_and_a_system_message_counts(work, run, dominie, typed):
    outs = []
    for more in ((), ("--system", "say red")):
        typed(ASKED)
        outs.append(dominie("chat", "runs/small/s/model", *SHORT, *more).out)
    assert outs[0].strip() == answered(run / "s" / "model", ASKED)
    assert outs[0] != outs[1]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("smal:s", ["no such run", "did you mean runs/small?"]),
        ("small:befor", ["no model 'befor'", "s, t, before", "small:before?"]),
        ("small:t", ["stage t has not been trained", "dominie run"]),
        ("runs", ["not a run's folder", "the model/ folder of a stage"]),
        ("recipes", ["not a run's folder", "`dominie run recipes` makes one"]),
        ("small", ["has no model"]),
    ],
)
def test_what_cannot_chat_is_named(work, run, dominie, refused, wanted, words):
    if wanted == "recipes":
        (work / "recipes").mkdir()
        shutil.copy(work / "r.yaml", work / "recipes" / "recipe.yaml")
    if wanted == "small":  # what its recipe names last was renamed
        (run / "recipe.yaml").write_text(dump_recipe(load_recipe(work / "r.yaml")))
        wanted = "small:gone"
    refused(dominie("chat", wanted), *words)


def test_a_run_comes_before_the_folder_of_its_recipe(work, run, dominie, typed):
    (work / "small").mkdir()
    shutil.copy(work / "r.yaml", work / "small" / "recipe.yaml")
    typed(ASKED)
    shown = dominie("chat", "small:s", *SHORT)
    assert shown.out.strip() == answered(run / "s" / "model", ASKED), shown.err


def test_an_unknown_command_is_not_sent(work, run, dominie, typed):
    typed("/rest")
    shown = dominie("chat", "small:s", *SHORT)
    assert shown.out.startswith("no such command: /rest   /reset  forget")


def test_a_full_context_is_shown_and_nothing_is_remembered(work, run, dominie, typed):
    typed("1 " * 300, ASKED)
    shown = dominie("chat", "small:s", *SHORT)
    full, answer = shown.out.splitlines()
    assert "fills the whole context of s" in full
    assert answer == answered(run / "s" / "model", ASKED)


def test_an_answer_comes_in_pieces_and_can_be_cut_short(work):
    model = loaded_model()
    pieces: list[str] = []
    ChatSession(model, Sampling(max_new_tokens=6)).answer(ASKED, pieces.append)
    assert len(pieces) == 2  # a word is known to be whole when the next begins

    def interrupted(piece: str) -> None:
        raise KeyboardInterrupt

    session = ChatSession(model, Sampling(max_new_tokens=6))
    assert session.answer(ASKED, interrupted)
    assert session.messages[-1] == {"role": "assistant", "content": pieces[0].strip()}


def test_an_empty_answer_is_shown_as_such(work):
    model = load_frozen(Model(path="m"))
    stop = configured_stops(model).pop()
    model.generate = lambda input_ids, **_: torch.nn.functional.pad(input_ids, (0, 1), value=stop)
    session = ChatSession(
        chat_model("m", model, load_tokenizer(Model(path="m"))), Sampling(max_new_tokens=512)
    )
    pieces: list[str] = []
    assert session.answer(ASKED, pieces.append)
    assert (pieces, session.messages[-1]["content"]) == (["(nothing)"], "")


def test_the_same_question_is_sampled_anew_and_a_seed_repeats_it(work):
    model, found = loaded_model(), []
    for seed in (1, 1, 2):
        session = ChatSession(model, Sampling(max_new_tokens=6, temperature=5.0, seed=seed))
        answers = []
        for _ in range(3):
            session.reset()
            session.answer(ASKED, lambda _: None)
            answers.append(session.messages[-1]["content"])
        found.append(answers)
    assert len(set(found[0])) == 3
    assert found[0] == found[1] != found[2]


def test_columns_stand_side_by_side():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=40, color_system=None)
    with Columns(console).answers(["one", "two"]) as (one, two):
        one("red ")
        two("green")
        one("ball")
    lines = out.getvalue().replace("\r", "\n").splitlines()
    last = [line for line in lines if "green" in line][-1]
    assert last.index("red ball") < 20 <= last.index("green")
