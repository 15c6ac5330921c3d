"""What a run consists of: stages that train, that merge models, or make a mixture of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Tag

from dominie.losses.terms import LossTerms
from dominie.models.info import ModelInfo
from dominie.models.made import Merge, Upcycle
from dominie.models.spec import Placement
from dominie.teachers.cache_sampling import CacheSettings
from dominie.training.settings import TrainSettings

STRICT: dict[str, Any] = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """A source within a stage.

    Attributes:
        share: fraction of the stage's conversations; shares are normalised to sum to one.
        teacher: who teaches on this source; None is the stage's teacher.
        loss: the loss on this source; None is the stage's loss.
        cache: whether its teacher speaks from a cache; None is as the stage's `cache` says.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    share: float
    teacher: str | None = None
    loss: LossTerms | None = None
    cache: bool | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.share < float("inf"):
            raise ValueError(f"share must be finite and not negative, got {self.share}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Who learns, on which data, taught by whom, by which losses.

    Attributes:
        student: who learns: a stage, whose model is trained further, or any other model.
        data: the sources it learns from, with their shares.
        loss: what is minimised; on a source that has a loss of its own, that one instead.
        teacher: who teaches on the sources that name no teacher of their own.
        cache: whether and how what the teachers say is written down before training.
        train: how it trains; single keys replace those of the recipe's `train`.
        placement: where the weights of its model lie when that teaches another stage, as of a
            model under `models`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    kind: ClassVar[str] = "train"
    student: str
    data: dict[str, Mixed]
    loss: LossTerms | None = None
    teacher: str | None = None
    cache: CacheSettings | None = None
    train: TrainSettings = field(default_factory=TrainSettings)
    placement: Placement | None = None

    def loss_on(self, source: str) -> LossTerms:
        """The loss on a source of this stage."""
        loss = self.data[source].loss or self.loss
        assert loss is not None, "checked when the recipe was loaded"
        return loss

    def teacher_on(self, source: str) -> str | None:
        """The name of the teacher on a source, None where its loss needs none."""
        if not self.loss_on(source).needs_teacher:
            return None
        return self.data[source].teacher or self.teacher

    def cache_on(self, source: str) -> CacheSettings | None:
        """How the teacher on a source is written down; None where it speaks itself."""
        wanted = self.data[source].cache
        if wanted is None:
            wanted = self.cache is not None and self.cache.enabled
        if not wanted or self.teacher_on(source) is None:
            return None
        return self.cache or CacheSettings()

    @property
    def active(self) -> list[str]:
        """Sources with a share above zero."""
        return [name for name, mixed in self.data.items() if mixed.share > 0]

    @property
    def cached(self) -> list[str]:
        """Active sources whose teacher speaks from a cache."""
        return [source for source in self.active if self.cache_on(source)]

    @property
    def models(self) -> list[str]:
        """Every model the stage needs: the student, then the teachers."""
        taught = [self.teacher_on(source) for source in self.active]
        return list(dict.fromkeys([self.student, *(name for name in taught if name)]))

    @property
    def named(self) -> dict[str, str]:
        """Every model the stage names, needed or not, by where it names it."""
        names = {"student": self.student}
        if self.teacher is not None:
            names["teacher"] = self.teacher
        for source, mixed in self.data.items():
            if mixed.teacher is not None:
                names[f"data.{source}.teacher"] = mixed.teacher
        return names

    def model_info(self, name: str, of: Callable[[str], ModelInfo]) -> ModelInfo:
        """Describe the model that it makes; `of` describes those that it reads.

        Args:
            name: of the stage.
            of: from a model's name.
        """
        student, lora = of(self.student), self.train.lora
        made = _of_stage(name, student, dtype=self.train.precision)
        if lora is None or lora.merge:
            return made
        return dataclasses.replace(made, base=student.base, adapter=name)

    def renamed(self, of: Callable[[str], str]) -> Stage:
        """The stage with every model's name replaced."""
        return dataclasses.replace(
            self,
            student=of(self.student),
            teacher=self.teacher and of(self.teacher),
            data={
                source: dataclasses.replace(mixed, teacher=mixed.teacher and of(mixed.teacher))
                for source, mixed in self.data.items()
            },
        )


@dataclass(frozen=True, kw_only=True)
class MergeStage:
    """A model made of the weights of several; nothing is trained.

    Attributes:
        merge: which models, and how.
        placement: where the weights of its model lie when that teaches another stage.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    kind: ClassVar[str] = "merge"
    merge: Merge
    placement: Placement | None = None

    @property
    def models(self) -> list[str]:
        """Every model that is read; the first lends configuration and tokenizer."""
        return self.merge.sources

    @property
    def named(self) -> dict[str, str]:
        """Every model the stage names, by where it names it."""
        names = {f"merge.models.{name}": name for name in self.merge.models}
        return {"merge.base": self.merge.base, **names} if self.merge.base else names

    def model_info(self, name: str, of: Callable[[str], ModelInfo]) -> ModelInfo:
        """Describe the model that it makes; `of` describes those that it reads."""
        return _of_stage(name, of(self.models[0]))

    def renamed(self, of: Callable[[str], str]) -> MergeStage:
        """The stage with every model's name replaced."""
        merge = dataclasses.replace(
            self.merge,
            models={of(name): weight for name, weight in self.merge.models.items()},
            base=self.merge.base and of(self.merge.base),
        )
        return dataclasses.replace(self, merge=merge)


@dataclass(frozen=True, kw_only=True)
class UpcycleStage:
    """A dense model made a mixture of experts; nothing is trained.

    Attributes:
        upcycle: which model, and how.
        placement: where the weights of its model lie when that teaches another stage.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    kind: ClassVar[str] = "upcycle"
    upcycle: Upcycle
    placement: Placement | None = None

    @property
    def models(self) -> list[str]:
        """The dense model, which lends configuration and tokenizer, then its siblings."""
        return self.upcycle.sources

    @property
    def named(self) -> dict[str, str]:
        """Every model the stage names, by where it names it."""
        siblings = {f"upcycle.siblings.{i}": name for i, name in enumerate(self.upcycle.siblings)}
        return {"upcycle.model": self.upcycle.model, **siblings}

    def model_info(self, name: str, of: Callable[[str], ModelInfo]) -> ModelInfo:
        """Describe the mixture that it makes; `of` describes the models that it reads."""
        from dominie.models.moe import upcycled_info

        settings, dense = self.upcycle, of(self.upcycle.model)
        mixture = upcycled_info(
            dense, experts=settings.experts, experts_per_token=settings.experts_per_token
        )
        return _of_stage(name, mixture, dtype=dense.dtype)

    def renamed(self, of: Callable[[str], str]) -> UpcycleStage:
        """The stage with every model's name replaced."""
        model, *siblings = map(of, self.upcycle.sources)
        upcycle = dataclasses.replace(self.upcycle, model=model, siblings=siblings)
        return dataclasses.replace(self, upcycle=upcycle)


def _of_stage(name: str, info: ModelInfo, **changed: Any) -> ModelInfo:
    """The same facts of a model that a stage will write whole."""
    return dataclasses.replace(
        info, name=name, origin="stage", spec=None, base=name, adapter=None, **changed
    )


#: Kinds of stage, by the key that only they have; without one of these keys a stage trains.
MADE = {"merge": MergeStage, "upcycle": UpcycleStage}


def _kind(value: Any) -> str:
    """The tag of a stage's kind."""
    return next((f"<{key}>" for key in MADE if isinstance(value, dict) and key in value), "<train>")


AnyStage = Annotated[
    Annotated[Stage, Tag("<train>")]
    | Annotated[MergeStage, Tag("<merge>")]
    | Annotated[UpcycleStage, Tag("<upcycle>")],
    Discriminator(_kind),
]
