"""The sentence at the top of a report, and a few below it, computed from the results.

Nothing here knows the names of a recipe. What a model is follows from the stages: the model it was
trained from (its *parent*), the models that taught it, and the models trained from the same parent.
What is *within noise* is said so, whatever the difference: see `changes`. Where no model solves any
task, how like its teacher it is has the word: see `likeness`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dominie.core.results import RATED
from dominie.report.changes import Change, ability_of, candidates, change, changes, likeness
from dominie.report.formatting import (
    MINUS,
    THIN,
    Part,
    Sentence,
    joined,
    listed,
    percent,
    rating,
    span,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dominie.core.run_records import Run

_KEPT = 0.9
_MOST_TASKS = 3


@dataclass(frozen=True)
class Findings:
    """What the results say: the first sentence, those that support it, and whom it is about."""

    headline: Sentence
    support: tuple[Sentence, ...] = ()
    model: str | None = None


def findings(run: Run) -> Findings:
    """The sentences that the results of a run bear out."""
    if not run.results:
        return Findings(_unfinished(run))
    if not any(run.results[m][t].score for m in run.results for t in ability_of(run, m)):
        found = likeness(run)
        if found is not None:
            return Findings(found.headline, found.support, found.model)
        if not run.ability_tasks:
            return Findings(_unfinished(run))
        return Findings(_unsolved(run))
    model = _most_interesting(run)
    headline = _sentence(run, model)
    others = sorted(
        (name for name in run.results if name != model and name in run.stages),
        key=lambda name: -_closeness(run, name, model),
    )
    support = [_sentence(run, name) for name in others if _related(run, name)]
    return Findings(headline, tuple(support[:3]), model)


def _most_interesting(run: Run) -> str:
    """The model a run is about: of its candidates, the best over the tasks.

    The mean is taken over all tasks, so a model that was not measured on one of them comes last.
    """
    return max(
        candidates(run),
        key=lambda name: sum(run.results[name][task].score for task in ability_of(run, name)),
    )


def _sentence(run: Run, model: str) -> Sentence:
    parent, teacher = run.parent(model), _evaluated_teacher(run, model)
    from_stage = parent in run.stages
    if parent and (from_stage or not teacher) and (shared := changes(run, model, parent)):
        return _against_parent(model, parent, shared)
    if teacher and (shared := changes(run, model, teacher)):
        return _against_teacher(run, model, teacher, shared)
    return _alone(run, model)


def _against_parent(model: str, parent: str, shared: Sequence[Change]) -> Sentence:
    """`align` keeps 99 % of the general score of `distill` and gains 74 points in domain."""
    gains = [change for change in shared if not change.within_noise and change.difference > 0]
    kept = [change for change in shared if change not in gains and _is_kept(change)]
    losses = [change for change in shared if change not in gains and change not in kept]
    clauses: list[Sentence] = []
    if kept:
        clauses.append(_keeping(kept, parent))
    if gains:
        clauses.append((Part("gains "), *_amounts(gains)))
    if losses:
        verb = "but loses " if gains and not kept else "loses "
        clauses.append((Part(verb), *_amounts(losses)))
    if not kept:
        clauses[0] = (*clauses[0], Part(" over " if gains else " against "), Part(parent, "model"))
    joined: list[Part] = [Part(model, "model"), Part(" ")]
    for index, clause in enumerate(clauses):
        last = index == len(clauses) - 1
        opens = clause[0].text.startswith("but ")
        joined += [Part("" if index == 0 else " " if opens else " and " if last else ", "), *clause]
    return (*joined, Part("."))


def _keeping(kept: Sequence[Change], parent: str) -> Sentence:
    if len(kept) == 1:
        (change,) = kept
        share = change.kept
        if share is None or (change.within_noise and share < _KEPT):
            return (
                Part("is within noise of "),
                Part(parent, "model"),
                Part(" in "),
                Part(change.task, "task"),
            )
        how = "within noise" if change.within_noise else f"{MINUS}{change.size} points"
        amount = "all" if share >= 1 else f"{_share(share)}{THIN}%"
        return (
            Part(f"keeps {amount} of the "),
            Part(change.task, "task"),
            Part(" score of "),
            Part(parent, "model"),
            Part(f" ({how})"),
        )
    lowest = min(kept, key=lambda change: change.kept if change.kept is not None else 1.0)
    if len(kept) > _MOST_TASKS:
        names: Sentence = (Part(f"{len(kept)} tasks"),)
    else:
        names = joined([(Part(change.task, "task"),) for change in kept])
    noise = "within noise" if all(change.within_noise for change in kept) else None
    floor = lowest.kept if lowest.kept is not None else 1.0
    how = noise or f"at least {_share(floor)}{THIN}% each"
    return (
        Part("keeps its scores in "),
        *names,
        Part(" from "),
        Part(parent, "model"),
        Part(f" ({how})"),
    )


def _amounts(moved: Sequence[Change]) -> Sentence:
    """41 points in domain and 12 in math; of many tasks the number and the largest."""
    largest = sorted(moved, key=lambda change: -abs(change.difference))
    if len(moved) > _MOST_TASKS:
        top = largest[0]
        return (
            Part(f"in {len(moved)} tasks, most in "),
            Part(top.task, "task"),
            Part(f" ({top.size} points)"),
        )
    return joined(
        [
            (
                Part(f"{change.size}{' points' if index == 0 else ''} in "),
                Part(change.task, "task"),
            )
            for index, change in enumerate(largest)
        ]
    )


def _against_teacher(run: Run, model: str, teacher: str, shared: Sequence[Change]) -> Sentence:
    """`distill` reaches 87 % of the general score of its teacher, 13 points above `sft`."""
    best = max(shared, key=lambda each: each.before.score)
    share = best.kept
    if share is None:
        return _alone(run, model)
    reached: list[Part] = [Part(model, "model")]
    if best.within_noise:
        reached += [Part(" is within noise of its teacher "), Part(teacher, "model"), Part(" in ")]
        reached += [Part(best.task, "task")]
    else:
        verb = "surpasses its teacher" if share > 1 else f"reaches {_share(share)}{THIN}% of the"
        if share > 1:
            reached += [Part(f" {verb} "), Part(teacher, "model"), Part(" in ")]
            reached += [
                Part(best.task, "task"),
                Part(f" by {best.size} points"),
            ]
        else:
            reached += [
                Part(f" {verb} "),
                Part(best.task, "task"),
                Part(" score of its teacher "),
            ]
            reached += [Part(teacher, "model")]
    return (*reached, *_against_untaught(run, model, best.task), Part("."))


def _against_untaught(run: Run, model: str, task: str) -> Sentence:
    """The same student trained without a teacher, where the run has one."""
    stage = run.stages[model]
    for other in run.stages.values():
        if other.name in (model, stage.student) or other.teacher_names:
            continue
        if stage.student is None or other.student != stage.student:
            continue
        if task not in run.results.get(other.name, {}):
            continue
        step = change(run, task, model, other.name)
        where = "above" if step.difference > 0 else "below"
        what = "within noise of" if step.within_noise else f"{step.size} points {where}"
        return (Part(f", {what} "), Part(other.name, "model"), Part(", taught by labels alone"))
    return ()


def _alone(run: Run, model: str) -> Sentence:
    """`kd` scores 76.9 ± 2.1 % in general and 12.0 ± 1.8 % in domain."""
    tasks = [task for task in run.ability_tasks if task in run.results[model]]
    scores = []
    for task in tasks[:_MOST_TASKS]:
        score = run.results[model][task]
        rated = score.metric == RATED
        interval = "" if score.ends is None else f" ({span(score.ends, rated=rated)})"
        value = rating(score.score) if rated else f"{percent(score.score)}{THIN}%"
        text = f"{value}{interval} in "
        scores.append((Part(text), Part(task, "task")))
    if not scores:
        return (Part(model, "model"), Part(" has no score yet."))
    return (Part(model, "model"), Part(" scores "), *joined(scores), Part("."))


def _unsolved(run: Run) -> Sentence:
    """What to say where all scores are 0, before `keeps its score` is said of nothing."""
    tasks = [(Part(task, "task"),) for task in run.ability_tasks[:_MOST_TASKS]]
    return (Part("No model solves anything yet: 0 % in "), *joined(tasks), Part("."))


def _unfinished(run: Run) -> Sentence:
    done = sum(stage.done for stage in run.stages.values())
    if not run.stages:
        return (Part("Nothing has been trained or evaluated yet."),)
    names = [stage.name for stage in run.stages.values() if not stage.done]
    if names:
        return (Part(f"{done} of {len(run.stages)} stages done, {listed(names)} still open."),)
    return (Part(f"{len(run.stages)} stages done; nothing has been evaluated yet."),)


def _related(run: Run, model: str) -> bool:
    return run.parent(model) is not None or _evaluated_teacher(run, model) is not None


def _closeness(run: Run, name: str, model: str) -> int:
    """How much another model has to do with the one in the headline."""
    stage, chosen = run.stages[name], run.stages.get(model)
    if chosen is None:
        return 0
    if name == chosen.student:
        return 3
    if name in chosen.teacher_names:
        return 2
    return int(stage.student is not None and stage.student == chosen.student)


def _evaluated_teacher(run: Run, model: str) -> str | None:
    stage = run.stages.get(model)
    names = stage.teacher_names if stage else ()
    return next((name for name in names if name in run.results and name != model), None)


def _is_kept(change: Change) -> bool:
    return change.within_noise or (change.kept is not None and change.kept >= _KEPT)


def _share(share: float) -> str:
    """A share in whole percent that never rounds a loss away."""
    return f"{min(99, round(100 * share)) if share < 1 else 100}"
