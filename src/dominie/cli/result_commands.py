"""Commands about results: evaluate, report, compare, chat, rollouts."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer

from dominie.cli.main import JsonOption, OptionalRecipeArgument, OverridesArgument, RunsOption, app
from dominie.cli.output import (
    display_for,
    examples,
    interruptible,
    offered_answers,
    offered_models,
    offered_runs,
    only_json,
    print_summary,
)

PANEL = "Results"


@app.command(rich_help_panel=PANEL, epilog=examples("evaluate"))
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
    display = display_for(as_json)
    if from_annotations is not None:
        with only_json(as_json):
            from dominie.stages.judged import annotated_win_rates

            rates = annotated_win_rates(from_annotations, difficulty, display)
        if as_json:
            typer.echo(json.dumps(rates))
        return
    assert recipe is not None, "checked above"
    with only_json(as_json):
        from dominie.recipe import load_recipe
        from dominie.workflows.pipeline import evaluate_recipe

        loaded = load_recipe(recipe, overrides or ())
        folder = evaluate_recipe(loaded, runs, display)
    print_summary(folder, display, as_json, stages=loaded.stages)


@app.command(rich_help_panel=PANEL, epilog=examples("report"))
def report(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="A run: its folder, or its name.",
            show_default=False,
            autocompletion=offered_runs,
        ),
    ],
    runs: RunsOption = Path("runs"),
) -> None:
    """Write a run's report again from the files in its folder."""
    from dominie.core.run_reader import found_run
    from dominie.report import write_report

    typer.echo(write_report(found_run(run, runs)))


@app.command(rich_help_panel=PANEL, epilog=examples("compare"))
def compare(
    wanted: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Runs: folders, or names.",
            show_default=False,
            autocompletion=offered_runs,
        ),
    ],
    runs: RunsOption = Path("runs"),
    x: Annotated[
        str | None,
        typer.Option("--x", metavar="TASK", help="The task across."),
    ] = None,
    y: Annotated[
        str | None,
        typer.Option("--y", metavar="TASK", help="The task upwards."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="MODEL",
            help="Show paired differences to this model.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page to write.")] = Path(
        "compare.html"
    ),
) -> None:
    """Draw the models of several runs as a scatter plot of two tasks, with their Pareto front."""
    from dominie.core.display import PlainConsole
    from dominie.core.run_reader import found_run
    from dominie.report import compare_runs, comparison_table, write_comparison

    found = [found_run(run, runs) for run in wanted]
    comparison = compare_runs(found, across=x, upwards=y, against=against)
    write_comparison(comparison, out)
    PlainConsole().print(comparison_table(comparison))
    for note in comparison.notes:
        typer.echo(f"note   {note}")
    typer.echo(f"page   {out}")


@app.command(rich_help_panel=PANEL, epilog=examples("chat"))
def chat(
    wanted: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN[:NAME,…]",
            help="A run and names of its models; its last stage without one.",
            show_default=False,
            autocompletion=offered_models,
        ),
    ],
    runs: RunsOption = Path("runs"),
    system: Annotated[str, typer.Option(metavar="TEXT", help="A system message.")] = "",
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0, help="Of sampling; 0 takes the likeliest token.")
    ] = 0.0,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Of the longest answer.")
    ] = 512,
    seed: Annotated[int, typer.Option(metavar="N", help="Of sampling.")] = 0,
) -> None:
    """Talk to models of a run, several of them side by side.

    Each line is a message; /reset begins anew, /quit leaves. Lines may be piped in.
    """
    from dominie.core.display import PlainConsole
    from dominie.generation.generator import Sampling
    from dominie.workflows.chat import chat as begin
    from dominie.workflows.chat import chat_models
    from dominie.workflows.chat_screens import screen, typed_lines

    progress = display_for(as_json=True)  # stdout is for the answers
    found = chat_models(wanted, runs, progress)
    console = PlainConsole()
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    with interruptible(), contextlib.suppress(KeyboardInterrupt):
        lines = typed_lines(console)
        begin(found, lines, screen(console, several=len(found) > 1), sampling, system)


@app.command(rich_help_panel=PANEL, epilog=examples("rollouts"))
def rollouts(
    wanted: Annotated[
        str,
        typer.Argument(
            metavar="RUN:STAGE",
            help="A stage whose student answers in its training.",
            show_default=False,
            autocompletion=offered_answers,
        ),
    ],
    runs: RunsOption = Path("runs"),
    step: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of this optimiser step alone.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(metavar="NAME", help="To conversations of this source alone.")
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Answers at most.")] = 20,
) -> None:
    """Show the answers that a student wrote in its training, those its teacher likes least first.

    The redder a token, the further the teacher is from the student there.
    """
    from dominie.core.display import PlainConsole
    from dominie.workflows.rollout_view import marked_answers, show_answers

    answers, tokenizer = marked_answers(wanted, runs, step=step, source=source)
    show_answers(answers[:limit], tokenizer, PlainConsole())
    if len(answers) > limit:
        typer.echo(f"{len(answers) - limit:,} more: --limit, --step, --source")
