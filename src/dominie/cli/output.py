"""Where output goes: progress and results, or one JSON object on stdout."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dominie.core.distributed import is_main_process
from dominie.core.run_reader import read_results

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
    from rich.console import Console

    from dominie.core.display import Display

    with only_json(as_json):
        _quiet_libraries()
    return Display(
        Console(stderr=as_json, highlight=False, soft_wrap=True, quiet=not is_main_process())
    )


def _quiet_libraries() -> None:
    """Switch off progress bars and warnings of libraries."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")
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
