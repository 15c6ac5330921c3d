"""The keys of a stage in a recipe, and the registry of the kinds of stage."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Discriminator, GetCoreSchemaHandler, Tag

from dominie.core.references import ModelName, references, rewritten
from dominie.data.sources import Source
from dominie.losses.terms import LossTerms
from dominie.models.info import ModelInfo
from dominie.models.spec import Placement

if TYPE_CHECKING:
    from pydantic_core import CoreSchema

    from dominie.recipe import TrainStage
    from dominie.recipe.schema import Recipe

STRICT: dict[str, Any] = {"extra": "forbid", "strict": True}

#: Modules that register the kinds that come with dominie; imported when a kind is first asked for,
#: since they lie in a layer above this one.
_BUILT_IN = tuple(
    f"dominie.stages.{name}" for name in ("train", "merge", "upcycle", "prune", "write_answers")
)

_kinds: dict[str, type[StageConfig]] = {}

C = TypeVar("C", bound="type[StageConfig]")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """The keys of a stage. A kind of stage derives from `dominie.stages.stage_kind.StageKind`.

    Fields that name models or sources are marked (`ModelName`, `SourceName`): from the marks follow
    order, checks of names and paths.

    Attributes:
        kind: what the stage is called in `stage.json`, plan and report.
        key: the key that only stages of this kind have; None for stages that train.
        makes: what comes of it: the folder within the stage's that holds the result.
        trains: whether it has a student, data and `train` settings.
        relation: of its model to the one it began as, in the terms of the hub.
        served: the last parts of keys that may name a model behind a server.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    kind: ClassVar[str]
    key: ClassVar[str | None]
    makes: ClassVar[Literal["model", "data"]] = "model"
    trains: ClassVar[bool] = False
    relation: ClassVar[str] = "finetune"
    served: ClassVar[frozenset[str]] = frozenset()

    @property
    def placement(self) -> Placement | None:
        """Where the weights of its model are held when it teaches another stage."""
        return None

    @property
    def models(self) -> list[str]:
        """Every model that is read; the first gives configuration and tokenizer."""
        return list(dict.fromkeys(self.named.values()))

    @property
    def sources(self) -> list[str]:
        """Every source that is read."""
        return list(dict.fromkeys(self.named_sources.values()))

    @property
    def loaded(self) -> list[str]:
        """Models that are whole in memory while it runs; a stage that trains plans by itself."""
        return [] if self.makes == "model" else self.models

    @property
    def begins_from(self) -> list[str]:
        """The models that its own model is a descendant of."""
        return self.models

    @property
    def cached(self) -> list[str]:
        """Sources whose teacher is replaced by a cache of what it predicts."""
        return []

    @property
    def hub_tags(self) -> list[str]:
        """Tags for the model card, in the terms of the hub."""
        return [self.kind]

    @property
    def named(self) -> dict[str, str]:
        """List every model the stage names, needed or not, by the key that names it."""
        return references(self, "model")

    @property
    def named_sources(self) -> dict[str, str]:
        """List every source the stage names, needed or not, by the key that names it."""
        return references(self, "source")

    def renamed(self, of: Callable[[str], str]) -> StageConfig:
        """Replace the name of every model."""
        return rewritten(self, lambda kind, name: of(name) if kind == "model" else name)

    def resolved(self, recipe: Recipe) -> StageConfig:
        """Write out what follows from other parts of the recipe."""
        del recipe
        return self

    def check(self, recipe: Recipe, name: str, *, where: str) -> None:
        """Refuse what names and settings show to be wrong; models and sources exist.

        Raises:
            InputError: names the key.
        """

    def source(self, name: str) -> Source:
        """Describe the data that it makes as a source; the path begins at the run's folder.

        A kind may have the keys `validation_fraction` and `test_fraction`, as a source has.
        """
        held_out: dict[str, Any] = {
            key: getattr(self, key, 0.0) for key in ("validation_fraction", "test_fraction")
        }
        return Source(name=name, path=f"{name}/data", **held_out)

    def model_info(self, name: str, of: Callable[[str], ModelInfo]) -> ModelInfo:
        """Describe the model that it makes; `of` describes those that it reads."""
        return info_of_stage(name, of(self.models[0]))

    def conversations(self, sizes: Mapping[str, int]) -> int | None:
        """Count the conversations it will make, given those of each source; None if unknown."""
        del sizes
        return None

    def plan(self, recipe: Recipe, name: str, machine: Any, sizes: Mapping[str, Any]) -> Any:
        """Plan its memory and time on a machine: a `StagePlan`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PrivilegedTeacher:
    """A teacher that reads the right answer in its prompt, which the student does not.

    Attributes:
        model: the teacher: often what the student starts as, so that no expert is needed.
        shows: what it reads beside the question: `answer`, that of the data.
        text: what is added to the question for it; `{answer}` stands for the answer, without the
            token that ends it.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    kind: ClassVar[str] = "privileged"
    model: ModelName
    shows: Literal["answer"]
    text: str = (
        "\n\nThis is an example of a good answer:\n{answer}\n\nNow write an answer of your own."
    )

    def __post_init__(self) -> None:
        if self.text.count("{answer}") != 1:
            raise ValueError("text must hold {answer} once, where the answer is to stand")


def _teacher(value: Any) -> str:
    """Find the tag of a teacher: a name, or a mapping that says what it reads."""
    return "<name>" if isinstance(value, str) else "<privileged>"


AnyTeacher = Annotated[
    Annotated[ModelName, Tag("<name>")] | Annotated[PrivilegedTeacher, Tag("<privileged>")],
    Discriminator(_teacher),
]


@dataclass(frozen=True, kw_only=True)
class MixedSource:
    """A source within a stage.

    Attributes:
        share: fraction of the stage's conversations; shares are normalised to sum to one.
        teacher: of this source, by name or with what it reads; None is the stage's teacher.
        loss: the loss on this source; None is the stage's loss.
        cache: whether its teacher is replaced by a cache; None is the stage's `cache`.
        on_policy: fraction of its conversations whose last answer the student writes anew, for the
            teacher to mark; None is none.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    share: float
    teacher: AnyTeacher | None = None
    loss: LossTerms | None = None
    cache: bool | None = None
    on_policy: float | None = None

    def __post_init__(self) -> None:
        if self.on_policy is not None and not 0.0 <= self.on_policy <= 1.0:
            raise ValueError(f"on_policy must be from 0 to 1, got {self.on_policy}")
        if not 0.0 <= self.share < float("inf"):
            raise ValueError(f"share must be finite and not negative, got {self.share}")


def info_of_stage(name: str, info: ModelInfo, **changed: Any) -> ModelInfo:
    """Copy the facts of a model for one that a stage will write whole."""
    return dataclasses.replace(
        info, name=name, origin="stage", spec=None, base=name, adapter=None, **changed
    )


def register_stage_kind(config: C) -> C:
    """Let recipes have stages of this kind; decorates its class.

    Raises:
        ValueError: another class has the kind's name or its key.
    """
    for other in _kinds.values():
        same = config.kind == other.kind or config.key == other.key
        if same and (config.__module__, config.__name__) != (other.__module__, other.__name__):
            raise ValueError(f"{other.__name__} is the kind {other.kind!r} already")
    _kinds[config.kind] = config
    return config


def unregister_stage_kind(kind: str) -> None:
    """Forget a kind that was registered."""
    del _kinds[kind]


def stage_kinds() -> Mapping[str, type[StageConfig]]:
    """List every kind of stage by name, the kind that trains first."""
    for module in _BUILT_IN:
        importlib.import_module(module)
    order = {"train": 0, "merge": 1, "upcycle": 2, "prune": 3, "answers": 4}
    return dict(sorted(_kinds.items(), key=lambda item: order.get(item[0], len(order))))


def _tag_of(stage: Any) -> str:
    """Find the tag of a stage's kind by the key that only this kind has."""
    keys = stage if isinstance(stage, dict) else ()
    return next((f"<{k.kind}>" for k in stage_kinds().values() if k.key in keys), "<train>")


class _AnyKind:
    """Validates a stage as the registered kind that its keys belong to."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        del source
        tagged = [Annotated[kind, Tag(f"<{name}>")] for name, kind in stage_kinds().items()]
        union = functools.reduce(operator.or_, tagged)
        return handler.generate_schema(Annotated[union, Discriminator(_tag_of)])


AnyStage = Annotated[StageConfig, _AnyKind()]


def span_sources(stage: TrainStage) -> dict[str, list[str]]:
    """The sources that a stage compares with a teacher by spans, by their teacher."""
    found: dict[str, list[str]] = {}
    for source in stage.active:
        teacher = stage.teacher_on(source)
        if teacher is not None and stage.loss_on(source).weighs("spans"):
            found.setdefault(teacher, []).append(source)
    return found


def same_token_teachers(stage: TrainStage) -> list[str]:
    """The teachers that have to have the student's tokens: all that are compared otherwise."""
    others = (each for each in stage.active if not stage.loss_on(each).weighs("spans"))
    return list(dict.fromkeys(name for each in others if (name := stage.teacher_on(each))))
