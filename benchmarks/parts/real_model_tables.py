"""From the rows of the evidence on real text to the tables of docs/evidence-real.md."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dominie.core.task_result import Interval, estimate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: Model → seed → task → figure.
Scores = dict[str, dict[str, dict[str, float]]]


def tables(rows: Sequence[Mapping[str, str]], aligned: Sequence[str], cut: Sequence[str]) -> str:
    """The tables of docs/evidence-real.md, in Markdown.

    `gain` is a model's F1 above the original's as a share of the expert's gain, `kept` its
    HellaSwag as a share of the original's, both seed by seed. KL is KL(original ‖ model) in nats a
    token. ± is the 95 % interval over questions and, by Student, over seeds; of gain and kept over
    seeds alone. Tokens (supervised) and seconds are of a model's own stage.

    Args:
        rows: of results/real-models.csv.
        aligned: models of the first table, in this order.
        cut: those of the second.
    """
    scores: Scores = {}
    errors: Scores = {}
    for row in rows:
        for found, column in ((scores, "score"), (errors, "stderr")):
            by_task = found.setdefault(row["model"], {}).setdefault(row["seed"], {})
            by_task[row["task"]] = float(row[column] or 0)
    head = [
        "model",
        "seeds",
        "entities F1 %",
        "gain %",
        "HellaSwag %",
        "kept %",
        "KL",
        "tokens",
        "s",
    ]
    lines = [
        [
            model,
            str(len(scores[model])),
            _score(scores, errors, model, "entities"),
            _mean(scores, model, _gain),
            _score(scores, errors, model, "hellaswag"),
            _mean(scores, model, lambda s, of: 100 * s["hellaswag"] / of("original")["hellaswag"]),
            _nats(scores, errors, model),
            *_cost(rows, model),
        ]
        for model in aligned
        if model in scores
    ]
    head_of_cut = ["model", "seeds", "KL(teacher ‖ model)", "tokens", "s"]
    lines_of_cut = [
        [
            model,
            str(len(scores[model])),
            _nats(scores, errors, model),
            *_cost(rows, model),
        ]
        for model in cut
        if model in scores
    ]
    return f"{_markdown(head, lines)}\n\n{_markdown(head_of_cut, lines_of_cut)}"


def _gain(mine: Mapping[str, float], of: Callable[[str], Mapping[str, float]]) -> float:
    before, expert = of("original")["entities"], of("expert")["entities"]
    return 100 * (mine["entities"] - before) / (expert - before) if expert != before else math.nan


def _score(scores: Scores, errors: Scores, model: str, task: str) -> str:
    """A score in percent, with the intervals over questions and seeds."""
    found = [
        (100 * by_task[task], 196 * errors[model][seed][task])
        for seed, by_task in scores[model].items()
        if task in by_task
    ]
    return _estimated(found, digits=1)


def _nats(scores: Scores, errors: Scores, model: str) -> str:
    """KL in nats, of which the score is exp(−KL)."""
    found = [
        (-math.log(tasks["moved"]) + 0.0, 1.96 * errors[model][seed]["moved"] / tasks["moved"])
        for seed, tasks in scores[model].items()
        if "moved" in tasks
    ]
    return _estimated(found, digits=3)


def _estimated(found: Sequence[tuple[float, float]], *, digits: int) -> str:
    """The mean of values, each with half its interval over questions."""
    if not found:
        return "–"
    on_questions = [Interval(each, each - half, each + half) for each, half in found if half]
    over = estimate([each for each, _ in found], on_questions)
    return f"{over.mean:.{digits}f}" + ("" if over.half is None else f" ±{over.half:.{digits}f}")


def _mean(
    scores: Scores,
    model: str,
    value: Callable[[Mapping[str, float], Callable[[str], Mapping[str, float]]], float],
) -> str:
    """The mean over the seeds that have what it needs; a dash where none has."""
    found = []
    for seed, tasks in scores[model].items():
        try:
            found.append(value(tasks, lambda other, seed=seed: scores[other][seed]))
        except KeyError:
            continue
    return _estimated([(each, 0.0) for each in found if math.isfinite(each)], digits=1)


def _cost(rows: Sequence[Mapping[str, str]], model: str) -> list[str]:
    cells = []
    for column in ("tokens", "seconds"):
        values = {r["seed"]: float(r[column]) for r in rows if r["model"] == model and r[column]}
        cells.append(f"{sum(values.values()) / len(values):,.0f}" if values else "–")
    return cells


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        [
            f"| {' | '.join(head)} |",
            f"|{'---|' * len(head)}",
            *(f"| {' | '.join(cells)} |" for cells in lines),
        ]
    )
