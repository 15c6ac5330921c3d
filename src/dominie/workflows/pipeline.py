"""The whole job: stages, evaluation, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dominie.core.display import Display
from dominie.core.distributed import destroy_distributed, end_training, is_main_process
from dominie.core.errors import InputError
from dominie.core.run_reader import read_stage
from dominie.recipe import Recipe
from dominie.report import write_report
from dominie.stages.cache_estimate import estimated
from dominie.stages.evaluate import evaluate
from dominie.stages.prepare import prepare_stages
from dominie.stages.run_folder import RunFolder, check_whole
from dominie.stages.run_stages import run_stages
from dominie.stages.teacher_caches import filled_caches, ready_plans, record_of
from dominie.stages.train import cached_stages
from dominie.workflows.model_card import write_cards


def run_recipe(
    recipe: Recipe, runs: Path, display: Display | None = None, *, reuse: bool = False
) -> Path:
    """Train what is not trained, score what is not scored, write the report.

    Args:
        recipe: what to run.
        runs: the folder of all runs.
        display: shows progress.
        reuse: take over stages that another of these runs has finished.

    Returns:
        The run's folder.
    """
    display = display or Display()
    folder = RunFolder(recipe, runs)
    first = is_main_process()  # judges are paid once, files written by one
    folder.check_apart()
    with folder.held():
        try:
            fingerprints = run_stages(folder, display, reuse=reuse)
        finally:
            if first:  # of what was made before an interruption, too
                write_cards(folder, scored=False)
        end_training()
        evaluate(folder, fingerprints, display)  # the ranks share the questions
        destroy_distributed()
        if first:
            write_cards(folder, scored=True)
            write_report(folder.path)
    return folder.path


def evaluate_recipe(recipe: Recipe, runs: Path, display: Display | None = None) -> Path:
    """Score the models of a recipe whose stages have been trained.

    Returns:
        The run's folder.
    """
    display = display or Display()
    folder = RunFolder(recipe, runs)
    with folder.held():
        for name in recipe.stages:
            check_whole(folder.stage(name), read_stage(folder.stage(name)), display)
        evaluate(folder, folder.trained_fingerprints(), display)
        destroy_distributed()
        if is_main_process():
            write_cards(folder, scored=True)
            write_report(folder.path)
    return folder.path


def cache_recipe(
    recipe: Recipe, runs: Path, display: Display | None = None, *, estimate: bool = False
) -> dict[str, Any]:
    """Write down what the teachers of all stages say, or what it would cost.

    Returns:
        `caches`, a record of each; `waiting`, for each stage the stages whose models have to be
        trained before they can teach it.
    """
    display = display or Display()
    folder = RunFolder(recipe, runs)
    with folder.held():
        stages = cached_stages(prepare_stages(folder, display))
        if not stages:
            raise InputError(
                "no stage of the recipe has a cache",
                where=recipe.name,
                do=f"set stages.{_cacheable(recipe)}.cache=true",
            )
        waiting: dict[str, list[str]] = {}
        records = []
        for prepared in stages:
            plans, later = ready_plans(folder, prepared)
            if later:
                waiting[prepared.name] = later
                display.line(f"{prepared.name}: after stage {', '.join(later)}")
            if estimate:
                records += [estimated(folder, prepared, plan, display) for plan in plans]
            else:
                caches = filled_caches(folder, prepared, display, plans, repair=True)
                records += [record_of(plan, caches[plan.name]) for plan in plans]
    return {"caches": records, "waiting": waiting}


def _cacheable(recipe: Recipe) -> str:
    """A stage whose teachers' predictions could be cached, to name in advice."""
    for name, stage in recipe.trained.items():
        if any(
            stage.teacher_on(s) and not stage.loss_on(s).weighs("attention") for s in stage.active
        ):
            return name
    return "NAME"
