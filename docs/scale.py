"""Prints docs/scale.md from the planner; `--write` puts it there."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dominie.core.hardware import NETWORK
from dominie.planning.cost import Cost, placed, stage_cost
from dominie.planning.memory import CACHED_BYTES, stage_memory
from dominie.planning.plan import Plan, StagePlan, machine, plan_recipe
from dominie.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"
COUNTS, CONVERSATIONS, TOKENS = (8, 64, 512), 1_000_000, 1024

#: Bytes a second that a machine reads from storage, where a cache lies: a parallel file system's.
_STORAGE = 5e9

_BEFORE = """# Planning for many machines

`python docs/scale.py --write` printed this page: `recipes/mistral-7b.yaml` as `dominie plan` sees
it on 8, 64 and 512 H100 (80 GB), with a million conversations of 1,024 tokens in each source,
student and Mixtral sharded over all ranks, and a batch of 4,096 in the expert's stage too, which
512 ranks can share. No such run was made: these are bounds and their ratios, no measurements.
Hours are at 40 % of the bound that binds. `compute`, `memory` and `network` are the time that
each bound alone would take, as a share of the longest. Memory is for conversations as long as
`max_length` allows.
"""

_AFTER = """## What it means
- Compute binds at every size, so GPU hours stay what they are and the clock runs down with the
  GPUs; the teacher's forward is the largest saving there is. What moves is the distance to the next
  bound: the network needs a third to a half of the compute time in one machine, and more in
  several. It hides behind compute only while transfers overlap with computation.
- That distance is made of tokens in a forward pass. Every micro-batch gathers the student two or
  three times and the teacher once, whatever is in it: with half of the tokens in a micro-batch the
  network binds in distillation. More ranks at one batch leave less to each; at 512 a batch of 4,096
  leaves 8 conversations, one micro-batch, and no accumulation. More GPUs than that want a larger
  batch, which is another experiment.
- These machines have a network card for each GPU. With one card a machine the network is eight
  times slower and binds from the second machine on: shard within machines, copy between them.
- The teacher is most of the traffic in distillation (93 GB of Mixtral, 14.5 GB of the
  student a pass) and a fifth to a third of the FLOPs. A cache takes both away, and the stage's
  memory with it. Its price is storage: read once an epoch in order, it asks less than one storage
  system gives, so that reading it does not become the next bound. The attention term needs the
  teacher live: a stage with it cannot be cached, DAE can.
"""


def scale_tables(
    recipe: Recipe, *, gpu: str, counts: Sequence[int], conversations: int, tokens: int
) -> list[str]:
    """Markdown tables of a recipe's plan on several numbers of GPUs."""
    plans = {
        count: plan_recipe(
            recipe, machine(gpu=gpu, gpus=count), conversations=conversations, tokens=tokens
        )
        for count in counts
    }
    lines: list[str] = []
    for name in next(iter(plans.values())).stages:
        lines += [f"### {name}", "", *_stage_table(plans, name), ""]
    return lines


def _stage_table(plans: Mapping[int, Plan], name: str) -> list[str]:
    head = ["GPUs", "GB a rank", "hours", "GPU hours", "compute", "memory", "network", "bound by"]
    rows = []
    for count, plan in plans.items():
        stage = plan.stages[name]
        if stage.cost is None:
            continue
        rows.append([str(count), *_figures(stage, stage.cost, stage.peak)])
        if (cached := _from_cache(stage)) is not None:
            rows.append([f"{count}, cached teacher", *_figures(stage, *cached)])
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _figures(stage: StagePlan, cost: Cost, peak: float) -> list[str]:
    count = stage.machine.count
    shares = [
        f"{100 * cost.seconds[bound] / max(cost.seconds.values()):.0f} %"
        if bound in cost.seconds
        else "–"
        for bound in ("compute", "memory", "network")
    ]
    hours = cost.hours
    return [f"{peak / 1e9:.0f}", f"{hours:.2f}", f"{hours * count:.0f}", *shares, cost.bound]


def _from_cache(stage: StagePlan) -> tuple[Cost, float] | None:
    """The same stage when its teachers' predictions are read; None where maps are compared."""
    setup, work = stage.setup, stage.work
    if setup is None or work is None or not setup.teachers or setup.attention:
        return None
    cached = dataclasses.replace(setup, teachers=placed(setup.teachers, "cached"))
    memory = stage_memory(cached)
    cost = stage_cost(
        cached,
        device=stage.machine.device,
        tokens=work.tokens,
        steps=work.steps,
        trainable=memory.traced.trainable,
        shares={},
        efficiency=stage.machine.efficiency,
    )
    return cost, memory.peak


def cache_line(plan: Plan) -> str:
    """Size of the cache of a plan's taught tokens, and how fast it has to be read."""
    taught = [s for s in plan.stages.values() if s.work and s.teachers]
    tokens = max(stage.work.tokens / stage.setup.train.epochs for stage in taught)  # type: ignore[union-attr]
    fastest = max(stage.cost.tokens_per_second for stage in taught)  # type: ignore[union-attr]
    return (
        f"A cache of 64 tokens a position takes {CACHED_BYTES} bytes a position: "
        f"{tokens * CACHED_BYTES / 1e12:.2f} TB for these data, read at "
        f"{fastest * CACHED_BYTES / 1e9:.2f} GB/s by {plan.machine.count} GPUs "
        f"(a machine's network gives {NETWORK / 1e9:.0f} GB/s a GPU, its storage about "
        f"{_STORAGE / 1e9:.0f} GB/s)."
    )


def page() -> str:
    """The page of today's planner."""
    recipe = load_recipe(ROOT / "recipes" / "mistral-7b.yaml", ["stages.expert.train.batch=4096"])
    tables = scale_tables(
        recipe, gpu="h100", counts=COUNTS, conversations=CONVERSATIONS, tokens=TOKENS
    )
    largest = plan_recipe(
        recipe,
        machine(gpu="h100", gpus=COUNTS[-1]),
        conversations=CONVERSATIONS,
        tokens=TOKENS,
    )
    return "\n".join([_BEFORE, *tables, cache_line(largest), "", _AFTER])


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")
