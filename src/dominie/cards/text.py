"""The words of a model card."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dominie.cards.lineage import Lineage, is_private, public_name
from dominie.losses.terms import TERMS, LossTerms
from dominie.recipe import Recipe, Stage, dump_recipe


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
        stage = recipe.stages[name]
        if not isinstance(stage, Stage):
            models = ", ".join(public_name(recipe, model) for model in stage.models)
            rows.append([name, models, stage.kind, "", ""])
            continue
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

    def named(path: str) -> str:
        return path.rstrip("/").rpartition("/")[2] if is_private(path) else path

    replace = dataclasses.replace
    return replace(
        recipe,
        data={
            name: replace(source, path=named(source.path)) for name, source in recipe.data.items()
        },
        models={name: model.located(named) for name, model in recipe.models.items()},
        stages={
            name: _with_cache_named(
                stage.renamed(lambda m: public_name(recipe, m) if "/" in m else m)
            )
            for name, stage in recipe.stages.items()
        },
    )


def _with_cache_named(stage: Any) -> Any:
    cache = getattr(stage, "cache", None)
    if cache is None or cache.folder is None:
        return stage
    folder = cache.folder.rpartition("/")[2]
    return dataclasses.replace(stage, cache=dataclasses.replace(cache, folder=folder))


def _terms(terms: LossTerms) -> str:
    return " + ".join(
        f"{getattr(terms, term).weight:g} {term}" for term in TERMS if terms.weighs(term)
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
