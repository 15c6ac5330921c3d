"""The application, and the arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import dominie
from dominie.cli import completion
from dominie.cli.help import SEE_ALSO
from dominie.models import spec as remote_code

app = typer.Typer(
    name="dominie",
    help="Train small language models from large ones; align them to a domain without forgetting.",
    no_args_is_help=True,
    epilog=SEE_ALSO,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe: a YAML file, or the folder of a recipe.yaml.",
        show_default=False,
        autocompletion=completion.recipes,
    ),
]
OptionalRecipeArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe.",
        show_default=False,
        autocompletion=completion.recipes,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Values that replace the recipe's: stages.align.train.epochs=1",
        show_default=False,
        autocompletion=completion.overrides,
    ),
]
RunsOption = Annotated[
    Path, typer.Option("--runs", metavar="DIR", help="Where run folders are made.")
]
OnlyOption = Annotated[
    str | None,
    typer.Option(
        "--only",
        metavar="MODEL,…",
        help="Score these models of `evaluate` alone, and train the stages they need.",
        autocompletion=completion.scored,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object; everything else goes to stderr.")
]


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # noqa: ARG001
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run Python code that lies beside a model; nothing else allows it.",
        ),
    ] = False,
) -> None:
    if version:
        typer.echo(f"dominie {dominie.__version__}")
        raise typer.Exit
    remote_code.allow(trust_remote_code)
