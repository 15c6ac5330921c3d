"""Puts a first recipe together and writes it, with two small files of examples."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dominie.errors import InputError
from dominie.starting import blocks
from dominie.toyworld import materialise

#: Rows of each example file.
ROWS = 600


@dataclass(frozen=True)
class Template:
    """A first recipe: what it is for, its sources, its stages, and from whom KD or DAE starts."""

    purpose: str
    sources: tuple[str, ...]
    stages: tuple[str, ...]
    starts_from: str = "small"


TEMPLATES: Mapping[str, Template] = {
    "kd": Template(
        "Knowledge distillation: a small model learns from a large one.",
        ("general",),
        ("taught", "distill"),
    ),
    "kd-dae": Template(
        "The whole method: distillation, then a domain without forgetting (KD, expert, DAE).",
        ("general", "domain"),
        ("taught", "distill", "expert", "align"),
    ),
    "dae": Template(
        "Domain Alignment from Expert: your model learns a domain and forgets nothing.",
        ("general", "domain"),
        ("expert", "align"),
    ),
    "2x7b": Template(
        "The whole method, its student a mixture of two experts.",
        ("general", "domain"),
        ("taught", "pair", "distill", "expert", "align"),
        starts_from="pair",
    ),
}


def start(folder: Path, template: str) -> list[Path]:
    """Write `recipe.yaml` and its example data into a folder.

    Args:
        folder: made if it is not there.
        template: a name of `TEMPLATES`.

    Returns:
        What was written.

    Raises:
        InputError: no such template, a file that is already there, or a folder that cannot be
            written.
    """
    if template not in TEMPLATES:
        raise InputError(
            "no such template",
            where="--template",
            expected=f"one of {', '.join(TEMPLATES)}",
            found=template,
        )
    wanted = TEMPLATES[template]
    recipe = folder / "recipe.yaml"
    data = {source: folder / f"{source}.jsonl" for source in wanted.sources}
    for path in (recipe, *data.values()):
        if path.exists():
            raise InputError(
                "there is a file already, and it is not overwritten",
                where=str(path),
                do="name another folder, or move the file away",
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".starting-", dir=folder) as scratch:
            for source, path in data.items():
                materialise(f"toyworld:{source}?rows={ROWS}", Path(scratch)).rename(path)
        recipe.write_text(recipe_text(wanted, name=_run_name(folder)), encoding="utf-8")
    except OSError as error:
        raise InputError(
            "the folder cannot be written", where=str(folder), found=error.strerror
        ) from None
    return [recipe, *data.values()]


def recipe_text(template: Template, *, name: str) -> str:
    """The YAML of a template."""
    with_teacher = "taught" in template.stages
    student = "distill" if "distill" in template.stages else template.starts_from
    models = dict.fromkeys([template.starts_from, *template.stages])
    told = ", ".join(f"{name}: {name}" for name in models)
    stages = (
        blocks.STAGES[stage].replace(
            "STUDENT", template.starts_from if stage == "distill" else student
        )
        for stage in template.stages
    )
    parts = (
        [blocks.HEAD.format(purpose=template.purpose, name=name), blocks.MODELS],
        [blocks.TEACHER_MODEL] if with_teacher else [],
        [blocks.DATA, *(blocks.SOURCES[source] for source in template.sources), blocks.TRAIN],
        ["\n".join(stages)],
        [blocks.EVALUATE.replace("MODELS", told)],
        [blocks.TASKS[source] for source in template.sources],
    )
    return "".join(itertools.chain(*parts))


def _run_name(folder: Path) -> str:
    """A run's name after the folder's, where that can be one."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._")
    return name or "first"
