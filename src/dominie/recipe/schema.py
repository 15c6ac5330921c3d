"""The typed objects of a recipe, after `load` has written out its shorthands."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import Discriminator, Tag

from dominie.core.errors import InputError, nearest
from dominie.core.references import ModelName, SourceName
from dominie.core.task_result import FORGETTING
from dominie.data.sources import Source
from dominie.evaluation.task import MetricSettings
from dominie.generation.endpoint import NO_WEIGHTS, PLACES, Endpoint, ServedModel
from dominie.judge.alpaca_eval import AlpacaEval
from dominie.judge.mt_bench import MtBench
from dominie.models.spec import Model, Placement
from dominie.recipe.stage_config import STRICT, AnyStage
from dominie.training.settings import TrainSettings

if TYPE_CHECKING:
    from dominie.recipe import TrainStage


@dataclass(frozen=True, kw_only=True)
class Task(MetricSettings):
    """Something models are scored on, and how: see `MetricSettings` for what an answer counts.

    Attributes:
        source: whose conversations are asked; the last assistant turn is the target.
        split: which split of the source.
        teacher: the model that `agreement` and `forgetting` compare with; None is, of
            `forgetting`, the evaluation's baseline.
        by: a field of the data rows to break the score down by, `family` say.
        limit: score the first rows of the split only.
        max_new_tokens: longest answer; None is the longest target of the split and a little more.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    source: SourceName | None = None
    split: Literal["test", "validation"] = "test"
    teacher: ModelName | None = None
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
    """Find the tag of a benchmark's kind; MT-Bench if none is given."""
    if not isinstance(value, dict):
        return f"<{getattr(value, 'kind', 'mt_bench')}>"  # and refused there, if it is none
    return f"<{value.get('kind', 'mt_bench')}>"


AnyBenchmark = Annotated[
    Annotated[MtBench, Tag("<mt_bench>")] | Annotated[AlpacaEval, Tag("<alpaca_eval>")],
    Discriminator(_benchmark),
]


def _model(value: Any) -> str:
    """Find the tag of a model: behind a server, or with weights that are loaded."""
    is_served = "endpoint" in value if isinstance(value, dict) else isinstance(value, ServedModel)
    return "<served>" if is_served else "<local>"


AnyModel = Annotated[
    Annotated[Model, Tag("<local>")] | Annotated[ServedModel, Tag("<served>")],
    Discriminator(_model),
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
    models: dict[str, ModelName] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    benchmarks: dict[str, AnyBenchmark] = field(default_factory=dict)
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    batch: int = 64
    baseline: str | None = None

    @property
    def scored(self) -> dict[str, str]:
        """What is scored, by the name it has in the results: a model, or an endpoint itself."""
        return {**self.models, **{name: name for name in self.endpoints}}

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
        base = self.models.get(self.baseline or next(iter(self.models), ""))
        for name, task in self.tasks.items():
            if task.metric == FORGETTING and task.teacher is None:
                if base is None:
                    raise ValueError(
                        f"task {name} measures how far models moved from a base, and the baseline "
                        "is an endpoint: name the base as its teacher"
                    )
                self.tasks[name] = dataclasses.replace(task, teacher=base)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run.

    Attributes:
        name: of the run folder, `runs/NAME`.
        data: sources of conversations, by the names that stages and tasks use.
        stages: what is trained or made, by name; the order follows from what each reads.
        train: settings of every stage, unless it sets its own.
        models: names for models that need options, or are behind a server.
        evaluate: what is scored, and on what; None scores nothing.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    name: str
    data: dict[str, Source] = field(default_factory=dict)
    stages: dict[str, AnyStage] = field(default_factory=dict)
    train: TrainSettings = field(default_factory=TrainSettings)
    models: dict[str, AnyModel] = field(default_factory=dict)
    evaluate: Evaluation | None = None

    @property
    def trained(self) -> dict[str, TrainStage]:
        """The stages that train."""
        stages = {name: stage for name, stage in self.stages.items() if stage.trains}
        return cast("dict[str, TrainStage]", stages)

    @property
    def sources(self) -> dict[str, Source]:
        """The sources of `data`, and the stages that make data: `made` has these alone."""
        return self.data | {name: self.stages[name].source(name) for name in self.made}

    @property
    def made(self) -> list[str]:
        """The stages that make data."""
        return [name for name, stage in self.stages.items() if stage.makes == "data"]

    def needs(self, name: str) -> list[str]:
        """The stages that a stage reads the model or the data of."""
        stage = self.stages[name]
        made = set(self.made)
        return [n for n in stage.models if n in self.stages and n not in made] + [
            n for n in stage.sources if n in made
        ]

    def needed(self, names: Iterable[str]) -> set[str]:
        """The stages among these names, and all stages that they need."""
        found: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name in self.stages and name not in found:
                found.add(name)
                waiting += self.needs(name)
        return found

    @property
    def served(self) -> dict[str, ServedModel]:
        """The models that are behind servers."""
        return {n: model for n, model in self.models.items() if isinstance(model, ServedModel)}

    def task(self, name: str) -> dict[str, Any]:
        """The settings of a task, as plain data."""
        assert self.evaluate is not None, "checked when the recipe was loaded"
        return dataclasses.asdict(self.evaluate.tasks[name])

    def model(self, name: str) -> Model:
        """Describe a model that no stage makes.

        Raises:
            InputError: it is behind a server.
        """
        model = self.models.get(name) or Model(path=name)
        if isinstance(model, ServedModel):
            raise InputError(NO_WEIGHTS, where=f"models.{name}", found=model.title, do=PLACES)
        return model

    def placement(self, name: str) -> Placement:
        """Where the weights of a teacher lie, whether a stage makes it or not."""
        if name in self.served:
            return "cached"
        stage = self.stages.get(name)
        return self.model(name).placed if stage is None else stage.placement or "device"


def only_models(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """Keep only these models to score, and the stages that they and the tasks need.

    Args:
        names: under `evaluate.models`; of stages, if nothing is evaluated.

    Raises:
        InputError: there is no such model.
    """
    evaluation = recipe.evaluate
    known = dict(evaluation.models) if evaluation else {name: name for name in recipe.stages}
    for name in names:
        if name not in known:
            near = nearest(name, known)
            raise InputError(
                "no such model to train and score",
                where="--only",
                found=name,
                expected=", ".join(known),
                do=f"did you mean {near}?" if near else None,
            )
    needed = [known[name] for name in names]
    for task in evaluation.tasks.values() if evaluation else ():
        needed += [task.teacher] if task.teacher else []
        needed += [task.source] if task.source in recipe.made else []
    kept = recipe.needed(needed)
    return dataclasses.replace(
        recipe,
        stages={name: stage for name, stage in recipe.stages.items() if name in kept},
        evaluate=evaluation
        and dataclasses.replace(
            evaluation, models={name: known[name] for name in known if name in names}
        ),
    )
