"""The Python API: `dominie.run`, `dominie.check` and so on, as on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dominie.core.errors import InputError
from dominie.core.results_file import read_results
from dominie.core.run_reader import read_metrics
from dominie.recipe import Recipe, load_recipe, recipe_of

if TYPE_CHECKING:
    from dominie.planning.plan import Plan
    from dominie.workflows.check import Checked

RecipeLike = str | Path | Mapping[str, Any] | Recipe


@dataclass(frozen=True)
class Run:
    """A run, read from its folder when an attribute is accessed.

    Attributes:
        folder: `runs/NAME`.
    """

    folder: Path

    @property
    def results(self) -> dict[str, dict[str, dict[str, Any]]]:
        """`{model: {task: {score, stderr, n, interval, …}}}`; empty if nothing was scored."""
        return read_results(self.folder)

    @property
    def report(self) -> Path:
        """The file of the report."""
        return self.folder / "report.html"

    @property
    def stages(self) -> list[str]:
        """The names of finished stages, in dependency order."""
        from dominie.core.run_records import read_run

        return [stage.name for stage in read_run(self.folder).stages.values() if stage.done]

    def model(self, stage: str) -> Path:
        """Return the folder of a stage's model.

        Raises:
            InputError: no finished stage has this name.
        """
        if stage not in self.stages:
            raise InputError(
                "the run has no finished stage of this name",
                where=str(self.folder),
                expected=", ".join(self.stages) or "none is done",
                found=stage,
            )
        return self.folder / stage / "model"

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """Return the lines of a stage's `metrics.jsonl`."""
        return read_metrics(self.folder / stage)

    def load(self, stage: str) -> tuple[Any, Any]:
        """Load a stage's model, in evaluation mode, and its tokenizer."""
        from dominie.models.loading import load_frozen, load_tokenizer
        from dominie.models.spec import Model

        spec = Model(path=str(self.model(stage)))
        return load_frozen(spec), load_tokenizer(spec)


def run(
    recipe: RecipeLike,
    *overrides: str,
    runs: str | Path = "runs",
    only: Sequence[str] = (),
    reuse: bool = False,
) -> Run:
    """Train the stages that are not done, score the models, write the report.

    Args:
        recipe: a YAML file, the mapping it would hold, or a loaded recipe.
        overrides: values that replace the recipe's, as in `"train.seed=1"`.
        runs: the folder of all runs.
        only: models of `evaluate` to score; only the stages they need are trained.
        reuse: link stages that another run has finished.

    Raises:
        InputError: the recipe, the data or a model is at fault.
        RunError: the run failed though its input was acceptable.
    """
    from dominie.workflows.pipeline import run_recipe

    loaded = _loaded(recipe, overrides)
    return Run(run_recipe(loaded, Path(runs), reuse=reuse, only=only))


def check(recipe: RecipeLike, *overrides: str, runs: str | Path = "runs") -> Checked:
    """Render all data with all templates, compare tokenizers, plan memory and time.

    Raises:
        InputError: the recipe, the data or a model is at fault, as `run` would find.
    """
    from dominie.workflows.check import check_recipe

    return check_recipe(_loaded(recipe, overrides), Path(runs))


def evaluate(recipe: RecipeLike, *overrides: str, runs: str | Path = "runs") -> Run:
    """Score the models of a recipe whose stages have been trained.

    Raises:
        InputError: a stage has not been trained, or a task cannot be asked.
    """
    from dominie.workflows.pipeline import evaluate_recipe

    return Run(evaluate_recipe(_loaded(recipe, overrides), Path(runs)))


def plan(
    recipe: RecipeLike,
    *overrides: str,
    gpu: str | None = None,
    gpus: int | None = None,
    memory: float | None = None,
    price: float | None = None,
) -> Plan:
    """Estimate the memory, time and cost of each stage from configurations alone.

    Args:
        recipe: as for `run`.
        overrides: as for `run`.
        gpu: h200, h100, a100, …; without it, this machine's.
        gpus: how many.
        memory: GB of each.
        price: of a GPU hour.
    """
    from dominie.planning.plan import machine, plan_recipe

    on = machine(gpu=gpu, gpus=gpus, memory=memory, price=price)
    return plan_recipe(_loaded(recipe, overrides), on)


def _loaded(recipe: RecipeLike, overrides: Sequence[str]) -> Recipe:
    if isinstance(recipe, Recipe):
        if overrides:
            raise InputError(
                "a loaded recipe takes no overrides",
                where=recipe.name,
                found=", ".join(overrides),
                do="give them to load_recipe, or use dataclasses.replace",
            )
        return recipe
    if isinstance(recipe, Mapping):
        return recipe_of(recipe, overrides)
    return load_recipe(recipe, overrides)
