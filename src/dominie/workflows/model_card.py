"""The text and the metadata of a model card."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dominie.core.io import write_atomic
from dominie.core.references import Kind, rewritten
from dominie.core.run_reader import read_results, read_stage
from dominie.losses.terms import LossTerms
from dominie.models.spec import is_model
from dominie.recipe import Recipe, dump_recipe
from dominie.stages.run_folder import RunFolder
from dominie.toyworld import is_toyworld
from dominie.workflows import model_card as text
from dominie.workflows.lineage import (
    Lineage,
    hub_id,
    is_private,
    licence_of,
    lineage,
    public_name,
    warnings,
)


def metadata(
    recipe: Recipe,
    name: str,
    ancestry: Lineage,
    *,
    licence: str | None,
    adapter: bool,
    results: Mapping[str, Mapping[str, Any]],
) -> str:
    """The metadata of a stage's model, between its two lines of dashes.

    Args:
        recipe: the resolved recipe.
        name: of the stage.
        ancestry: of its model.
        licence: inherited; None leaves the field out.
        adapter: whether the model is an adapter over another's weights.
        results: by task.
    """
    from huggingface_hub import EvalResult, ModelCardData

    ids = [found for student in ancestry.students if (found := hub_id(recipe, student))]
    fields: dict[str, Any] = {
        "license": licence,
        "base_model": (ids[0] if len(ids) == 1 else ids) or None,
        "base_model_relation": _relation(recipe, name, adapter) if ids else None,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dominie", *_tags(recipe, ancestry)],
        "datasets": _datasets(recipe, ancestry) or None,
    }
    evaluated = [
        EvalResult(
            task_type="text-generation",
            task_name=task,
            dataset_name=_asked(recipe, task),
            dataset_type=_asked(recipe, task).replace(" ", "-"),
            metric_type=str(found.get("metric", "score")),
            metric_value=found["score"],
        )
        for task, found in results.items()
    ]
    if evaluated:
        fields |= {"model_name": f"{recipe.name}-{name}", "eval_results": evaluated}
    return f"---\n{ModelCardData(**fields).to_yaml()}\n---\n"


def _relation(recipe: Recipe, name: str, adapter: bool) -> str:
    if adapter:
        return "adapter"
    return recipe.stages[name].relation


def _tags(recipe: Recipe, ancestry: Lineage) -> list[str]:
    """What was done on the way, in the hub's words."""
    tags = [tag for name in ancestry.stages for tag in recipe.stages[name].hub_tags]
    return list(dict.fromkeys(tags))


def _datasets(recipe: Recipe, ancestry: Lineage) -> list[str]:
    read = [
        recipe.data[source]
        for name in ancestry.stages
        if name in recipe.trained
        for source in recipe.trained[name].active
        if source in recipe.data
    ]
    public = [s.path for s in read if not s.is_local and not s.path.startswith("toyworld:")]
    return list(dict.fromkeys(public))


def _asked(recipe: Recipe, task: str) -> str:
    """Whose questions a task asks."""
    tasks = recipe.evaluate.tasks if recipe.evaluate else {}
    if task in tasks and tasks[task].source:
        return f"{tasks[task].source} {tasks[task].split}"
    return task


def opening(recipe: Recipe, name: str, ancestry: Lineage, adapter: bool) -> str:
    """Title and first sentence: what this is."""
    began = " and ".join(f"`{public_name(recipe, student)}`" for student in ancestry.students)
    kind = "An adapter over" if adapter else "A model that began as"
    taught = [f"`{public_name(recipe, teacher)}`" for teacher in ancestry.teachers]
    learnt = f", and learnt from {' and '.join(taught)}" if taught else ""
    return (
        f"# {recipe.name}: {name}\n\n{kind} {began}{learnt}. It was made by "
        "[dominie](https://arxiv.org/abs/2406.19112), stage "
        f"`{name}` of the run `{recipe.name}`.\n"
    )


def making(recipe: Recipe, ancestry: Lineage) -> str:
    """A row for every stage behind the model."""
    rows = []
    for name in ancestry.stages:
        if name not in recipe.trained:
            read, kind = recipe.stages[name].models, recipe.stages[name].kind
            rows.append(
                [name, ", ".join(public_name(recipe, model) for model in read), kind, "", ""]
            )
            continue
        stage = recipe.trained[name]
        for source in stage.active:
            teacher = stage.teacher_on(source)
            rows.append(
                [
                    name,
                    public_name(recipe, stage.student),
                    f"{source} ({stage.data[source].share:g})",
                    public_name(recipe, teacher) if teacher else "its own labels",
                    _terms(stage.loss_on(source)),
                ]
            )
    return _section(
        "How it was made", _table(["stage", "from", "on (share)", "taught by", "loss"], rows)
    )


def data(record: Mapping[str, Any]) -> str:
    """What the last stage read, kept and used."""
    rows = [
        [
            source,
            *(_count(n.get(key)) for key in ("read", "removed_duplicates", "removed_held_out")),
            *(_count(n.get(key)) for key in ("too_long", "truncated", "train")),
            _percent(n.get("share")),
            _percent(n.get("token_share")),
        ]
        for source, n in record.get("data", {}).items()
    ]
    heads = ["source", "read", "duplicates", "held out elsewhere", "too long", "truncated"]
    heads += ["trained on", "% of conversations", "% of supervised tokens"]
    steps = (
        f"{_count(record.get('steps'))} optimiser steps over "
        f"{_count(record.get('supervised_tokens'))} supervised tokens, in "
        f"{_count(record.get('seconds'))} s.\n"
    )
    return _section("Conversations of the last stage", f"{_table(heads, rows)}\n{steps}")


def losses(record: Mapping[str, Any]) -> str:
    """Where its losses ended on the validation splits; nothing where there were none."""
    final = record.get("final", {}).get("evaluation", {})
    keys = ("loss", "next_token", "divergence", "agreement")
    rows = [
        [source, *(_number(f.get(key)) for key in keys), _count(f.get("tokens"))]
        for source, f in final.items()
    ]
    if not rows:
        return ""
    heads = ["validation split of", "minimised", "next-token loss", "KL to its teacher"]
    heads += ["agreement with it", "tokens"]
    note = "Losses and KL in nats a token.\n"
    return _section("Losses at the end", f"{_table(heads, rows)}\n{note}")


def figures(
    name: str,
    results: Mapping[str, Any],
    baseline: str | None,
    theirs: Mapping[str, Any],
) -> str:
    """Scores with their intervals, beside those of the baseline."""
    if not results:
        return _section("Results", "It has not been evaluated by its run.\n")
    beside = baseline if baseline not in (None, name) and theirs else None
    rows = [
        [task, str(found.get("metric", "")), _score(found), _count(found.get("n"))]
        + ([_score(theirs[task]) if task in theirs else ""] if beside else [])
        for task, found in results.items()
    ]
    heads = ["task", "metric", "this model, %", "questions", *([f"{beside}, %"] if beside else [])]
    note = "With 95 % intervals, resampled by question.\n"
    return _section("Results", f"{_table(heads, rows)}\n{note}")


def usage(adapter: bool) -> str:
    """How to run it with nothing but transformers."""
    if adapter:
        load = 'model = AutoPeftModelForCausalLM.from_pretrained("THIS/MODEL")'
        imports = (
            "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
        )
    else:
        load = 'model = AutoModelForCausalLM.from_pretrained("THIS/MODEL")'
        imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    code = f"""{imports}

{load}
tokenizer = AutoTokenizer.from_pretrained("THIS/MODEL")
chat = [{{"role": "user", "content": "…"}}]
asked = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
written = model.generate(**asked, max_new_tokens=256)
print(tokenizer.decode(written[0, asked["input_ids"].shape[1] :]))
"""
    return _section("Use", f"```python\n{code}```\n")


def licence(inherited: str | None, students: Sequence[str], warnings: Iterable[str]) -> str:
    """Under what it stands, and what to look at before it is published."""
    told = (
        f"`{inherited}`, inherited from {' and '.join(students)}.\n"
        if inherited
        else "None is known.\n"
    )
    listed = "".join(f"\n> **Before you publish:** {warning}\n" for warning in warnings)
    return _section("Licence", told + listed)


def reproduction(recipe: Recipe, ancestry: Lineage, record: Mapping[str, Any]) -> str:
    """Command, versions and the part of the recipe that the model depends on."""
    versions = ", ".join(f"{key} {value}" for key, value in record.get("versions", {}).items())
    part = dataclasses.replace(
        recipe, evaluate=None, stages={stage: recipe.stages[stage] for stage in ancestry.stages}
    )
    text = dump_recipe(_without_places(part))
    return _section(
        "How to make it again",
        f"`dominie run recipe.yaml`, with {versions}. The recipe, resolved:\n\n"
        f"<details><summary>recipe.yaml</summary>\n\n```yaml\n{text}```\n\n</details>\n",
    )


def _without_places(recipe: Recipe) -> Recipe:
    """The recipe with the names of files and folders in place of where they lie."""

    def named(kind: Kind, text: str) -> str:
        if kind == "model":
            return public_name(recipe, text) if "/" in text else text
        is_place = kind == "output" or (kind != "source" and is_private(text))
        return text.rstrip("/").rpartition("/")[2] if is_place else text

    return rewritten(recipe, named)


def _terms(terms: LossTerms) -> str:
    return " + ".join(
        f"{term.weight:g} {name}" for name, term in terms.present.items() if term.weighs
    )


def _section(title: str, body: str) -> str:
    return f"\n## {title}\n\n{body}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _score(found: Mapping[str, Any]) -> str:
    interval = found.get("interval")
    score = f"{100 * found['score']:.1f}"
    return f"{score} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else score


def _count(number: Any) -> str:
    return f"{number:,.0f}" if isinstance(number, int | float) else ""


def _number(number: Any) -> str:
    return f"{number:.3f}" if isinstance(number, int | float) else ""


def _percent(number: Any) -> str:
    return f"{100 * number:.1f}" if isinstance(number, int | float) else ""


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
            write_atomic(card, _card(folder, name, _results(folder, name) if scored else _UNSCORED))
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
    found = read_results(folder.path)
    if evaluation is None:
        return _UNSCORED
    called = next((n for n, model in evaluation.models.items() if model == name), None)
    if called is None or called not in found:
        return _UNSCORED
    baseline = evaluation.baseline or next(iter(found))
    return found[called], None if baseline == called else baseline, found.get(baseline, {})
