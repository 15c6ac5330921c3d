"""The typed objects of a recipe. Shorthands are written out before these are made: see `load`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Tag

from dominie.data.sources import Source
from dominie.evaluation.alpaca_eval import AlpacaEval
from dominie.evaluation.judging.endpoint import Endpoint
from dominie.evaluation.mt_bench import MtBench
from dominie.evaluation.scoring import Scoring
from dominie.losses.terms import LossTerms
from dominie.models.made import Merge, Upcycle
from dominie.models.spec import Model, Placement
from dominie.teachers.schemes import CacheSettings
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

    def renamed(self, of: Callable[[str], str]) -> UpcycleStage:
        """The stage with every model's name replaced."""
        model, *siblings = map(of, self.upcycle.sources)
        upcycle = dataclasses.replace(self.upcycle, model=model, siblings=siblings)
        return dataclasses.replace(self, upcycle=upcycle)


#: Kinds of stage, by the key that only they have; without one of these keys a stage trains.
MADE = {"merge": MergeStage, "upcycle": UpcycleStage}


def _kind(value: Any) -> str:
    """The tag of a stage's kind, which no key of a recipe can look like."""
    return next((f"<{key}>" for key in MADE if isinstance(value, dict) and key in value), "<train>")


AnyStage = Annotated[
    Annotated[Stage, Tag("<train>")]
    | Annotated[MergeStage, Tag("<merge>")]
    | Annotated[UpcycleStage, Tag("<upcycle>")],
    Discriminator(_kind),
]


@dataclass(frozen=True, kw_only=True)
class Task(Scoring):
    """Something models are scored on, and how: see `Scoring` for what an answer counts.

    Attributes:
        source: whose conversations are asked; the last assistant turn is the target.
        split: which split of the source.
        teacher: whom `agreement` compares with.
        by: a field of the data rows to break the score down by, `family` say.
        limit: score the first rows of the split only.
        max_new_tokens: longest answer; None is the longest target of the split and a little more.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    source: str | None = None
    split: Literal["test", "validation"] = "test"
    teacher: str | None = None
    by: str | None = None
    limit: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric == "agreement" and not self.teacher:
            raise ValueError("metric agreement needs a teacher to agree with")
        if (self.source is None) != (self.metric == "lm_eval"):
            raise ValueError(
                "metric lm_eval brings its own questions: leave out source"
                if self.source
                else f"metric {self.metric} needs a source of questions"
            )
        for name in ("limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def _benchmark(value: Any) -> str:
    """The tag of a benchmark's kind; MT-Bench where it is not said."""
    kind = value.get("kind", "mt_bench") if isinstance(value, dict) else value.kind
    return f"<{kind}>"


AnyBenchmark = Annotated[
    Annotated[MtBench, Tag("<mt_bench>")] | Annotated[AlpacaEval, Tag("<alpaca_eval>")],
    Discriminator(_benchmark),
]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Which models are scored on what; the names are those of `results.json`.

    Attributes:
        models: stages, names under models, paths or hub ids, by the name they are shown under.
        tasks: questions with known answers.
        benchmarks: questions whose answers are judged.
        endpoints: models behind an endpoint, which answer benchmarks and no tasks.
        batch: prompts, or conversations, per forward pass.
        baseline: the model all others are compared with, question by question; None is the first.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    models: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    benchmarks: dict[str, AnyBenchmark] = field(default_factory=dict)
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    batch: int = 64
    baseline: str | None = None

    def __post_init__(self) -> None:
        names = (*self.models, *self.endpoints)
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(f"baseline is none of the models: {', '.join(names)}")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        if not (self.models or self.endpoints) or not (self.tasks or self.benchmarks):
            raise ValueError("evaluate needs models, and tasks or benchmarks to score them on")
        if self.endpoints and not self.benchmarks:
            raise ValueError("endpoints answer benchmarks, and there are none")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run.

    Attributes:
        name: of the run folder, `runs/NAME`.
        data: sources of conversations, by the names that stages and tasks use.
        stages: what is trained or made, by name; the order follows from who learns from whom.
        train: what every stage trains with, where it does not say otherwise.
        models: names for models that need options.
        evaluate: what is scored, and on what; None scores nothing.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    name: str
    data: dict[str, Source] = field(default_factory=dict)
    stages: dict[str, AnyStage] = field(default_factory=dict)
    train: TrainSettings = field(default_factory=TrainSettings)
    models: dict[str, Model] = field(default_factory=dict)
    evaluate: Evaluation | None = None

    @property
    def trained(self) -> dict[str, Stage]:
        """The stages that train."""
        return {name: stage for name, stage in self.stages.items() if isinstance(stage, Stage)}

    def model(self, name: str) -> Model:
        """What a model name means when it is not a stage's."""
        return self.models.get(name) or Model(path=name)

    def placement(self, name: str) -> Placement:
        """Where the weights of a teacher lie, whether a stage makes it or not."""
        stage = self.stages.get(name)
        return self.model(name).held if stage is None else stage.placement or "device"
