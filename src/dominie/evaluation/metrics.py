"""Scores answers: the registry of metrics, each one function from an answer to a `SampleScore`.

To add a metric, write that function and register it with `@metric(...)`; recipes then accept its
name, and tasks are scored by it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dominie.core.errors import InputError, nearest
from dominie.core.task_result import FORGETTING
from dominie.data.conversations import Conversation
from dominie.data.ecommerce_formats import listed
from dominie.evaluation.answer_text import (
    attribute_pairs,
    extract,
    label_of,
    ndcg,
    ranking,
    rouge_l,
    spans,
    token_f1,
)
from dominie.evaluation.score_items import SampleScore
from dominie.evaluation.text_forms import normalise
from dominie.generation.thoughts import without_thoughts

if TYPE_CHECKING:
    from dominie.evaluation.task import MetricSettings

#: From a task's settings, an answer (None if the output held none) and the row it answers.
ScoreAnswer = Callable[["MetricSettings", str | None, Conversation], SampleScore]


@dataclass(frozen=True)
class Metric:
    """A metric that recipes can name.

    Attributes:
        score: from an answer to its score; None if no answer is generated.
        keys: the keys of a task that it reads besides `metric`; any other is refused.
        statistic: what the score is computed by from the sums of all answers, in `STATISTICS`.
        measure: the head of a table; None is the name.
        check: raises ValueError if a task's settings lack what it needs.
        has_form: whether an output can be of another form than the one asked for.
    """

    score: ScoreAnswer | None
    keys: Collection[str] = ("extract",)
    statistic: str = "ratio"
    measure: Callable[[MetricSettings], str] | str | None = None
    check: Callable[[MetricSettings], None] | None = None
    has_form: bool = False


#: All metrics by name.
METRICS: dict[str, Metric] = {}


def metric(name: str, **attributes: Any) -> Callable[[ScoreAnswer], ScoreAnswer]:
    """Register the decorated function as a metric; the attributes are those of `Metric`."""

    def register(score: ScoreAnswer) -> ScoreAnswer:
        METRICS[name] = Metric(score, **attributes)
        return score

    return register


def known_metric(name: str) -> Metric:
    """Return a metric by its name.

    Raises:
        ValueError: there is none; names those there are.
    """
    if name in METRICS:
        return METRICS[name]
    near = nearest(name, METRICS)
    hint = f"; did you mean {near}?" if near else ""
    raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {name!r}{hint}")


def score_answer(task: MetricSettings, answer: str | None, row: Conversation) -> SampleScore:
    """Return the score of an extracted answer to a row by the task's metric.

    Raises:
        InputError: no answer to the row could be right.
    """
    score = METRICS[task.metric].score
    assert score is not None, "scored without a generated answer"
    return score(task, answer, row)


def may_be_invalid(task: MetricSettings) -> bool:
    """Return whether an output can be of another form than the one asked for."""
    by_settings = task.extract is not None or task.labels is not None
    return by_settings or METRICS[task.metric].has_form


def check_rows(task: MetricSettings, rows: Sequence[Conversation]) -> None:
    """Refuse rows that no answer could be right to, before anything is generated.

    Raises:
        InputError: names the first such row.
    """
    for row in rows:
        score_answer(task, None, row)


def _target(task: MetricSettings, row: Conversation) -> str:
    answer = row.answer if task.keep_thoughts else without_thoughts(row.answer)
    found = extract(task.extract, answer)
    return answer if found is None else found


def _needs_two_labels(task: MetricSettings) -> None:
    if task.labels is None or len(task.labels) != 2:
        raise ValueError("metric binary_f1 needs two labels")
    if task.positive not in task.labels:
        raise ValueError("metric binary_f1 needs positive, one of its labels")


def _needs_labels(task: MetricSettings) -> None:
    if not task.labels:
        raise ValueError("metric macro_f1 needs labels, the answers there are")


def _needs_reference(task: MetricSettings) -> None:
    if task.reference is None:
        raise ValueError("metric ndcg needs reference, the field that holds the relevances")


def _at_k(name: str) -> Callable[[MetricSettings], str]:
    return lambda task: f"{name}@{task.k}" if task.k else name


@metric("exact_match", keys=("extract", "ignore", "labels"))
def _exact_match(task: MetricSettings, answer: str | None, row: Conversation) -> SampleScore:
    if task.labels is not None:
        right, chosen = _right_and_chosen(task, answer, row)
        return SampleScore.of_mean(float(chosen == right), valid=chosen is not None)
    if answer is None:
        return SampleScore.of_mean(0.0, valid=False)
    ignore = task.ignore or ()
    same = normalise(answer, ignore) == normalise(_target(task, row), ignore)
    return SampleScore.of_mean(float(same))


METRICS["choice"] = Metric(
    None,
    keys=("options", "likelihood"),
    measure=lambda task: (
        "most likely option"
        + {"sum": "", "tokens": ", per token", "bytes": ", per byte"}[task.likelihood]
    ),
)


@metric(
    "binary_f1",
    keys=("extract", "labels", "positive"),
    statistic="micro_f1",
    measure=lambda task: f"F1 of {task.positive}",
    check=_needs_two_labels,
)
def _binary_f1(task: MetricSettings, answer: str | None, row: Conversation) -> SampleScore:
    """Count an answer that is no label as the wrong one of the two."""
    right, chosen = _right_and_chosen(task, answer, row)
    taken = 1 - right if chosen is None else chosen
    positive = (task.labels or []).index(task.positive or "")
    hits = (taken == positive and right == positive, taken == positive, right == positive)
    tp, guessed, wanted = (int(flag) for flag in hits)
    return SampleScore(float(taken == right), (tp, guessed - tp, wanted - tp), chosen is not None)


@metric(
    "macro_f1",
    keys=("extract", "labels"),
    statistic="macro_f1",
    measure="macro F1",
    check=_needs_labels,
)
def _macro_f1(task: MetricSettings, answer: str | None, row: Conversation) -> SampleScore:
    """Count an answer that is no label as missing from the right one and as no other."""
    right, chosen = _right_and_chosen(task, answer, row)
    sums = [0] * (3 * len(task.labels or ()))
    if chosen == right:
        sums[3 * right] = 1
    else:
        sums[3 * right + 2] = 1
        if chosen is not None:
            sums[3 * chosen + 1] = 1
    return SampleScore(float(chosen == right), tuple(sums), chosen is not None)


@metric("attribute_f1", statistic="micro_f1", measure="attribute F1", has_form=True)
def _attribute_f1(task: MetricSettings, answer: str | None, row: Conversation) -> SampleScore:
    wanted = attribute_pairs(_target(task, row))
    if wanted is None:
        raise InputError(
            "the target names no attribute and value",
            where=row.where,
            expected='JSON [{"attribute": …, "value": …}] or lines `attribute: value`',
            found=repr(row.answer)[:80],
        )
    found = None if answer is None else attribute_pairs(answer)
    if found is not None and wanted and all(len(pair) == 2 for pair in wanted):
        found = {pair[:2] for pair in found}  # a source that was not asked for
    return _set_score(found or set(), wanted, valid=found is not None)


@metric("span_f1", statistic="micro_f1", measure="span F1")
def _span_f1(task: MetricSettings, answer: str | None, row: Conversation) -> SampleScore:
    wanted = spans(_target(task, row))
    return _set_score(spans(answer or ""), wanted, valid=answer is not None)


@metric("token_f1", measure="token F1")
def _token_f1(task: MetricSettings, answer: str | None, row: Conversation) -> SampleScore:
    if answer is None:
        return SampleScore.of_mean(0.0, valid=False)
    return SampleScore.of_mean(token_f1(answer, _target(task, row)))


@metric("rouge_l", measure="ROUGE-L")
def _rouge_l(task: MetricSettings, answer: str | None, row: Conversation) -> SampleScore:
    if answer is None:
        return SampleScore.of_mean(0.0, valid=False)
    return SampleScore.of_mean(rouge_l(answer, _target(task, row)))


_RANKING = ("extract", "k", "reference")


@metric("ndcg", keys=_RANKING, measure=_at_k("NDCG"), check=_needs_reference, has_form=True)
def _ndcg(task: MetricSettings, answer: str | None, row: Conversation) -> SampleScore:
    relevances = _relevances(task.reference or "", row)
    ranked = ranking(answer or "")
    return SampleScore.of_mean(ndcg(ranked, relevances, task.k), valid=bool(ranked))


@metric("hit", keys=_RANKING, measure=_at_k("hit"), has_form=True)
def _hit(task: MetricSettings, answer: str | None, row: Conversation) -> SampleScore:
    """1 if any relevant item is among the first k."""
    relevant, ranked = _relevant(task, row), ranking(answer or "")
    any_found = bool(set(ranked[: task.k]) & relevant)
    return SampleScore.of_mean(float(any_found), valid=bool(ranked))


@metric("recall", keys=_RANKING, measure=_at_k("recall"), has_form=True)
def _recall(task: MetricSettings, answer: str | None, row: Conversation) -> SampleScore:
    """The part of the relevant items among the first k (ShoppingMMLU's "hit rate")."""
    relevant, ranked = _relevant(task, row), ranking(answer or "")
    found = len(set(ranked[: task.k]) & relevant) / len(relevant)
    return SampleScore.of_mean(found, valid=bool(ranked))


METRICS["agreement"] = Metric(None, keys=())
METRICS[FORGETTING] = Metric(None, (), "likelihood_kept", "likelihood kept")
METRICS["lm_eval"] = Metric(
    None,
    keys=("lm_eval",),
    measure=lambda task: f"lm-eval {task.lm_eval.figure if task.lm_eval else ''}",
)


def _set_score(
    found: Collection[tuple[str, ...] | str], wanted: Collection[tuple[str, ...] | str], valid: bool
) -> SampleScore:
    """Return TP, FP and FN of a set; the answer by itself scores its own F1."""
    tp = len(set(found) & set(wanted))
    fp, fn = len(found) - tp, len(wanted) - tp
    alone = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else float(valid)
    return SampleScore(alone, (tp, fp, fn), valid)


def _right_and_chosen(
    task: MetricSettings, answer: str | None, row: Conversation
) -> tuple[int, int | None]:
    """Return the labels of the target and of the answer, None if the answer is no label."""
    labels, target = task.labels or (), _target(task, row)
    right = label_of(target, labels)
    if right is None:
        raise InputError(
            "the target is none of the labels",
            where=row.where,
            expected=" | ".join(labels)[:200],
            found=repr(target)[:80],
            do="name every label in labels, or set extract to find one in the target",
        )
    return right, None if answer is None else label_of(answer, labels)


def _relevances(field: str, row: Conversation) -> list[float]:
    given = listed(row.fields.get(field))
    try:
        relevances = [float(value) for value in given or ()]
    except (TypeError, ValueError):
        relevances = []
    if not relevances or not all(0 <= value < 64 for value in relevances):
        raise InputError(
            f"the row has no relevances in the field {field!r}",
            where=row.where,
            expected="a list of numbers from 0, one for each item in its order",
            found=repr(row.fields.get(field))[:80],
        )
    return relevances


def _relevant(task: MetricSettings, row: Conversation) -> set[int]:
    """Return the relevant items, from the field of the row that names them, else the target."""
    if task.reference is None:
        text = _target(task, row)
    else:
        given = row.fields.get(task.reference, "")
        text = ",".join(map(str, given)) if isinstance(given, list) else str(given)
    relevant = ranking(text)
    if not relevant:
        raise InputError(
            "the row does not name the relevant items",
            where=row.where,
            expected="numbers from 1 or letters, in "
            + (f"the field {task.reference!r}" if task.reference else "the target"),
            found=repr(text)[:80],
        )
    return set(relevant)
