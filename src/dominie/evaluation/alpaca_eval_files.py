"""The files of AlpacaEval as its authors publish them: a baseline's outputs and prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dominie.errors import InputError
from dominie.evaluation.judging.prompts import Prompt
from dominie.evaluation.judging.wording import preference_prompt
from dominie.evaluation.upstream_files import by_unique, read_objects, read_text, text_field

_FIELDS = ("instruction", "output_1", "output_2")


@dataclass(frozen=True)
class Instruction:
    """An instruction and what the baseline answered.

    Attributes:
        id: its place in the evaluation set.
        instruction: what the user says.
        output: the baseline's answer.
        generator: the baseline's name.
        dataset: where the instruction is from.
    """

    id: int
    instruction: str
    output: str
    generator: str
    dataset: str


def read_baseline(path: str) -> list[Instruction]:
    """Instructions with a baseline's answers: a file of outputs, or of annotations.

    Raises:
        InputError: the file is missing or malformed, or an instruction stands twice.
    """
    placed = read_objects(Path(path), what="baseline outputs")
    ending = "_1" if "output_1" in placed[0][1] else ""
    found = [
        (
            where,
            Instruction(
                id=i,
                instruction=text_field(row, "instruction", where=where),
                output=text_field(row, f"output{ending}", where=where),
                generator=str(row.get(f"generator{ending}", "baseline")),
                dataset=str(row.get("dataset", "all")),
            ),
        )
        for i, (where, row) in enumerate(placed)
    ]
    return list(by_unique(found, lambda item: item.instruction, what="instruction").values())


def preference_prompt_of(path: str | None, version: Literal[1, 2]) -> Prompt:
    """Upstream's prompt of a version, or our own.

    Raises:
        InputError: the file is missing, or lacks a field.
    """
    if path is None:
        return preference_prompt(weighted=version == 2)
    text = read_text(Path(path), what="the judge's prompt")
    made = Prompt(Path(path).stem, text, None, "identifier" if version == 2 else "ranking")
    if missing := [field for field in _FIELDS if field not in made.fields]:
        raise InputError(
            f"the prompt lacks {{{missing[0]}}}",
            where=path,
            expected=", ".join(f"{{{field}}}" for field in _FIELDS),
            do="use upstream's prompt file, or leave prompt out for our own words",
        )
    return made
