"""Checks a recipe: its models and data, templates and tokenizers, memory and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dominie.checking.reach import Hidden, hidden_parts, visible_part
from dominie.checking.samples import Sample, samples, shown, untokenised
from dominie.data.conversations import read_conversations
from dominie.data.rows import Summary
from dominie.display import Display
from dominie.errors import OutOfReach
from dominie.planning.plan import Plan, machine, plan_recipe
from dominie.planning.printing import as_json
from dominie.recipe import Recipe
from dominie.running.folder import RunFolder
from dominie.running.preparation import prepare_stages
from dominie.running.prepared import Prepared, PreparedTraining


@dataclass(frozen=True)
class Checked:
    """What a check came to; what is wrong is raised, not returned.

    Attributes:
        recipe: what was checked.
        stages: those that can run, in the order in which they do.
        sources: what becomes of the conversations of each source.
        samples: a conversation of each source, tokenised.
        plan: memory and time of each stage on this machine; None where it could not be made.
        not_checked: what a hub that could not be reached hides, and why.
    """

    recipe: Recipe
    stages: tuple[str, ...]
    sources: Mapping[str, Summary]
    samples: Mapping[str, Sample]
    plan: Plan | None
    not_checked: tuple[tuple[str, str], ...]

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        planned = None if self.plan is None else as_json(self.plan)
        return {
            "recipe": self.recipe.name,
            "stages": list(self.stages),
            "sources": {name: vars(summary) for name, summary in self.sources.items()},
            "samples": {
                name: {
                    "text": each.text,
                    "tokens": each.tokens,
                    "supervised_tokens": each.supervised,
                }
                for name, each in self.samples.items()
            },
            "plan": planned,
            "not_checked": [{"what": what, "why": why} for what, why in self.not_checked],
        }


def check_recipe(recipe: Recipe, runs: Path, display: Display | None = None) -> Checked:
    """Read all data through all templates, compare tokenizers, plan memory and time.

    Nothing is trained. What lies on a hub that cannot be reached is listed in `not_checked`, and
    everything else is checked without it.

    Args:
        recipe: what to check.
        runs: the folder of all runs; tokenised rows are kept there for the run.
        display: shows progress, the samples and the rest.

    Raises:
        InputError: whatever a run would stop at for the user's input.
    """
    display = display or Display()
    whole = RunFolder(recipe, runs)
    with whole.held():
        hidden = hidden_parts(whole)
        part = visible_part(recipe, hidden)
        prepared = prepare_stages(RunFolder(part, runs), display)
        trained = [stage for stage in prepared if isinstance(stage, PreparedTraining)]
        sources = {
            name: source.summary for stage in trained for name, source in stage.sources.items()
        }
        examples = samples(prepared)
        for name in part.data:
            if name not in sources:
                examples[name] = _read(whole, name, display)
        plan, unplanned = _planned(recipe)
        checked = Checked(
            recipe=recipe,
            stages=tuple(stage.name for stage in prepared),
            sources=sources,
            samples=examples,
            plan=plan,
            not_checked=(*hidden.told(), *unplanned),
        )
    _show(checked, hidden, prepared, display)
    return checked


def _read(folder: RunFolder, name: str, display: Display) -> Sample:
    """Read a source that no stage could be prepared for, as far as it goes without a tokenizer."""
    conversations = read_conversations(folder.source(name))
    first = next(conversations)  # an empty source was refused
    rows = 1 + sum(1 for _ in conversations)
    display.line(f"{name}: {rows:,} conversations can be read; not tokenised")
    return untokenised(name, first)


def _planned(recipe: Recipe) -> tuple[Plan | None, list[tuple[str, str]]]:
    """The plan for this machine; else why there is none."""
    if not recipe.stages:
        return None, []
    try:
        return plan_recipe(recipe, machine()), []
    except OutOfReach as error:
        return None, [("memory and time", f"no configuration of {error.where} is here")]


def _show(checked: Checked, hidden: Hidden, prepared: list[Prepared], display: Display) -> None:
    for text in shown(checked.samples, display.console):
        display.console.print(text)
    display.line("")
    if checked.plan is not None:
        for line in _plan_lines(checked.plan):
            display.line(line)
        display.line("")
    if checked.not_checked:
        display.line("not checked:")
        for what, why in checked.not_checked:
            display.line(f"  {what}: {why}")
    count, all_of = len(prepared), len(checked.recipe.stages)
    if hidden.stages:
        display.line(
            f"{checked.recipe.name}: nothing wrong was found in what could be checked; that is "
            f"{count} of {all_of} stages"
        )
    else:
        display.done(checked.recipe.name, f"{count} stage{'' if count == 1 else 's'} can run")


def _plan_lines(plan: Plan) -> list[str]:
    """A line a stage; `dominie plan` has the rest."""
    on = plan.machine
    lines = [f"memory and time on this machine, {on.device.name} of {on.memory / 1e9:.0f} GB:"]
    width = max(map(len, plan.stages))
    for name, stage in plan.stages.items():
        hours = stage.cost.hours if stage.cost else 0.0
        fits = "" if stage.fits else "  DOES NOT FIT; see dominie plan, for other machines too"
        lines.append(f"  {name:<{width}}  {stage.peak / 1e9:8.2f} GB  {_duration(hours):>8}{fits}")
    return lines


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return "<1 min"
    return f"{60 * hours:.0f} min" if hours < 1.5 else f"{hours:,.1f} h"
