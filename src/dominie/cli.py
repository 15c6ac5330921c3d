"""The verbs of the command line. Nothing heavy is imported until one of them runs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import dominie
from dominie.errors import DominieError

if TYPE_CHECKING:
    from dominie.display import Display

app = typer.Typer(
    name="dominie",
    help="Train small language models from large ones; align them to a domain without forgetting.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe, a YAML file.", show_default=False)
]
OptionalRecipeArgument = Annotated[
    Path | None, typer.Argument(metavar="RECIPE", help="A recipe.", show_default=False)
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Values that replace the recipe's: stages.align.train.epochs=1",
        show_default=False,
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
) -> None:
    if version:
        typer.echo(f"dominie {dominie.__version__}")
        raise typer.Exit


@app.command()
def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Made if it is not there.", show_default=False)
    ],
    template: Annotated[
        str, typer.Option(metavar="NAME", help="kd, kd-dae, dae or 2x7b.")
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


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    only: OnlyOption = None,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="Take over what another of these runs has finished.")
    ] = False,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Run a recipe: train its stages, score its models, write the report.

    What is done already is skipped, what was cut off goes on from its last checkpoint. A changed
    recipe runs only the stages that depend on the change.
    """
    display = _display(as_json)
    from dominie.pipeline import run_recipe
    from dominie.recipe import load_recipe, only_models

    with _only_json(as_json):
        loaded = load_recipe(recipe, overrides or ())
        if only:
            loaded = only_models(loaded, only.split(","))
        folder = run_recipe(loaded, runs, display, reuse=reuse)
    _conclude(folder, display, as_json)


@app.command()
def evaluate(
    recipe: OptionalRecipeArgument = None,
    overrides: OverridesArgument = None,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
    from_annotations: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="No recipe: win rates of an AlpacaEval annotation file.",
            show_default=False,
        ),
    ] = None,
    difficulty: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With it: AlpacaEval's df_gamed.csv, for length control as upstream.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Score a recipe's models on its tasks, without training."""
    if (recipe is None) == (from_annotations is None):
        raise typer.BadParameter("one of the two: RECIPE, or --from-annotations FILE")
    if difficulty is not None and from_annotations is None:
        raise typer.BadParameter("--difficulty goes with --from-annotations")
    display = _display(as_json)
    if from_annotations is not None:
        from dominie.judged_scores import annotated_win_rates

        told = annotated_win_rates(from_annotations, difficulty, display)
        if as_json:
            typer.echo(json.dumps(told))
        return
    from dominie.pipeline import evaluate_recipe
    from dominie.recipe import load_recipe

    assert recipe is not None, "checked above"
    folder = evaluate_recipe(load_recipe(recipe, overrides or ()), runs, display)
    _conclude(folder, display, as_json)


@app.command()
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
    display = _display(as_json)
    from dominie.pipeline import cache_recipe
    from dominie.recipe import load_recipe

    with _only_json(as_json):
        loaded = load_recipe(recipe, overrides or ())
        found = cache_recipe(loaded, runs, display, estimate=estimate)
    if as_json:
        typer.echo(json.dumps(found))


@app.command()
def sweep(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            "--over",
            metavar="KEY=V1,V2",
            help="Values to run the recipe under; several make a grid.",
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
    display = _display(as_json)
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
        print_json=typer.echo if as_json else None,
    )


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, runs/NAME.")],
) -> None:
    """Write a run's report again from what lies in its folder."""
    from dominie.report import write_report

    typer.echo(write_report(run_folder))


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Folders of runs.", show_default=False)
    ],
    x: Annotated[str | None, typer.Option("--x", metavar="TASK", help="The task across.")] = None,
    y: Annotated[str | None, typer.Option("--y", metavar="TASK", help="The task upwards.")] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="MODEL", help="Show paired differences to this model."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page to write.")] = Path(
        "compare.html"
    ),
) -> None:
    """Draw the models of several runs on the plane of two tasks, with their Pareto front."""
    from rich.console import Console

    from dominie.report import compare_runs, comparison_table, write_comparison

    comparison = compare_runs(runs, across=x, upwards=y, against=against)
    write_comparison(comparison, out)
    Console(highlight=False, soft_wrap=True).print(comparison_table(comparison))
    typer.echo(f"plane  {out}")


@app.command()
def check(
    recipe: RecipeArgument, overrides: OverridesArgument = None, runs: RunsOption = Path("runs")
) -> None:
    """Check a recipe, its data, its chat templates and its tokenizers, without training."""
    display = _display(as_json=False)
    from dominie.pipeline import check_recipe
    from dominie.recipe import load_recipe

    check_recipe(load_recipe(recipe, overrides or ()), runs, display)


@app.command()
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
    display = _display(as_json)
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


def _only_json(as_json: bool) -> contextlib.AbstractContextManager[object]:
    """Within, what libraries print goes to stderr where stdout is for JSON."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def _display(as_json: bool) -> Display:
    """Where words go: stdout, or stderr when stdout is for JSON."""
    from rich.console import Console

    from dominie.display import Display

    _quiet_libraries()
    return Display(Console(stderr=as_json, highlight=False, soft_wrap=True))


def _quiet_libraries() -> None:
    """Keep other people's progress bars and advice out of ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _conclude(folder: Path, display: Display, as_json: bool) -> None:
    """What was made, where, and the next thing to do."""
    from dominie.report import results_table

    if as_json:
        results = folder / "results.json"
        found: Any = json.loads(results.read_text()) if results.exists() else {}
        typer.echo(json.dumps({"run": str(folder), "results": found}))
        return
    if (folder / "results.json").exists():
        display.console.print(results_table(folder))
    display.line(f"models  {folder}/*/model")
    display.line(f"report  {folder / 'report.html'}")


class _Stopped(BaseException):
    """A signal came. No `Exception`, so that nothing on its way mistakes it for a failure."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


def _stop(signum: int, _: FrameType | None) -> None:
    raise _Stopped(signum)


def main() -> None:
    """Run the command line; every error becomes one message and an exit status."""
    debug = "--debug" in sys.argv
    if debug:  # wherever it stands
        sys.argv = [sys.argv[0], "--debug", *(a for a in sys.argv[1:] if a != "--debug")]
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):  # while a stage trains, it listens itself
            signal.signal(signum, _stop)
    try:
        status = app(prog_name="dominie", standalone_mode=False)
    except _Stopped as stopped:
        name = signal.Signals(stopped.signum).name
        _fail(f"interrupted by {name}; what was done is kept", 128 + stopped.signum, debug)
    except DominieError as error:
        _fail(str(error), error.exit_status, debug)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if (show := getattr(error, "show", None)) is not None:  # click's usage errors
            show()
            _hint_at_override(error)
            sys.exit(2)
        _fail(_unforeseen(error), 1, debug)
    sys.exit(status if isinstance(status, int) else 0)


def _unforeseen(error: Exception) -> str:
    """The message of an error that nobody put into words."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}\n  do        {_ADVICE['OSError']}"
    kind = type(error).__name__
    advice = _ADVICE.get(kind, "run again with --debug and report this")
    return f"{kind}: {error}\n  do        {advice}"


_ADVICE = {
    "SafetensorError": "make room; the same command goes on from what is done",
    "OSError": "make room or mend permissions; the same command goes on from what is done",
    "OutOfMemoryError": "lower train.micro_batch or train.max_length, "
    "or set train.gradient_checkpointing=true",
}


def _hint_at_override(error: Exception) -> None:
    """Overrides are written without dashes, which those of many other programs have."""
    name = str(getattr(error, "option_name", "")).lstrip("-")
    if "." in name:
        print(f"  do        write overrides without dashes: {name}=VALUE", file=sys.stderr)


def _fail(message: str, status: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
