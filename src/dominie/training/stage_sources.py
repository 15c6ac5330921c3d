"""Sources as a stage sees them: rows, share, loss and teacher; and the layer pairs of the stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dominie.core.errors import InputError
from dominie.data.batch import Row
from dominie.losses.terms import Attention, LossTerms, NextToken
from dominie.models.info import ModelInfo
from dominie.models.layer_mapping import check_heads, map_layers
from dominie.teachers import LocalTeacher, RoutedTeacher, Teacher


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
        cache: name of the cache that speaks in its teacher's place, None where it speaks itself.
    """

    name: str
    train: Sequence[Row]
    validation: Sequence[Row]
    share: float
    terms: LossTerms = field(default_factory=lambda: LossTerms(next_token=NextToken()))
    teacher: str | None = None
    cache: str | None = None

    @property
    def speaker(self) -> str | None:
        """Who is asked about this source: a cache or a teacher, by name; None is nobody."""
        return self.cache or self.teacher


def layer_pairs(
    student: ModelInfo, teachers: Mapping[str, ModelInfo], lessons: Sequence[StageSource]
) -> tuple[list[tuple[int, int]], Attention]:
    """(student layer, teacher layer) pairs of the attention term, none without one; its options.

    Args:
        student: what is known of the student.
        teachers: what is known of the teachers, by name.
        lessons: what is taught.

    Raises:
        InputError: layers or heads that do not map, or sources that ask for different mappings.
    """
    found: dict[tuple[tuple[tuple[int, int], ...], Attention], str] = {}
    for lesson in lessons:
        term = lesson.terms.attention
        if term is None or not lesson.terms.weighs("attention") or lesson.teacher is None:
            continue
        models = student, teachers[lesson.teacher]
        check_heads(*(model.need("heads", use="comparing attention") for model in models))
        depths = [model.need("layers", use="comparing attention") for model in models]
        mapped = map_layers(term.layers, *depths)
        options = replace(
            term, weight=1.0, layers="all"
        )  # weights differ by source, layers are mapped
        found.setdefault((tuple(mapped), options), lesson.name)
    if len(found) > 1:
        raise InputError(
            "sources of one stage compare attention differently",
            where="loss.attention",
            expected="one mapping of layers, one backend and the same fractions in a stage",
            found=f"different ones on {', '.join(found.values())}",
            do="give the attention term of every source the same options but for its weight",
        )
    for pairs, options in found:
        return list(pairs), options
    return [], Attention()


def routed_teacher(
    teachers: Mapping[str, LocalTeacher],
    lessons: Sequence[StageSource],
    pairs: Sequence[tuple[int, int]],
    caches: Mapping[str, Teacher],
) -> RoutedTeacher | None:
    """Route each source to its teacher; None if no source has one.

    Args:
        teachers: that are in memory, by name.
        lessons: what is taught.
        pairs: (student layer, teacher layer) of the attention term.
        caches: teachers that need no model, by name.
    """
    if not teachers and not caches:
        return None
    compared = {
        lesson.teacher
        for lesson in lessons
        if lesson.share > 0 and lesson.terms.weighs("attention")
    }
    layers = sorted({teacher_layer for _, teacher_layer in pairs})
    for name, teacher in teachers.items():
        teacher.capture(layers if name in compared else ())
    return RoutedTeacher({**teachers, **caches}, [lesson.speaker for lesson in lessons])
