"""The whole job: stages, evaluation, report."""

from __future__ import annotations

import os
from pathlib import Path

from dominie.display import Display
from dominie.preparation import prepare_stages
from dominie.recipe import Recipe
from dominie.report import write_report
from dominie.run_folder import RunFolder
from dominie.scores import evaluate
from dominie.stages import run_stages


def run_recipe(recipe: Recipe, runs: Path, display: Display | None = None) -> Path:
    """Train what is not trained, score what is not scored, write the report.

    Returns:
        The run's folder.
    """
    display = display or Display()
    folder = RunFolder(recipe, runs)
    with folder.held():
        fingerprints = run_stages(folder, display)
        if os.environ.get("RANK", "0") == "0":  # judges are paid once, files written by one
            evaluate(folder, fingerprints, display)
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
        evaluate(folder, folder.trained_fingerprints(), display)
        write_report(folder.path)
    return folder.path


def check_recipe(recipe: Recipe, runs: Path, display: Display | None = None) -> None:
    """Read all data through all templates, and compare tokenizers; nothing is trained."""
    display = display or Display()
    folder = RunFolder(recipe, runs)
    with folder.held():
        prepared = prepare_stages(folder, display)
    display.done(recipe.name, f"{len(prepared)} stages can run")
