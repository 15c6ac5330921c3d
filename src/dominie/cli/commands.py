"""Commands that prepare and train: init, check, plan, cache, run, sweep."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from dominie.cli.main import (
    JsonOption,
    OnlyOption,
    OverridesArgument,
    RecipeArgument,
    RunsOption,
    app,
)
from dominie.cli.output import display_for, examples, offered_keys, only_json, print_summary
from dominie.core.distributed import is_main_process, world_size
from dominie.core.launch import ENGINES, launch, without_options

PANEL = "Before anything is spent"


#: The names of `dominie.workflows.init.TEMPLATES`, which is slow to import.
TEMPLATES = ["kd", "kd-dae", "dae", "2x7b", "served", "answers"]


@app.command(rich_help_panel=PANEL, epilog=examples("init"))
def init(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Created if it does not exist.", show_default=False),
    ],
    template: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="kd, kd-dae, dae, 2x7b, served or answers. Default: kd-dae; dae with --model.",
            autocompletion=lambda: TEMPLATES,
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A folder, GGUF file or hub id to align: settings follow from its size and "
            "this machine's memory.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a first recipe and example data into a folder.

    The recipe runs unchanged, offline, on tiny models, or on the model that is given. Its comments
    mark where your own models and data go.
    """
    from dominie.workflows.init import start

    for path in start(folder, template, model=model):
        print(f"wrote {path}")
    print(f"\nnext: dominie check {folder / 'recipe.yaml'}")


@app.command(rich_help_panel=PANEL, epilog=examples("check"))
def check(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Check a recipe, its data, chat templates and tokenizers; show the supervised text.

    Nothing is trained. If a hub cannot be reached, what is on it is listed as not checked.
    """
    display = display_for(as_json)
    from dominie.recipe import load_recipe
    from dominie.workflows.check import check_recipe

    with only_json(as_json):
        checked = check_recipe(load_recipe(recipe, overrides or ()), runs, display)
    if as_json:
        typer.echo(json.dumps(checked.as_dict()))
    else:
        display.line(f"\nnext: dominie run {shlex.join([str(recipe), *(overrides or ())])}")


@app.command(rich_help_panel=PANEL, epilog=examples("plan"))
def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="h200, h100, a100, …; without it, this machine's."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(metavar="N", help="How many; h100 unless named.")
    ] = None,
    memory: Annotated[float | None, typer.Option(metavar="GB", help="Of each GPU.")] = None,
    price: Annotated[float | None, typer.Option(metavar="X", help="Of a GPU hour.")] = None,
    conversations: Annotated[
        int | None, typer.Option(metavar="N", help="In a source whose data are not here.", min=1)
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Of a conversation, the mean.", min=1)
    ] = None,
    sharded: Annotated[
        bool, typer.Option("--shard/--no-shard", help="Whether several GPUs share the weights.")
    ] = True,
    efficiency: Annotated[
        float, typer.Option(metavar="X", help="Share of the roofline's rate that is reached.")
    ] = 0.4,
    as_json: JsonOption = False,
) -> None:
    """Estimate the memory, time and cost of a recipe's stages, from configurations alone."""
    display = display_for(as_json)
    with only_json(as_json):
        from dominie.planning.plan import machine, plan_recipe
        from dominie.planning.plan_output import as_json as plan_object
        from dominie.planning.plan_output import as_lines, misfit
        from dominie.recipe import load_recipe

        on = machine(
            gpu=gpu, gpus=gpus, memory=memory, price=price, sharded=sharded, efficiency=efficiency
        )
        planned = plan_recipe(
            load_recipe(recipe, overrides or ()), on, conversations=conversations, tokens=tokens
        )
    if as_json:
        typer.echo(json.dumps(plan_object(planned)))
    else:
        for line in as_lines(planned):
            display.line(line)
    if (error := misfit(planned)) is not None:
        raise error


@app.command(rich_help_panel=PANEL, epilog=examples("cache"))
def cache(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    runs: RunsOption = Path("runs"),
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate", help="Estimate time, size and fidelity from a sample; write nothing."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Cache the predictions of teachers for stages with `cache`; training then needs no teacher.

    Existing entries are kept, damaged ones are computed again.
    """
    display = display_for(as_json)
    from dominie.recipe import load_recipe
    from dominie.workflows.pipeline import cache_recipe

    with only_json(as_json):
        loaded = load_recipe(recipe, overrides or ())
        found = cache_recipe(loaded, runs, display, estimate=estimate)
    if as_json:
        typer.echo(json.dumps(found))


PANEL = "Training"


@app.command(rich_help_panel=PANEL, epilog=examples("run"))
def run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    only: OnlyOption = None,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="Link stages that another run has finished.")
    ] = False,
    nproc: Annotated[
        int, typer.Option("--nproc", metavar="N", help="Processes on this machine.", min=1)
    ] = 1,
    engine: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            autocompletion=lambda: list(ENGINES),
            help="What they share: ddp (gradients), fsdp2 or zero3 (weights), or the file of an "
            "accelerate configuration.",
        ),
    ] = "ddp",
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Run a recipe: train its stages, score its models, write the report.

    Finished stages are skipped, an interrupted one goes on from its last checkpoint. A changed
    recipe runs only the stages that depend on the change.
    """
    if nproc > 1 and world_size() == 1:
        arguments = without_options(sys.argv[1:], "--nproc", "--engine")
        raise typer.Exit(launch(arguments, nproc, engine=engine))
    display = display_for(as_json)
    from dominie.recipe import load_recipe
    from dominie.workflows.pipeline import run_recipe

    with only_json(as_json):
        loaded = load_recipe(recipe, overrides or ())
        is_main = is_main_process()  # before evaluation ends the process group
        folder = run_recipe(
            loaded, runs, display, reuse=reuse, only=only.split(",") if only else None
        )
    if is_main:
        print_summary(folder, display, as_json, stages=loaded.stages)


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
            autocompletion=offered_keys,
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

    Finished runs are skipped, and equal stages are trained once.
    """
    display = display_for(as_json)
    lines: list[str] = []
    with only_json(as_json):
        from dominie.workflows.sweep import sweep_recipe

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
            print_json=lines.append if as_json else None,
        )
    for line in lines:
        typer.echo(line)
