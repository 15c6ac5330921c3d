"""Verbs for before anything is spent: init, check, plan, cache."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from dominie.cli.app import JsonOption, OverridesArgument, RecipeArgument, RunsOption, app
from dominie.cli.manual import examples
from dominie.cli.output import only_json, shown_on

PANEL = "Before anything is spent"


def _templates() -> list[str]:
    """What may stand after --template: `dominie.starting` knows them, and is slow to import."""
    return ["kd", "kd-dae", "dae", "2x7b"]


@app.command(rich_help_panel=PANEL, epilog=examples("init"))
def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Made if it is not there.", show_default=False)
    ],
    template: Annotated[
        str,
        typer.Option(metavar="NAME", help="kd, kd-dae, dae or 2x7b.", autocompletion=_templates),
    ] = "kd-dae",
) -> None:
    """Write a first recipe and example data into a folder.

    The recipe runs as it stands, offline, on tiny models. Its comments say where your own models
    and data go.
    """
    from dominie.starting import start

    for path in start(folder, template):
        print(f"wrote {path}")
    print(f"\nnext: dominie check {folder / 'recipe.yaml'}")


@app.command(rich_help_panel=PANEL, epilog=examples("check"))
def check(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Check a recipe, its data, chat templates and tokenizers; show what is trained on.

    Nothing is trained. What lies on a hub that cannot be reached is listed as not checked.
    """
    display = shown_on(as_json)
    from dominie.checking import check_recipe
    from dominie.recipe import load_recipe

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
    """Say what a recipe's stages need in memory, time and money, from configurations alone."""
    display = shown_on(as_json)
    with only_json(as_json):
        from dominie.planning.plan import machine, plan_recipe
        from dominie.planning.printing import as_json as plan_object
        from dominie.planning.printing import as_lines, misfit
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
            "--estimate", help="Say what it would cost and keep, from a sample; write nothing."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write down what the teachers of stages with `cache` say; training then needs no teacher.

    What is there already is kept, what is damaged is computed again.
    """
    display = shown_on(as_json)
    from dominie.pipeline import cache_recipe
    from dominie.recipe import load_recipe

    with only_json(as_json):
        loaded = load_recipe(recipe, overrides or ())
        found = cache_recipe(loaded, runs, display, estimate=estimate)
    if as_json:
        typer.echo(json.dumps(found))
