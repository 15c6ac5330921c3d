"""Prints docs/errors.md from the source's own messages; `--write` puts it there.

Every error that a person can cause is raised with its words where it is raised. They are read from
the syntax tree, `…` standing for what is only known then. Where neither an expectation nor a remedy
stands beside a message, `CURES` has one, and a test sees to it that none is missing or left over.
"""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from generated import say_or_write
from recipe_reference import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "dominie"
PAGE = ROOT / "docs" / "errors.md"
_KINDS = {"InputError": 2, "RunError": 1}
_REST = "Running"
_AREAS = {
    "Recipe and command line": ("recipe/", "cli/", "workflows/init", "workflows/sweep"),
    "Data and chat templates": ("data/", "toyworld/", "stages/prepare"),
    "Models and teachers": (
        "models/",
        "teachers/",
        "stages/merge",
        "stages/upcycle",
        "stages/prune",
        "stages/write_answers",
        "stages/teacher_caches",
        "workflows/pipeline",
    ),
    "Training": ("training/", "losses/", "stages/train"),
    "Evaluation and judges": (
        "evaluation/",
        "judge/",
        "generation/",
        "stages/evaluat",
        "stages/judged",
    ),
    "Planning": ("planning/",),
    "Results and reports": ("report/",),
    _REST: ("",),
}

#: What to do where the message itself names neither an expectation nor a remedy.
CURES = {
    "the chat template cannot be read": "name a Jinja file in UTF-8 that may be read",
    "… cannot be read": "mend the file, or copy it again from where it was published",
    "the conversation has no message": "remove the row, or give it its messages",
    "the prompt is empty": "remove the row, or give it its question",
    "the text holds half of a surrogate pair": "write the file again in valid UTF-8",
    "the row is nested too deeply": "flatten the row: no format has lists within lists of lists",
    "the file cannot be read": "see that it is there, may be read, and is not cut off",
    "malformed CSV": "quote fields that hold commas or line ends, as RFC 4180 has it",
    "preferences of gamed baselines are from 0 to 1": "use AlpacaEval's own df_gamed.csv",
    "no row has a preference from 1 to 2": "use an annotation file of AlpacaEval",
    "no such folder of task definitions": "name a folder that holds tasks of lm-eval as YAML",
    "interrupted; what was answered is kept": "give the same command again; it goes on from there",
    "cannot be read": "see that the file may be read, and is not cut off",
    "no question_id": "use the file as its authors publish it",
    "the prompt lacks {…}": "use a prompt file of the benchmark, with all its fields",
    "nothing is asked before the answer": "remove the row, or set a question before its answer",
    "no text under …": "use the file as its authors publish it",
    "no number under …": "use the file as its authors publish it",
    "the file of … is empty": "copy the file again from where it is published",
    "no object of …": "use the file as its authors publish it",
    "no such folder": "correct the path, which begins at the recipe's folder",
    "the name of a model and of an endpoint": "rename one of the two",
    "the name of a task and of a benchmark": "rename one of the two",
    "missing key": "add the key; [every key of a recipe](recipe.md) says what it means",
    "not a mapping": "write `key: value` there",
    "not valid YAML": "look at that line: indentation, colons, quotes",
    "the folder cannot be written": "name another folder, or mend its permissions",
    "a key is varied twice": "name it once, with all its values",
    "… is not a whole number above zero": "write a name like toyworld:general?rows=500",
    "width is not a multiple of 32": "write a name like toyworld:student?width=64",
    "noise is not a fraction from 0 to 1": "write a name like toyworld:domain?noise=0.3",
    "transformers refuses the settings": "change what it names under `train`",
}

_BEFORE = """# Error messages

`python docs/error_reference.py --write` made this page of the messages in the source. A message
says where it went wrong, what was expected, what was found and what to do, in that order:

```text
error: recipe.yaml: stages.align.data.domain.teacher: unknown stage or model 'expret'
  expected  one of taught, distill, expert, align, small, large
  do        did you mean expert?
```

An error of input ends with exit status 2, before anything is spent wherever that can be; those that
end a run with status 1 are marked *(1)*. `…` stands for what is known only then. What was done
already stays done: after the cure, the same command goes on. What has no words here is a bug:
`dominie --debug VERB …` shows the traceback to report.

| seen in the terminal | cause | cure |
|---|---|---|
| `OutOfMemoryError` | the device is full | `train.micro_batch=1`, a shorter `train.max_length`, \
`train.gradient_checkpointing=true`; `dominie plan` says what would fit |
| `No space left on device` | the disk is full | make room, then give the same command: \
checkpoints are whole or not there |
| `Killed` | the system ran out of memory, and said nothing else | as for `OutOfMemoryError`; \
a cached teacher (`cache: true`) needs no room |
"""


_CHECKS = ("__post_init__", "_check_weight")
_REFUSED = """## Values that a recipe cannot have

Refused as soon as the recipe is read, with the key they stand at; the message is the rule, and
[every key of a recipe](recipe.md) has the defaults.
"""


@dataclass(frozen=True)
class Entry:
    """One message: what went wrong, what would have been accepted, what to do, and where it is."""

    what: str
    expected: str
    do: str
    status: int
    file: str


def page() -> str:
    """The page of today's messages."""
    by_area: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries():
        by_area[_area(entry.file)].append(entry)
    parts = [_BEFORE]
    for area in _AREAS:
        if by_area[area]:
            parts += [f"## {area}", "", "| error | expected | do |", "|---|---|---|"]
            rows = dict.fromkeys(_row(entry) for entry in by_area[area])
            parts += [*sorted(rows, key=str.lower), ""]
    parts += [_REFUSED, *(f"- {_cell(text)}" for text in refused_values()), ""]
    return "\n".join(parts)


def entries() -> list[Entry]:
    """Every message of the package, a cure beside each that has one."""
    return [entry for path in sorted(SOURCE.rglob("*.py")) for entry in _of_file(path)]


def without_cure() -> list[str]:
    """Messages with neither an expectation nor a remedy, here or in the source."""
    return [f"{e.file}: {e.what}" for e in entries() if not (e.expected or e.do)]


def unused_cures() -> list[str]:
    """Cures of messages that are no longer there, or that say themselves what to do."""
    used = {e.what for e in entries() if e.do == CURES.get(e.what)}
    return sorted(CURES.keys() - used)


def _of_file(path: Path) -> Iterator[Entry]:
    tree, file = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(SOURCE).as_posix()
    for call in _calls(tree):
        name = _name(call)
        if name not in _KINDS or not call.args:
            continue
        given = {each.arg: each.value for each in call.keywords}
        expected = [_worded(text) for text in _texts(given.get("expected"))]
        remedies = [_worded(text) for text in _texts(given.get("do"))]
        for what in _messages(call.args[0], tree):
            do = " / ".join(remedies)
            if not (do or expected):
                do = CURES.get(what, "")
            yield Entry(what, " / ".join(expected), do, _KINDS[name], file)


def _worded(text: str) -> str:
    return text if text.strip("… ") else "what the message names"


def refused_values() -> list[str]:
    """What the settings of a recipe refuse by themselves, in their own words."""
    found = set()
    for file in sorted({inspect.getfile(base) for base in settings()}):
        for function in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef) and function.name in _CHECKS:
                calls = (call for call in _calls(function) if _name(call) == "ValueError")
                found |= {text for call in calls if call.args for text in _texts(call.args[0])}
    return sorted(found, key=str.lower)


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _messages(node: ast.expr, tree: ast.Module) -> list[str]:
    """The messages that an expression can be; a parameter is what its callers in the file pass."""
    if isinstance(node, ast.Name):
        return _passed(node, tree)
    return [text for text in _texts(node) if text.strip("… ")]


def _passed(parameter: ast.Name, tree: ast.Module) -> list[str]:
    """The texts that calls in this file pass for a parameter of the function around it."""
    found: list[str] = []
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or parameter not in ast.walk(function):
            continue
        names = [each.arg for each in function.args.args if each.arg not in ("self", "cls")]
        if parameter.id not in names:
            continue
        at = names.index(parameter.id)
        for call in _calls(tree):
            if _name(call) == function.name:
                keywords = {each.arg: each.value for each in call.keywords}
                value = keywords.get(parameter.id, call.args[at] if at < len(call.args) else None)
                found += [text for text in _texts(value) if text.strip("… ")]
    return found


def _texts(node: ast.expr | None) -> list[str]:
    """The texts that an expression can be, `…` for every part known only when it runs."""
    if node is None or (isinstance(node, ast.Constant) and node.value is None):
        return []
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(part) for part in product(*(_texts(value) for value in node.values))]
    if isinstance(node, ast.FormattedValue):
        plain = isinstance(node.value, ast.Constant | ast.IfExp)
        return _texts(node.value) if plain else ["…"]
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body), *_texts(node.orelse)]
    if isinstance(node, ast.BoolOp):
        return [text for value in node.values for text in _texts(value)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in _texts(node.left) for b in _texts(node.right)]
    return ["…"]


def _name(call: ast.Call) -> str:
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


def _area(file: str) -> str:
    return next(area for area, starts in _AREAS.items() if file.startswith(starts))


def _row(entry: Entry) -> str:
    mark = "" if entry.status == 2 else " *(1)*"
    return f"| {_cell(entry.what)}{mark} | {_cell(entry.expected)} | {_cell(entry.do)} |"


def _cell(text: str) -> str:
    """A text within a table: bars, braces, stars and angles are themselves, code is left alone."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    if len(parts) % 2 == 0:  # a lone tick opens no code
        parts = ["`".join(parts)]
    return "`".join(_plain(part) if at % 2 == 0 else part for at, part in enumerate(parts))


def _plain(text: str) -> str:
    for sign, written in (
        ("{", "&#123;"),
        ("}", "&#125;"),
        ("*", "\\*"),
        ("<", "\\<"),
        ("_", "\\_"),
    ):
        text = text.replace(sign, written)
    return text


if __name__ == "__main__":
    say_or_write(PAGE, page())
