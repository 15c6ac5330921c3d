"""What commands print: results, progress, JSON; and what `--help` adds to their options."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dominie.core.distributed import is_main_process
from dominie.core.errors import printable

if TYPE_CHECKING:
    from dominie.core.display import Display


@contextlib.contextmanager
def only_json(as_json: bool) -> Iterator[None]:
    """Send what libraries and child processes print in the block to stderr, if stdout is JSON."""
    if not as_json:
        yield
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)  # a compiler that DeepSpeed starts does not use `sys.stdout`
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def display_for(as_json: bool) -> Display:
    """Return a display that writes to stdout, or to stderr if stdout is for JSON."""
    from dominie.core.display import Display, PlainConsole

    with only_json(as_json):
        _quiet_libraries()
    return Display(PlainConsole(stderr=as_json, quiet=not is_main_process()))


def _quiet_libraries() -> None:
    """Switch off progress bars and warnings of libraries."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_PrintableFormatter())
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    # DeepSpeed resets its level when it is imported, and then logs a missing GPU to stdout.
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        with contextlib.suppress(ImportError):
            backend = importlib.import_module("deepspeed.comm.torch")
            vars(backend)["print"] = lambda *_: None  # each rank prints its build
    import transformers

    transformers.logging.set_verbosity_error()
    if not is_main_process():
        logging.getLogger("dominie").setLevel(logging.ERROR)  # the main process logs it
    transformers.logging.disable_progress_bar()


class _PrintableFormatter(logging.Formatter):
    """Writes out control characters, which names of files and of models may have."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in the block, instead of ending the program."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def print_summary(
    folder: Path, display: Display, as_json: bool, *, stages: Collection[str]
) -> None:
    """Print the results of a run, its models and report, and commands to go on with.

    Args:
        folder: of the run.
        display: to print on.
        as_json: print one JSON object.
        stages: of the recipe; the folder may hold models of others.
    """
    from dominie.core.results_file import read_results
    from dominie.report import results_table

    if as_json:
        typer.echo(json.dumps({"run": str(folder), "results": read_results(folder)}))
        return
    if (folder / "results.json").exists():
        display.console.print(results_table(folder))
    models = {k: v for k, v in finished_stages(folder).items() if k in stages}
    width = max(map(len, models), default=0)
    for place, (name, size) in enumerate(models.items()):
        head = "models" if place == 0 else ""
        display.line(f"{head:<8}{name:<{width}}  {folder / name / 'model'}{size}")
    display.line(f"report  {folder / 'report.html'}")
    if models:
        two = ",".join(list(models)[-2:])
        publish = f"hf upload ORG/NAME {folder / list(models)[-1] / 'model'}"
        steps = {f"dominie chat {folder}:{two}": "talk to them", publish: "after its README.md"}
        for place, (command, why) in enumerate(steps.items()):
            display.line(f"{'next' if place == 0 else '':<8}{command}   # {why}")


def finished_stages(folder: Path) -> dict[str, str]:
    """Return the finished stages with a model, in dependency order, each with its size as text."""
    from dominie.core.run_records import read_run
    from dominie.report.formatting import size

    return {
        stage.name: f"   {size(stage.parameters)} parameters"
        for stage in read_run(folder).stages.values()
        if stage.done and (folder / stage.name / "model").is_dir()
    }


#: By verb: example commands, each with a comment.
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "init": (
        ("dominie init shop", "the whole method: KD, an expert, DAE"),
        ("dominie init shop --template dae", "teach your own model a domain"),
        ("dominie init shop --model model.gguf", "the same, with settings for that model"),
    ),
    "check": (
        ("dominie check shop/recipe.yaml", "before anything is spent"),
        ("dominie check shop/recipe.yaml models.small.path=org/model", "with another student"),
    ),
    "plan": (
        ("dominie plan mine.yaml", "on this machine"),
        ("dominie plan mine.yaml --gpus 8 --memory 80 --price 2.5", "on eight GPUs, in money"),
        ("dominie plan mine.yaml --gpu h200 --conversations 500000", "data not here yet"),
    ),
    "cache": (
        ("dominie cache mine.yaml --estimate", "time, size and fidelity"),
        ("dominie cache mine.yaml", "write what is missing or damaged"),
    ),
    "run": (
        ("dominie run mine.yaml", "everything; run it again to go on"),
        ("dominie run mine.yaml stages.align.train.epochs=1", "with another value"),
        ("dominie run mine.yaml train.report_to=tensorboard", "watched in TensorBoard"),
        ("dominie run mine.yaml --only align", "one model and what it needs"),
        ("dominie run mine.yaml --nproc 8", "on eight GPUs"),
    ),
    "sweep": (
        ("dominie sweep mine.yaml --over stages.align.data.domain.share=0.1,0.5", "a grid"),
        ("dominie sweep mine.yaml --seeds 0-4 --jobs 2", "five seeds, two at a time"),
    ),
    "evaluate": (
        ("dominie evaluate mine.yaml", "score what has been trained"),
        ("dominie evaluate --from-annotations annotations.json --json", "of AlpacaEval"),
    ),
    "report": (("dominie report runs/mine", "after copying a run here, for example"),),
    "compare": (
        ("dominie compare runs/one runs/two", "as a scatter plot of their first two tasks"),
        ("dominie compare runs/a runs/b --x general --y domain --against distill", ""),
    ),
    "chat": (
        ("dominie chat runs/mine", "its last stage"),
        ("dominie chat runs/mine:distill,align", "side by side"),
        ('echo "Hello" | dominie chat mine:align other:align', "from a script"),
    ),
    "rollouts": (
        ("dominie rollouts mine:align", "the twenty worst"),
        ("dominie rollouts mine:align --step 200 --source shop", ""),
    ),
}

SEE_ALSO = (
    "**Begin with** `dominie init shop`, `dominie check shop/recipe.yaml`, "
    "`dominie run shop/recipe.yaml`.\n\n"
    "**Any value of a recipe** can be set on the command line, as in `train.seed=1`.\n\n"
    "**Exit status**: 0 done, 1 the run failed, 2 the input is at fault, 130 or 143 interrupted "
    "with its work saved; the same command goes on."
)


def examples(verb: str) -> str:
    """Return the examples of a verb as Markdown, for the end of its help."""
    width = max(len(command) for command, _ in EXAMPLES[verb])
    one_line = width + 2 + max(len(why) for _, why in EXAMPLES[verb]) <= 74
    lines = []
    for command, why in EXAMPLES[verb]:
        if one_line or not why:
            lines.append(f"{command:<{width}}  {f'# {why}' if why else ''}".rstrip())
        else:
            lines += [f"# {why}", command]
    return "\n".join(["**Examples**", "", "```sh", *lines, "```"])


def offered_keys(ctx: typer.Context) -> list[str]:
    """Complete a key of the recipe that was typed before, as its file has it."""
    from ruamel.yaml import YAML

    with contextlib.suppress(Exception):  # a message would land in the user's command line
        # While an option waits for its value, the arguments before it are in `args`.
        path = Path(ctx.params.get("recipe") or ctx.args[0])
        text = (path / "recipe.yaml" if path.is_dir() else path).read_text("utf-8")
        return [f"{key}=" for key in _flat_keys(YAML(typ="safe", pure=True).load(text))]
    return []


def _flat_keys(tree: Mapping[str, Any]) -> Iterator[str]:
    """Yield the dotted keys of nested mappings."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from (f"{name}.{key}" for key in _flat_keys(value))
        else:
            yield str(name)


def offered_runs(ctx: typer.Context) -> list[str]:
    """Complete the name of a run."""
    from dominie.core.run_reader import runs_in

    return runs_in(_runs(ctx))


def offered_models(ctx: typer.Context) -> list[str]:
    """Complete a run, or `RUN:STAGE`."""
    models = (path.parent for path in _runs(ctx).glob("*/*/model"))
    return [*offered_runs(ctx), *(f"{stage.parent.name}:{stage.name}" for stage in models)]


def offered_answers(ctx: typer.Context) -> list[str]:
    """Complete a `RUN:STAGE` whose student has answered in its training."""
    stages = (path.parent for path in _runs(ctx).glob("*/*/rollouts"))
    return [f"{stage.parent.name}:{stage.name}" for stage in stages]


def _runs(ctx: typer.Context) -> Path:
    return Path(ctx.params.get("runs") or "runs")
