"""`dominie rollouts`: the answers that a student wrote in its training, the worst first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from dominie.core.errors import InputError, nearest
from dominie.core.run_reader import found_run
from dominie.training.rollouts import Rollout, RolloutFiles

#: Divergence of a token in nats above which it has the colour.
_COLOURS = ((2.0, "bold white on red"), (0.5, "red"), (0.1, "yellow"))
_PROMPT = 400  # characters of a prompt that are shown, its last ones


@dataclass(frozen=True)
class MarkedAnswer:
    """An answer, and how far its teacher was from the student at each of its tokens.

    Attributes:
        rollout: the answer in tokens.
        divergences: of each token, in nats; empty if no step has learnt from it yet.
    """

    rollout: Rollout
    divergences: Sequence[float]

    @property
    def mean(self) -> float:
        """In nats per token; −1 if nothing is known."""
        return sum(self.divergences) / len(self.divergences) if self.divergences else -1.0


def marked_answers(
    wanted: str, runs: Path, *, step: int | None = None, source: str | None = None
) -> tuple[list[MarkedAnswer], Any]:
    """The answers of a stage, and the tokenizer that they are written in.

    Args:
        wanted: `RUN:STAGE`, the run by its folder or its name in `runs`.
        runs: the folder of all runs.
        step: of the optimiser; None is all that are kept.
        source: whose conversations; None is all.

    Returns:
        Those of the largest mean divergence first.

    Raises:
        InputError: no such run, no such stage in it, or no answer.
    """
    from transformers import AutoTokenizer

    run, colon, stage = wanted.rpartition(":")
    if not colon:
        raise InputError("no stage is named", where=wanted, expected="RUN:STAGE")
    folder = found_run(Path(run), runs)
    files = RolloutFiles(folder / stage / "rollouts")
    answered = sorted(path.parent.name for path in folder.glob("*/rollouts"))
    if stage not in answered:
        near = nearest(stage, answered)
        raise InputError(
            "this stage has no answers of its student",
            where=str(folder / stage),
            expected=", ".join(answered) or "a stage whose sources are on_policy, begun or done",
            do=f"did you mean {near}?" if near else None,
        )
    found = []
    for first in files.steps():
        rollouts = files.read(first)[0].values()
        known = {n: files.divergences(n) for n in {r.key.step for r in rollouts}}
        found += [MarkedAnswer(r, known[r.key.step].get(r.key, ())) for r in rollouts]
    steps = sorted({each.rollout.key.step for each in found})
    chosen = [
        each
        for each in found
        if step in (None, each.rollout.key.step) and source in (None, each.rollout.key.source)
    ]
    if not chosen:
        sources = sorted({each.rollout.key.source for each in found})
        raise InputError(
            "there are no such answers",
            where=str(files.folder),
            expected=f"steps {steps[0]} to {steps[-1]}, sources {', '.join(sources)}"
            if found
            else "files that are whole",
        )
    tokenizer = AutoTokenizer.from_pretrained(files.folder / "tokenizer")
    return sorted(chosen, key=lambda each: (-each.mean, each.rollout.key)), tokenizer


def show_answers(answers: Sequence[MarkedAnswer], tokenizer: Any, console: Console) -> None:
    """Print answers with the tokens at which the teacher disagrees in colour.

    Where there are no colours, a line under each answer names its worst tokens.
    """
    for each in answers:
        console.print(_heading(each), markup=False, style="bold")
        prompt = tokenizer.decode(list(each.rollout.prompt))
        shown = prompt if len(prompt) <= _PROMPT else f"…{prompt[-_PROMPT:]}"
        console.print(shown, markup=False, style="dim")
        text, pieces = Text(), list(_pieces(tokenizer, each.rollout.answer))
        values = [*each.divergences, *[0.0] * (len(pieces) - len(each.divergences))]
        for piece, value in zip(pieces, values, strict=True):
            text.append(piece, style=_style(value))
        console.print(text)
        if each.divergences and not console.color_system:
            worst = sorted(zip(values, pieces, strict=True), key=lambda pair: -pair[0])[:3]
            told = ", ".join(f"{piece!r} {value:.2f}" for value, piece in worst)
            console.print(f"worst: {told}", markup=False, style="dim")
        console.print()


def _style(divergence: float) -> str:
    return next((style for least, style in _COLOURS if divergence >= least), "")


def _heading(answer: MarkedAnswer) -> str:
    key, count = answer.rollout.key, len(answer.rollout.answer)
    mean = f"{answer.mean:.3f} nats per token" if answer.divergences else "not learnt from yet"
    end = "" if answer.rollout.ended else ", cut off"
    return f"step {key.step}  {key.source}[{key.row}]  {mean}  {count} tokens{end}"


def _pieces(tokenizer: Any, ids: Sequence[int]) -> Iterator[str]:
    """The text of each token: what it adds to the text of those before it."""
    before = ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:count]))
        if text.endswith("�") and count < len(ids):  # part of a character
            yield ""
            continue
        yield text[len(before) :] if text.startswith(before) else tokenizer.decode([ids[count - 1]])
        before = text
