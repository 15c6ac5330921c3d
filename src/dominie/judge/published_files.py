"""Files of benchmarks as their authors publish them: JSON arrays, JSON Lines, those of MT-Bench."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dominie.core.errors import InputError
from dominie.data.json_files import json_rows, jsonl_rows, whole_characters
from dominie.judge.benchmark import Answers, failed_answers
from dominie.judge.prompts import Prompt, comparison_prompt, rating_prompt

T = TypeVar("T")


def read_objects(path: Path, *, what: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the objects of a JSON or JSON Lines file, each with its place.

    Raises:
        InputError: it is missing, empty, malformed, or holds something else.
    """
    rows = jsonl_rows(path) if path.suffix in (".jsonl", ".ndjson") else json_rows(path)
    found = []
    try:
        for line, row in rows:
            where = f"{path}:{line}"
            if isinstance(row, InputError):
                raise row
            if not isinstance(row, dict):
                raise InputError(f"no object of {what}", where=where, found=repr(row)[:80])
            found.append((where, whole_characters(row)))
    except OSError as error:
        raise unreadable(path, what, error) from None
    if not found:
        raise InputError(f"the file of {what} is empty", where=str(path))
    return found


def read_text(path: Path, *, what: str) -> str:
    """Return the text of a file.

    Raises:
        InputError: it is missing, empty or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, what, error) from None
    if not text.strip():
        raise InputError(f"the file of {what} is empty", where=str(path))
    return text


def text_field(row: Mapping[str, Any], name: str, *, where: str) -> str:
    """Return a field that has to be text.

    Raises:
        InputError: it is missing or something else.
    """
    value = row.get(name)
    if isinstance(value, str):
        return value
    found = f"{name}: {json.dumps(value)[:80]}" if name in row else f"keys {', '.join(row)}"
    raise InputError(f"no text under {name!r}", where=where, found=found)


def by_unique(
    items: Iterable[tuple[str, T]], key: Callable[[T], Any], *, what: str
) -> dict[Any, T]:
    """Return items by a key that must not occur twice.

    Raises:
        InputError: names both places.
    """
    found: dict[Any, T] = {}
    places: dict[Any, str] = {}
    for where, item in items:
        name = key(item)
        if name in found:
            raise InputError(
                f"{what} {name!r:.80} occurs twice",
                where=where,
                found=f"the first at {places[name]}",
                do="remove one of the two",
            )
        found[name], places[name] = item, where
    return found


def unreadable(path: Path, what: str, error: Exception) -> InputError:
    """Return the error of a file that cannot be read."""
    missing = isinstance(error, FileNotFoundError)
    return InputError(
        f"there is no such file of {what}" if missing else f"the file of {what} cannot be read",
        where=str(path),
        found=None if missing else (getattr(error, "strerror", None) or str(error)),
        do="name the file as its authors publish it; docs/evaluation.md says where it is found",
    )


#: Categories judged with a reference answer beside the model's; so are Arena-Hard's.
REFERENCED = {"math", "reasoning", "coding"}
ARENA_HARD = "arena-hard"


@dataclass(frozen=True)
class MtQuestion:
    """A question of one or two turns.

    Attributes:
        id: of the question.
        category: what its score is broken down by.
        turns: of the user.
        reference: right answers to the turns, if the category needs them.
    """

    id: int | str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] | None = None

    @property
    def needs_reference(self) -> bool:
        """Whether it is judged against a reference answer."""
        return self.kind in REFERENCED or self.kind.startswith(ARENA_HARD)

    @property
    def kind(self) -> str:
        """The category, however it is capitalised."""
        return self.category.strip().casefold()

    @property
    def trusted(self) -> dict[str, str]:
        """Fields of prompts that no judged model wrote."""
        fields = {"question": self.turns[0]}
        fields |= {f"question_{i}": turn for i, turn in enumerate(self.turns, 1)}
        return fields | {f"ref_answer_{i}": text for i, text in enumerate(self.reference or (), 1)}


@dataclass(frozen=True)
class Prompts:
    """MT-Bench prompts by (with a reference, turn).

    Attributes:
        rating: for one model's answers.
        comparison: for two models'.
        origin: `upstream`, or `own` for the package's default prompts.
    """

    rating: Mapping[tuple[bool, int], Prompt]
    comparison: Mapping[tuple[bool, int], Prompt]
    origin: str


def read_questions(path: str, references: str | None) -> list[MtQuestion]:
    """Return the questions, with references if their category needs them.

    Raises:
        InputError: a file is missing or malformed, an id occurs twice, or a reference is missing.
    """
    placed = [(w, _question(row, w)) for w, row in read_objects(Path(path), what="questions")]
    questions = list(by_unique(placed, lambda q: q.id, what="question").values())
    needing = [q for q in questions if q.needs_reference]
    if not needing:
        return questions
    if references is None:
        raise InputError(
            "no reference answers",
            where=path,
            expected=f"references, as {needing[0].category} is judged against them",
            do="set references: FILE, for example upstream's reference_answer/gpt-4.jsonl",
        )
    known = read_answers(references, needing, what="reference answers")
    if failed := failed_answers({f"question {q.id}": known[q.id] for q in needing}, "references"):
        raise InputError(
            "references that are no answers",
            where=references,
            found=failed,
            do="write these references, or take the questions out",
        )
    return [
        MtQuestion(q.id, q.category, q.turns, tuple(known[q.id])) if q.needs_reference else q
        for q in questions
    ]


def reference_ids(path: str) -> set[int | str]:
    """Return the ids of all questions that a file of references answers."""
    return set(_answers_by_id(_only_file(Path(path), "reference answers"), "reference answers"))


def read_answers(path: str, questions: Sequence[MtQuestion], *, what: str) -> Answers:
    """Return answers to these questions; whose they are does not matter.

    Args:
        path: a file in the shape of upstream's `model_answer`, or a folder with one such file.
        questions: that have to be answered.
        what: what they are, for messages.

    Raises:
        InputError: a file is missing or malformed, or a question is not answered.
    """
    file = _only_file(Path(path), what)
    found = _answers_by_id(file, what)
    for question in questions:
        if len(found.get(question.id, ())) < len(question.turns):
            raise InputError(
                f"question {question.id} has none of the {what}"
                if question.id not in found
                else f"question {question.id} has fewer {what} than turns",
                where=str(file),
                do="use the file that belongs to these questions",
            )
    return {question.id: found[question.id][: len(question.turns)] for question in questions}


def _answers_by_id(file: Path, what: str) -> dict[int | str, list[str]]:
    placed = [(w, (_id(row, w), _turns(row, w))) for w, row in read_objects(file, what=what)]
    return dict(by_unique(placed, lambda answer: answer[0], what="id").values())


def read_prompts(path: str) -> Prompts:
    """Return the prompts of upstream's `judge_prompts.jsonl`.

    Raises:
        InputError: one of the prompts is missing, or lacks a field.
    """
    placed = read_objects(Path(path), what="judge prompts")
    rows = by_unique(placed, lambda row: row.get("name"), what="prompt")
    endings = {1: "", 2: "-multi-turn"}

    def prompt(name: str, verdict: Any, fields: Sequence[str]) -> Prompt:
        if name not in rows:
            raise InputError(
                f"no prompt named {name!r}",
                where=path,
                found=", ".join(map(str, rows)),
                do="use upstream's judge_prompts.jsonl, or leave prompts out for the default ones",
            )
        row, where = rows[name], f"{path}, prompt {name}"
        found = Prompt(
            name,
            text_field(row, "prompt_template", where=where),
            text_field(row, "system_prompt", where=where),
            verdict,
        )
        if missing := sorted(set(fields) - found.fields):
            raise InputError(f"the prompt lacks {{{missing[0]}}}", where=where)
        return found

    rating, comparison = {}, {}
    for reference in (False, True):
        for turn, ending in endings.items():
            single = f"single-{'math-' if reference else ''}v1{ending}"
            rating[reference, turn] = prompt(single, "rating", _fields("answer", turn, reference))
            pair = ("pair-math-v1" if reference else "pair-v2") + ending
            fields = {*_fields("answer_a", turn, reference), *_fields("answer_b", turn, reference)}
            comparison[reference, turn] = prompt(pair, "letter", sorted(fields))
    return Prompts(rating, comparison, "upstream")


def default_prompts() -> Prompts:
    """Return the package's own prompts."""
    kinds = [(reference, turn) for reference in (False, True) for turn in (1, 2)]
    return Prompts(
        {(r, t): rating_prompt(reference=r, turns=t) for r, t in kinds},
        {(r, t): comparison_prompt(reference=r, turns=t) for r, t in kinds},
        "own",
    )


def _fields(answer: str, turn: int, reference: bool) -> list[str]:
    if turn == 1:
        return ["question", answer, *(["ref_answer_1"] if reference else [])]
    names = ["question", answer, *(["ref_answer"] if reference else [])]
    return [f"{name}_{i}" for name in names for i in (1, 2)]


def _question(row: Mapping[str, Any], where: str) -> MtQuestion:
    turns = row.get("turns")
    if (
        not isinstance(turns, list)
        or len(turns) not in (1, 2)
        or not all(isinstance(turn, str) and turn for turn in turns)
    ):
        raise InputError(
            "no question", where=where, expected="turns: one or two texts", found=_brief(turns)
        )
    return MtQuestion(_id(row, where), text_field(row, "category", where=where), tuple(turns))


def _id(row: Mapping[str, Any], where: str) -> int | str:
    name = row.get("question_id")
    if isinstance(name, bool) or not isinstance(name, int | str):
        raise InputError("no question_id", where=where, found=_brief(name))
    return name


def _turns(row: Mapping[str, Any], where: str) -> list[str]:
    try:
        turns = row["choices"][0]["turns"]
        if isinstance(turns, list) and all(isinstance(turn, str) for turn in turns):
            return turns
    except (LookupError, TypeError):
        turns = row.get("choices")
    raise InputError(
        "no answers", where=where, expected='choices: [{"turns": [TEXT, …]}]', found=_brief(turns)
    )


def _only_file(path: Path, what: str) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.jsonl"))
    if len(files) == 1:
        return files[0]
    raise InputError(
        f"which of these are the {what}?" if files else f"no {what} in this folder",
        where=str(path),
        expected="one .jsonl file",
        found=", ".join(file.name for file in files) or "none",
        do="name the file",
    )


def _brief(value: Any) -> str:
    return json.dumps(value)[:80]
