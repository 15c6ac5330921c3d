"""What a stage trains on: its sources, its schedule, its layer pairs and its teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dominie.core.errors import InputError
from dominie.data.assistant_spans import ends_of_turn
from dominie.data.batch import Row
from dominie.data.tokenization import ends_of_rows
from dominie.losses.terms import Attention, LossTerms, NextToken
from dominie.models.info import ModelInfo
from dominie.models.matching import check_heads, map_layers
from dominie.models.pruning import kept_pairs
from dominie.teachers import LocalTeacher, RoutedTeacher, Teacher
from dominie.teachers.answer_shown import AnswerPrompt, AnswerReadingTeacher
from dominie.training.dataloader import Mix, total_conversations
from dominie.training.rollouts import RolloutSettings
from dominie.training.settings import TrainSettings
from dominie.training.stop_at import forgetting_bounds

_ROWS_FOR_ENDS = 256
"""So many rows of each source are looked at for the ends of their answers."""


@dataclass(frozen=True, kw_only=True)
class StageSource:
    """A source as a stage sees it.

    Attributes:
        name: of the source.
        train: tokenised conversations to learn from.
        validation: held-out conversations to watch.
        share: fraction of the stage's conversations; 0 for a source that is only watched.
        terms: the loss on it.
        teacher: name of its teacher, None where the loss needs none.
        cache: name of the cache used in place of its teacher, None without one.
        reference: whether its teacher is the model that the student starts as.
        on_policy: fraction of its conversations that the student answers itself.
        shows: how the right answer is written into the prompts of its teacher, `{answer}` in it;
            None shows the teacher what the student reads.
    """

    name: str
    train: Sequence[Row]
    validation: Sequence[Row]
    share: float
    terms: LossTerms = field(default_factory=lambda: LossTerms(next_token=NextToken()))
    teacher: str | None = None
    cache: str | None = None
    reference: bool = False
    on_policy: float = 0.0
    shows: str | None = None

    @property
    def target_provider(self) -> str | None:
        """Name of the cache or teacher that provides its targets; None without any."""
        if self.teacher is not None and self.terms.weighs("spans"):
            return span_teacher_name(self.teacher)
        if self.shows is not None:
            return f"{self.teacher}, which reads {self.shows!r}"
        return self.cache or self.teacher


def span_teacher_name(teacher: str) -> str:
    """By which sources that compare by spans name a teacher, which may teach others as it is."""
    return f"{teacher}, by spans"


@dataclass(frozen=True)
class Schedule:
    """How much a stage learns: conversations and share of each source, optimiser steps, epochs."""

    sizes: Mapping[str, int]
    shares: Mapping[str, float]
    steps: int
    epochs: float

    def mix(self, settings: TrainSettings, *, micro_batch: int) -> Mix:
        """The order in which the stage reads its conversations."""
        return Mix(
            self.sizes,
            self.shares,
            batch=settings.batch,
            micro_batch=micro_batch,
            steps=self.steps,
            seed=settings.seed,
            mixing=settings.mixing,
        )


def schedule_of(active: Sequence[StageSource], settings: TrainSettings) -> Schedule:
    """The schedule of a stage that learns from these sources."""
    shares = {source.name: source.share for source in active}
    sizes = {source.name: len(source.train) for source in active}
    conversations = total_conversations(sizes, shares, settings.epochs)
    steps = settings.steps or max(1, round(conversations / settings.batch))
    return Schedule(sizes, shares, steps, steps * settings.batch / conversations * settings.epochs)


@dataclass(frozen=True, kw_only=True)
class StageTraining:
    """What a stage trains on and how.

    Attributes:
        folder: the stage's folder; `checkpoints/` and `metrics.jsonl` are made in it.
        sources: those it learns from first, then those it only watches.
        settings: the stage's `train`.
        rollouts: how the student answers the sources that are `on_policy`.
    """

    folder: Path
    sources: Sequence[StageSource]
    settings: TrainSettings
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)

    @property
    def active(self) -> list[StageSource]:
        """The sources it learns from."""
        return [source for source in self.sources if source.share > 0]

    @cached_property
    def schedule(self) -> Schedule:
        """How much it learns."""
        return schedule_of(self.active, self.settings)

    @property
    def bounds(self) -> dict[str, float]:
        """The most forgetting by source, at which it ends."""
        return forgetting_bounds(self.settings.stop_at, self.sources)

    def ends_of_turn(self, tokenizer: Any) -> list[int]:
        """The tokens that end an answer, as the rows have them, and as the template ends examples.

        The template may refuse all examples, for want of what only the rows have.
        """
        rows = (row for source in self.active for row in source.train[:_ROWS_FOR_ENDS])
        whole = [row for row in rows if len(row.input_ids) < self.settings.max_length]
        return list(dict.fromkeys([*ends_of_rows(tokenizer, whole), *ends_of_turn(tokenizer)]))


@dataclass(frozen=True)
class AttentionPairs:
    """What the attention term of a stage compares.

    Attributes:
        pairs: (student layer, teacher layer), ascending; none without such a term.
        teachers: names of the teachers whose attention is compared.
    """

    pairs: Sequence[tuple[int, int]] = ()
    teachers: frozenset[str] = frozenset()

    @property
    def student_layers(self) -> list[int]:
        """Layers of the student that are compared."""
        return sorted({student for student, _ in self.pairs})

    @property
    def teacher_layers(self) -> list[int]:
        """Layers of each of the teachers that are compared."""
        return sorted({teacher for _, teacher in self.pairs})

    def layers_of(self, teacher: str) -> list[int]:
        """Layers of one teacher that are compared."""
        return self.teacher_layers if teacher in self.teachers else []


def attention_pairs(
    student: ModelInfo, teachers: Mapping[str, ModelInfo], sources: Sequence[StageSource]
) -> AttentionPairs:
    """Decide which layers of student and teachers a stage compares.

    Args:
        student: what is known of the student.
        teachers: what is known of the teachers, by name.
        sources: those the stage learns from.

    Raises:
        InputError: layers or heads that do not map, or sources that ask for different mappings.
    """
    found: dict[tuple[tuple[tuple[int, int], ...], Attention], str] = {}
    compared = set()
    for source in sources:
        term = source.terms.attention
        if term is None or not term.weighs or source.teacher is None:
            continue
        models = student, teachers[source.teacher]
        check_heads(*(model.need("heads", use="comparing attention") for model in models))
        if term.layers == "kept":
            mapped = kept_pairs(*models)
        else:
            depths = [model.need("layers", use="comparing attention") for model in models]
            mapped = map_layers(term.layers, *depths)
        # Weights may differ by source, and layers are mapped.
        found.setdefault((tuple(mapped), replace(term, weight=1.0, layers="all")), source.name)
        compared.add(source.teacher)
    if len(found) > 1:
        raise InputError(
            "sources of one stage compare attention differently",
            where="loss.attention",
            expected="one mapping of layers, one backend and the same fractions in a stage",
            found=f"different ones on {', '.join(found.values())}",
            do="give the attention term of every source the same options but for its weight",
        )
    for pairs, _ in found:
        return AttentionPairs(pairs, frozenset(compared))
    return AttentionPairs()


def routed_teacher(
    teachers: Mapping[str, LocalTeacher],
    sources: Sequence[StageSource],
    pairs: AttentionPairs,
    caches: Mapping[str, Teacher],
    tokenizer: Any = None,
) -> RoutedTeacher | None:
    """The teachers of all sources as one; None if there are none.

    Args:
        teachers: in memory, by name.
        sources: of the stage.
        pairs: what the attention term compares.
        caches: teachers that need no model, by name.
        tokenizer: the student's; needed for teachers that read right answers.
    """
    if not teachers and not caches:
        return None
    for name, teacher in teachers.items():
        teacher.capture(pairs.layers_of(name))
    reading: dict[str, Teacher] = {
        source.target_provider or "": AnswerReadingTeacher(
            teachers[source.teacher or ""], AnswerPrompt.of(tokenizer, source.shows)
        )
        for source in sources
        if source.shows is not None
    }
    routes = [source.target_provider for source in sources]
    return RoutedTeacher({**teachers, **caches, **reading}, routes)
