"""Conversations: what every source becomes, whatever the format of its rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dominie.core.errors import InputError
from dominie.data.formats import Field, Message, parsed_row
from dominie.data.readers import raw_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dominie.data.sources import Source

FAULTS_SHOWN = 5
"""So many bad rows are named at once, that a file need not be mended one run at a time."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation with at least one assistant turn.

    Args:
        messages: in order, each with `role` (system, user, assistant or tool), `content` (text) and
            whatever else the row gave it, `tool_calls` say.
        tools: JSON schemas of the tools on offer, or None.
        where: the file and line it was read from.
        fields: the remaining columns that hold one value, such as `family`, or a list of them.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    where: str = ""
    fields: dict[str, Field] = field(default_factory=dict)

    @property
    def last_answer(self) -> int:
        """Where the last assistant turn stands among the messages."""
        return max(i for i, m in enumerate(self.messages) if m["role"] == "assistant")

    @property
    def answer(self) -> str:
        """The text of the last assistant turn."""
        return str(self.messages[self.last_answer]["content"])


def read_conversations(source: Source) -> Iterator[Conversation]:
    """The conversations of a source in order, streamed: a file is never held in memory.

    Raises:
        InputError: at the first row that cannot be read, naming also the bad rows that follow it
            up to `FAULTS_SHOWN`; or for a file that cannot be read at all.
    """
    results = _results(source)
    for result in results:
        if isinstance(result, InputError):
            raise _with_further_faults(result, results)
        yield result


def _results(source: Source) -> Iterator[Conversation | InputError]:
    for where, row in raw_rows(source):
        if isinstance(row, InputError):
            yield row
            continue
        try:
            messages, tools, fields = parsed_row(row, where)
        except InputError as error:
            yield error
        else:
            if all(fields.get(key) == value for key, value in (source.where or {}).items()):
                yield Conversation(messages, tools, where, fields)


def _with_further_faults(
    first: InputError, rest: Iterator[Conversation | InputError]
) -> InputError:
    """The first fault, with the places of those that follow."""
    further: list[InputError] = []
    try:
        for result in rest:
            if isinstance(result, InputError):
                further.append(result)
            if len(further) == FAULTS_SHOWN:
                break
    except InputError as error:
        further.append(error)
    if not further:
        return first
    shown = further[: FAULTS_SHOWN - 1]
    if all(error.what == first.what for error in shown):  # a file of another layout, mostly
        also = f"the same in {', '.join(Path(str(error.where)).name for error in shown)}"
    else:
        also = "also at fault: " + "; ".join(f"{error.where} ({error.what})" for error in shown)
    more = ", and more" if len(further) == FAULTS_SHOWN else ""
    return InputError(
        first.what,
        where=first.where,
        expected=first.expected,
        found=first.found,
        do=f"{first.do or 'correct this row'}; {also}{more}",
    )
