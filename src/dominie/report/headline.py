"""The sentences at the top of a report: templates, filled from the changes between models.

Nothing here knows the names of a recipe. What a model is follows from the stages: the model it was
trained from (its *parent*), its teachers, and the models trained from the same parent. A difference
*within noise* is called so, however large. If no model solves any task, its agreement with the
teacher is reported in place of its scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dominie.core.task_result import RATED, within_noise
from dominie.report.formatting import (
    MINUS,
    THIN,
    RichText,
    figure,
    joined,
    listed,
    percent,
    points,
    rich,
    span,
    with_unit,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dominie.core.run_records import Run
    from dominie.core.task_result import Interval, TaskResult

_KEPT = 0.9  # the part of a score from which on it counts as kept
_MOST_TASKS = 3  # named in a sentence; more are counted

_NEAR = "is within noise of {parent:model} in {task:task}"
_KEEPS = "keeps {amount} of the {task:task} score of {parent:model} ({how})"
_KEEPS_MANY = "keeps its scores in {tasks} from {parent:model} ({how})"
_NEAR_TEACHER = "{model:model} is within noise of its teacher {teacher:model} in {task:task}"
_SURPASSES = "{model:model} surpasses its teacher {teacher:model} in {task:task} by {size} points"
_REACHES = "{model:model} reaches {share} of the {task:task} score of its teacher {teacher:model}"
_UNTAUGHT = ", {difference} {other:model}, taught by labels alone"
_AGREES = "{model:model} agrees with the teacher on {clauses}."
_AGREEMENT = "{share} of the tokens of {task:task}{details}"


@dataclass(frozen=True)
class Change:
    """A task's result of one model beside that of another, `after` beside `before`.

    Attributes:
        paired: their difference on the same questions, if that was computed.
    """

    task: str
    before: TaskResult
    after: TaskResult
    paired: Interval | None = None

    @property
    def difference(self) -> float:
        """After minus before, as a fraction."""
        return self.after.score - self.before.score

    @property
    def within_noise(self) -> bool:
        """Whether the difference is noise; without intervals only equal scores are."""
        noise = within_noise(self.after, self.before, self.paired)
        return self.difference == 0 if noise is None else noise

    @property
    def rated(self) -> bool:
        """Whether the scores are ratings from 1 to 10."""
        return self.after.metric == RATED

    @property
    def size(self) -> str:
        """The size of the difference, in points of 100, or of 10 if ratings are compared."""
        return points(self.difference, rated=self.rated)

    @property
    def kept(self) -> float | None:
        """The part of the earlier score that is left."""
        return self.after.score / self.before.score if self.before.score > 0 else None


def change(run: Run, task: str, model: str, baseline: str) -> Change:
    """The change on a task that both models were measured on."""
    before, after = run.results[baseline][task], run.results[model][task]
    return Change(task, before, after, run.difference(task, model, baseline))


def changes(run: Run, model: str, baseline: str) -> tuple[Change, ...]:
    """The tasks of ability on which both models were measured, in order."""
    shared = run.results[model].keys() & run.results[baseline].keys()
    return tuple(change(run, task, model, baseline) for task in run.ability_tasks if task in shared)


@dataclass(frozen=True)
class Findings:
    """The first sentence about the results, those that support it, and the model it is about."""

    headline: RichText
    support: tuple[RichText, ...] = ()
    model: str | None = None


def findings(run: Run) -> Findings:
    """The sentences that the results of a run support."""
    if not run.results:
        return Findings(_unfinished(run))
    if not any(run.results[m][t].score for m in run.results for t in _abilities(run, m)):
        return agreement_summary(run) or Findings(_unsolved(run))
    # The mean is taken over all tasks, so a model not measured on one of them comes last.
    model = max(
        _candidates(run),
        key=lambda name: sum(run.results[name][task].score for task in _abilities(run, name)),
    )
    others = sorted(
        (name for name in run.results if name != model and name in run.stages),
        key=lambda name: -_closeness(run, name, model),
    )
    related = [name for name in others if run.parent(name) or _evaluated_teacher(run, name)]
    support = tuple(_sentence(run, name) for name in related[:3])
    return Findings(_sentence(run, model), support, model)


def agreement_summary(run: Run) -> Findings | None:
    """How far the model nearest to its teacher agrees with it; None if that was not measured."""
    tasks = [task for task in run.tasks if run.metric(task) == "agreement"]
    measured = {m: [t for t in tasks if t in run.results[m]] for m in _candidates(run)}
    known = [model for model, shared in measured.items() if shared]
    if not known:
        return None
    model = max(known, key=lambda m: sum(run.results[m][task].score for task in measured[m]))
    clauses = joined([_agreement(run, model, task) for task in measured[model]])
    unsolved = _abilities(run, model)
    support = rich("No model solved anything in {tasks} yet.", tasks=_names(unsolved[:3]))
    headline = rich(_AGREES, model=model, clauses=clauses)
    return Findings(headline, (support,) if unsolved else (), model)


def _agreement(run: Run, model: str, task: str) -> RichText:
    """`41.2 % of the tokens of general (KL 2.31 nats, 12 points above sft)`."""
    result, parent = run.results[model][task], run.parent(model)
    parts = []
    if "kl" in result.extras:
        parts.append(rich("KL {kl} nats", kl=figure(result.extras["kl"])))
    if parent and task in run.results[parent]:
        step = change(run, task, model, parent)
        size = f"{percent(abs(step.difference))} points"
        parts.append(rich("{side} {parent:model}", side=_side(step, size), parent=parent))
    return rich(
        _AGREEMENT,
        share=with_unit(result.score),
        task=task,
        details=rich(" ({parts})", parts=joined(parts, ", ")) if parts else (),
    )


def _sentence(run: Run, model: str) -> RichText:
    parent, teacher = run.parent(model), _evaluated_teacher(run, model)
    # What was not trained here is worth comparing with if it teaches too, as a reference does.
    compared = parent in run.stages or not teacher or parent in run.stages[model].teacher_names
    if parent and compared and (shared := changes(run, model, parent)):
        return _against_parent(model, parent, shared)
    if teacher and (shared := changes(run, model, teacher)):
        return _against_teacher(run, model, teacher, shared)
    return _alone(run, model)


def _against_parent(model: str, parent: str, shared: Sequence[Change]) -> RichText:
    """`align` keeps 99 % of the general score of `distill` and gains 74 points in domain."""
    gains = [each for each in shared if not each.within_noise and each.difference > 0]
    kept = [c for c in shared if c not in gains and (c.within_noise or (c.kept or 0.0) >= _KEPT)]
    losses = [each for each in shared if each not in gains and each not in kept]
    clauses = [_keeping(kept, parent)] if kept else []
    if gains:
        clauses.append(rich("gains {amounts}", amounts=_amounts(gains)))
    if losses:
        clauses.append(rich("loses {amounts}", amounts=_amounts(losses)))
    if not kept:
        over = "over" if gains else "against"
        clauses[0] = (*clauses[0], *rich(" {over} {parent:model}", over=over, parent=parent))
    last = " but " if losses and gains and not kept else " and "
    return rich("{model:model} {predicate}.", model=model, predicate=joined(clauses, last))


def _keeping(kept: Sequence[Change], parent: str) -> RichText:
    shares = [1.0 if each.kept is None else each.kept for each in kept]
    if len(kept) > 1:
        noise = all(each.within_noise for each in kept)
        how = "within noise" if noise else f"at least {_share(min(shares))} each"
        tasks: RichText | str = f"{len(kept)} tasks"
        if len(kept) <= _MOST_TASKS:
            tasks = _names(each.task for each in kept)
        return rich(_KEEPS_MANY, tasks=tasks, parent=parent, how=how)
    (only,), (share,) = kept, shares
    if only.kept is None or (only.within_noise and share < _KEPT):
        return rich(_NEAR, parent=parent, task=only.task)
    how = "within noise" if only.within_noise else f"{MINUS}{only.size} points"
    amount = "all" if share >= 1 else _share(share)
    return rich(_KEEPS, amount=amount, task=only.task, parent=parent, how=how)


def _amounts(moved: Sequence[Change]) -> RichText:
    """41 points in domain and 12 in math; of many tasks the number and the largest."""
    largest = sorted(moved, key=lambda each: -abs(each.difference))
    if len(moved) > _MOST_TASKS:
        many = f"in {len(moved)} tasks, most in {{task:task}} ({largest[0].size} points)"
        return rich(many, task=largest[0].task)
    first, *others = largest
    amounts = [rich("{size} points in {task:task}", size=first.size, task=first.task)]
    amounts += [rich("{size} in {task:task}", size=o.size, task=o.task) for o in others]
    return joined(amounts)


def _against_teacher(run: Run, model: str, teacher: str, shared: Sequence[Change]) -> RichText:
    """`distill` reaches 87 % of the general score of its teacher, 13 points above `sft`."""
    best = max(shared, key=lambda each: each.before.score)
    if best.kept is None:
        return _alone(run, model)
    apart = _SURPASSES if best.kept > 1 else _REACHES
    reached = rich(
        _NEAR_TEACHER if best.within_noise else apart,
        model=model,
        teacher=teacher,
        task=best.task,
        size=best.size,
        share=_share(best.kept),
    )
    return (*reached, *_against_untaught(run, model, best.task), *rich("."))


def _against_untaught(run: Run, model: str, task: str) -> RichText:
    """The same student trained without a teacher, if the run has one."""
    student = run.stages[model].student
    for name, other in run.stages.items():
        if student is None or other.student != student or other.teacher_names:
            continue
        if name not in (model, student) and task in run.results.get(name, {}):
            step = change(run, task, model, name)
            return rich(_UNTAUGHT, difference=_side(step, f"{step.size} points"), other=name)
    return ()


def _side(step: Change, size: str) -> str:
    """On which side of an earlier score the later one is."""
    side = "above" if step.difference > 0 else "below"
    return "within noise of" if step.within_noise else f"{size} {side}"


def _alone(run: Run, model: str) -> RichText:
    """`kd` scores 76.9 % (74.8–79.0) in general and 12.0 % (10.2–13.8) in domain."""
    results = {task: run.results[model][task] for task in _abilities(run, model)[:_MOST_TASKS]}
    if not results:
        return rich("{model:model} has no score yet.", model=model)
    scores = [
        rich(
            "{score}{interval} in {task:task}",
            score=with_unit(result.score, rated=result.metric == RATED),
            interval=f" ({span(result.ends, rated=result.metric == RATED)})" if result.ends else "",
            task=task,
        )
        for task, result in results.items()
    ]
    return rich("{model:model} scores {scores}.", model=model, scores=joined(scores))


def _unsolved(run: Run) -> RichText:
    """The sentence if all scores are 0, of which nothing can be kept."""
    if not run.ability_tasks:
        return _unfinished(run)
    tasks = _names(run.ability_tasks[:_MOST_TASKS])
    return rich("No model solves anything yet: 0 % in {tasks}.", tasks=tasks)


def _unfinished(run: Run) -> RichText:
    open_ = [stage.name for stage in run.stages.values() if not stage.done]
    count = len(run.stages)
    if not count:
        return rich("Nothing has been trained or evaluated yet.")
    if open_:
        done = f"{count - len(open_)} of {count} stages done"
        return rich("{done}, {open} still open.", done=done, open=listed(open_))
    return rich("{count} stages done; nothing has been evaluated yet.", count=str(count))


def _names(tasks: Iterable[str]) -> RichText:
    return joined([rich("{task:task}", task=task) for task in tasks])


def _candidates(run: Run) -> list[str]:
    """The models a run may be about: those trained and teaching nobody, if there are any."""
    teachers = {name for stage in run.stages.values() for name in stage.teacher_names}
    trained = [name for name in run.results if name in run.stages]
    final = [name for name in trained if name not in teachers]
    return final or trained or list(run.results)


def _abilities(run: Run, model: str) -> list[str]:
    """The tasks that measured what this model can do."""
    return [task for task in run.ability_tasks if task in run.results[model]]


def _closeness(run: Run, name: str, model: str) -> int:
    """How closely another model is related to the one in the headline."""
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


def _share(share: float) -> str:
    """A share in whole percent that never rounds a loss away."""
    return f"{min(99, round(100 * share)) if share < 1 else 100}{THIN}%"
