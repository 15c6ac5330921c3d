"""A recipe: one YAML file that describes a run, as typed, strict objects."""

from typing import TYPE_CHECKING, Any

from dominie.recipe.kinds import AnyStage, StageConfig, register_stage_kind, stage_kinds
from dominie.recipe.load import dump_recipe, load_recipe, recipe_of
from dominie.recipe.schema import AnyBenchmark, Evaluation, Recipe, Task, only_models

if TYPE_CHECKING:
    from dominie.stages.merge import MergeStage
    from dominie.stages.train import MixedSource, TrainStage
    from dominie.stages.upcycle import UpcycleStage

__all__ = [
    "AnyBenchmark",
    "AnyStage",
    "Evaluation",
    "MergeStage",
    "MixedSource",
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

#: Names of the kinds that come with dominie, and what they were called before.
_OF_KINDS = {
    "MergeStage": ("merge", "MergeStage"),
    "MixedSource": ("train", "MixedSource"),
    "TrainStage": ("train", "TrainStage"),
    "UpcycleStage": ("upcycle", "UpcycleStage"),
    "Mixed": ("train", "MixedSource"),
    "Stage": ("train", "TrainStage"),
}


def __getattr__(name: str) -> Any:
    """The classes of the built-in kinds, which lie in a layer above this one."""
    import importlib

    if name not in _OF_KINDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, kind = _OF_KINDS[name]
    return getattr(importlib.import_module(f"dominie.stages.{module}"), kind)
