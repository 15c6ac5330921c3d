"""`dominie check`: what it shows, what it refuses, and what it cannot know."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from dominie.data.row_store import Row
from dominie.workflows.check import sample, sample_lines

HUB = "org/model"


def test_a_sample_of_each_source_shows_what_is_trained_on(work, dominie):
    said = dominie("check", "r.yaml")
    assert said.status == 0, said.err
    assert "d, the shortest: 2 of 9 tokens are trained on, between ⟦ and ⟧" in said.out
    assert "<|assistant|>⟦ red <|end|>⟧" in said.out
    assert "memory and time on this machine" in said.out
    assert "not checked" not in said.out
    assert said.out.rstrip().endswith("next: dominie run r.yaml")


def test_a_template_whose_answers_no_token_ends_is_warned_of(work, dominie):
    template = work / "chatml.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    said = dominie("check", "r.yaml", "models.m={path: m, chat_template: chatml.jinja}")
    assert said.status == 0, said.err
    assert " ".join(said.out.split()).count("warning: s: under its chat template an answer") == 1
    assert "will not stop" in " ".join(said.out.split())
    assert "warning" not in dominie("check", "r.yaml").out


def test_json_is_one_object(work, dominie):
    said = dominie("check", "r.yaml", "--json")
    found = json.loads(said.out)
    assert found["stages"] == ["s"]
    assert found["sources"]["d"]["kept"] == 40
    assert found["samples"]["d"][0]["supervised_tokens"] == 2
    assert found["plan"]["stages"]["s"]["fits"]
    assert found["not_checked"] == []
    assert found["shares"] == {}


def test_the_shares_of_a_mix_are_told_and_a_short_one_is_warned_of(work, dominie):
    turns = [("user", "copy"), ("assistant", " ".join(["red"] * 20))]
    messages = [{"role": role, "content": text} for role, text in turns]
    (work / "long.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    mix = ["data.long={path: long.jsonl}", "stages.s.data={d: 0.2, long: 0.8}"]
    plain = "train.balance=conversations"
    said = dominie("check", "r.yaml", *mix, "train.batch=10", plain, "--json")
    words = " ".join(said.err.split())
    assert "s: shares of conversations, tokens and loss: d 20 %, 2.33 %, 2.33 %; long 80 %" in words
    assert "warning: s: d is 20 % of the conversations and 2.33 % of the loss; set train." in words
    (shares,) = json.loads(said.out)["shares"].values()
    assert [each["conversations"] for each in shares] == [0.2, 0.8]
    assert shares[0]["loss"] == pytest.approx(2 * 2 / (2 * 2 + 8 * 21), abs=1e-6)
    said = dominie("check", "r.yaml", *mix, "train.batch=10")
    assert "d 20 %, 2.33 %, 20 %" in " ".join(said.out.split())
    assert "warning" not in said.out


def test_what_an_unreachable_hub_hides_is_listed(work, dominie):
    said = dominie("check", "r.yaml", f"stages.s.student={HUB}")
    assert said.status == 0, said.err
    assert "not checked:" in said.out
    assert f"  model {HUB}: the hub cannot be reached" in said.out
    assert f"  stage s: it needs {HUB}" in said.out
    assert "  memory and time: no configuration of" in said.out
    assert "d: 40 conversations can be read; not tokenised" in said.out
    assert "assistant: ⟦red⟧" in said.out
    assert "that is 0 of 1 stages" in said.out
    assert "can run" not in said.out


def test_the_rest_is_checked_without_it(work, dominie):
    """Of two stages and two sources, one of each is hidden; evaluation goes with its model."""
    hidden = [
        f"stages.t={{student: s, teacher: {HUB}, data: {{e: 1.0}}, loss: {{prediction: 1.0}}}}",
        "data.e=org/chats",
        "evaluate.models.t=t",
    ]
    said = dominie("check", "r.yaml", *hidden, "--json")
    assert said.status == 0, said.err
    found = json.loads(said.out)
    assert found["stages"] == ["s"]
    assert list(found["sources"]) == ["d"]
    whats = {each["what"]: each["why"] for each in found["not_checked"]}
    assert list(whats) == [f"model {HUB}", "source e", "stage t", "memory and time"]
    assert whats["stage t"] == f"it needs {HUB} and e"


def test_a_template_that_a_hidden_model_may_lend(work, dominie):
    (work / "m" / "chat_template.jinja").unlink()
    stage = f"stages.s={{student: m, teacher: {HUB}, data: {{d: 1.0}}, loss: {{prediction: 1.0}}}}"
    said = dominie("check", "r.yaml", stage, f"stages.s.student={work / 'm'}")
    assert said.status == 0, said.err
    assert f"it has no chat template, and {HUB} may have one to lend" in said.out


@pytest.mark.parametrize(
    ("override", "word"),
    [("data.d.path=gone.jsonl", "no such file"), ("evaluate.models.m=./gone", "no such folder")],
)
def test_a_local_path_that_is_missing_is_an_error_all_the_same(
    work, dominie, refused, override, word
):
    refused(dominie("check", "r.yaml", f"stages.s.student={HUB}", override), word)


def test_bad_rows_are_found_where_no_tokenizer_is(work, dominie, refused):
    with (work / "d.jsonl").open("a") as file:
        file.write('{"messages": 3}\n')
    refused(dominie("check", "r.yaml", f"stages.s.student={HUB}"), "d.jsonl:41")


def test_a_name_that_the_hub_refuses_is_an_error(work, dominie, refused, monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError

    def model_info(*_, **__):
        raise RepositoryNotFoundError(
            "no such model", response=SimpleNamespace(headers={}, status_code=401, request=None)
        )

    monkeypatch.setattr("huggingface_hub.model_info", model_info)
    refused(dominie("check", "r.yaml", f"stages.s.student={HUB}"), "that the hub gives out")


def test_colour_takes_the_place_of_marks_on_a_terminal():
    found = {"d": [_sample("abc", [False, False, True])]}
    colours = Console(force_terminal=True, color_system="standard", width=80, no_color=False)
    with colours.capture() as captured:
        for line in sample_lines(found, colours):
            colours.print(line)
    assert "\x1b[1;32mc\x1b[0m" in captured.get()
    assert "⟦" not in captured.get()
    plain = Console(force_terminal=True, color_system="standard", no_color=True)
    assert any("ab⟦c⟧" in line.plain for line in sample_lines(found, plain))


def test_spans_keep_the_spaces_that_a_tokenizer_drops_in_front():
    pieces = ["▁hello", "▁you", "▁there"]
    tokenizer = SimpleNamespace(
        decode=lambda ids, **_: "".join(pieces[i] for i in ids).replace("▁", " ").removeprefix(" ")
    )
    row = Row(np.arange(3, dtype=np.int32), np.array([False, True, True]))
    assert sample("d", "train", "s", tokenizer, row).text == "hello⟦ you there⟧"


def test_long_spans_are_shown_whole():
    found = {"d": [_sample("x" * 1000 + "y", [False] * 1000 + [True])]}
    (_, _, line) = sample_lines(found, Console())
    assert line.plain == "    " + "x" * 1000 + "⟦y⟧"


def test_the_shortest_the_longest_and_a_rich_row_are_shown(work, dominie):
    long = {"prompt": "copy " + "red " * 9, "completion": "red blue"}
    tools = [{"type": "function", "function": {"name": "count"}}]
    rows = [{"prompt": "copy red blue", "completion": "red blue"}] * 2
    rows += [{"prompt": "copy red", "completion": "red"}, long]
    rows += [{"prompt": "copy blue red", "completion": "red blue", "tools": tools, "id": 7}]
    (work / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = json.loads(dominie("check", "r.yaml", "--json").out)
    shown = {each["which"]: each["text"] for each in found["samples"]["d"]}
    assert list(shown) == ["the shortest", "the longest", "with tools or thoughts"]
    assert " red <|end|> <|assistant|>" in shown["the shortest"]
    assert shown["the longest"].count("red") == 10
    assert " blue red <|end|> <|assistant|>" in shown["with tools or thoughts"]
    said = dominie("check", "r.yaml").out
    assert "d, the longest: " in said
    assert "for tasks and `where` alone: id" in said


def _sample(text, flags):
    tokenizer = SimpleNamespace(decode=lambda ids, **_: text[: len(ids)])
    row = Row(np.zeros(len(flags), np.int32), np.array(flags))
    return sample("d", "train", "s", tokenizer, row)
