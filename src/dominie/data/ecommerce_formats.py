"""Rows of published e-commerce benchmarks, in the layouts they are published in."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dominie.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


def listed(value: Any) -> list[Any] | None:
    """What is a list, or is written as one in JSON or Python; None for anything else."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if not isinstance(value, str) or not value.strip().startswith("["):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if isinstance(found, list) else None
    return None


def options_text(value: Any) -> str:
    """The options of a question as lines below a heading, empty where there are none."""
    options = listed(value)
    lines = str(value).splitlines() if options is None else [str(option) for option in options]
    return "\n".join(["Options:", *lines]) if any(line.strip() for line in lines) else ""


META_FILE = "meta-info.json"
"""What lies beside the rows of an EcomInstruct task: its prompt and its labels."""
_META = "meta-info"  # the column under which a row carries what it needs of it
_RESPONSE, _INSTRUCTION = "### Response:", "### Instruction:"
_RATINGS = ["1", "2", "3", "4", "5"]


class QuestionAndAnswer(NamedTuple):
    """A question, its answer, the other fields of the row, and the columns that were read."""

    question: str
    answer: str
    fields: dict[str, Any]
    columns: set[str]


def benchmark_question(columns: dict[str, Any], where: str) -> QuestionAndAnswer | None:
    """The question and answer of a row in one of the layouts, None for any other row.

    Raises:
        InputError: a row of such a layout that is broken.
    """
    read = next((read for names, read in _FORMATS if names <= columns.keys()), None)
    return read and read(columns, where)


def meta_file(path: Path) -> Path | None:
    """The file beside a data file without which its rows mean nothing, if there is one."""
    beside = path.with_name(META_FILE)
    return beside if path.name != META_FILE and beside.is_file() else None


def with_meta_file(path: Path, rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Rows of a file, those of EcomInstruct with what `meta-info.json` says of their task.

    Raises:
        InputError: the file beside cannot be read.
    """
    beside = meta_file(path)
    if beside is None:
        yield from rows
        return
    try:
        meta = json.loads(beside.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{META_FILE} cannot be read", where=str(beside), found=str(error)
        ) from None
    parts = path.parent.name.split("-")  # language, data set, kind, name
    for where, row in rows:
        if isinstance(row, dict) and "sentences" in row and isinstance(meta, dict):
            yield where, {**row, _META: {**meta, "kind": parts[2] if len(parts) > 2 else ""}}
        else:
            yield where, row


def _ecom_instruct(columns: dict[str, Any], where: str) -> QuestionAndAnswer:
    meta = columns.get(_META)
    try:
        template = meta["test_prompt"]["instruction"]  # type: ignore[index]
        assert meta is not None
        labels = _labels(columns, meta)
        joint = meta.get("label_sep", ", ")
        answer = _ecom_answer(columns, meta, labels, joint)
        sentences = columns["sentences"]
        text = "".join(sentences) if isinstance(sentences, list) else sentences
        question = template.replace("{label_set}", joint.join(labels)).replace("{sentences}", text)
    except (KeyError, TypeError, AttributeError):
        raise InputError(
            "a row of EcomInstruct's layout cannot be read",
            where=where,
            expected=f"{META_FILE} beside the file, with test_prompt, label_set and label_key",
            found=f"columns {', '.join(key for key in columns if key != _META)}",
            do=f"keep each task's {META_FILE} and test.json in a folder as published",
        ) from None
    # The chat template takes the place of these headings.
    question = question.strip().removeprefix(_INSTRUCTION).removesuffix(_RESPONSE).strip()
    fields = {"task": str(meta.get("task", "")), "kind": meta["kind"]}
    if meta["kind"] == "CLS":
        fields["options"] = labels
    return QuestionAndAnswer(
        question, answer, fields, {"sentences", "labels", "spans", "label_set", _META}
    )


def _labels(columns: dict[str, Any], meta: dict[str, Any]) -> list[str]:
    """The labels of a row: its own where it has some, else the task's."""
    own = [str(label) for label in columns.get("label_set") or () if str(label).strip()]
    if own or "label_set" not in meta:
        return own
    return [str(label) for label in meta["label_set"][meta["label_key"]]]


def _ecom_answer(
    columns: dict[str, Any], meta: dict[str, Any], labels: list[str], joint: str
) -> str:
    """The answer as upstream writes it: labels, terms, or for NER a line of terms for each type."""
    if "labels" in columns:
        return str(joint.join(columns["labels"][meta["label_key"]])) or "None"
    spans = columns["spans"]
    if meta["kind"] != "NER":
        return joint.join(span["term"] for span in spans) or "None"
    terms = {label: [s["term"] for s in spans if s["type"] == label] for label in labels}
    return "\n".join(f"{label}: {joint.join(found) or 'None'}" for label, found in terms.items())


def _shopping_task(columns: dict[str, Any], where: str) -> QuestionAndAnswer:
    question, target = columns["input_field"], columns["target_field"]
    parts = listed(target)
    answer = ", ".join(map(str, parts)) if parts is not None else str(target)
    if not isinstance(question, str) or not answer.strip():
        raise InputError(
            "a row of ShoppingMMLU's layout cannot be read",
            where=where,
            expected="a text in input_field and a text or a list in target_field",
            found=f"{question!r:.60} and {target!r:.60}",
        )
    fields = {} if parts is None else {"target_field": parts}
    return QuestionAndAnswer(question, answer, fields, {"input_field", "target_field"})


def _shopping_choice(columns: dict[str, Any], where: str) -> QuestionAndAnswer:
    """Choices are numbered from 0, as upstream shows them; ratings, 1 to 5, have none."""
    question, given = columns["question"], columns.get("choices")
    choices = listed(given)
    if choices is None and not str(given or "").strip():
        options, shown = _RATINGS, str(question)
    else:
        options = [str(number) for number in range(len(choices or ()))]
        numbered = (f"{number}. {choice}" for number, choice in enumerate(choices or ()))
        shown = "\n".join([str(question), *numbered])
    answer = str(columns["answer"]).strip()
    answer = answer.removesuffix(".0")
    if answer not in options:
        raise InputError(
            "the answer is none of the choices",
            where=where,
            expected=f"one of {', '.join(options)}" if options else "a list of choices",
            found=f"answer {columns['answer']!r}, choices {given!r:.60}",
        )
    return QuestionAndAnswer(
        f"{shown}\nAnswer:", answer, {"options": options}, {"question", "choices", "answer"}
    )


_FORMATS: tuple[tuple[set[str], Callable[[dict[str, Any], str], QuestionAndAnswer]], ...] = (
    ({"sentences", "labels"}, _ecom_instruct),
    ({"sentences", "spans"}, _ecom_instruct),
    ({"input_field", "target_field"}, _shopping_task),
    ({"question", "choices", "answer"}, _shopping_choice),
)
"""The columns by which each format is recognised, and its reader."""
