"""One recipe on 8, 64 and 512 GPUs: where the time goes, and what a cache of the teacher saves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from dominie.core.hardware import NETWORK
from dominie.planning.cost import Cost, stage_cost
from dominie.planning.memory import CACHED_BYTES, needs_of, stage_memory
from dominie.planning.plan import Plan, StagePlan, machine, plan_recipe
from dominie.recipe import Recipe

#: Bytes a second that a machine reads from storage, where a cache lies: a parallel file system's.
_STORAGE = 5e9


def scale_page(
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
    head = ["GPUs", "GB a rank", "hours", "GPU hours", "products", "memory", "network", "bound by"]
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
        for bound in ("products", "memory", "network")
    ]
    hours = cost.hours
    return [f"{peak / 1e9:.0f}", f"{hours:.2f}", f"{hours * count:.0f}", *shares, cost.bound]


def _from_cache(stage: StagePlan) -> tuple[Cost, float] | None:
    """The same stage when its teachers' predictions are read; None where maps are compared."""
    situation, work = stage.situation, stage.work
    if situation is None or work is None or not situation.teachers or situation.attention:
        return None
    cached = dataclasses.replace(situation, teachers=needs_of(situation.teachers, "cached"))
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
    tokens = max(stage.work.tokens / stage.situation.train.epochs for stage in taught)  # type: ignore[union-attr]
    fastest = max(stage.cost.tokens_per_second for stage in taught)  # type: ignore[union-attr]
    return (
        f"A cache of 64 tokens a position takes {CACHED_BYTES} bytes a position: "
        f"{tokens * CACHED_BYTES / 1e12:.2f} TB for these data, read at "
        f"{fastest * CACHED_BYTES / 1e9:.2f} GB/s by {plan.machine.count} GPUs "
        f"(a machine's network gives {NETWORK / 1e9:.0f} GB/s a GPU, its storage about "
        f"{_STORAGE / 1e9:.0f} GB/s)."
    )
