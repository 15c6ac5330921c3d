"""The evidence on a pretrained chat model and real text: every method beside every baseline.

Of `real_models.yaml`, under each seed: DAE beside what tunes on the domain, mixes labels or learns
from written text; and a student of two thirds of the layers, cut from its teacher, by labels,
predictions and attention. Scored are the entities found in held-out sentences (F1), HellaSwag (the
likeliest ending, by bytes), and KL(original ‖ model) on held-out general answers. The blocks of a
seed run in the order of their importance, each a `dominie run` of one thread; rows are appended to
`results/real-models.csv` as blocks end, and what is there is not run again. An estimate comes
first.

    python benchmarks/real_models.py --model MODEL --domain FOLDER --general FILE --hellaswag FILE
                                     [--seeds 0-2] [--minutes 150] [--jobs 1] [--runs FOLDER]
                                     [--json]
    python benchmarks/real_models.py --summary [--write]
    python benchmarks/real_models.py --quick [--json]

MODEL is a folder or a GGUF file; the data are those of docs/real-run.md, in the layouts that
`examples/real_model/prepare.py` reads. ``--summary`` prints the tables of docs/evidence-real.md
from the rows that are there, ``--write`` puts them there. ``--quick`` runs every arm on a tiny
model and words of the toy world, and leaves the results alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from evidence import HERE, appended, flat_rows, read
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dominie.core.display import Display
from dominie.toyworld.toy_models import WORDS, word_tokenizer
from dominie.workflows.sweep import run_trials
from dominie.workflows.sweep_trials import Trial, grid, seeds_of

sys.path.insert(0, str(HERE.parent / "examples" / "real_model"))
sys.path.insert(0, str(HERE / "parts"))
from prepare import as_choice, as_instruction, rows_of, write_rows
from real_model_tables import tables

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RECIPE = HERE / "real_models.yaml"
RESULTS = HERE / "results" / "real-models.csv"
PAGE = HERE.parent / "docs" / "evidence-real.md"
BEGIN, END = "<!-- tables -->", "<!-- /tables -->"
#: Characters of the longest sentence, and of the longest instruction with its answer: an arm is to
#: take minutes on one core.
SENTENCE, ANSWERED = 180, 420
PROMPTS = 140  # of the general rows, the first so many are answered anew for SeqKD

#: Blocks of a seed, the first first: their models, and seconds on one core with AMX, measured.
#: A block after another finds the stages it shares done.
ALIGN: dict[str, tuple[tuple[str, ...], int]] = {
    "align": (("original", "expert", "dae"), 600),
    "mix": (("mix", "labels_and_reference"), 500),
    "text": (("seqkd", "tune_then_recover"), 550),
    "alone": (("lora", "asft"), 350),
    "conversations": (("dae_conversations", "mix_conversations"), 500),
}
CUT: dict[str, tuple[tuple[str, ...], int]] = {
    "cut": (("cut", "cut_labels", "cut_prediction", "cut_attention", "random_prediction"), 450),
    "longer": (("cut_labels_longer", "cut_prediction_longer"), 250),
}
ALIGNED, CUTS = ([m for models, _ in part.values() for m in models] for part in (ALIGN, CUT))
FIRST, LAST = ("align", "mix", "text", "cut", "alone", "longer"), ("conversations",)


def trials(inputs: Path, seeds: Sequence[int], more: Sequence[str] = ()) -> dict[str, Trial]:
    """The runs by name: seed by seed, a block each; what matters less after all seeds.

    Args:
        inputs: the folder that `prepared` has filled.
        more: further overrides of the recipe.
    """
    paths = json.loads((inputs / "paths.json").read_text(encoding="utf-8"))
    fixed = [f"{key}={value}" for key, value in paths.items()]
    moved = "evaluate.tasks={moved: {source: general, metric: forgetting, teacher: original}}"
    found = {}
    for block, seed in [(b, s) for part in (FIRST, LAST) for s in seeds for b in part]:
        models, _ = {**ALIGN, **CUT}[block]
        tasks = [moved] if block in CUT else []
        for trial in grid(
            RECIPE, [], seeds=[seed], fixed=[*fixed, *tasks, *more], only=models, prefix=block
        ):
            found[trial.name] = trial
    return found


def prepared(options: argparse.Namespace, folder: Path) -> Path:
    """Put data and the model of random weights into a folder, with the paths for the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    task = folder / options.domain.resolve().name
    shutil.copytree(options.domain, task, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for file in task.glob("t*.json"):
        write_rows(file, [row for row in rows_of(file) if len(row["sentences"]) <= SENTENCE])
    general = [as_instruction(row) for row in rows_of(options.general)]
    general = [row for row in general if sum(map(len, row.values())) <= ANSWERED]
    write_rows(folder / "general.jsonl", general)
    write_rows(folder / "prompts.jsonl", general[:PROMPTS])
    write_rows(folder / "hellaswag.jsonl", [as_choice(row) for row in rows_of(options.hellaswag)])
    return with_paths(folder, options.model.resolve(), task)


def with_paths(folder: Path, model: Path, domain: Path) -> Path:
    """Write a model of random weights with two thirds of the layers, and where all of it is."""
    given: dict[str, Any] = {"gguf_file": model.name} if model.is_file() else {}
    place = model.parent if model.is_file() else model
    config = AutoConfig.from_pretrained(place, **given)
    layers = config.num_hidden_layers * 2 // 3
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)
    random = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    random.save_pretrained(folder / "random")
    AutoTokenizer.from_pretrained(place, **given).save_pretrained(folder / "random")
    paths: dict[str, Any] = {
        "models.original.path": model,
        "models.random.path": folder / "random",
        "data.domain.path": domain,
        "data.general.path": folder / "general.jsonl",
        "data.prompts.path": folder / "prompts.jsonl",
        "data.hellaswag.path": folder / "hellaswag.jsonl",
        "stages.cut.prune.layers": layers,
    }
    text = json.dumps({key: str(value) for key, value in paths.items()}, indent=1)
    (folder / "paths.json").write_text(text, encoding="utf-8")
    return folder


def toy(folder: Path) -> Path:
    """A tiny model that knows the toy world's words, and rows of these, for `--quick`."""
    folder.mkdir(parents=True)
    tokenizer = word_tokenizer()
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    begins = {"domain": "red", "hellaswag": "blue", "general": "green", "prompts": "green"}
    for name, begin in begins.items():
        rows = [
            {
                "prompt": " ".join([begin, *WORDS[i : i + 3]]),
                "completion": WORDS[i],
                "options": [WORDS[i], WORDS[i + 1]],
            }
            for i in range(40)
        ]
        write_rows(folder / f"{name}.jsonl", rows)
    return with_paths(folder, folder / "model", folder / "domain.jsonl")


#: Overrides of `--quick`. The words of the toy world are no entities; what knows nothing yet ends
#: its answers now and then only if they are drawn.
QUICK = (
    "train.steps=2", "train.precision=fp32", "stages.cut_labels_longer.train.steps=2",
    "stages.cut_prediction_longer.train.steps=2", "evaluate.tasks.entities.metric=exact_match",
    "stages.expert_wrote.answers.temperature=1.0", "stages.old_wrote.answers.temperature=1.0",
)  # fmt: skip


def write_page(rows: Sequence[Mapping[str, str]]) -> None:
    """Put the tables into the page."""
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    tail = rest.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n{tables(rows, ALIGNED, CUTS)}\n{END}{tail}", encoding="utf-8")


def main() -> None:
    """Read the command line and run, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, results left alone")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument("--summary", action="store_true", help="tables of the rows there are")
    parser.add_argument("--write", action="store_true", help=f"the summary into docs/{PAGE.name}")
    for name in ("model", "domain", "general", "hellaswag"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--seeds", default="0-2", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=150, help="begin no run after these")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one core each")
    parser.add_argument("--runs", type=Path, default=Path("runs/real-models"))
    options = parser.parse_args()
    if options.summary:
        if options.write:
            write_page(read(RESULTS))
        else:
            print(tables(read(RESULTS), ALIGNED, CUTS))
        return
    given = [options.model, options.domain, options.general, options.hellaswag]
    if not options.quick and None in given:
        parser.error("--model, --domain, --general and --hellaswag are needed, or --quick")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    display = Display(Console(highlight=False, soft_wrap=True, stderr=options.json))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "runs" if options.quick else options.runs.resolve()
        results = Path(scratch) / "rows.csv" if options.quick else RESULTS
        if options.quick:
            runs = quick_trials(toy(Path(scratch) / "input"))
        else:
            runs = trials(prepared(options, folder / "input"), seeds_of(options.seeds))
            written = {row["run"] for row in read(results)}
            runs = {name: trial for name, trial in runs.items() if name not in written}
            blocks = {**ALIGN, **CUT}
            seconds = sum(blocks[name.rpartition("-seed")[0]][1] for name in runs)
            display.line(f"{len(runs)} runs, about {seconds / options.jobs / 60:.0f} minutes")

        def finished(trial: Trial) -> None:
            rows = list(flat_rows(trial.name.rpartition("-seed")[0], trial, folder))
            appended(results, rows)
            for row in rows if options.json else ():
                print(json.dumps(row), flush=True)

        run_trials(
            list(runs.values()),
            folder,
            jobs=options.jobs,
            display=display,
            finished=finished,
            deadline=time.monotonic() + 60 * options.minutes,
        )
        if not options.json:
            print(tables(read(results), ALIGNED, CUTS))


def quick_trials(inputs: Path) -> dict[str, Trial]:
    """All blocks as one run, which is as long as its start takes."""
    every = trials(inputs, [0], QUICK)
    first = next(iter(every.values()))
    only = tuple(model for trial in every.values() for model in trial.only)
    (trial,) = grid(RECIPE, [], seeds=[0], fixed=first.fixed, only=only, prefix="quick")
    return {trial.name: trial}


if __name__ == "__main__":
    main()
