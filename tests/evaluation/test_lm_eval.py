"""EleutherAI's harness on the live model, with a task defined here: nothing is downloaded."""

from __future__ import annotations

import importlib.util
import json

import pytest

from dominie.core.errors import InputError
from dominie.evaluation.lm_eval import check_harness, definitions_digest, harness_score
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
