"""A stage before it is run: what it is made of, and what tells whether that has changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dominie.data.rows import PreparedSource
from dominie.data.store import Rows
from dominie.recipe import AnyStage, Stage, UpcycleStage
from dominie.training.stage_sources import StageSource


@dataclass(frozen=True)
class Prepared:
    """A stage whose models are known to fit each other, before any is loaded.

    Attributes:
        name: of the stage.
        stage: its part of the recipe.
        tokenizer: of the model it makes, with a chat template.
        fingerprint: of everything its model depends on.
        depends: the same by name, to tell what has changed.
    """

    name: str
    stage: AnyStage
    tokenizer: Any
    fingerprint: str
    depends: Mapping[str, Any] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class PreparedTraining(Prepared):
    """A stage that trains, its data ready.

    Attributes:
        sources: the sources it learns from, then those it only watches.
        teachers: the fingerprints of its teachers.
    """

    stage: Stage
    sources: Mapping[str, PreparedSource]
    teachers: Mapping[str, str]

    @property
    def lessons(self) -> list[StageSource]:
        """What the stage teaches, then what it only watches."""
        stage, limit = self.stage, self.stage.train.evaluate_rows
        taught = [
            StageSource(
                name=name,
                train=self.sources[name].train,
                validation=self.sources[name].validation.first(limit),
                share=stage.data[name].share,
                terms=stage.loss_on(name),
                teacher=stage.teacher_on(name),
                cache=cache_name(stage, name),
            )
            for name in stage.active
        ]
        watched = [
            StageSource(name=name, train=(), validation=source.validation.first(limit), share=0.0)
            for name, source in self.sources.items()
            if name not in stage.active and len(source.validation)
        ]
        return taught + watched


@dataclass(frozen=True)
class PreparedUpcycle(Prepared):
    """A stage that makes a mixture of experts, with what its gates are found by.

    Attributes:
        rows: conversations of the source that its gates read; None where they read none.
    """

    stage: UpcycleStage
    rows: Rows | None


def cache_name(stage: Stage, source: str) -> str | None:
    """Who speaks in the place of the teacher on a source; None where it does itself.

    Sources that share a teacher share its cache, if they compare at one temperature.
    """
    if stage.cache_on(source) is None:
        return None
    prediction = stage.loss_on(source).prediction
    temperature = prediction.temperature if prediction else 1.0
    return f"{stage.teacher_on(source)}, cached at temperature {temperature:g}"
