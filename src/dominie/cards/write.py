"""Writes the card of every model that a run has made, and again when it has been scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dominie.cards import text
from dominie.cards.licences import licence_of, warnings
from dominie.cards.lineage import lineage, public_name
from dominie.cards.metadata import metadata
from dominie.files.disk import replace_text
from dominie.models.folders import is_model
from dominie.recipe import Recipe
from dominie.running.folder import RunFolder, read_stage
from dominie.toyworld import is_toyworld

#: A model's scores, its run's baseline, and that one's scores.
_Results = tuple[dict[str, Any], str | None, dict[str, Any]]


def write_cards(folder: RunFolder, *, scored: bool) -> list[Path]:
    """Write `model/README.md` of finished stages.

    A card that somebody has taken over, by removing the line that says who wrote it, stays.

    Args:
        folder: of the run.
        scored: whether `results.json` speaks of the models as they are now: every card is then
            written with its figures. Else those that are missing are, without any.

    Returns:
        The cards that were written.
    """
    written = []
    for name in folder.recipe.stages:
        model = folder.stage(name) / "model"
        if read_stage(folder.stage(name)).get("status") != "done" or not is_model(model):
            continue
        card = model / "README.md"
        found = card.read_text(encoding="utf-8") if card.is_file() else _FORM
        if _FORM in found or (scored and _OURS in found):
            replace_text(card, _card(folder, name, _results(folder, name) if scored else _UNSCORED))
            written.append(card)
    return written


_OURS = "<!-- written by dominie, and again at each run: remove this line to keep your edits -->"
_FORM = "[More Information Needed]"  # in the card that peft leaves to be filled in
_UNSCORED: _Results = ({}, None, {})


def _card(folder: RunFolder, name: str, results: _Results) -> str:
    recipe, record = folder.recipe, read_stage(folder.stage(name))
    ancestry = lineage(recipe, name)
    adapter = (folder.stage(name) / "model" / "adapter_config.json").is_file()
    licences = {
        model: None if _is_toy(recipe, model) else licence_of(recipe.model(model))
        for model in (*ancestry.students, *ancestry.teachers)
    }
    students = [public_name(recipe, student) for student in ancestry.students]
    inherited = licences[ancestry.students[0]]
    teachers = {
        public_name(recipe, model): licences[model]
        for model in (*ancestry.students[1:], *ancestry.teachers)
        if not _is_toy(recipe, model)
    }
    told = warnings(inherited, teachers, students[0])
    if _is_toy(recipe, ancestry.students[0]):
        told = told[1:]  # of a toy model there is nothing to be asked
    own, baseline, theirs = results
    return "".join(
        [
            metadata(recipe, name, ancestry, licence=inherited, adapter=adapter, results=own),
            f"{_OURS}\n\n",
            text.opening(recipe, name, ancestry, adapter),
            text.figures(name, own, baseline, theirs),
            text.making(recipe, ancestry),
            text.data(record) if record.get("data") else "",
            text.losses(record),
            text.usage(adapter),
            text.licence(inherited, students, told),
            text.reproduction(recipe, ancestry, record),
        ]
    )


def _is_toy(recipe: Recipe, model: str) -> bool:
    return is_toyworld(recipe.model(model).path)


def _results(folder: RunFolder, name: str) -> _Results:
    """The scores of a stage's model, the baseline's name and its scores."""
    evaluation = folder.recipe.evaluate
    try:
        found = json.loads((folder.path / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return _UNSCORED
    if evaluation is None:
        return _UNSCORED
    called = next((n for n, model in evaluation.models.items() if model == name), None)
    if called is None or called not in found:
        return _UNSCORED
    baseline = evaluation.baseline or next(iter(found))
    return found[called], None if baseline == called else baseline, found.get(baseline, {})
