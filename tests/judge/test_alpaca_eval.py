"""AlpacaEval as judged here: both orders, weighted or not, and what cannot be compared."""

from __future__ import annotations

import json
import math

import pytest

from dominie.core.errors import InputError
from dominie.generation.calls import Calls
from dominie.generation.reply_log import ReplyLog
from dominie.judge.alpaca_eval import AlpacaEval
from dominie.judge.annotations import read_annotations, summarise
from dominie.judge.judge import (
    Judge,
    Verdict,
    control_warnings,
    same_family_warning,
    verdicts,
)

from fault_server import reply  # isort: skip

JUDGE = Judge(endpoint="http://127.0.0.1:9/v1", model="j")
ROWS = [
    {"instruction": f"Do {i}.", "output": f"base {i}", "generator": "b", "dataset": "xy"[i % 2]}
    for i in range(6)
]
# An upstream file by its marks alone; the words are ours.
UPSTREAM_2 = (
    '<|im_start|>system\nPick.\n<|im_end|>\n<|im_start|>user\n"""{instruction}"""\n'
    'm: """{output_1}"""\nM: """{output_2}"""\n<|im_end|>'
)


@pytest.fixture
def load(tmp_path):
    def make(rows=ROWS, prompt=None, judge=JUDGE, **more):
        (tmp_path / "base.json").write_text(json.dumps(rows))
        if prompt is not None:
            (tmp_path / "prompt.txt").write_text(prompt)
            more["prompt"] = str(tmp_path / "prompt.txt")
        settings = AlpacaEval(baseline=str(tmp_path / "base.json"), judge=judge, **more)
        return settings.load()

    return make


def answers(benchmark):
    return {d.id: [f"model says {d.id}"] for d in benchmark.dialogues}


def test_half_a_surrogate_pair_in_a_baseline_can_be_judged(load):
    row = {"instruction": "Name\udc00 it.", "output": "Lyon \ud83d", "generator": "b"}
    loaded = load([row])
    assert [note[:21] for note in loaded.notes] == [
        "1 of 1 instructions h",
        "1 of 1 baseline outpu",
    ]
    (instruction,) = loaded.instructions
    assert (instruction.instruction, instruction.output) == ("Name\ufffd it.", "Lyon \ufffd")


def test_both_orders_are_judged_and_averaged(load):
    benchmark = load(version=1)
    cases = benchmark.cases(answers(benchmark))
    assert cases[0].quoted == ("base 0", "model says 0")
    assert cases[1].quoted == ("model says 0", "base 0")
    letters = ["B", "A", "B", "B", "A", "B", "C", "C", "B", None, "A", "A"]
    found = [Verdict(letter, "", 1) for letter in letters]
    judged = benchmark.judged(answers(benchmark), found, "me")
    preferences = [row["preference"] for row in judged.files["annotations.json"]]
    assert preferences == [2.0, 1.5, 1.0, 1.5, None, 1.5]
    figures = judged.figures
    assert figures["win_rate"] == pytest.approx((1 + 0.5 + 0 + 0.5 + 0.5) / 5)
    assert figures["score"] == figures["win_rate"]
    assert figures["excluded"] == 1
    assert (judged.scored, judged.total) == (11, 12)
    assert figures["order_flips"] == pytest.approx(2 / 4)
    assert set(figures["groups"]) == {"x", "y"}
    assert figures["length_control"].startswith("none: the answers are longer")
    assert "length_controlled_win_rate" not in figures
    assert figures["prompt"] == "own"


def test_what_is_written_is_what_annotation_files_are_read_from(load, tmp_path):
    benchmark = load(version=1)
    found = [Verdict(letter, "", 1) for letter in "BABABBACBBCC"]
    judged = benchmark.judged(answers(benchmark), found, "me")
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(judged.files["annotations.json"]))
    rates = summarise(read_annotations(path), where=str(path)).percent()
    assert rates["win_rate"] == pytest.approx(100 * judged.figures["win_rate"])
    assert rates["length_control"] == judged.figures["length_control"]
    outputs = judged.files["model_outputs.json"]
    assert set(outputs[0]) == {"dataset", "instruction", "output", "generator"}


def test_weighted_preferences_through_an_endpoint(load, serve, tmp_path):
    def likes_what_the_model_says(asked):
        assert asked.body["logprobs"] is True
        assert asked.body["max_tokens"] == 1
        first = asked.text.index("model says") < asked.text.index("base")
        odds = {"m": 0.8, "M": 0.2} if first else {"m": 0.4, "M": 0.6}
        top = [{"token": token, "logprob": math.log(p)} for token, p in odds.items()]
        return reply("m", finish_reason="length", logprobs={"content": [{"top_logprobs": top}]})

    judge = Judge(endpoint=serve(likes_what_the_model_says).url, model="j")
    benchmark = load(prompt=UPSTREAM_2, judge=judge)
    calls = Calls(judge, ReplyLog(tmp_path / "l.jsonl"), where="judge", show=print)
    found = verdicts(judge, benchmark.cases(answers(benchmark)), calls, lambda *_: None)
    figures = benchmark.judged(answers(benchmark), found, "me").figures
    assert figures["win_rate"] == pytest.approx((0.8 + 0.6) / 2)
    assert figures["prompt"] == "upstream"


def test_an_annotation_file_serves_as_baseline(load):
    rows = [
        {
            "instruction": r["instruction"],
            "output_1": r["output"],
            "generator_1": "g",
            "output_2": 7,
        }
        for r in ROWS
    ]
    benchmark = load(rows)
    assert [i.output for i in benchmark.instructions] == [r["output"] for r in ROWS]
    assert benchmark.instructions[0].generator == "g"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": [*ROWS, ROWS[0]]}, "occurs twice"),
        ({"rows": [{"instruction": "i"}]}, "no text under 'output'"),
        ({"rows": []}, "empty"),
        ({"prompt": "{instruction} {output_1}"}, r"lacks \{output_2\}"),
        ({"prompt": " \n"}, "empty"),
    ],
)
def test_bad_files_are_refused(load, change, words):
    with pytest.raises(InputError, match=words):
        load(**change)


def test_a_judge_of_the_same_family():
    assert "itself" in str(same_family_warning("m", ["x", "m"]))
    assert "Mistral" in str(
        same_family_warning("mistral-large-2411", ["runs/x", "mistralai/Mixtral-8x7B"])
    )
    assert "OpenAI" in str(same_family_warning("gpt-4o", ["davinci-003"]))
    assert same_family_warning("gpt-4o", ["mistral-7b", "llama-3"]) is None
    assert same_family_warning("qwen3:8b", ["Qwen/Qwen2.5-0.5B"]) is not None
    assert same_family_warning("my-own-judge", ["my-own-model"]) is None


def test_warnings_say_what_controls_show():
    figures = {
        "interval": [0.4, 0.6],
        "controls": {
            "empty": {"score": 0.1},
            "constant": {"score": 0.45},
            "length_only": {"longer_answer_wins": 0.9, "correlation": -0.7},
        },
        "order_flips": 0.3,
    }
    text = " | ".join(control_warnings(figures))
    assert "constant scores 45 %" in text
    assert "empty" not in text
    assert "90 % of decided pairs" in text
    assert "-0.70" in text
    assert "30 % of verdicts flip" in text
    assert "read the win rate at equal length" not in text, "there is none"
    apart = {**figures, "length_control": "none: never compared"}
    assert "there is no win rate at equal length: never compared" in control_warnings(apart)
    known = {**figures, "length_control": "no difficulty", "length_controlled_win_rate": 0.5}
    text = " | ".join(control_warnings(known))
    assert "read the win rate at equal length" in text
    assert "there is no" not in text
    quiet = {"interval": [0.4, 0.6], "controls": {"empty": {"unscored": 3}}}
    assert control_warnings(quiet) == []
