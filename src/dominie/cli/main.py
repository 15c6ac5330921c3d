"""The application, the arguments that several commands share, and the entry point."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

import dominie
from dominie.cli.output import SEE_ALSO, offered_keys
from dominie.core.display import print_everything
from dominie.core.distributed import EXIT_PEER_LOST, is_peer_loss, report_error, world_size
from dominie.core.errors import DominieError
from dominie.core.launch import stop_with_launcher
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
    ),
]
OptionalRecipeArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe.",
        show_default=False,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Values that replace the recipe's: stages.align.train.epochs=1",
        show_default=False,
        autocompletion=offered_keys,
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


class _Stopped(BaseException):
    """A signal came. Not an `Exception`, so that no handler of failures catches it."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


def _stop(signum: int, _: FrameType | None) -> None:
    raise _Stopped(signum)


def main() -> None:
    """Run the command line: every error becomes one message and an exit status."""
    for stream in (sys.stdout, sys.stderr):
        print_everything(stream)
    debug = "--debug" in sys.argv
    if debug:  # at any place of the command line
        sys.argv = [sys.argv[0], "--debug", *(a for a in sys.argv[1:] if a != "--debug")]
    if threading.current_thread() is threading.main_thread():
        for signum in (
            signal.SIGINT,
            signal.SIGTERM,
        ):  # a stage in training has a handler of its own
            signal.signal(signum, _stop)
        stop_with_launcher()
    try:
        status = app(prog_name="dominie", standalone_mode=False)
    except _Stopped as stopped:
        name = signal.Signals(stopped.signum).name
        _fail(f"interrupted by {name}; what was done is kept", 128 + stopped.signum, debug)
    except DominieError as error:
        if is_peer_loss(error):
            _exit_after_peer_loss(debug)
        _fail(str(error), error.exit_status, debug)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if (show := getattr(error, "show", None)) is not None:  # click's usage errors
            show()
            _hint_at_override(error)
            sys.exit(2)
        if is_peer_loss(error):
            _exit_after_peer_loss(debug)
        _fail(_unexpected(error), 1, debug)
    sys.exit(status if isinstance(status, int) else 0)


def _unexpected(error: Exception) -> str:
    """Return the message for an error that is not dominie's own."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}\n  do        {_ADVICE['OSError']}"
    kind = type(error).__name__
    advice = "run again with --debug and report this"
    if kind != "SafetensorError" or "os error" in str(error):  # else it is an error in dominie
        advice = _ADVICE.get(kind, advice)
    return f"{kind}: {error}\n  do        {advice}"


_ADVICE = {
    "SafetensorError": "make room; the same command goes on from what is done",
    "OSError": "make room or correct permissions; the same command goes on from what is done",
    "OutOfMemoryError": "lower train.micro_batch or train.max_length, "
    "or set train.gradient_checkpointing=true",
}


def _hint_at_override(error: Exception) -> None:
    """Print that overrides are written without dashes, unlike in many other programs."""
    name = str(getattr(error, "option_name", "")).lstrip("-")
    if "." in name:
        print(f"  do        write overrides without dashes: {name}=VALUE", file=sys.stderr)


def _fail(message: str, status: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    report_error(message, status)
    _exit(status)


def _exit_after_peer_loss(debug: bool) -> NoReturn:
    """Exit silently: the process that was lost, or the launcher, prints the reason."""
    if debug:
        traceback.print_exc()
    _exit(EXIT_PEER_LOST)


def _exit(status: int) -> NoReturn:
    """Exit; at once if there are other ranks, as an open collective would block the exit."""
    if world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
