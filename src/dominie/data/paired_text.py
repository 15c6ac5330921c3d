"""A conversation in the tokens of two models, and the spans of its text that both can be asked for.

Each model sees the conversation in its own chat template, so that only what the assistant says has
the same bytes on both sides. Those are laid end to end, each turn followed by `END` for the token
that ends it and by `GAP`, and of every token it is known where it ends among them. Where a token of
either side ends at the same byte, both models have read the same text: what they predict there can
be compared. (The chunks of ALM, arXiv 2503.20083.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dominie.data.token_bytes import END, TokenBytes
from dominie.data.tokenization import Tokenised, tokenised

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from dominie.data.chat_template import Span
    from dominie.data.formats import Conversation

    Numbers = NDArray[np.int64]

GAP = b"\xfe"
"""Stands between two turns; no byte of UTF-8."""
_SPACE = b" \t\n\r\x0b\x0c"
_OUTSIDE = -1


@dataclass(frozen=True, eq=False)
class Paired:
    """A conversation in the tokens of a student and of its teacher.

    Attributes:
        text: what the assistant says, turn by turn: its bytes, `END`, `GAP`.
        student_ends: [n_s] the byte of `text` at which each token of the student ends: of those
            before a turn, the last one ends where the turn begins; −1 of those that lie outside,
            or whose end is not known.
        teacher_ids: [n_t] the conversation in the teacher's tokens, as far as it is needed.
        teacher_ends: [n_t] as `student_ends`.
    """

    text: bytes
    student_ends: NDArray[np.int32]
    teacher_ids: NDArray[np.int32]
    teacher_ends: NDArray[np.int32]

    def first(self, count: int | None) -> Paired:
        """The pair with so many of the teacher's tokens at most."""
        return replace(
            self, teacher_ids=self.teacher_ids[:count], teacher_ends=self.teacher_ends[:count]
        )


def paired(
    conversations: Sequence[Conversation],
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    tables: tuple[TokenBytes, TokenBytes],
) -> list[tuple[Tokenised, Paired]]:
    """Tokenise conversations for both models, and find where their tokens end.

    Args:
        conversations: whole ones.
        student: fast tokenizer with a chat template.
        teacher: likewise.
        tables: the bytes of the student's tokens and of the teacher's.

    Returns:
        Of each the student's tokens, and the pair.

    Raises:
        InputError: as `encode` does, for either tokenizer.
    """
    ours, theirs = tokenised(student, conversations), tokenised(teacher, conversations)
    return [(one, pair(one, other, *tables)) for one, other in zip(ours, theirs, strict=True)]


def pair(ours: Tokenised, theirs: Tokenised, student: TokenBytes, teacher: TokenBytes) -> Paired:
    """The pair of one conversation that was tokenised for both models.

    Where their templates mark different numbers of turns, nothing is paired.
    """
    sides = [_Side(ours, student), _Side(theirs, teacher)]
    text = bytearray()
    if len(ours.spans) == len(theirs.spans):
        for one, other in zip(*(map(side.turn, side.tokens.spans) for side in sides), strict=True):
            if (shared := _shared(one.text, other.text)) is None:
                continue
            start, length = shared
            content = one.text[start[0] : start[0] + length].encode()
            for side, turn, first in zip(sides, (one, other), start, strict=True):
                side.place(turn, first, length, base=len(text))
            text += content + END + GAP
    needed = np.flatnonzero(sides[1].ends >= 0)
    until = int(needed[-1]) + 2 if len(needed) else 0  # with what follows the last one
    return Paired(
        bytes(text),
        sides[0].ends,
        np.asarray(theirs.input_ids[:until], np.int32),
        sides[1].ends[:until],
    )


class _Turn(NamedTuple):
    """What is said in a turn, without the token that ends it.

    Attributes:
        text: of it.
        start: character of the rendering at which it begins.
        end_token: index of the token that ends it; None if none does.
    """

    text: str
    start: int
    end_token: int | None


class _Side:
    """A conversation in one model's tokens, whose ends are filled in turn by turn."""

    def __init__(self, tokens: Tokenised, table: TokenBytes) -> None:
        self.tokens, self.table = tokens, table
        begins, ends = np.asarray(tokens.offsets, np.int64).reshape(-1, 2).T
        self._begins, self._ends = np.maximum.accumulate(begins), np.maximum.accumulate(ends)
        self._ids = np.asarray(tokens.input_ids, np.int64)
        self.ends = np.full(len(self._ids), _OUTSIDE, np.int32)

    def turn(self, span: Span) -> _Turn:
        start, stop = span
        last = int(np.searchsorted(self._begins, stop)) - 1
        if last >= 0 and self._begins[last] >= start and self.table.of[self._ids[last]] == END:
            return _Turn(self.tokens.text[start : self._begins[last]], start, last)
        return _Turn(self.tokens.text[start:stop], start, None)

    def place(self, turn: _Turn, first: int, length: int, *, base: int) -> None:
        """Fill in where the tokens of a turn end.

        Args:
            turn: of this side.
            first: character of its text at which the shared text begins.
            length: characters of that.
            base: its byte in the text of the pair.
        """
        start = turn.start + first
        stop = start + length
        content = self.tokens.text[start:stop]
        low = int(np.searchsorted(self._ends, start, "right"))
        high = int(np.searchsorted(self._begins, stop))
        if turn.end_token is not None:
            high = min(high, turn.end_token)
        size = _byte_places(content)
        if low < high:
            # A token that goes on behind the text ends outside of it.
            inside = self._ends[low:high] <= stop
            places = size[np.minimum(self._ends[low:high], stop) - start] + base
            known = self._within_characters(low, high, places)
            self.ends[low:high] = np.where(inside & known, places, _OUTSIDE)
        if low and (low >= high or self._begins[low] >= start):
            self.ends[low - 1] = base
        if turn.end_token is not None:
            self.ends[turn.end_token] = base + size[-1] + 1

    def _within_characters(self, low: int, high: int, places: Numbers) -> NDArray[np.bool_]:
        """Correct the ends of tokens inside a character; return which of them are known.

        Of such a token a tokenizer says that it ends with the character, where the next one begins.
        """
        known = np.ones(high - low, np.bool_)
        overlaps = self._begins[low + 1 : high] < self._ends[low : high - 1]
        for index in np.flatnonzero(overlaps)[::-1]:
            following = int(self.table.lengths[self._ids[low + index + 1]])
            places[index] = places[index + 1] - following
            known[index] = following > 0 and known[index + 1]
        before = np.concatenate([[-1], np.maximum.accumulate(places)[:-1]])
        return known & (places > before)


def _byte_places(text: str) -> Numbers:
    """[characters + 1] the byte of the text at which each character begins, and its length."""
    if text.isascii():
        return np.arange(len(text) + 1)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(widths)])


def _shared(one: str, other: str) -> tuple[tuple[int, int], int] | None:
    """Where the text that two turns share begins in each, and its length; None if there is none.

    Templates trim a content, add white space around it, or a mark of thoughts before it.
    """
    if one == other:
        return (0, 0), len(one)
    mine, theirs = one.strip(), other.strip()
    short = min(mine, theirs, key=len)
    if not short or (at := max(mine, theirs, key=len).rfind(short)) < 0:
        return None
    starts = [len(text) - len(text.lstrip()) for text in (one, other)]
    starts[int(len(theirs) > len(mine))] += at
    return (starts[0], starts[1]), len(short)


class Chunks(NamedTuple):
    """The shortest stretches of text between bytes at which tokens of both sides end.

    Attributes:
        first: [C] index of the student's token that a chunk begins with.
        last: [C] of the one that it ends with.
        teacher_first: [C] the same of the teacher's.
        teacher_last: [C].
        through: [C] the teacher's token with which it has written all of the student's first one.
        exact: [C] whether the tokens of both sides have just the bytes of the text. Normalisers
            and the white space that words imply change them.
        space: [C] whether it is nothing but white space.
        ends_turn: [C] whether it is the token that ends a turn.
    """

    first: Numbers
    last: Numbers
    teacher_first: Numbers
    teacher_last: Numbers
    through: Numbers
    exact: NDArray[np.bool_]
    space: NDArray[np.bool_]
    ends_turn: NDArray[np.bool_]

    def where(self, chosen: NDArray[np.bool_]) -> Chunks:
        """Those of them."""
        columns: Any = (column[chosen] for column in self)
        return Chunks(*columns)


def chunks_of(
    both: Paired,
    student_ids: NDArray[np.integer[Any]],
    supervised: NDArray[np.bool_],
    student: TokenBytes,
    teacher: TokenBytes,
) -> Chunks:
    """The chunks of a conversation whose tokens are all supervised.

    Args:
        both: the conversation.
        student_ids: [n_s] in the student's tokens; may be shorter than the pair, never longer.
        supervised: [n_s] which of them are trained on.
        student: the bytes of its tokens.
        teacher: of the teacher's.
    """
    ends = both.student_ends[: len(student_ids)]
    ours, theirs = np.flatnonzero(ends >= 0), np.flatnonzero(both.teacher_ends >= 0)
    cuts, at, other = np.intersect1d(
        ends[ours], both.teacher_ends[theirs], assume_unique=True, return_indices=True
    )
    at, other = ours[at], theirs[other]
    text = np.frombuffer(both.text, np.uint8)
    begin, stop = cuts[:-1].astype(np.int64), cuts[1:].astype(np.int64)
    first, last, teacher_first, teacher_last = at[:-1] + 1, at[1:], other[:-1] + 1, other[1:]
    trained = _sums(supervised)
    chosen = trained[last + 1] - trained[first] == last + 1 - first
    chosen &= _between(text == GAP[0], begin, stop) == 0
    chosen &= (last >= first) & (teacher_last >= teacher_first)
    begin, stop = begin[chosen], stop[chosen]
    first, last = first[chosen], last[chosen]
    teacher_first, teacher_last = teacher_first[chosen], teacher_last[chosen]
    exact = _spells(text, begin, stop, student_ids, first, last, student)
    exact &= _spells(text, begin, stop, both.teacher_ids, teacher_first, teacher_last, teacher)
    written = _sums(teacher.lengths[both.teacher_ids])
    wanted = written[teacher_first] + student.lengths[student_ids[first]]
    through = np.minimum(np.searchsorted(written, wanted) - 1, teacher_last)
    blank = np.isin(text, np.frombuffer(_SPACE, np.uint8))
    return Chunks(
        first,
        last,
        teacher_first,
        teacher_last,
        np.maximum(through, teacher_first),
        exact,
        _between(~blank, begin, stop) == 0,
        _between(text == END[0], begin, stop) > 0,
    )


def _sums(values: NDArray[Any]) -> Numbers:
    """[n + 1] sums of all values before each place."""
    return np.concatenate([[0], np.cumsum(values, dtype=np.int64)])


def _between(flags: NDArray[np.bool_], begin: Numbers, stop: Numbers) -> Numbers:
    """How many flags are set in each range."""
    before = _sums(flags)
    counted: Numbers = before[stop] - before[begin]
    return counted


def _spells(
    text: NDArray[np.uint8],
    begin: Numbers,
    stop: Numbers,
    ids: NDArray[np.integer[Any]],
    first: Numbers,
    last: Numbers,
    table: TokenBytes,
) -> NDArray[np.bool_]:
    """[C] whether the tokens from `first` to `last` have the bytes from `begin` to `stop`."""
    written = _sums(table.lengths[ids])
    size = stop - begin
    fits = written[last + 1] - written[first] == size
    joined = table.joined(np.asarray(ids, np.int64))
    # Of chunks that fit, each byte beside the one it should be.
    length = np.where(fits, size, 0)
    inside = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
    wrong = (
        joined[np.repeat(written[first], length) + inside]
        != text[np.repeat(begin, length) + inside]
    )
    chunk = np.repeat(np.arange(len(size)), length)
    same: NDArray[np.bool_] = fits & (np.bincount(chunk, wrong, len(size)) == 0)
    return same
