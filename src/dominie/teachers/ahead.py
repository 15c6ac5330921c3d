"""Targets ahead of time: what teachers begin before they are asked, or ask of somebody else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch

from dominie.core.errors import DominieError, RunError
from dominie.data.batch import Batch, Span, joined, to_device
from dominie.losses.targets import Part, Signal
from dominie.losses.vocabulary import SparseTarget
from dominie.teachers.cache_writer import Scores
from dominie.teachers.cached import key_of_span

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dominie.teachers.teacher import Teacher


class ExpectingTeacher(Protocol):
    """A teacher that can begin its work on conversations before their batch is asked for."""

    def expect(self, spans: Sequence[Span]) -> None:
        """Begin with the conversations of the next `signal`; without any, end what was begun."""


def can_expect(teacher: Teacher) -> bool:
    """Whether a teacher can begin before it is asked."""
    return hasattr(teacher, "expect") and getattr(teacher, "expects", True)


def expect_next(teacher: Teacher, spans: Sequence[Span]) -> None:
    """Have a teacher begin with these conversations, if it can."""
    if can_expect(teacher):
        cast("ExpectingTeacher", teacher).expect(spans)


def expect_all(teacher: Teacher, spans: Sequence[Span]) -> None:
    """Have a teacher ask for the conversations of a step, if it asks for them at once."""
    if hasattr(teacher, "expect_step"):
        teacher.expect_step(spans)


class TeacherPrefetch:
    """The targets of the micro-batches of an optimiser step, a few of them in one forward pass.

    Teachers that can begin before they are asked do so while the student is at the micro-batches
    before.

    Args:
        teacher: whose targets.
        micro_batches: of the student, in a forward pass of the teacher.
    """

    def __init__(self, teacher: Teacher, micro_batches: int) -> None:
        self.teacher, self.micro_batches = teacher, micro_batches
        self._waiting: list[Batch] = []
        self._ready: list[Signal] = []
        self._following: Callable[[], Sequence[Span]] = tuple

    def start_step(
        self, batches: Sequence[Batch], following: Callable[[], Sequence[Span]] = tuple
    ) -> None:
        """Expect a step's micro-batches, then what follows; what is left of a step is dropped."""
        self._waiting, self._ready, self._following = list(batches), [], following
        expect_all(self.teacher, [span for batch in batches for span in batch.spans])
        self._begin_next()

    def next(self) -> Signal:
        """The signal of the next micro-batch of the step."""
        if not self._ready:
            together = self._waiting[: self.micro_batches]
            self._waiting = self._waiting[self.micro_batches :]
            self._ready = signals(self.teacher, together)
            self._begin_next()
        return self._ready.pop(0)

    def _begin_next(self) -> None:
        if can_expect(self.teacher):
            together = self._waiting[: self.micro_batches]
            spans = [span for batch in together for span in batch.spans]
            spans = spans if together else list(self._following())
            expect_next(self.teacher, spans)
            if not together:
                expect_all(self.teacher, spans)

    def close(self) -> None:
        """End what teachers have begun."""
        self.start_step([])


def signals(teacher: Teacher, batches: Sequence[Batch]) -> list[Signal]:
    """The signal of each batch, from one forward pass over the rows of all of them."""
    if len(batches) == 1:
        return [teacher.signal(batches[0])]
    whole = joined(batches)
    signal, supervised = teacher.signal(whole), whole.supervised_by_row
    found, start = [], 0
    for batch in batches:
        rows, length = batch.input_ids.shape
        parts = [part.of(start, start + rows, length, supervised) for part in signal.parts]
        found.append(Signal(tuple(part for part in parts if part is not None)))
        start += rows
    return found


#: Bytes of the scores that are kept of conversations nobody announced: those of validation, which
#: come again.
_KEPT_BYTES = 2**28

#: The ids [n] of a conversation, and the positions [N] of the tokens that are predicted.
AskedScores = tuple["NDArray[np.int32]", "NDArray[np.int64]"]


class LostTeacher(DominieError):
    """A teacher that is elsewhere says nothing, or is another: the step itself is at no fault."""


class ScoreSource(Protocol):
    """Scores conversations: a server, say."""

    def score(self, asked: Sequence[AskedScores], found: Callable[[int, Any], None]) -> None:
        """Score conversations in any order.

        Args:
            asked: the conversations.
            found: called with the index of each and its `Scores`, as they come.
        """


class ScoredTeacher:
    """The likeliest ids of another's predictions and what is left, as a cache has them.

    The conversations of an optimiser step are asked for together, as soon as they are known; a
    micro-batch waits for its own.

    Args:
        source: of the scores.
    """

    def __init__(self, source: ScoreSource) -> None:
        self._source = source
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dominie-scores")
        self._asked: dict[bytes, Future[Scores]] = {}
        self._kept: dict[bytes, Future[Scores]] = {}
        self._kept_bytes = 0

    def expect_step(self, spans: Sequence[Span]) -> None:
        """Ask for the conversations of the step that begins; drop what else was asked for."""
        wanted = {key_of_span(span): span for span in spans if span.supervised}
        known = {key: each for key, each in self._asked.items() if key in wanted}
        self._asked = known | self._begun({k: s for k, s in wanted.items() if k not in known})

    def signal(self, batch: Batch) -> Signal:
        """Sparse probabilities of all supervised positions.

        Raises:
            InputError, LostTeacher: a conversation cannot be scored.
        """
        spans = {key_of_span(span): span for span in batch.spans if span.supervised}
        known = self._kept | self._asked
        begun = self._begun({key: span for key, span in spans.items() if key not in known})
        known |= begun
        scores = [known[key_of_span(span)].result() for span in batch.spans if span.supervised]
        for key, future in begun.items():
            self._kept_bytes += 20 * len(future.result().ids)
            if self._kept_bytes < _KEPT_BYTES:
                self._kept[key] = future
        target = target_of_scores(scores, batch.input_ids.device)
        return Signal((Part(torch.arange(len(batch.input_ids)), target),))

    def close(self) -> None:
        """End after the requests that are under way."""
        self._thread.shutdown(cancel_futures=True)

    def _begun(self, spans: dict[bytes, Span]) -> dict[bytes, Future[Scores]]:
        """Ask for conversations; of each a future."""
        futures: list[Future[Scores]] = [Future() for _ in spans]
        if spans:
            asked = [(s.input_ids, np.flatnonzero(s.taught) + 1) for s in spans.values()]
            self._thread.submit(self._score, asked, futures)
        return dict(zip(spans, futures, strict=True))

    def _score(self, asked: list[AskedScores], futures: list[Future[Scores]]) -> None:
        try:
            self._source.score(asked, lambda index, scores: futures[index].set_result(scores))
            left: BaseException = LostTeacher("a conversation was not scored")
        except RunError as error:
            left = LostTeacher(
                error.what,
                where=error.where,
                expected=error.expected,
                found=error.found,
                do=error.do,
            )
        except BaseException as error:
            left = error
        for future in futures:
            if not future.done():
                future.set_exception(left)


def target_of_scores(conversations: Sequence[Scores], device: torch.device) -> SparseTarget:
    """Scores of conversations, one after the other, as a loss takes them.

    The tail is what is left of 1, computed in float64: no mass is lost, and none normalised again.

    Args:
        conversations: the scores of each.
        device: where the target is wanted.
    """
    counts = np.concatenate([each.counts for each in conversations] or [np.zeros(0, np.int64)])
    width = int(counts.max(initial=1))
    ids = np.full((len(counts), width), -1, np.int64)
    p = np.zeros((len(counts), width))
    used = np.arange(width) < counts[:, None]
    if len(counts):
        ids[used] = np.concatenate([each.ids for each in conversations])
        p[used] = np.exp(np.concatenate([each.log_probs for each in conversations]))
    tail = np.maximum(1.0 - p.sum(1), 0.0)

    def moved(values: NDArray[Any]) -> torch.Tensor:
        return to_device(torch.from_numpy(values), device)

    return SparseTarget(moved(ids), moved(p.astype(np.float32)), moved(tail.astype(np.float32)))
