"""The layouts of published e-commerce benchmarks, in small files written by hand.

The rows are invented; their columns are those of the published files, which are not shipped.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dominie.core.errors import InputError
from dominie.data.conversations import Conversation, read_conversations
from dominie.data.sources import Source, content_fingerprint, read_split


def read(path: Path, **options: object) -> list[Conversation]:
    return list(read_conversations(Source(name="shop", path=str(path), **options)))  # type: ignore[arg-type]


def question(row: Conversation) -> str:
    assert [m["role"] for m in row.messages] == ["user", "assistant"]
    return str(row.messages[0]["content"])


def write_lines(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ECINSTRUCT = {
    "task": "Sequential_Recommendation",
    "setting": "IND_Diverse_Instruction",
    "split": "test",
    "instruction": "Pick the next purchase.",
    "input": "['1st: a tent', '2nd: a stove']",
    "options": "['A: a lamp', 'B: a piano']",
    "output": "A",
}


def test_ecinstruct_shows_the_options_and_keeps_them(tmp_path):
    plain = {**ECINSTRUCT, "task": "Product_Matching", "options": None, "output": "yes"}
    written = {**ECINSTRUCT, "task": "Sentiment_Analysis", "options": '["A: good", "B: bad"]'}
    first, second, third = read(write_lines(tmp_path / "ec.jsonl", ECINSTRUCT, plain, written))
    assert question(first) == (
        "Pick the next purchase.\n\n['1st: a tent', '2nd: a stove']\n\n"
        "Options:\nA: a lamp\nB: a piano"
    )
    assert first.answer == "A"
    assert first.fields["options"] == "['A: a lamp', 'B: a piano']"
    assert first.fields["task"] == "Sequential_Recommendation"
    assert "Options" not in question(second)
    assert question(third).endswith("Options:\nA: good\nB: bad")


def test_a_source_is_a_part_of_a_file(tmp_path):
    """All of ECInstruct is one data set: a task, a setting and a split are chosen by `where`."""
    rows = [
        {**ECINSTRUCT, "input": str(number), "split": split}
        for number, split in enumerate(["train", "test", "test"])
    ]
    path = write_lines(tmp_path / "ec.jsonl", *rows)
    chosen = Source(name="s", path=str(path), test_fraction=1.0, where={"split": "test"})
    assert [row.fields["split"] for row in read_split(chosen, "test")] == ["test", "test"]
    whole = Source(name="s", path=str(path), test_fraction=1.0)
    assert content_fingerprint(chosen) != content_fingerprint(whole)
    nothing = Source(name="s", path=str(path), test_fraction=1.0, where={"split": "dev"})
    with pytest.raises(InputError, match=r"(?s)test split is empty.*where \{'split': 'dev'\}"):
        read_split(nothing, "test")


def ecom_task(folder: Path, name: str, meta: dict[str, object], *rows: object) -> Path:
    write_lines(folder / name / "test.json", *rows)
    (folder / name / "meta-info.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder / name


CLASSES = {
    "task": "EN-Toy-CLS-topic",
    "test_prompt": {
        "instruction": "### Instruction:\n{sentences}\nTopics: {label_set}. \n### Response:"
    },
    "label_set": {"en": ["Food", "Price"], "zh": ["食", "价"]},
    "label_key": "en",
    "label_sep": ", ",
}
TERMS = {**CLASSES, "task": "EN-Toy-NER-ner", "label_set": {"en": ["Brand", "Product"]}}


def test_ecominstruct_takes_prompt_and_labels_from_the_file_beside(tmp_path):
    row = {"sentences": "Cheap {soup}.", "labels": {"en": ["Food", "Price"], "zh": ["食", "价"]}}
    folder = ecom_task(tmp_path, "EN-Toy-CLS-topic", CLASSES, row)
    for path in (folder, folder / "test.json"):
        (found,) = read(path)
        assert question(found) == "Cheap {soup}.\nTopics: Food, Price."
        assert found.answer == "Food, Price"
        assert found.fields == {
            "task": "EN-Toy-CLS-topic",
            "kind": "CLS",
            "options": ["Food", "Price"],
        }


def test_ecominstruct_s_entities_are_a_line_for_each_type(tmp_path):
    row = {
        "sentences": "An Ada lamp and an Ada desk",
        "spans": [
            {"start": 3, "end": 6, "type": "Brand", "term": "Ada"},
            {"start": 7, "end": 11, "type": "Product", "term": "lamp"},
            {"start": 23, "end": 27, "type": "Product", "term": "desk"},
        ],
    }
    (found,) = read(ecom_task(tmp_path, "EN-Toy-NER-ner", TERMS, row))
    assert found.answer == "Brand: Ada\nProduct: lamp, desk"
    (found,) = read(ecom_task(tmp_path, "EN-Toy-NER-none", TERMS, {**row, "spans": []}))
    assert found.answer == "Brand: None\nProduct: None"
    (found,) = read(ecom_task(tmp_path, "EN-Toy-Condition_Extract-spans", TERMS, row))
    assert found.answer == "Ada, lamp, desk"
    (found,) = read(ecom_task(tmp_path, "ZH-Toy-Extract-own", TERMS, {**row, "label_set": ["x"]}))
    assert "Topics: x." in question(found)


def test_a_changed_prompt_is_another_content(tmp_path):
    row = {"sentences": "Soup", "labels": {"en": ["Food"]}}
    source = Source(name="s", path=str(ecom_task(tmp_path, "EN-Toy-CLS-topic", CLASSES, row)))
    before = content_fingerprint(source)
    ecom_task(tmp_path, "EN-Toy-CLS-topic", {**CLASSES, "label_key": "zh"}, row)
    assert content_fingerprint(source) != before


def test_ecominstruct_without_its_meta_file_says_what_is_missing(tmp_path):
    path = write_lines(tmp_path / "test.json", {"sentences": "x", "labels": {"en": ["a"]}})
    with pytest.raises(InputError, match=r"(?s)EcomInstruct's layout.*meta-info\.json beside"):
        read(path)
    (tmp_path / "meta-info.json").write_text("{broken")
    with pytest.raises(InputError, match=r"meta-info\.json cannot be read"):
        read(path)


def test_shoppingmmlu_s_choices_are_numbered_from_0(tmp_path):
    path = tmp_path / "choice.csv"
    path.write_text(
        "\ufeffquestion,choices,answer\n"
        '"What, if any?","[\'wool\', ""a boy\'s"", \'silk\', \'linen\']",2\n'
        "How many stars?,,5\n",
        encoding="utf-8",
    )
    choice, rating = read(path)
    assert question(choice) == "What, if any?\n0. wool\n1. a boy's\n2. silk\n3. linen\nAnswer:"
    assert (choice.answer, choice.fields["options"]) == ("2", ["0", "1", "2", "3"])
    assert (rating.answer, rating.fields["options"]) == ("5", ["1", "2", "3", "4", "5"])
    assert choice.where == f"{path}:2"


def test_shoppingmmlu_s_other_tasks_have_an_input_and_a_target(tmp_path):
    path = write_lines(
        tmp_path / "ranking.json",
        {"input_field": "Rank 1, 2, 3.", "target_field": [0.0, 1.0, 0.1]},
        {"input_field": "Name the brand.", "target_field": ["Ada", "Bo"]},
        {"input_field": "Write a title.", "target_field": "A red lamp"},
    )
    ranking, entities, title = read(path)
    assert ranking.fields["target_field"] == [0.0, 1.0, 0.1]
    assert entities.answer == "Ada, Bo"
    assert (title.answer, title.fields) == ("A red lamp", {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question,choices,answer\nq,\"['a', 'b']\",2\n", "none of the choices"),
        ("question,choices,answer\nq,a or b,0\n", "none of the choices"),
        ("question,choices,answer\nq,0\n", "another number of columns"),
        ("question,choices,answer\nq,0,1,2\n", "another number of columns"),
        ('question,choices,answer\n"q,0,1\n', "malformed CSV"),
        ("question,choices,answer\n", "the file is empty"),
    ],
)
def test_broken_tables_are_refused_by_line(tmp_path, text, message):
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read(path)
