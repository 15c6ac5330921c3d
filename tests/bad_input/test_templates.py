"""Chat templates that refuse or leave out: `check` says so, and no trained model is lost."""

from __future__ import annotations

import json

import pytest

from dominie.toyworld.toy_models import CHAT_TEMPLATE, word_tokenizer

END = word_tokenizer().convert_tokens_to_ids("<|end|>")
SYSTEM_FIRST = (
    "{% if messages[0].role != 'system' %}"
    "{{ raise_exception('a system message first') }}"
    "{% endif %}"
)
NEEDS_TOOLS = "{% for tool in tools %}{{ tool.function.name }}{% endfor %}"
TOOL = {"type": "function", "function": {"name": "copy"}}


def write_rows(path, **more):
    rows = [
        {
            "messages": [
                {"role": "system", "content": "answer"},
                {"role": "user", "content": f"copy {i} {7 * i}"},
                {"role": "assistant", "content": "red"},
            ],
            **more,
        }
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("opening", "more"), [(SYSTEM_FIRST, {}), (NEEDS_TOOLS, {"tools": [TOOL]})]
)
def test_a_model_is_written_whatever_its_template_refuses(work, dominie, opening, more):
    (work / "t.jinja").write_text(opening + CHAT_TEMPLATE)
    write_rows(work / "d.jsonl", **more)
    said = dominie("run", "r.yaml", "models.m={path: ./m, chat_template: t.jinja}")
    assert said.status == 0, said.err
    settings = json.loads((work / "runs/small/s/model/generation_config.json").read_text())
    assert settings["eos_token_id"] == END


def test_what_an_evaluated_models_template_refuses_is_found_before_training(work, dominie, refused):
    (work / "t.jinja").write_text(SYSTEM_FIRST + CHAT_TEMPLATE)
    other = "models.other={path: ./m, chat_template: t.jinja}"
    said = dominie("check", "r.yaml", other, "evaluate.models.other=other")
    refused(said, "d.jsonl:", "model other: the chat template fails", "a system message first")


def test_what_an_evaluated_models_template_leaves_out_is_said(work, dominie):
    (work / "t.jinja").write_text(
        CHAT_TEMPLATE.replace("in messages", "in messages if message.role != 'system'")
    )
    write_rows(work / "d.jsonl")
    other = "models.other={path: ./m, chat_template: t.jinja}"
    said = dominie("check", "r.yaml", other, "evaluate.models.other=other")
    assert said.status == 0, said.err
    line = "warning: d, asked of other: its chat template leaves out system messages (the first: d."
    assert said.out.count(line) == 1
    assert said.out.count("leaves out") == 1


def test_what_a_template_makes_of_a_benchmark_is_found_before_training(work, dominie, refused):
    (work / "t.jinja").write_text(SYSTEM_FIRST + CHAT_TEMPLATE)
    write_rows(work / "d.jsonl")
    rows = [{"instruction": "copy", "output": "green", "generator": "g", "dataset": "d"}]
    (work / "base.json").write_text(json.dumps(rows))
    judge = "{endpoint: 'http://127.0.0.1:9/v1', model: judge}"
    model = "models.m={path: ./m, chat_template: t.jinja}"
    benchmark = f"{{kind: alpaca_eval, version: 1, baseline: base.json, judge: {judge}}}"
    said = dominie("check", "r.yaml", model, f"evaluate.benchmarks.b={benchmark}")
    refused(said, "evaluate.benchmarks.b, model s", "a system message first")


def test_what_is_left_out_is_said_once_by_check_and_by_run(work, dominie):
    (work / "t.jinja").write_text(
        CHAT_TEMPLATE.replace("in messages", "in messages if message.role != 'system'")
    )
    write_rows(work / "d.jsonl")
    for command in ("check", "run"):
        said = dominie(command, "r.yaml", "models.m={path: ./m, chat_template: t.jinja}")
        assert said.status == 0, said.err
        line = "warning: d: the chat template leaves out system messages, in 40 of 40"
        assert (said.out + said.err).count(line) == 1
        assert "(the first: d.jsonl:1, message 1)" in said.out + said.err
    said = dominie("check", "r.yaml", "models.m={path: ./m, chat_template: t.jinja}", "--json")
    [lost] = json.loads(said.out)["sources"]["d"]["left_out"]
    assert lost["what"] == "system messages"
    assert lost["conversations"] == 40


@pytest.mark.parametrize("path", ["t.jinja", "m/chat_template.jinja"])
def test_a_byte_order_mark_is_no_part_of_a_template(work, dominie, path):
    (work / path).write_text(CHAT_TEMPLATE, encoding="utf-8-sig")
    given = "{path: ./m, chat_template: t.jinja}" if path == "t.jinja" else "{path: ./m}"
    said = dominie("check", "r.yaml", f"models.m={given}", "--json")
    assert said.status == 0, said.err
    assert '"<s> <|user|>' in said.out  # nothing in front of it
