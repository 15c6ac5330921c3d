"""The evidence: every method beside every baseline, over seeds, on the toy world.

Runs the groups of ``evidence.yaml`` in their order, as many processes at a time as there are
cores, each with one thread. Rows are appended to ``results/evidence.csv`` as runs end; what has
ended is not run again, and after ``--minutes`` no further run is begun. Prints an estimate first.

    python benchmarks/evidence.py [--quick | --gpu] [--json] [--minutes 115] [--jobs 2]
    python benchmarks/evidence.py --summary [--write]

``--quick`` is the same path on tiny settings, within 50 seconds on two cores, and leaves the
results alone. ``--gpu`` is the heart of the comparison with larger models, one run at a time,
within ten minutes on one large GPU; its rows go to ``results/evidence-gpu.csv``. It runs recipes,
so pydantic, ruamel.yaml, typer, rich and datasets have to be there (bring them as wheels where
there is no network); `benchmarks/gpu.sh` needs none of them. ``--summary`` prints the tables of
docs/evidence.md from the rows that are there; ``--write`` puts them there,
and draws its pictures.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from ruamel.yaml import YAML

from dominie.core.display import Display
from dominie.core.hardware import cores
from dominie.recipe import Recipe, load_recipe
from dominie.workflows.sweep import run_trials
from dominie.workflows.sweep_trials import Trial, grid, rows_of, seeds_of

sys.path.insert(0, str(Path(__file__).parent / "parts"))
from evidence_scatter import scatter
from evidence_tables import tables

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

HERE = Path(__file__).parent
RESULTS = {
    "groups": HERE / "results" / "evidence.csv",
    "gpu": HERE / "results" / "evidence-gpu.csv",
}
COLUMNS = (
    "group", "run", "setting", "seed", "model", "task", "score", "stderr", "n",
    "steps", "tokens", "seconds", "generation_seconds", "teacher_seconds",
)  # fmt: skip

BEGIN, END = "<!-- tables -->", "<!-- /tables -->"  # in docs/evidence.md

#: Groups and settings that are drawn, and the models.
PICTURES = (("base", ""), ("noise", ""))
DRAWN = (
    "distill", "expert", "gentle", "asft", "mix", "mix_balanced", "labels_and_reference",
    "labels_and_reference_balanced", "dae", "dae_balanced", "seqkd", "seqkd_balanced",
    "tune_then_recover", "arithmetic_30", "arithmetic_50", "arithmetic_70", "arithmetic_85",
)  # fmt: skip

#: Seconds a step of 32 conversations took, two runs on two cores, by what it computes; to begin a
#: run, score a model, and let one write answers. For the estimate alone.
STEP = {
    "teacher": 0.09, "labels": 0.05, "prediction": 0.065, "attention": 0.04, "two": 0.017,
    "own": 0.1,
}  # fmt: skip
START, SCORED, WRITTEN = 12.0, 8.0, 15.0


def trials_of(group: dict[str, Any], chosen: dict[str, Any]) -> list[Trial]:
    """The runs of one group of evidence.yaml."""
    recipe = (HERE / group["recipe"]).resolve()
    stages = load_recipe(recipe).stages
    settings = {
        key: value
        for key, value in {**chosen, **group.get("set", {})}.items()
        if not key.startswith("stages.") or key.split(".")[1] in stages
    }
    return grid(
        recipe,
        [f"{key}={','.join(map(str, values))}" for key, values in group.get("grid", {}).items()],
        seeds=seeds_of(str(group["seeds"])),
        fixed=[f"{key}={_written(value)}" for key, value in settings.items()],
        only=group.get("only", ()),
        prefix=group["name"],
    )


def _written(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def estimate(trials: Sequence[Trial]) -> float:
    """Seconds on one core; what two runs share is counted once."""
    known: set[str] = set()
    total = 0.0
    for trial in trials:
        recipe = trial.loaded()
        total += START + SCORED * len(recipe.evaluate.models if recipe.evaluate else ())
        for name in recipe.stages:
            key = _key(recipe, name)
            if key not in known:
                known.add(key)
                total += _seconds(recipe, name)
    return total


def _key(recipe: Recipe, name: str) -> str:
    """What a stage depends on, as far as the recipe says it."""
    if name not in recipe.stages:
        return f"{name} {recipe.train.seed}"
    stage = recipe.stages[name]
    data = [recipe.data[s].path if s in recipe.data else _key(recipe, s) for s in stage.sources]
    told = asdict(stage.renamed(lambda model: _key(recipe, model)))
    text = json.dumps([told, data], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _seconds(recipe: Recipe, name: str) -> float:
    stage = recipe.trained.get(name)
    if stage is None:
        return WRITTEN if recipe.stages[name].kind == "answers" else 1.0
    terms = {t for source in stage.active for t, v in asdict(stage.loss_on(source)).items() if v}
    step = STEP["prediction"] if "prediction" in terms else STEP["labels"]
    step = STEP["teacher"] if stage.student.endswith(":teacher") else step
    parent = recipe.stages.get(stage.student)
    step += STEP["two"] if parent and parent.kind == "upcycle" else 0.0
    step += STEP["attention"] if "attention" in terms else 0.0
    step += STEP["own"] if any(source.on_policy for source in stage.data.values()) else 0.0
    return (stage.train.steps or 0) * step * stage.train.batch / 32


def flat_rows(group: str, trial: Trial, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a run as the CSV holds them."""
    setting = " ".join(f"{key}={value}" for key, value in trial.values.items())
    for row in rows_of(trial, folder):
        flat = row.flat() | parts_of(folder / trial.name / row.model)
        yield {**{c: flat.get(c) for c in COLUMNS}, "group": group, "setting": setting}


def parts_of(stage: Path) -> dict[str, float]:
    """Seconds of generation and of teachers, of a stage whose student answers; else nothing."""
    if not (metrics := stage / "metrics.jsonl").exists():
        return {}
    found: dict[str, float] = {}
    for line in map(json.loads, metrics.read_text(encoding="utf-8").splitlines()):
        for part in ("generation_seconds", "teacher_seconds"):
            if part in line:
                found[part] = round(found.get(part, 0.0) + line[part], 3)
    return found


def appended(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a CSV file, with a head where it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none where there is none."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _which(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a row of a CSV file tells."""
    return row["run"], row["model"], row["task"]


def write_docs(rows: list[dict[str, str]], docs: Path) -> None:
    """The tables into the page of the evidence, and its pictures beside it."""
    page = docs / "evidence.md"
    text = page.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    page.write_text(f"{head}{BEGIN}\n{tables(rows)}\n{END}{tail}", encoding="utf-8")
    there = {(row["group"], row["setting"]) for row in rows}
    told = [row for row in rows if row["model"] in DRAWN]
    for trial in PICTURES:
        if trial in there:
            drawing = scatter(told, trial, least=0.5)
            (docs / f"evidence-{trial[0]}.svg").write_text(drawing, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    plans = parser.add_mutually_exclusive_group()
    plans.add_argument("--quick", action="store_true", help="tiny settings, results left alone")
    plans.add_argument("--gpu", action="store_true", help="larger models, on one GPU")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument("--summary", action="store_true", help="tables of the rows there are")
    parser.add_argument("--write", action="store_true", help="the summary into docs/evidence.md")
    parser.add_argument("--only", help="groups of these names alone, with commas between")
    parser.add_argument("--minutes", type=float, default=115, help="begin no run after these")
    parser.add_argument(
        "--jobs", type=int, help="runs at a time: the cores there are, one on a GPU"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    options = parser.parse_args()
    part = "quick" if options.quick else "gpu" if options.gpu else "groups"
    if options.summary:
        rows = read(RESULTS[part])
        if options.write:
            write_docs(rows, HERE.parent / "docs")
        else:
            print(tables(rows))
        return
    jobs = options.jobs or (1 if options.gpu else cores())
    plan = YAML(typ="safe", pure=True).load((HERE / "evidence.yaml").read_text(encoding="utf-8"))
    groups = [g for g in plan[part] if not options.only or g["name"] in options.only.split(",")]
    chosen = plan["chosen"] if part == "groups" else {}
    names: dict[str, str] = {}
    trials: list[Trial] = []
    for group in groups:
        for trial in trials_of(group, chosen):
            assert trial.name not in names, f"two runs of one name: {trial.name}"
            trials.append(trial)
            names[trial.name] = group.get("beside", group["name"])
    display = Display(Console(highlight=False, soft_wrap=True, stderr=options.json))
    about = "" if options.gpu else f", about {estimate(trials) / jobs / 60:.0f} minutes"
    display.line(f"{len(trials)} runs{about} with {jobs} at a time")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "runs" if options.quick else options.runs.resolve()
        results = Path(scratch) / "evidence.csv" if options.quick else RESULTS[part]
        written = {_which(row) for row in read(results)}

        def finished(trial: Trial) -> None:
            rows = list(flat_rows(names[trial.name], trial, folder))
            appended(results, [row for row in rows if _which(row) not in written])
            for row in rows if options.json else ():
                print(json.dumps(row), flush=True)

        run_trials(
            trials,
            folder,
            jobs=jobs,
            display=display,
            finished=finished,
            deadline=time.monotonic() + 60 * options.minutes,
        )
        if not options.json:
            print(tables(read(results)))


if __name__ == "__main__":
    main()
