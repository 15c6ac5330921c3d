"""Rows of prompts: of every layout, with or without an answer, tokenised up to where it begins."""

from __future__ import annotations

import json

import pytest

from dominie.core.errors import InputError
from dominie.data.conversations import parsed_prompt
from dominie.data.rows import prepare
from dominie.data.sources import Source
from dominie.data.tokenization import prompt_ids
from dominie.generation.prompt_answers import prompts_of
from dominie.toyworld.toy_models import word_tokenizer

ASKED = {"role": "user", "content": "how much is 5 and 4 ?"}
TURNS = [ASKED, {"role": "assistant", "content": "nine"}]


@pytest.mark.parametrize(
    ("row", "messages", "answered"),
    [
        ({"prompt": ASKED["content"]}, [ASKED], False),
        ({"prompt": ASKED["content"], "completion": "nine"}, [ASKED], True),
        ({"instruction": ASKED["content"], "input": ""}, [ASKED], False),
        ({"messages": [ASKED]}, [ASKED], False),
        ({"messages": TURNS}, [ASKED], True),
        ({"messages": [*TURNS, ASKED]}, [*TURNS, ASKED], False),
        ({"conversations": [{"from": "human", "value": ASKED["content"]}]}, [ASKED], False),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            [{"role": "user", "content": "a"}],
            True,
        ),
    ],
)
def test_every_layout_has_a_prompt(row, messages, answered):
    found = parsed_prompt(row, "file:1")
    assert found.messages == messages
    assert found.prompt
    assert ("the last answer" in found.unread) == answered
    assert found.last_answer == len(messages)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "no prompt"),
        ({"messages": [{"role": "assistant", "content": "Hello."}]}, "no prompt"),
        ({"text": "a"}, "no known format"),
        ([], "an object"),
        ({"messages": []}, "no message"),
        ({"prompt": " "}, "the prompt is empty"),
    ],
)
def test_rows_that_ask_nothing_are_refused(row, said):
    with pytest.raises(InputError, match=said):
        parsed_prompt(row, "file:1")


def test_prompts_are_tokenised_up_to_where_the_answer_begins(tmp_path):
    rows = [{"messages": TURNS}, {"prompt": "what is 2 ?"}, {"prompt": "and 4 ? " * 40}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = word_tokenizer()
    sources = {
        "asked": Source(name="asked", path=str(path), prompts=True),
        "learnt": Source(name="learnt", path=str(path.with_name("learnt.jsonl"))),
    }
    path.with_name("learnt.jsonl").write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    found = prepare(sources, tokenizer, max_length=32, cache=tmp_path / "cache", processes=1)
    asked, learnt = found["asked"], found["learnt"]
    assert [row.input_ids.tolist() for row in asked.train] == [
        prompt_ids(tokenizer, [ASKED]),
        prompt_ids(tokenizer, [{"role": "user", "content": "what is 2 ?"}]),
    ]
    assert not any(row.supervised.any() for row in asked.train)
    assert asked.summary.too_long == 1
    assert asked.summary.unread == {"the last answer": 1}
    (row,) = learnt.train
    prompt = asked.train[0].input_ids.tolist()
    assert row.input_ids[: len(prompt)].tolist() == prompt
    assert row.supervised.tolist().index(True) == len(prompt)


def test_an_answers_stage_asks_prompts_as_they_are(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"messages": TURNS}, {"messages": [*TURNS, ASKED]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = Source(name="asked", path=str(path), prompts=True)
    found = [prompt.messages for prompt in prompts_of(source, frozenset())]
    assert found == [[ASKED], [*TURNS, ASKED]]
