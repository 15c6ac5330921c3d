"""From the rows of the evidence to the tables of docs/evidence.md."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dominie.core.task_result import estimate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dominie.core.task_result import Estimate

Row = dict[str, str]
#: (group, setting) → model → seed → task → score
Scores = dict[tuple[str, str], dict[str, dict[str, dict[str, float]]]]

BASE = ("base", "")
REFERENCE = "dae_balanced"
#: Scores of the tasks, and those whose score is exp(−KL(base ‖ model)).
TASKS, MOVED = ("general", "domain"), ("general_moved", "domain_moved")
NO_RIVALS = ("teacher", "untrained")  # models of another kind; nothing is beaten by them


def tables(rows: Sequence[Row]) -> str:
    """One table for every group and setting, in Markdown.

    `gain` is a model's domain score above the student's as a share of the expert's, `kept` its
    general score as a share of the student's; both run by run. Intervals are Student's 95 % over
    seeds; differences are to `REFERENCE` of the same run, a star where the interval leaves zero
    out. `KL` is KL(student ‖ model) in nats a token. `beaten by` names the first model that is
    better in one of general and domain beyond the interval of paired differences, and not worse in
    the other in the mean; who has none is on the Pareto front. Where the student answers,
    `generation` and `teacher` are parts of `s`.
    """
    scores = scores_of(rows)
    return "\n\n".join(
        f"### {' '.join(part for part in cell if part)}\n\n{_table(scores, cell, rows)}"
        for cell in scores
    )


def scores_of(rows: Sequence[Row]) -> Scores:
    """Scores of the test tasks by group and setting, model, seed and task."""
    found: Scores = {}
    for row in rows:
        if row["task"] in (*TASKS, *MOVED):
            cell = found.setdefault((row["group"], row["setting"]), {})
            seeds = cell.setdefault(row["model"], {})
            seeds.setdefault(row["seed"], {})[row["task"]] = float(row["score"])
    return found


def _table(scores: Scores, cell: tuple[str, str], rows: Sequence[Row]) -> str:
    models, base = scores[cell], scores.get(BASE, {})
    domain = any("domain" in tasks for seeds in models.values() for tasks in seeds.values())
    head = ["model", "seeds", "general %", *(["domain %", "gain %", "kept %"] if domain else [])]
    head += [f"general − {REFERENCE}", f"domain − {REFERENCE}"] if domain else []
    moved = any(MOVED[0] in tasks for seeds in models.values() for tasks in seeds.values())
    head += ["KL general", "KL domain"] if moved else []
    head += ["beaten by"] if domain else []
    head += ["tokens", "s"]
    split = any(r.get("generation_seconds") for r in rows if (r["group"], r["setting"]) == cell)
    head += ["generation %", "teacher %"] if split else []
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for model, seeds in models.items():
        cells = [model, str(len(seeds)), _percent(_over(seeds, "general"))]
        if domain:
            student, expert = (models.get(n) or base.get(n, {}) for n in ("distill", "expert"))
            cells += [
                _percent(_over(seeds, "domain")),
                _percent(_ratio(seeds, "domain", student, expert)),
                _percent(_ratio(seeds, "general", {}, student)),
            ]
            dae = models.get(REFERENCE) or base.get(REFERENCE, {})
            cells += [_difference(seeds, dae, task) for task in TASKS]
        cells += [_nats(seeds, task) for task in MOVED] if moved else []
        cells += [_beaten_by(model, models)] if domain else []
        cells += _cost(rows, cell, model)
        cells += _split(rows, cell, model) if split else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _over(seeds: Mapping[str, Mapping[str, float]], task: str) -> Estimate | None:
    values = [tasks[task] for tasks in seeds.values() if task in tasks]
    return estimate(values) if values else None


def _ratio(
    seeds: Mapping[str, Mapping[str, float]],
    task: str,
    zero: Mapping[str, Mapping[str, float]],
    one: Mapping[str, Mapping[str, float]],
) -> Estimate | None:
    """Where a score lies between that of `zero` (nothing, where empty) and that of `one`."""
    values = []
    for seed, tasks in seeds.items():
        if task not in tasks or seed not in one or (zero and seed not in zero):
            continue
        low = zero[seed][task] if zero else 0.0
        if span := one[seed][task] - low:
            values.append((tasks[task] - low) / span)
    return estimate(values) if values else None


def _difference(
    mine: Mapping[str, Mapping[str, float]], theirs: Mapping[str, Mapping[str, float]], task: str
) -> str:
    if mine is theirs:
        return "–"
    found = _paired(mine, theirs, task)
    if found is None:
        return "–"
    half = "" if found.half is None else f" ±{100 * found.half:.1f}"
    return f"{100 * found.mean:+.1f}{half}{'*' if found.significant else ''}"


def _paired(
    mine: Mapping[str, Mapping[str, float]], theirs: Mapping[str, Mapping[str, float]], task: str
) -> Estimate | None:
    """The mean difference of a task's scores over the seeds that both have."""
    values = [
        tasks[task] - theirs[seed][task]
        for seed, tasks in mine.items()
        if task in tasks and task in theirs.get(seed, {})
    ]
    return estimate(values) if values else None


def _beaten_by(model: str, models: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The first model that is better beyond the interval in one, and not worse in the other."""
    if model in NO_RIVALS:
        return "–"
    for other, seeds in models.items():
        found = [each for task in TASKS if (each := _paired(seeds, models[model], task))]
        if other == model or other in NO_RIVALS or len(found) < len(TASKS):
            continue
        if any(each.significant for each in found) and min(each.mean for each in found) >= 0:
            return other
    return "nobody"


def _nats(seeds: Mapping[str, Mapping[str, float]], task: str) -> str:
    values = [-math.log(tasks[task]) for tasks in seeds.values() if tasks.get(task)]
    return f"{sum(values) / len(values):.3f}" if values else "–"


def _percent(found: Estimate | None) -> str:
    if found is None:
        return "–"
    return f"{100 * found.mean:.1f}" + ("" if found.half is None else f" ±{100 * found.half:.1f}")


def _cost(rows: Sequence[Row], cell: tuple[str, str], model: str) -> list[str]:
    """Supervised tokens and seconds of the model's own stage, in the mean."""
    mine = [r for r in rows if (r["group"], r["setting"], r["model"]) == (*cell, model)]
    told = []
    for column in ("tokens", "seconds"):
        values = [float(row[column]) for row in mine if row[column]]
        told.append(f"{sum(values) / len(values):,.0f}" if values else "–")
    return told


def _split(rows: Sequence[Row], cell: tuple[str, str], model: str) -> list[str]:
    """The parts of the model's own stage that generation and the teachers took, in percent."""
    mine = [
        row
        for row in rows
        if (row["group"], row["setting"], row["model"], row["task"]) == (*cell, model, TASKS[0])
        and row.get("generation_seconds")
    ]
    whole = sum(float(row["seconds"]) for row in mine)
    parts = ("generation_seconds", "teacher_seconds")
    return [f"{100 * sum(float(r[p]) for r in mine) / whole:.0f}" if mine else "–" for p in parts]
