"""Where words go: to a person, or out of the way of JSON."""

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
    """Within, what libraries and the programs they start print goes to stderr, stdout is JSON's."""
    if not as_json:
        yield
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)  # a compiler that DeepSpeed starts knows no `sys.stdout`
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def shown_on(as_json: bool) -> Display:
    """Where words go: stdout, or stderr when stdout is for JSON."""
    from rich.console import Console

    from dominie.core.display import Display

    with only_json(as_json):
        _quiet_libraries()
    return Display(
        Console(stderr=as_json, highlight=False, soft_wrap=True, quiet=not is_main_process())
    )


def _quiet_libraries() -> None:
    """Keep other people's progress bars and advice out of ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    # DeepSpeed sets its level anew when it is imported, and then tells stdout about a missing GPU.
    logging.getLogger("DeepSpeed").addFilter(_is_grave)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        with contextlib.suppress(ImportError):
            backend = importlib.import_module("deepspeed.comm.torch")
            vars(backend)["print"] = lambda *_: None  # each process tells what it has built
    import transformers

    transformers.logging.set_verbosity_error()
    if not is_main_process():
        logging.getLogger("dominie").setLevel(logging.ERROR)  # what the first process says, too
    transformers.logging.disable_progress_bar()


def _is_grave(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within, Ctrl-C interrupts what is under way, and need not end the program."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def conclude(folder: Path, display: Display, as_json: bool, *, stages: Collection[str]) -> None:
    """What was made, where, and the next thing to do.

    Args:
        folder: of the run.
        display: where to say it.
        as_json: say it as an object.
        stages: of the recipe that was run; others' models may lie beside them.
    """
    from dominie.report import results_table

    if as_json:
        typer.echo(json.dumps({"run": str(folder), "results": read_results(folder)}))
        return
    if (folder / "results.json").exists():
        display.console.print(results_table(folder))
    made = {k: v for k, v in finished_stages(folder).items() if k in stages}
    width = max(map(len, made), default=0)
    for place, (name, size) in enumerate(made.items()):
        head = "models" if place == 0 else ""
        display.line(f"{head:<8}{name:<{width}}  {folder / name / 'model'}{size}")
    display.line(f"report  {folder / 'report.html'}")
    if made:
        two = ",".join(list(made)[-2:])
        publish = f"hf upload ORG/NAME {folder / list(made)[-1] / 'model'}"
        steps = {f"dominie chat {folder}:{two}": "talk to them", publish: "after its README.md"}
        for place, (command, why) in enumerate(steps.items()):
            display.line(f"{'next' if place == 0 else '':<8}{command}   # {why}")


def finished_stages(folder: Path) -> dict[str, str]:
    """The stages of a run that are done, in dependency order, each with its size in words."""
    from dominie.core.run_records import read_run
    from dominie.report.formatting import size

    return {
        stage.name: f"   {size(stage.parameters)} parameters"
        for stage in read_run(folder).stages.values()
        if stage.done and (folder / stage.name / "model").is_dir()
    }
