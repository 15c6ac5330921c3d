"""A teacher with another tokenizer: reads conversations in its own tokens, answers in a student's.

At each byte of an answer at which tokens of both sides end, the teacher's next-token distribution
is mapped into the student's vocabulary: each of its tokens to the longest token of the student that
it begins with. What the teacher gives to the text that is really there is known better: the product
over the tokens in which it writes the student's next one is moved to that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dominie.data.batch import Batch, Span, collate, to_device
from dominie.data.paired_text import Chunks, Paired, chunks_of
from dominie.data.row_store import Row
from dominie.data.token_bytes import END, Vocabularies
from dominie.losses.spans import MappedPredictions, SpanTarget
from dominie.losses.targets import DenseTarget, Part, Signal, SparseTarget
from dominie.losses.tiles import sum_precision
from dominie.models.head import decoder, output_head
from dominie.models.packed_attention import decoder_inputs
from dominie.teachers.teacher import LocalTeacher

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Numbers = NDArray[np.int64]

TOP = 256
"""Most tokens of a mapped distribution that stand for themselves; the others are its tail."""
_BOUNDARY = b" \t\n\r" + END
_LEAST_BOUNDARY = 0.1
"""Chunks behind which a boundary is less likely are not compared (2503.20083, table 4)."""


@dataclass(frozen=True, eq=False)
class Asked:
    """What a teacher is asked of one conversation.

    Attributes:
        row: the conversation in its tokens, and which of them have to be predicted.
        direct: chunks whose first token is compared by its distribution.
        whole: chunks that are compared by their likelihood.
        begin: [whole] the student's token from which on.
        space: tokens of the student that are left out as white space.
    """

    row: Row
    direct: Chunks
    whole: Chunks
    begin: Numbers
    space: int


def asked_of(
    both: Paired, ids: NDArray[Any], taught: NDArray[np.bool_], words: Vocabularies
) -> Asked:
    """Decide what a teacher is asked of a conversation.

    Args:
        both: the conversation in the tokens of both.
        ids: [n] in the student's tokens.
        taught: [n] whether the next token is supervised.
        words: the tokens of both.
    """
    supervised = np.concatenate([[False], taught[:-1]])
    chunks = chunks_of(both, ids, supervised, words.student, words.teacher)
    space = 0
    if words.mapped.same:
        single = (chunks.first == chunks.last) & (chunks.teacher_first == chunks.teacher_last)
        direct, whole = chunks.where(single), chunks.where(np.zeros(len(single), np.bool_))
    else:
        left_out = chunks.where(chunks.space)
        space = int((left_out.last + 1 - left_out.first).sum())
        chunks = chunks.where(~chunks.space)
        follows = chunks.ends_turn | (
            taught[chunks.last] & (chunks.teacher_last + 1 < len(both.teacher_ids))
        )
        several = ~chunks.exact | (chunks.last > chunks.first)
        direct, whole = chunks.where(chunks.exact), chunks.where(several & follows)
    steps = np.zeros(len(both.teacher_ids) + 2, np.int64)
    through = direct.teacher_first if words.mapped.same else direct.through
    behind = whole.teacher_last + np.where(whole.ends_turn, 1, 2)
    for first, stop in ((direct.teacher_first, through + 1), (whole.teacher_first, behind)):
        np.add.at(steps, first, 1)
        np.add.at(steps, stop, -1)
    needed = np.cumsum(steps)[: len(both.teacher_ids)] > 0
    begin = whole.first + whole.exact
    return Asked(Row(both.teacher_ids, needed), direct, whole, begin, space)


class SpanTeacher(LocalTeacher):
    """A frozen causal language model with another tokenizer than the student.

    Args:
        model: frozen, in evaluation mode.
        pair_of: finds a conversation of the student in the teacher's tokens.
        words: the tokens of both.
        top: most tokens of a distribution that stand for themselves.
    """

    def __init__(
        self,
        model: nn.Module,
        pair_of: Callable[[Span], Paired],
        words: Vocabularies,
        *,
        top: int = TOP,
    ) -> None:
        super().__init__(model)
        self.pair_of, self.words, self.top = pair_of, words, top
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    @torch.no_grad()
    def signal(self, batch: Batch) -> Signal:
        """What the teacher says at the supervised positions, as far as both have tokens there."""
        device = batch.input_ids.device
        spans = [span for span in batch.spans if span.supervised]
        asked = [
            asked_of(self.pair_of(span), span.input_ids, span.taught, self.words) for span in spans
        ]
        read = [index for index, each in enumerate(asked) if each.row.supervised.any()]
        places = _Places(spans, asked, read)
        rows = torch.arange(len(batch.input_ids))
        if not read:
            target = self._nothing(places.count, device)
            self.run_for_other_ranks(device)
        else:
            longest = max(len(asked[index].row.input_ids) for index in read)
            theirs = collate(
                [(index, asked[index].row) for index in read],
                pack_to=longest if batch.packed else None,
            )
            hidden = decoder(self.model)(**decoder_inputs(self.model, theirs.to(device)))
            states = hidden.last_hidden_state.flatten(0, 1)[theirs.to(device).positions]
            places.lay_out(theirs)
            if self.words.mapped.same:
                target = self._dense(states, places)
            else:
                target = self._mapped(states, theirs.labels.flatten()[theirs.positions], places)
        return Signal((Part(rows, target),))

    def _nothing(self, count: int, device: torch.device) -> SpanTarget:
        head = output_head(self.model).constant()
        none = torch.full((count,), -1, device=device)
        zeros = torch.zeros(count, dtype=sum_precision(head.weight.dtype), device=device)
        values = none[:, None].int(), zeros[:, None]
        return self._target(SparseTarget(*values, zeros), zeros, none, none, zeros[:0])

    def _target(
        self,
        target: DenseTarget | SparseTarget,
        weights: Tensor,
        chunk: Tensor,
        after: Tensor,
        log_teacher: Tensor,
    ) -> SpanTarget:
        boundary = self._tables(weights.device)["student_boundary"]
        return SpanTarget(target, weights, chunk, after, log_teacher, boundary)

    def _dense(self, states: Tensor, places: _Places) -> SpanTarget:
        """Of a teacher with the same tokens: its states, where both have read the same."""
        where, ranks = (_moved(each, device=states.device) for each in places.direct)
        hidden = states.new_zeros((places.count, states.shape[1]))
        hidden[where] = states[ranks]
        none = torch.full((places.count,), -1, device=states.device)
        weights = torch.zeros(places.count, device=states.device)
        weights[where] = 1.0
        target = DenseTarget(hidden, output_head(self.model))
        return self._target(target, weights, none, none, weights[:0])

    def _mapped(self, states: Tensor, labels: Tensor, places: _Places) -> SpanTarget:
        """Of a teacher with other tokens: its distributions mapped, and likelihoods of chunks."""
        device = states.device
        move = partial(_moved, device=device)
        head, tables = output_head(self.model).constant(), self._tables(device)
        where, ranks = map(move, places.direct)
        first, written = move(places.label), move(places.through)
        # The token that the teacher's next one maps to, and the student's own next one.
        known = torch.stack([tables["map"][to_device(labels, device)[ranks]], first], dim=1)
        read = MappedPredictions(head, tables, self.top, to_device(labels, device), ranks, known)
        read.run(states)
        sums = torch.cat([read.log_p.new_zeros(1).double(), read.log_p.double().cumsum(0)])
        product = (sums[written + 1] - sums[ranks]).exp().to(read.probabilities.dtype)
        # A token is moved only if it is written as the map has it: ids −1 are the tail.
        slots = (read.ids[:, :, None] == known[:, None, :]).int().argmax(1)
        has_map = known[:, 0] >= 0
        moved = torch.where(has_map, product, torch.zeros_like(product))
        at_map, at_label = slots[:, :1], slots[:, 1:]
        p = read.probabilities
        p.scatter_add_(1, at_map, -moved[:, None]).scatter_add_(1, at_label, product[:, None])
        p.clamp_(min=0)
        read.tail.sub_(product - moved).clamp_(min=0)
        weights = p.new_zeros(places.count)
        weights[where] = 1.0
        shape = (places.count, p.shape[1])
        ids = torch.full(shape, -1, dtype=torch.int32, device=device)
        ids[where] = read.ids.int()
        probabilities = p.new_zeros(shape)
        probabilities[where] = p
        tail = p.new_zeros(places.count)
        tail[where] = read.tail
        target = SparseTarget(ids, probabilities, tail, fold=tables["fold"])
        label_mass = p.new_ones(places.count)
        label_mass[where] = p.gather(1, at_label)[:, 0]
        log_teacher, keep = self._likelihoods(read, sums, label_mass, places, move)
        chunk = torch.full((places.count,), -1, device=device)
        after = chunk.clone()
        chunk[move(places.chunk_tokens)] = move(places.chunk_numbers)
        after[move(places.after)] = move(places.after_numbers)
        for column in (chunk, after):
            column.masked_fill_(~keep[column.clamp(min=0)] if len(keep) else column >= 0, -1)
        return self._target(target, weights, chunk, after, log_teacher)

    def _likelihoods(
        self, read: MappedPredictions, sums: Tensor, label_mass: Tensor, places: _Places, move: Any
    ) -> tuple[Tensor, Tensor]:
        """[C] log-likelihoods of chunks with a boundary behind them, and which are compared."""
        begin, stop, behind = (move(each) for each in places.whole_ranks)
        log_chunk = sums[stop + 1] - sums[begin]
        follows = read.log_boundary[behind.clamp(min=0)].double()
        follows = follows.where(behind >= 0, torch.zeros_like(follows))
        # What is compared at the first token already is no part of it.
        start = move(places.whole_start)
        before = label_mass[start.clamp(min=0)].double()
        before = before.where(start >= 0, torch.ones_like(before))
        log_rest = log_chunk - before.clamp_min(torch.finfo(torch.float32).tiny).log() + follows
        return log_rest.clamp(max=0.0), follows >= np.log(_LEAST_BOUNDARY)

    def _tables(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self._on_device:
            words, size = self.words, output_head(self.model).vocabulary_size
            longest = np.full(max(size, len(words.mapped.longest)), -1, np.int64)
            longest[: len(words.mapped.longest)] = words.mapped.longest
            boundary = np.zeros(len(longest), np.bool_)
            boundary[: len(words.teacher)] = words.teacher.beginning(_BOUNDARY)
            found = {
                "map": longest[:size],
                "fold": words.mapped.fold,
                "boundary": boundary[:size],
                "student_boundary": words.student.beginning(_BOUNDARY),
            }
            self._on_device[device] = {
                name: torch.from_numpy(each).to(device) for name, each in found.items()
            }
        return self._on_device[device]


def _moved(array: NDArray[Any], *, device: torch.device) -> Tensor:
    """An array as a tensor on a device."""
    return to_device(torch.from_numpy(np.ascontiguousarray(array)), device)


class _Places:
    """Where the chunks of conversations stand: among the student's positions, and the teacher's.

    Attributes:
        count: supervised positions of the student.
        direct: (position of the student, rank of the teacher) of each distribution.
        label: the student's next token there.
        through: rank of the teacher's last token in which it is written.
        chunk_tokens: positions of the tokens of chunks, and
        chunk_numbers: the chunk of each.
        after: positions behind chunks, and
        after_numbers: the chunk of each.
        whole_ranks: of each chunk the ranks of its first and last token, and of the one behind it;
            −1 where it ends a turn.
        whole_start: position of its first token where a distribution is compared there, else −1.
    """

    def __init__(self, spans: Sequence[Span], asked: Sequence[Asked], read: Sequence[int]) -> None:
        self._spans, self._asked, self._read = spans, asked, read
        sizes = [span.supervised for span in spans]
        self._bases = np.cumsum([0, *sizes])
        self.count = int(self._bases[-1])

    def lay_out(self, theirs: Batch) -> None:
        """Find the ranks in a batch of the teacher, whose source is the conversation's number."""
        base, bases = 0, {}
        for span in theirs.spans:
            bases[span.source] = base
            base += span.supervised
        found: dict[str, list[NDArray[Any]]] = {}
        chunks = 0
        for index in self._read:
            span, asked = self._spans[index], self._asked[index]
            # At each token: the place of the position that predicts it.
            ours = self._bases[index] + np.concatenate([[0], np.cumsum(span.taught)[:-1]]) - 1
            rank = bases[index] + np.cumsum(asked.row.supervised) - 1
            direct, whole = asked.direct, asked.whole
            sizes = whole.last + 1 - asked.begin
            numbers = chunks + np.arange(len(sizes))
            within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            open_end = ~whole.ends_turn
            behind = np.where(open_end, rank[np.minimum(whole.teacher_last + 1, len(rank) - 1)], -1)
            for name, value in (
                ("where", ours[direct.first]),
                ("ranks", rank[direct.teacher_first]),
                ("label", span.input_ids[direct.first].astype(np.int64)),
                ("through", rank[direct.through]),
                ("tokens", ours[np.repeat(asked.begin, sizes) + within]),
                ("numbers", np.repeat(numbers, sizes)),
                ("after", ours[whole.last[open_end]] + 1),
                ("after_numbers", numbers[open_end]),
                ("begin", rank[whole.teacher_first]),
                ("stop", rank[whole.teacher_last]),
                ("behind", behind),
                ("start", np.where(whole.exact, ours[whole.first], -1)),
            ):
                found.setdefault(name, []).append(value)
            chunks += len(sizes)
        columns = {name: np.concatenate(parts) for name, parts in found.items()}
        order = np.argsort(columns["ranks"], kind="stable")
        for name in ("where", "ranks", "label", "through"):
            columns[name] = columns[name][order]
        self.direct = columns["where"], columns["ranks"]
        self.label, self.through = columns["label"], columns["through"]
        self.chunk_tokens, self.chunk_numbers = columns["tokens"], columns["numbers"]
        self.after, self.after_numbers = columns["after"], columns["after_numbers"]
        self.whole_ranks = columns["begin"], columns["stop"], columns["behind"]
        self.whole_start = columns["start"]
