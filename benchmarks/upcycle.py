"""What makes the experts of an upcycled model part, and what it is worth, at equal tokens.

In the toy world a dense student is distilled for a while, and a sibling of it is tuned on the shop.
From there the dense student itself and mixtures of two experts made of it in different ways learn
the same conversations in the same order from the same teachers. Printed for each, on the held-out
splits: KL to the teacher and agreement with it on general conversations, loss on the shop's, exact
match on both, and what became of the experts.

    python benchmarks/upcycle.py [--quick] [--json] [--seeds 0 1 2] [--runs DIR]

`--quick` ends within 50 seconds on two cores and proves nothing. A full run writes a dated table to
`benchmarks/results`, takes about 6 minutes a seed on an idle core, and goes on from what `--runs
DIR` holds: seeds can be run one at a time.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import _results
import torch
import transformers
from torch import Tensor

from dominie.core.display import Display
from dominie.data.batch import collate
from dominie.data.row_store import Rows
from dominie.losses.router_losses import routing_sums
from dominie.models.loading import load_frozen
from dominie.models.moe import Routers
from dominie.models.spec import Model
from dominie.recipe import load_recipe
from dominie.workflows.pipeline import run_recipe

#: How each mixture is made.
MIXTURES: dict[str, dict[str, Any]] = {
    "copy": {"gate": "zeros"},
    "noise 0.1": {"gate": "zeros", "noise": 0.1},
    "noise 0.5": {"gate": "zeros", "noise": 0.5},
    "drop 0.5": {"gate": "zeros", "reset": 0.5},
    "random gate": {"gate": "random"},
    "hidden-state gate": {"gate": "hidden_states", "source": "general"},
    "siblings": {"gate": "zeros", "siblings": ["sibling"]},
    "top-1": {"gate": "hidden_states", "source": "general", "experts_per_token": 1},
}
#: Sources whose held-out questions are asked.
TASKS = ("general", "domain")


def recipe(seed: int, quick: bool) -> dict[str, Any]:
    """Everything of one seed as one recipe."""
    steps = 6 if quick else 300
    train = {
        "learning_rate": 2e-3,
        "batch": 32,
        "micro_batch": 32,
        "max_length": 32,
        "packing": False,
        "seed": seed,
        "evaluate_every": 10_000,
        "checkpoint_every": 10_000,
        "log_every": max(1, steps // 5),
    }
    # The general skills from the teacher, the shop from its conversations' answers.
    lesson = {
        "teacher": "teacher",
        "data": {
            "general": {"share": 0.8, "loss": {"prediction": 1.0}},
            "domain": {"share": 0.2, "loss": {"next_token": 1.0}},
        },
        "train": {"steps": steps},
    }
    stages: dict[str, Any] = {
        "teacher": {
            "student": "toyworld:teacher",
            "data": {"corpus": 1.0},
            "loss": {"next_token": 1.0},
            "train": {"steps": 10 if quick else 1000},
        },
        "start": {"student": "toyworld:student", **lesson, "train": {"steps": steps // 2}},
        "sibling": {
            "student": "start",
            "data": {"domain": 1.0},
            "loss": {"next_token": 1.0},
            "train": {"steps": steps // 2},
        },
        "dense": {"student": "start", **lesson},
    }
    for name, how in chosen(quick).items():
        key = slug(name)
        stages[f"made-{key}"] = {"upcycle": {"model": "start", "seed": seed, **how}}
        stages[key] = {"student": f"made-{key}", **lesson}
    fraction = {"validation_fraction": 0.1, "test_fraction": 0.2}
    rows = "?rows=240" if quick else ""
    return {
        "name": f"upcycle-{seed}",
        "data": {
            "corpus": {"path": f"toyworld:corpus{rows}"},
            "general": {"path": f"toyworld:general{rows}", **fraction},
            "domain": {"path": f"toyworld:domain{rows}", **fraction},
        },
        "train": train,
        "stages": stages,
        "evaluate": {
            "models": {name: name for name in stages if not name.startswith("made-")},
            "tasks": {source: {"source": source, "split": "test"} for source in TASKS},
            "batch": 256,
        },
    }


def chosen(quick: bool) -> dict[str, dict[str, Any]]:
    """The mixtures of a run."""
    few = ("copy", "hidden-state gate")
    return {name: how for name, how in MIXTURES.items() if not quick or name in few}


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def measured(run: Path, seed: int) -> Iterator[dict[str, Any]]:
    """One row for each model."""
    rows = _held_out_rows(run)
    scores = json.loads((run / "results.json").read_text())
    for name in ("start", "sibling", "dense", *MIXTURES):
        stage = run / slug(name)
        if slug(name) not in scores:  # --quick makes a few
            continue
        lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
        last = [line["evaluation"] for line in lines if "evaluation" in line][-1]
        row = {"seed": seed, "model": name, "domain": last["domain"]["next_token"]}
        row |= {
            key: last["general"][key] for key in ("divergence", "agreement") if name != "sibling"
        }
        row |= {f"{task}_score": scores[slug(name)][task]["score"] for task in TASKS}
        if name in MIXTURES:
            row |= experts(stage / "model", rows)
        yield row


def _held_out_rows(run: Path) -> list[Any]:
    """Some conversations of both sources' test splits, tokenised by the run."""
    found: list[Any] = []
    for file in sorted((run / "rows").rglob("test.arrow")):
        rows = Rows(file, "")
        found += [rows[i] for i in range(min(len(rows), 200))]
    return found


@torch.no_grad()
def experts(folder: Path, rows: Sequence[Any]) -> dict[str, float]:
    """What became of a model's experts: means over layers, on test conversations.

    `weights` is ‖W₀ − W₁‖ / ‖(W₀ + W₁)/2‖ over all of an expert; `outputs` the same of what the
    two compute on the same tokens; `entropy` that of the router in nats (log 2 = 0.69 is even), and
    `load` the smallest share of the routing weight that an expert of any layer has.
    """
    model = load_frozen(Model(path=str(folder)))
    routers = Routers(model)
    batch = collate([(0, row) for row in rows])
    real = (batch.source_ids >= 0).flatten()
    weights, outputs = [], []

    def compare(module: Any, inputs: Any) -> None:
        states = inputs[0].reshape(-1, inputs[0].shape[-1])[real]
        both = []
        for expert in range(2):
            index = torch.full((len(states), 1), expert)
            both.append(module.experts(states, index, torch.ones(len(states), 1)))
        outputs.append(_apart(*both))
        up, down = module.experts.gate_up_proj, module.experts.down_proj
        flat = [torch.cat([up[i].flatten(), down[i].flatten()]) for i in range(2)]
        weights.append(_apart(*flat))

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(compare)
    with routers.recorded() as layers:
        model.get_decoder()(**batch.model_inputs())
    sums = routing_sums(layers, real)
    sums /= sums[:, :-1].sum(-1, keepdim=True)
    return {
        "weights": statistics.mean(weights),
        "outputs": statistics.mean(outputs),
        "entropy": float(sums[:, -1].mean()),
        "load": float(sums[:, :-1].min()),
    }


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / ((one + other) / 2).norm())


def run_seed(seed: int, runs: Path, quick: bool) -> Iterator[dict[str, Any]]:
    """Train what is left of a seed; its rows."""
    path = runs / f"upcycle-{seed}.yaml"
    path.write_text(json.dumps(recipe(seed, quick), indent=1))  # JSON is YAML
    run_recipe(load_recipe(path), runs, Display(_quiet()))
    return measured(runs / f"upcycle-{seed}", seed)


def _quiet() -> Any:
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, object]]:
    """One row a model: means over seeds, with their standard deviations."""
    columns = {
        "KL, nats": ("divergence", 1, 3),
        "KL, of dense": ("of_dense", 1, 3),
        "agreement, %": ("agreement", 100, 1),
        "loss on the shop": ("domain", 1, 3),
        "general, %": ("general_score", 100, 1),
        "shop, %": ("domain_score", 100, 1),
        "weights apart": ("weights", 1, 2),
        "outputs apart": ("outputs", 1, 2),
        "router entropy": ("entropy", 1, 2),
        "least load": ("load", 1, 2),
    }
    dense = {row["seed"]: row["divergence"] for row in rows if row["model"] == "dense"}
    rows = [
        {**row, "of_dense": row["divergence"] / dense[row["seed"]]}
        if "divergence" in row and row["seed"] in dense
        else row
        for row in rows
    ]
    made = []
    order = ("start", "sibling", "dense", *MIXTURES)
    for name in sorted({row["model"] for row in rows}, key=order.index):
        own = [row for row in rows if row["model"] == name]
        cells: dict[str, object] = {"model": name, "seeds": len(own)}
        for title, (key, scale, digits) in columns.items():
            cells[title] = _mean([scale * row[key] for row in own if key in row], digits)
        made.append(cells)
    return made


def _mean(values: Sequence[float], digits: int) -> str | None:
    if not values:
        return None
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    parser = _results.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, help="where runs are kept and gone on with")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        runs = options.runs or Path(scratch)
        runs.mkdir(parents=True, exist_ok=True)
        seeds = options.seeds[:1] if options.quick else options.seeds
        made = (row for seed in seeds for row in run_seed(seed, runs, options.quick))
        (rows,) = _results.gathered(made, as_json=options.json).values()
    note = (
        "Mean over seeds ± their standard deviation. All learn the same conversations in the same\n"
        "order; `weights apart` and the columns after it are of the experts, see `experts` in the\n"
        "script. docs/moe.md says what follows."
    )
    _results.finish("upcycle", "Upcycling", {"": summary(rows)}, options, note=note)


if __name__ == "__main__":
    main()
