"""Examples at the end of `--help`, and completion of runs, their models and recipe keys."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

#: By verb: example commands, each with a comment.
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "init": (
        ("dominie init shop", "the whole method: KD, an expert, DAE"),
        ("dominie init shop --template dae", "teach your own model a domain"),
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


def _runs(ctx: typer.Context) -> Path:
    return Path(ctx.params.get("runs") or "runs")
