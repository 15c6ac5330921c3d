"""A recipe: one YAML file that describes a run, as typed, strict objects."""

from dominie.recipe.load import dump_recipe, load_recipe, recipe_of
from dominie.recipe.resolve import only_models
from dominie.recipe.schema import AnyBenchmark, Evaluation, Recipe, Task
from dominie.recipe.stage_configs import AnyStage, MergeStage, Mixed, Stage, UpcycleStage

__all__ = [
    "AnyBenchmark",
    "AnyStage",
    "Evaluation",
    "MergeStage",
    "Mixed",
    "Recipe",
    "Stage",
    "Task",
    "UpcycleStage",
    "dump_recipe",
    "load_recipe",
    "only_models",
    "recipe_of",
]
