"""Targets that teachers begin with before they are asked, and several micro-batches at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, cast

from dominie.data.batch import Batch, Span, joined
from dominie.losses.targets import Signal

if TYPE_CHECKING:
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
