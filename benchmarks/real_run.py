"""A pretrained chat model aligned to a domain by DAE, on real text: before and after.

The model is tuned on the domain's rows alone, the expert; and, from where it began, by DAE: on the
domain's rows taught by the expert, on general ones by itself as it was. Before and after each it is
scored on held-out rows: by its answers in the domain, and by how far its predictions on general
answers are from those it made at first (KL in nats a token, and top-1 agreement).

    python benchmarks/real_run.py --domain FILE --general FILE (--model FOLDER | --gguf FILE…)
                                  [--metric exact_match …] [--steps 150] [--seconds 180]
                                  [--runs FOLDER] [--quick] [--json]

``--model`` is a folder or hub id; ``--gguf`` a GGUF file, or the parts of one in their order, which
needs the package `gguf`. Data are in any layout that dominie reads; of AlpacaEval's annotations,
which it does not, the first outputs are taken. Rows are printed as models are scored, so that what
is stopped leaves some; after ``--seconds`` no further model is trained. ``--quick`` takes three
steps and scores four rows; without data and model these are the toy world's.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _results
from _results import GPU, Deadline, Row

import dominie

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator, Sequence

#: Of the table, and of the recipe.
MODELS = {"before": "original", "expert": "expert", "DAE": "align"}
TOY = {
    "model": "toyworld:student",
    "domain": "toyworld:domain?rows=80",
    "general": "toyworld:general?rows=80",
}


def recipe_of(options: Namespace, *, model: str, domain: str, general: str) -> dict[str, Any]:
    """The recipe of the run."""
    steps, asked = (3, 4) if options.quick else (options.steps, 100)
    held_out = {"test_fraction": 0.25, "validation_fraction": 0.0}
    scored = {"source": "domain", "limit": asked}
    return {
        "name": "card",
        "models": {"original": {"path": model}},
        "data": {
            "domain": {"path": domain, **held_out},
            "general": {"path": general, **held_out},
        },
        "train": {
            "precision": "bf16" if GPU else "fp32",
            "learning_rate": 1e-4,
            "max_length": 256 if options.quick else 512,
            "batch": 4 if options.quick else 32,
            "micro_batch": 4 if options.quick else 32,
            "log_every": 10,
            "checkpoint_every": 1000,  # of a step of a tenth of a second, one costs twenty
        },
        "stages": {
            "expert": {
                "student": "original",
                "data": {"domain": 1.0},
                "loss": {"next_token": 1.0},
                "train": {"steps": max(3, steps // 3)},
            },
            "align": {
                "student": "original",
                "data": {
                    "domain": {"share": 0.25, "teacher": "expert"},
                    "general": {"share": 0.75, "teacher": "original"},
                },
                "loss": {"prediction": 1.0},
                "train": {"steps": steps},
            },
        },
        "evaluate": {
            "models": {name: name for name in MODELS.values()},
            "tasks": {
                "general": {
                    "source": "general", "metric": "agreement", "teacher": "original",
                    "limit": asked,
                },
                **{
                    metric: {**scored, "metric": metric, "max_new_tokens": 16 if options.quick
                             else 128}
                    for metric in options.metric
                },
            },
        },
    }  # fmt: skip


def rows(options: Namespace, deadline: Deadline) -> Iterator[Row]:
    """One for each model, as soon as it is scored."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.runs or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        recipe = recipe_of(
            options,
            model=joined(options.gguf, folder) if options.gguf else options.model,
            domain=options.domain,
            general=readable(options.general, folder),
        )
        for name, model in MODELS.items():
            if deadline.passed:
                print(f"out of time: no {name}", file=sys.stderr)
                continue
            begun = time.perf_counter()
            with contextlib.redirect_stdout(sys.stderr):
                run = dominie.run(recipe, runs=folder, only=[model])
            found = run.results[model]
            steps = recipe["stages"].get(model, {"train": {"steps": 0}})["train"]["steps"]
            yield {
                "model": name,
                **{metric: rounded(found[metric]["score"]) for metric in options.metric},
                "general_kl": round(found["general"]["kl"], 6),
                "general_agreement": rounded(found["general"]["score"]),
                "general_loss": rounded(found["general"]["loss"]),
                "asked": found[options.metric[0]]["n"],
                "steps": steps,
                "seconds": round(time.perf_counter() - begun, 1),
            }


def joined(parts: Sequence[Path], folder: Path) -> str:
    """The path of a GGUF file; of several parts in their order, that of one which has them all."""
    if len(parts) == 1:
        return str(parts[0].absolute())
    file = folder / "joined.gguf"
    with file.open("wb") as whole:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, whole)
    return str(file.absolute())


def readable(path: str, folder: Path) -> str:
    """The data's path, or that of their copy in a layout that dominie reads."""
    if not path.endswith(".json") or not Path(path).is_file():
        return path
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if not (found and isinstance(found, list) and {"instruction", "output_1"} <= found[0].keys()):
        return path
    copy = folder / "general.jsonl"
    lines = ({"instruction": row["instruction"], "output": row["output_1"]} for row in found)
    copy.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(copy)


def rounded(value: float) -> float:
    return round(value, 4)


def main() -> None:
    parser = _results.parser(__doc__, timed=True)
    parser.add_argument("--model", help="folder or hub id")
    parser.add_argument("--gguf", type=Path, nargs="+", help="a GGUF file, or its parts in order")
    parser.add_argument("--domain", help="rows to align to")
    parser.add_argument("--general", help="rows on which nothing may be forgotten")
    parser.add_argument("--metric", nargs="+", default=["exact_match"], help="of answers")
    parser.add_argument("--steps", type=int, default=150, help="of DAE; the expert has a third")
    parser.add_argument("--runs", type=Path, help="keep the run in this folder")
    options = parser.parse_args()
    if options.quick and not any((options.model, options.gguf, options.domain, options.general)):
        vars(options).update(TOY)
    if not (options.domain and options.general and bool(options.model) != bool(options.gguf)):
        parser.error("--domain, --general and either --model or --gguf are needed")
    found = _results.gathered(rows(options, Deadline(options.seconds)), as_json=options.json)
    note = (
        f"Domain: `{options.domain}`, general: `{options.general}`, {options.steps} steps of DAE."
    )
    _results.finish("real_run", "A real model on real text", found, options, note=note)


if __name__ == "__main__":
    main()
