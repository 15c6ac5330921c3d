"""Conversations: what every source becomes, whatever the format of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dominie.core.errors import InputError
from dominie.data.formats import Conversation, parsed_row
from dominie.data.readers import raw_rows

__all__ = ["Conversation", "read_conversations"]

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dominie.data.sources import Source

FAULTS_SHOWN = 5
"""So many bad rows are named at once, that a file need not be mended one run at a time."""


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
            conversation = parsed_row(row, where)
        except InputError as error:
            yield error
        else:
            if all(conversation.fields.get(k) == v for k, v in (source.where or {}).items()):
                yield conversation


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
