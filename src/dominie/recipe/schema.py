"""The typed objects of a recipe. Shorthands are written out before these are made: see `load`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from dominie.data.sources import Source
from dominie.losses.terms import LossTerms
from dominie.models.spec import Model
from dominie.training.settings import TrainSettings

STRICT: dict[str, Any] = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """A source within a stage.

    Attributes:
        share: fraction of the stage's conversations; shares are normalised to sum to one.
        teacher: who teaches on this source; None is the stage's teacher.
        loss: the loss on this source; None is the stage's loss.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    share: float
    teacher: str | None = None
    loss: LossTerms | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.share < float("inf"):
            raise ValueError(f"share must be finite and not negative, got {self.share}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Who learns, on which data, taught by whom, by which losses."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    student: str
    data: dict[str, Mixed]
    loss: LossTerms | None = None
    teacher: str | None = None
    train: TrainSettings = field(default_factory=TrainSettings)

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

    @property
    def active(self) -> list[str]:
        """Sources with a share above zero."""
        return [name for name, mixed in self.data.items() if mixed.share > 0]

    @property
    def models(self) -> list[str]:
        """Every model the stage needs: the student, then the teachers."""
        taught = [self.teacher_on(source) for source in self.active]
        return list(dict.fromkeys([self.student, *(name for name in taught if name)]))


@dataclass(frozen=True, kw_only=True)
class Task:
    """Something models are scored on.

    Attributes:
        source: whose conversations are asked; the last assistant turn is the target.
        metric: `exact_match` of a greedy answer; `agreement` with the teacher's most probable next
            token (held-out loss and KL beside it).
        split: which split of the source.
        teacher: whom `agreement` compares with.
        by: a field of the data rows to break the score down by, `family` say.
        limit: score the first rows of the split only.
        max_new_tokens: longest answer; None is the longest target of the split and a little more.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    source: str
    metric: Literal["exact_match", "agreement"] = "exact_match"
    split: Literal["test", "validation"] = "test"
    teacher: str | None = None
    by: str | None = None
    limit: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.metric == "agreement" and not self.teacher:
            raise ValueError("metric agreement needs a teacher to agree with")
        for name in ("limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Which models are scored on which tasks; the names are those of `results.json`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    models: dict[str, str]
    tasks: dict[str, Task]
    batch: int = 64

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    name: str
    data: dict[str, Source]
    stages: dict[str, Stage] = field(default_factory=dict)
    train: TrainSettings = field(default_factory=TrainSettings)
    models: dict[str, Model] = field(default_factory=dict)
    evaluate: Evaluation | None = None

    def model(self, name: str) -> Model:
        """What a model name means when it is not a stage's."""
        return self.models.get(name) or Model(path=name)
