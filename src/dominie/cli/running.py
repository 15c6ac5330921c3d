"""Verbs that train: run, sweep."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dominie.cli import completion
from dominie.cli.app import (
    JsonOption,
    OnlyOption,
    OverridesArgument,
    RecipeArgument,
    RunsOption,
    app,
)
from dominie.cli.manual import examples
from dominie.cli.output import conclude, only_json, shown_on
from dominie.processes.launching import ENGINES, launch, without_options
from dominie.processes.ranks import is_first, ranks

PANEL = "Training"


def _engines() -> list[str]:
    return list(ENGINES)


@app.command(rich_help_panel=PANEL, epilog=examples("run"))
def run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    only: OnlyOption = None,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="Take over what another of these runs has finished.")
    ] = False,
    nproc: Annotated[
        int, typer.Option("--nproc", metavar="N", help="Processes on this machine.", min=1)
    ] = 1,
    engine: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            autocompletion=_engines,
            help="What they share: ddp (gradients), fsdp2 or zero3 (weights), or the file of an "
            "accelerate configuration.",
        ),
    ] = "ddp",
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Run a recipe: train its stages, score its models, write the report.

    What is done already is skipped, what was cut off goes on from its last checkpoint. A changed
    recipe runs only the stages that depend on the change.
    """
    if nproc > 1 and ranks() == 1:
        arguments = without_options(sys.argv[1:], "--nproc", "--engine")
        raise typer.Exit(launch(arguments, nproc, engine=engine))
    display = shown_on(as_json)
    from dominie.pipeline import run_recipe
    from dominie.recipe import load_recipe, only_models

    with only_json(as_json):
        loaded = load_recipe(recipe, overrides or ())
        if only:
            loaded = only_models(loaded, only.split(","))
        speaks = is_first()
        folder = run_recipe(loaded, runs, display, reuse=reuse)
    if speaks:
        conclude(folder, display, as_json, stages=loaded.stages)


@app.command(rich_help_panel=PANEL, epilog=examples("sweep"))
def sweep(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            "--over",
            metavar="KEY=V1,V2",
            help="Values to run the recipe under; several make a grid.",
            autocompletion=completion.varied,
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="0-4", help="Seeds to run each point under.")
    ] = None,
    only: OnlyOption = None,
    best_by: Annotated[
        str | None,
        typer.Option(
            "--best-by",
            metavar="TASK+TASK",
            help="Choose each model's values by the mean of these tasks, of a validation split.",
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", metavar="N", help="Runs at a time; the cores there are.")
    ] = None,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Run a recipe under many values and seeds, in parallel, into one table of results.

    What is done is skipped, and stages that depend on the same are trained once.
    """
    display = shown_on(as_json)
    told: list[str] = []
    with only_json(as_json):
        from dominie.sweep.command import sweep_recipe

        sweep_recipe(
            recipe,
            over=over or (),
            seeds=seeds,
            fixed=overrides or (),
            only=only.split(",") if only else (),
            best_by=best_by.split("+") if best_by else (),
            jobs=jobs,
            runs=runs,
            display=display,
            print_json=told.append if as_json else None,
        )
    for line in told:
        typer.echo(line)
