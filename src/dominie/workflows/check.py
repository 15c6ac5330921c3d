"""`dominie check`: checks everything in a recipe that needs no training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dominie.core.display import Display
from dominie.core.errors import OutOfReach
from dominie.data.conversations import read_conversations
from dominie.data.row_store import Row, Rows
from dominie.data.rows import PreparedSource, Summary
from dominie.data.sources import SPLITS
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
    from dominie.training.source_weights import Shares

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
        which: of the rows of its source; empty if it is shown alone.
    """

    source: str
    split: str
    stage: str
    tokens: int
    supervised: int
    spans: tuple[tuple[str, bool], ...]
    which: str = ""

    @property
    def text(self) -> str:
        """The whole conversation, with the trained text between ⟦ and ⟧."""
        return "".join(_MARKS[0] + t + _MARKS[1] if on else t for t, on in self.spans)


def samples(prepared: Sequence[Prepared]) -> dict[str, list[Sample]]:
    """Show rows of every source, tokenised for the first stage that reads it.

    They are the shortest, the longest, and the first with tools or thoughts: what templates and
    `max_length` do to data shows there.
    """
    found: dict[str, list[Sample]] = {}
    for stage in prepared:
        for name, source in stage.sources.items():
            if name not in found and (chosen := _chosen(source)):
                found[name] = [
                    sample(name, split, stage.name, stage.tokenizer, rows[number], which)
                    for which, split, rows, number in chosen
                ]
    return found


def _chosen(source: PreparedSource) -> list[tuple[str, str, Rows, int]]:
    """Of each row to show: what is special about it, its split, the rows and its number."""
    by_split = [(split, getattr(source, split)) for split in SPLITS]
    all_rows = [(split, rows) for split, rows in by_split if len(rows)]
    if not all_rows:
        return []
    least = [int(rows.lengths.argmin()) for _, rows in all_rows]
    most = [int(rows.lengths.argmax()) for _, rows in all_rows]
    short = min(range(len(least)), key=lambda i: all_rows[i][1].lengths[least[i]])
    long = max(range(len(most)), key=lambda i: all_rows[i][1].lengths[most[i]])
    picked = [("the shortest", *all_rows[short], least[short])]
    picked.append(("the longest", *all_rows[long], most[long]))
    if source.rich is not None:
        split, number = source.rich
        picked.append(("with tools or thoughts", split, getattr(source, split), number))
    places = dict.fromkeys((split, number) for _, split, _, number in picked)
    if len(places) == 1:
        return [("", *picked[0][1:])]
    return [next(each for each in picked if (each[1], each[3]) == place) for place in places]


def sample(
    source: str, split: str, stage: str, tokenizer: Any, row: Row, which: str = ""
) -> Sample:
    """Decode a row, span by span."""
    ids, flags = row.input_ids.tolist(), row.supervised.tolist()

    def decoded(start: int, end: int) -> str:
        return str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))

    spans, before, start = [], 0, 0
    for on, members in groupby(flags):
        end = start + len(list(members))
        # By difference, since a tokenizer may drop the space that a piece of its own begins with.
        text = decoded(before, end)
        spans.append((text[len(decoded(before, start)) :] if start else text, bool(on)))
        before, start = start, end
    return Sample(source, split, stage, len(ids), sum(flags), tuple(spans), which)


def untokenised(source: str, conversation: Conversation, which: str = "") -> Sample:
    """Show a conversation as text, if no tokenizer for it can be reached."""
    spans: list[tuple[str, bool]] = []
    for message in conversation.messages:
        answers = message["role"] == "assistant"
        spans += [(f"{message['role']}: ", False), (str(message["content"] or ""), answers)]
        spans.append(("\n", False))
    return Sample(source, "", "", 0, 0, tuple(spans[:-1]), which)


def sample_lines(found: Mapping[str, Sequence[Sample]], console: Console) -> list[Text]:
    """Format samples: in colour on a terminal that has it, else with marks."""
    from rich.text import Text

    coloured = console.color_system is not None and not console.no_color
    lines = []
    for each in chain.from_iterable(found.values()):
        how = "in green" if coloured else f"between {_MARKS[0]} and {_MARKS[1]}"
        counted = f"{each.supervised} of {each.tokens} tokens are trained on"
        name = f"{each.source}, {each.which}" if each.which else each.source
        head = f"{name}: {counted if each.tokens else 'what is trained on'}, {how}"
        lines += [Text(""), Text(head)]
        body = Text()
        for text, on in each.spans:
            if coloured:
                body.append(text, style="bold green" if on else "dim")
            else:
                body.append(_MARKS[0] + text + _MARKS[1] if on else text)
        lines += [Text("    ") + line for line in body.split("\n", allow_blank=True)]
    return lines


@dataclass(frozen=True)
class Checked:
    """The result of a check; errors are raised instead.

    Attributes:
        recipe: what was checked.
        stages: those that can run, in the order in which they do.
        sources: what becomes of the conversations of each source.
        samples: conversations of each source, tokenised: the shortest, the longest, a rich one.
        shares: of the sources of each stage that mixes some, as they will come out.
        plan: memory and time of each stage on this machine; None if it could not be made.
        not_checked: what is on a hub that cannot be reached, or not made yet; and why.
    """

    recipe: Recipe
    stages: tuple[str, ...]
    sources: Mapping[str, Summary]
    samples: Mapping[str, Sequence[Sample]]
    shares: Mapping[str, Sequence[Shares]]
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
                name: [
                    {
                        "which": s.which,
                        "text": s.text,
                        "tokens": s.tokens,
                        "supervised_tokens": s.supervised,
                    }
                    for s in shown
                ]
                for name, shown in self.samples.items()
            },
            "shares": {
                stage: [dataclasses.asdict(each) for each in shares]
                for stage, shares in self.shares.items()
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
        preparation = Preparation(RunFolder(part, runs), display)
        prepared = preparation.all()
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
            shares=preparation.shares,
            plan=plan,
            not_checked=(*hidden.as_lines(), *_not_made(whole, part, sources), *unplanned),
        )
    _show(checked, hidden, prepared, display)
    return checked


def _read(folder: RunFolder, name: str, display: Display) -> list[Sample]:
    """Read a source without a tokenizer, if no stage that reads it could be prepared."""
    count = 0
    picked: dict[str, tuple[int, Conversation]] = {}
    for count, each in enumerate(read_conversations(folder.source(name)), 1):
        length = sum(len(message["content"]) for message in each.messages)
        if count == 1 or length < picked["the shortest"][0]:
            picked["the shortest"] = length, each
        if count == 1 or length > picked["the longest"][0]:
            picked["the longest"] = length, each
    display.line(f"{name}: {count:,} conversations can be read; not tokenised")
    if not picked:  # `where` chooses none
        return []
    if picked["the shortest"][1] is picked["the longest"][1]:
        return [untokenised(name, picked["the longest"][1])]
    return [untokenised(name, each, which) for which, (_, each) in picked.items()]


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
