"""`dominie check`: checks everything in a recipe that needs no training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dominie.core.display import Display
from dominie.core.errors import OutOfReach
from dominie.data.conversations import read_conversations
from dominie.data.row_store import Row
from dominie.data.rows import Summary
from dominie.planning.plan import Plan, machine, plan_recipe
from dominie.planning.plan_output import as_json
from dominie.recipe import Recipe
from dominie.stages.prepare import Preparation
from dominie.stages.run_folder import RunFolder
from dominie.stages.stage_kind import Prepared
from dominie.workflows.offline import Hidden, hidden_parts, visible_part

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from dominie.data.conversations import Conversation

#: Characters of a span that are shown; of a longer one its two ends.
_SHOWN = 400
_MARKS = "⟦", "⟧"


@dataclass(frozen=True)
class Sample:
    """A tokenised conversation as text.

    Attributes:
        source: it comes from.
        split: it lies in.
        stage: whose tokenizer and length were used; empty if none can be reached.
        tokens: in it; 0 if it is not tokenised.
        supervised: tokens of it that are trained on.
        spans: its text in order, in pieces, and whether each is trained on.
    """

    source: str
    split: str
    stage: str
    tokens: int
    supervised: int
    spans: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        """The whole conversation, with the trained text between ⟦ and ⟧."""
        return "".join(_MARKS[0] + t + _MARKS[1] if on else t for t, on in self.spans)


def samples(prepared: Sequence[Prepared]) -> dict[str, Sample]:
    """Show the first conversation of every source, tokenised for the first stage that reads it."""
    found: dict[str, Sample] = {}
    for stage in prepared:
        for name, source in stage.sources.items():
            for split in ("train", "validation", "test"):
                if name not in found and len(rows := getattr(source, split)):
                    found[name] = sample(name, split, stage.name, stage.tokenizer, rows[0])
    return found


def sample(source: str, split: str, stage: str, tokenizer: Any, row: Row) -> Sample:
    """Decode a row, span by span."""
    ids, flags = row.input_ids.tolist(), row.supervised.tolist()
    spans, end, before = [], 0, ""
    for on, members in groupby(flags):
        end += len(list(members))
        # By difference, since a tokenizer may drop the space that a piece of its own begins with.
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        spans.append((text[len(before) :], bool(on)))
        before = text
    return Sample(source, split, stage, len(ids), sum(flags), tuple(spans))


def untokenised(source: str, conversation: Conversation) -> Sample:
    """Show a conversation as text, if no tokenizer for it can be reached."""
    spans: list[tuple[str, bool]] = []
    for message in conversation.messages:
        answers = message["role"] == "assistant"
        spans += [(f"{message['role']}: ", False), (str(message["content"] or ""), answers)]
        spans.append(("\n", False))
    return Sample(source, "", "", 0, 0, tuple(spans[:-1]))


def sample_lines(found: Mapping[str, Sample], console: Console) -> list[Text]:
    """Format samples: in colour on a terminal that has it, else with marks."""
    from rich.text import Text

    coloured = console.color_system is not None and not console.no_color
    lines = []
    for each in found.values():
        how = "in green" if coloured else f"between {_MARKS[0]} and {_MARKS[1]}"
        counted = f"{each.supervised} of {each.tokens} tokens are trained on"
        head = f"{each.source}: {counted if each.tokens else 'what is trained on'}, {how}"
        lines += [Text(""), Text(head)]
        body = Text()
        for text, on in each.spans:
            short = _shortened(text)
            if coloured:
                body.append(short, style="bold green" if on else "dim")
            else:
                body.append(_MARKS[0] + short + _MARKS[1] if on else short)
        lines += [Text("    ") + line for line in body.split("\n", allow_blank=True)]
    return lines


def _shortened(text: str) -> str:
    if len(text) <= _SHOWN:
        return text
    left_out = len(text) - _SHOWN
    return f"{text[: _SHOWN // 2]} … {left_out:,} characters … {text[-_SHOWN // 2 :]}"


@dataclass(frozen=True)
class Checked:
    """The result of a check; errors are raised instead.

    Attributes:
        recipe: what was checked.
        stages: those that can run, in the order in which they do.
        sources: what becomes of the conversations of each source.
        samples: a conversation of each source, tokenised.
        plan: memory and time of each stage on this machine; None if it could not be made.
        not_checked: what is on a hub that cannot be reached, or not made yet; and why.
    """

    recipe: Recipe
    stages: tuple[str, ...]
    sources: Mapping[str, Summary]
    samples: Mapping[str, Sample]
    plan: Plan | None
    not_checked: tuple[tuple[str, str], ...]

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        planned = None if self.plan is None else as_json(self.plan)
        return {
            "recipe": self.recipe.name,
            "stages": list(self.stages),
            "sources": {
                name: dataclasses.asdict(summary) for name, summary in self.sources.items()
            },
            "samples": {
                name: {"text": s.text, "tokens": s.tokens, "supervised_tokens": s.supervised}
                for name, s in self.samples.items()
            },
            "plan": planned,
            "not_checked": [{"what": what, "why": why} for what, why in self.not_checked],
        }


def check_recipe(recipe: Recipe, runs: Path, display: Display | None = None) -> Checked:
    """Read all data through all templates, compare tokenizers, plan memory and time.

    Nothing is trained. What lies on a hub that cannot be reached is listed in `not_checked`, and
    everything else is checked without it.

    Args:
        runs: the folder of all runs; tokenised rows are kept there for the run.

    Raises:
        InputError: whatever a run would stop at for the user's input.
    """
    display = display or Display()
    whole = RunFolder(recipe, runs)
    with whole.locked():
        hidden = hidden_parts(whole)
        part = visible_part(recipe, hidden)
        prepared = Preparation(RunFolder(part, runs), display).all()
        sources = {
            name: source.summary for stage in prepared for name, source in stage.sources.items()
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
            not_checked=(*hidden.as_lines(), *_not_made(whole, part, sources), *unplanned),
        )
    _show(checked, hidden, prepared, display)
    return checked


def _read(folder: RunFolder, name: str, display: Display) -> Sample:
    """Read a source without a tokenizer, if no stage that reads it could be prepared."""
    conversations = read_conversations(folder.source(name))
    first = next(conversations)  # an empty source was refused
    rows = 1 + sum(1 for _ in conversations)
    display.line(f"{name}: {rows:,} conversations can be read; not tokenised")
    return untokenised(name, first)


def _not_made(
    folder: RunFolder, recipe: Recipe, read: Mapping[str, Summary]
) -> list[tuple[str, str]]:
    """List the data that stages have not made yet."""
    return [
        (f"source {name}", f"stage {name} makes it, and has not been run")
        for name in recipe.made
        if name not in read
        and (
            any(name in stage.sources for stage in recipe.stages.values())
            or not (folder.stage(name) / "data").is_dir()
        )
    ]


def _planned(recipe: Recipe) -> tuple[Plan | None, list[tuple[str, str]]]:
    """Plan for this machine; else the reason why there is no plan."""
    if not recipe.stages:
        return None, []
    try:
        return plan_recipe(recipe, machine()), []
    except OutOfReach as error:
        return None, [("memory and time", f"no configuration of {error.where} is here")]


def _show(checked: Checked, hidden: Hidden, prepared: list[Prepared], display: Display) -> None:
    for text in sample_lines(checked.samples, display.console):
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
    """Format a line for each stage; `dominie plan` shows the rest."""
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
