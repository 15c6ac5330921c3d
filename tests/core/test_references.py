"""Marked fields are listed by key and replaced, in whatever they are nested."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from dominie.core.references import (
    ModelName,
    PathName,
    Reference,
    SourceName,
    references,
    rewritten,
)


@dataclass(frozen=True)
class Inner:
    teacher: ModelName | None = None
    file: PathName = "inner.json"
    text: str = "inner"


@dataclass(frozen=True)
class Outer:
    student: ModelName
    models: dict[ModelName, float] = field(default_factory=dict)
    siblings: list[ModelName] = field(default_factory=list)
    data: dict[SourceName, Inner] = field(default_factory=dict)
    named: dict[str, ModelName] = field(default_factory=dict)
    folder: Annotated[str, Reference("output")] | None = None
    where: dict[str, str | int] | None = None
    options: dict[str, object] = field(default_factory=dict)


OUTER = Outer(
    student="a",
    models={"b": 0.5, "c": 0.5},
    siblings=["d", "e"],
    data={"s": Inner(teacher="f"), "t": Inner(file="other.json")},
    named={"a": "g"},
    folder="out",
    where={"a": "b"},
    options={"a": "b", "c": ["d"]},
)


def test_names_by_the_key_that_names_them():
    assert references(OUTER, "model") == {
        "student": "a", "models.b": "b", "models.c": "c", "siblings.0": "d", "siblings.1": "e",
        "data.s.teacher": "f", "named.a": "g",
    }  # fmt: skip
    assert references(OUTER, "source") == {"data.s": "s", "data.t": "t"}
    assert references(OUTER, "path") == {"data.s.file": "inner.json", "data.t.file": "other.json"}
    assert references(OUTER, "output") == {"folder": "out"}


def test_names_of_one_kind_are_replaced_and_nothing_else():
    changed = rewritten(OUTER, lambda kind, name: name.upper() if kind == "model" else name)
    assert changed == Outer(
        student="A",
        models={"B": 0.5, "C": 0.5},
        siblings=["D", "E"],
        data={"s": Inner(teacher="F"), "t": Inner(file="other.json")},
        named={"a": "G"},
        folder="out",
        where={"a": "b"},
        options={"a": "b", "c": ["d"]},
    )
    assert rewritten(OUTER, lambda _, name: name) is OUTER
