"""The whole job: stages, evaluation, report."""

from __future__ import annotations

from pathlib import Path

from dominie.core.display import Display
from dominie.core.distributed import destroy_distributed, end_training, is_main_process
from dominie.core.run_reader import read_stage
from dominie.recipe import Recipe
from dominie.report import write_report
from dominie.stages.evaluate import evaluate
from dominie.stages.run_folder import RunFolder, check_whole
from dominie.stages.run_stages import run_stages
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
    folder.check_overwrites()
    with folder.locked():
        try:
            fingerprints = run_stages(folder, display, reuse=reuse)
        finally:
            if first:  # also of stages that finished before an interruption
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
    with folder.locked():
        for name in recipe.stages:
            check_whole(folder.stage(name), read_stage(folder.stage(name)), display)
        evaluate(folder, folder.trained_fingerprints(), display)
        destroy_distributed()
        if is_main_process():
            write_cards(folder, scored=True)
            write_report(folder.path)
    return folder.path
