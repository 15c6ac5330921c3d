"""A conversation of each source as the student will see it, with what it is trained on marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from dominie.data.store import Row
from dominie.running.prepared import Prepared, PreparedTraining

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
        stage: whose tokenizer and length it was made with; empty where none can be reached.
        tokens: in it; 0 where it is not tokenised.
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
        """The whole conversation, what is trained on between ⟦ and ⟧."""
        return "".join(_MARKS[0] + t + _MARKS[1] if on else t for t, on in self.spans)


def samples(prepared: Sequence[Prepared]) -> dict[str, Sample]:
    """The first conversation of every source, as the first stage that reads it has it."""
    found: dict[str, Sample] = {}
    for stage in prepared:
        if not isinstance(stage, PreparedTraining):
            continue
        for name, source in stage.sources.items():
            for split in ("train", "validation", "test"):
                if name not in found and len(rows := getattr(source, split)):
                    found[name] = sample(name, split, stage.name, stage.tokenizer, rows[0])
    return found


def sample(source: str, split: str, stage: str, tokenizer: Any, row: Row) -> Sample:
    """A row as text."""
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
    """A conversation of which only the text is known: no tokenizer for it can be reached."""
    spans: list[tuple[str, bool]] = []
    for message in conversation.messages:
        answers = message["role"] == "assistant"
        spans += [(f"{message['role']}: ", False), (str(message["content"] or ""), answers)]
        spans.append(("\n", False))
    return Sample(source, "", "", 0, 0, tuple(spans[:-1]))


def shown(found: Mapping[str, Sample], console: Console) -> list[Text]:
    """Samples for a person: in colour on a terminal that has it, with marks elsewhere."""
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
