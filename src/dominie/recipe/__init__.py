"""A recipe: one YAML file that says everything about a run, as typed, strict objects."""

from dominie.recipe.load import dump_recipe, load_recipe
from dominie.recipe.schema import AnyStage, Evaluation, MergeStage, Mixed, Recipe, Stage, Task

__all__ = [
    "AnyStage",
    "Evaluation",
    "MergeStage",
    "Mixed",
    "Recipe",
    "Stage",
    "Task",
    "dump_recipe",
    "load_recipe",
]
