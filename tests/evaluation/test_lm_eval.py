"""EleutherAI's harness on the live model, with a task defined here: nothing is downloaded."""

from __future__ import annotations

import importlib.util
import json

import pytest

from dominie.core.errors import InputError
from dominie.evaluation.lm_eval import (
    _samples,
    check_harness,
    definitions_digest,
    harness_score,
)
from dominie.evaluation.task import Harness

installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)

TASK = """\
task: toy_colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture
def definitions(tmp_path):
    rows = [
        {"question": f"{colour} {colour}", "answer": i % 2, "choices": [" red", " blue green"]}
        for i, colour in enumerate(["red", "blue", "green", "black"] * 3)
    ]
    data = tmp_path / "colours.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "colours.yaml").write_text(TASK.format(data=data))
    return folder


@pytest.mark.full
@installed
def test_a_task_of_one_s_own_is_scored_on_the_live_model(model, tokenizer, definitions):
    settings = Harness(tasks=["toy_colours"], include=str(definitions), figure="acc_norm")
    check_harness(settings, where="evaluate.tasks.colours")
    scored = harness_score(model.float(), tokenizer, settings, batch=4)
    model.double()
    score = scored.result
    assert score.n == 12
    assert score.by["toy_colours"].n == 12
    assert score.score == sum(sample["score"] for sample in scored.samples) / 12
    assert score.interval.low <= score.score <= score.interval.high
    assert {"prompt", "target", "output", "correct", "group"} <= scored.samples[0].keys()
    with pytest.raises(InputError, match=r"(?s)no figure 'f1'.*one of .*acc_norm"):
        harness_score(
            model, tokenizer, Harness(tasks=["toy_colours"], include=str(definitions), figure="f1")
        )


NUMBERS = """\
task: toy_numbers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "7"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 3}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
filter_list:
  - {{name: nothing, filter: [{{function: regex, regex_pattern: "@(7)", fallback: "7"}}, {{function: take_first}}]}}
  - {{name: as_is, filter: [{{function: take_first}}]}}
"""  # noqa: E501


@pytest.mark.full
@installed
def test_one_of_several_filters_is_the_score(model, tokenizer, definitions):
    text = NUMBERS.format(data=definitions.parent / "colours.jsonl")
    (definitions / "numbers.yaml").write_text(text)
    (definitions / "both.yaml").write_text("group: both\ntask: [toy_numbers, toy_colours]\n")
    several = Harness(tasks=["both"], include=str(definitions), figure="exact_match")
    message = r"(?s)t\.lm_eval\.filter: task toy_numbers has several.*one of nothing, as_is"
    with pytest.raises(InputError, match=message):
        check_harness(several, where="t")
    for name, score in (("nothing", 1.0), ("as_is", 0.0)):
        settings = Harness(
            tasks=["toy_numbers"], include=str(definitions), figure="exact_match", filter=name
        )
        check_harness(settings, where="t")
        scored = harness_score(model.float(), tokenizer, settings, batch=4)
        assert (scored.result.score, scored.result.n) == (score, 12)
    model.double()


def documents(filters, values=(1, 0, 1, 1), figure="acc"):
    return [
        {"filter": name, "doc_id": i, "arguments": [["ask"]], "target": "t", "filtered_resps": []}
        | {figure: value}
        for name in filters
        for i, value in enumerate(values)
    ]


def found_by_harness(own, higher=True, name="none"):
    return {"results": {"t": {f"acc,{name}": own}}, "higher_is_better": {"t": {"acc": higher}}}


def test_documents_are_counted_once():
    one = _samples("t", documents(["none"]), found_by_harness(0.75), Harness(tasks=["t"]))
    assert [sample["score"] for sample in one] == [1.0, 0.0, 1.0, 1.0]
    chosen = Harness(tasks=["t"], filter="b")
    two = _samples("t", documents(["a", "b"]), found_by_harness(0.75, name="b"), chosen)
    assert [sample["document"] for sample in two] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("filters", "found", "settings", "message"),
    [
        (["a", "b"], found_by_harness(0.75), {}, "several filters.*\n.*one of a, b"),
        (["a", "b"], found_by_harness(0.75), {"filter": "c"}, "no filter 'c'.*\n.*one of a, b"),
        (["none"], found_by_harness(0.5), {}, "no mean over its documents"),
        (["none"], {"results": {"t": {}}}, {}, "no mean over its documents"),
        (["none"], found_by_harness(0.75, higher=False), {}, "better when it is lower"),
    ],
)
def test_what_is_no_score_is_refused(filters, found, settings, message):
    with pytest.raises(InputError, match=message):
        _samples("t", documents(filters), found, Harness(tasks=["t"], **settings))


@pytest.mark.full
@installed
def test_tasks_and_folders_that_do_not_exist_are_refused(definitions, tmp_path):
    with pytest.raises(InputError, match="no such folder of task definitions"):
        check_harness(Harness(tasks=["x"], include=str(tmp_path / "none")), where="t")
    with pytest.raises(InputError, match="knows no task 'toy_colors'"):
        check_harness(Harness(tasks=["toy_colors"], include=str(definitions)), where="t")


def test_a_changed_definition_is_another_task(definitions):
    settings = Harness(tasks=["toy_colours"], include=str(definitions))
    before = definitions_digest(settings)
    assert before == definitions_digest(settings)
    (definitions / "colours.yaml").write_text("task: other\n")
    assert definitions_digest(settings) != before


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_the_package_the_task_is_refused_with_the_command_to_install_it():
    with pytest.raises(InputError, match=r"pip install 'dominie\[lm-eval\]'"):
        check_harness(Harness(tasks=["arc_easy"]), where="evaluate.tasks.arc")
