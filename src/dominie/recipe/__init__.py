"""A recipe: one YAML file that describes a run, as typed, strict objects."""

from typing import TYPE_CHECKING, Any

from dominie.deprecated import renamed
from dominie.recipe.load import dump_recipe, load_recipe, recipe_of
from dominie.recipe.schema import AnyBenchmark, Evaluation, Recipe, Task, only_models
from dominie.recipe.stage_config import (
    AnyStage,
    MixedSource,
    StageConfig,
    register_stage_kind,
    stage_kinds,
)

if TYPE_CHECKING:
    from dominie.stages.merge import MergeStage
    from dominie.stages.prune import PruneStage
    from dominie.stages.train import TrainStage
    from dominie.stages.upcycle import UpcycleStage
    from dominie.stages.write_answers import AnswersStage

__all__ = [
    "AnswersStage",
    "AnyBenchmark",
    "AnyStage",
    "Evaluation",
    "MergeStage",
    "MixedSource",
    "PruneStage",
    "Recipe",
    "StageConfig",
    "Task",
    "TrainStage",
    "UpcycleStage",
    "dump_recipe",
    "load_recipe",
    "only_models",
    "recipe_of",
    "register_stage_kind",
    "stage_kinds",
]

#: Classes of the kinds that come with dominie: the module within `dominie.stages`.
_OF_KINDS = {
    "AnswersStage": "write_answers",
    "MergeStage": "merge",
    "PruneStage": "prune",
    "TrainStage": "train",
    "UpcycleStage": "upcycle",
}
_renamed = renamed(__name__, {"Mixed": "MixedSource", "Stage": "TrainStage"})


def __getattr__(name: str) -> Any:
    """The classes of the built-in kinds, which lie in a layer above this one."""
    import importlib

    if name not in _OF_KINDS:
        return _renamed(name)
    return getattr(importlib.import_module(f"dominie.stages.{_OF_KINDS[name]}"), name)
