"""Prints a plan: lines for a terminal, and the object of `--json`."""

from __future__ import annotations

from typing import Any

from dominie.core.errors import InputError
from dominie.planning.plan import Plan, StagePlan
from dominie.planning.sizes import Shape

_GB = 1e9


def as_json(plan: Plan) -> dict[str, Any]:
    """The whole plan; memory in GB (10⁹ bytes) of a rank."""
    on = plan.machine
    return {
        "recipe": plan.recipe.name,
        "machine": {
            "gpu": on.device.name,
            "gpus": on.count,
            "memory_gb": _gb(on.memory),
            "sharded": on.sharded,
            "price": on.price,
            "efficiency": on.efficiency,
        },
        "fits": plan.fits,
        "hours": _total_hours(plan),
        "money": None if on.price is None else round(_total_hours(plan) * on.price * on.count, 2),
        "stages": {
            name: {**_stage(stage), "not_counted": _not_counted(plan, name)}
            for name, stage in plan.stages.items()
        },
    }


def _stage(stage: StagePlan) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": stage.kind,
        "parameters": stage.shape.parameters if stage.shape else 0,
        "active_parameters": stage.shape.active if stage.shape else 0,
        "peak_gb": _gb(stage.peak),
        "fits": stage.fits,
    }
    if stage.memory is None or stage.work is None or stage.cost is None:
        hours = round(stage.cost.hours, 4) if stage.cost else 0.0
        return {**found, "trainable_parameters": 0, "hours": hours}
    memory, work, cost = stage.memory, stage.work, stage.cost
    return {
        **found,
        "trainable_parameters": round(memory.traced.trainable),
        "teachers": {
            name: {"parameters": shape.parameters, "active_parameters": shape.active}
            for name, shape in stage.teachers.items()
        },
        "peak_phase": memory.peak_phase,
        "memory": {name: _gb(size) for name, size in memory.items.items()},
        "phases": {name: _gb(size) for name, size in memory.totals.items()},
        "activations": {name: _gb(size) for name, size in stage.activations.items()},
        "host_gb": _gb(memory.host),
        "rows": work.rows,
        "length": work.length,
        "steps": work.steps,
        "conversations": work.conversations,
        "tokens": round(work.tokens),
        "data_known": work.known,
        "flops_per_token": {
            "student": cost.student_flops,
            "teachers": cost.teacher_flops,
        },
        "bound": cost.bound,
        "tokens_per_second": round(cost.tokens_per_second, 1),
        "hours": round(cost.hours, 4),
        "money": None if stage.money is None else round(stage.money, 2),
        "fix": stage.fix
        and {
            "change": stage.fix.text,
            "how": list(stage.fix.how),
            "peak_gb": _gb(stage.fix.peak),
        },
        "measures": {text: _gb(peak) for text, peak in stage.measures},
    }


def as_lines(plan: Plan) -> list[str]:
    """The plan for a person to read."""
    on = plan.machine
    many = f"{on.count} × " if on.count > 1 else ""
    how = "" if on.count == 1 else ", sharded" if on.sharded else ", a whole copy on each"
    lines = [f"planned for {many}{on.device.name}, {on.memory / _GB:.0f} GB each{how}"]
    for stage in plan.stages.values():
        lines += ["", *_stage_lines(stage)]
        lines += [f"  not counted: {each}" for each in _not_counted(plan, stage.name)]
    lines += ["", _sum_line(plan)]
    unknown = [n for n, s in plan.stages.items() if s.work is not None and not s.work.known]
    if unknown:
        sizes = [s.conversations for s in plan.sizes.values() if not s.known]
        lines.append(
            f"assumed, since the data are not here: {max(sizes):,} conversations to train on in a "
            "source, as long as max_length allows; --conversations and --tokens say otherwise"
        )
    lines.append(
        f"hours are at {on.efficiency:.0%} of the roofline's rate (--efficiency); "
        f"rates: {on.device.source}"
    )
    return lines


def _not_counted(plan: Plan, name: str) -> list[str]:
    """What a stage spends beside its planned hours."""
    stage = plan.recipe.trained.get(name)
    if stage is None:
        return []
    whole = sum(stage.data[source].share for source in stage.active)
    own = [stage.data[s].share / whole * (stage.data[s].on_policy or 0.0) for s in stage.active]
    lines = [
        f"the right answers of {source} that {stage.teacher_on(source)} reads beside the questions"
        for source in stage.active
        if stage.shown_on(source)
    ]
    if any(own):
        work = plan.stages[name].work
        answers = sum(own) * (work.conversations if work else 0)
        lines.append(
            f"the student's {answers:,.0f} answers, {stage.rollout_settings.lengths}: their "
            "generation (`python benchmarks/on_policy.py` measures its part of a step), and their "
            "tokens where the data have no answers"
        )
    return lines


def _stage_lines(stage: StagePlan) -> list[str]:
    limit = stage.machine.memory / _GB
    verdict = "fits" if stage.fits else "DOES NOT FIT"
    needs = f"{stage.peak / _GB:.2f} GB of {limit:.0f} GB"
    if stage.shape is None:
        hours = f"; {stage.cost.hours:,.2f} hours if no answer is shorter" if stage.cost else ""
        return [f"{stage.name}  data, made by {stage.kind}, not trained: {needs}, {verdict}{hours}"]
    head = f"{stage.name}  {_counted(stage.shape)}"
    if stage.memory is None or stage.work is None or stage.cost is None:
        return [f"{head}, made by {stage.kind}, not trained: {needs}, {verdict}"]
    memory, work, cost = stage.memory, stage.work, stage.cost
    trained = memory.traced.trainable
    head += ", all trained" if trained >= stage.shape.parameters else f", {_short(trained)} trained"
    lines = [head]
    for name, shape in stage.teachers.items():
        lines.append(f"  taught by {name}: {_counted(shape)}")
    lines.append(f"  batches of {work.rows} × {work.length} tokens a rank")
    width = max(len(name) for name in memory.items) + 2
    lines += [f"    {name:<{width}}{_bytes(size):>12}" for name, size in memory.items.items()]
    lines.append(
        f"    {'peak':<{width}}{_bytes(stage.peak):>12} of {limit:.0f} GB in the phase "
        f"“{memory.peak_phase}”: {verdict}"
    )
    both = ", ".join(f"{_bytes(size)} {name}" for name, size in stage.activations.items())
    lines.append(f"  activations: {both}")
    if memory.host:
        lines.append(f"  in the host's memory: {memory.host / _GB:.1f} GB a rank")
    lines.append(
        f"  {_flops(cost.student_flops)} a token, teachers {_flops(cost.teacher_flops)}; "
        f"{_short(work.tokens)} tokens in {work.steps:,} steps"
    )
    price = "" if stage.money is None else f", {stage.money:,.2f} in money"
    lines.append(
        f"  {cost.hours:,.2f} hours at {cost.tokens_per_second:,.0f} tokens/s, bound by "
        f"{cost.bound}{price}"
    )
    if not stage.fits:
        lines += [f"  {line}" for line in _advice(stage)]
    return lines


def _advice(stage: StagePlan) -> list[str]:
    lines = []
    if stage.fix is not None:
        lines.append(f"to make it fit: {stage.fix.text} ({stage.fix.peak / _GB:.1f} GB)")
        lines += [f"    {how}" for how in stage.fix.how]
    lines += [f"{text}: {peak / _GB:.1f} GB" for text, peak in stage.measures]
    return lines


def misfit(plan: Plan) -> InputError | None:
    """What to tell, and to leave with, if a stage does not fit; None if all do."""
    failing = [stage for stage in plan.stages.values() if not stage.fits]
    if not failing:
        return None
    first = failing[0]
    gigabytes = plan.machine.memory / _GB
    do = "lower train.max_length, choose smaller models, or more and larger GPUs"
    if first.fix is not None:
        do = f"{first.fix.text}: {' '.join(first.fix.how)}"
    rest = f"; nor {', '.join(stage.name for stage in failing[1:])}" if failing[1:] else ""
    return InputError(
        f"stage {first.name} does not fit{rest}",
        where=plan.recipe.name,
        expected=f"at most {gigabytes:.1f} GB on each {plan.machine.device.name}",
        found=f"{first.peak / _GB:.1f} GB",
        do=do,
    )


def _sum_line(plan: Plan) -> str:
    hours = _total_hours(plan)
    price = plan.machine.price
    money = "" if price is None else f", {hours * price * plan.machine.count:,.2f} in money"
    return (
        f"all stages: {hours:,.2f} hours on {plan.machine.count} {plan.machine.device.name}{money}"
    )


def _total_hours(plan: Plan) -> float:
    return round(sum(s.cost.hours for s in plan.stages.values() if s.cost), 4)


def _counted(shape: Shape) -> str:
    active = f" ({_short(shape.active)} active)" if shape.active < shape.parameters else ""
    return f"{_short(shape.parameters)} parameters{active}"


def _short(number: float) -> str:
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{letter}"
    return f"{number:.0f}"


def _flops(number: float) -> str:
    """Operations, by the prefixes of units: a billion of them is a giga."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f} {prefix}FLOP"
    return f"{number:,.0f} FLOP"


def _bytes(size: float) -> str:
    return f"{size / _GB:.2f} GB" if size >= 0.1 * _GB or not size else f"{size / 1e6:.2f} MB"


def _gb(size: float) -> float:
    return round(size / _GB, 4)
