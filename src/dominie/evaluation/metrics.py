"""What an answer is worth: one function for each metric, from text to a `SampleScore`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from dominie.core.errors import InputError
from dominie.data.conversations import Conversation
from dominie.data.ecommerce_formats import listed
from dominie.evaluation.extraction import extracted, label_of, normalised, pairs, ranking, spans
from dominie.evaluation.results import SampleScore, mean_grade
from dominie.evaluation.task import UNGENERATED, Scoring
from dominie.evaluation.text_metrics import hit, ndcg, recall, rouge_l, token_f1

#: From an answer (None where the output held none) and the row it answers to a grade.
Grader = Callable[[str | None, Conversation], SampleScore]

_F1 = ("attribute_f1", "span_f1", "binary_f1")


def grader(scoring: Scoring) -> Grader:
    """What turns an extracted answer to a row into its grade."""
    assert scoring.metric not in UNGENERATED, "these grade no text"
    return lambda answer, row: _GRADERS[scoring.metric](scoring, answer, row)


def statistic_of(scoring: Scoring) -> str:
    """The name of what is computed from the sums of the grades."""
    if scoring.metric in _F1:
        return "micro_f1"
    return "macro_f1" if scoring.metric == "macro_f1" else "ratio"


def may_be_invalid(scoring: Scoring) -> bool:
    """Whether an output can be of another form than was asked for."""
    return (
        scoring.extract is not None
        or scoring.labels is not None
        or scoring.metric in ("attribute_f1", "ndcg", "hit", "recall")
    )


def check_rows(scoring: Scoring, rows: Sequence[Conversation]) -> None:
    """Refuse rows that no answer could be right to, before anything is generated.

    Raises:
        InputError: names the first such row.
    """
    grade = grader(scoring)
    for row in rows:
        grade(None, row)


def _target(scoring: Scoring, row: Conversation) -> str:
    found = extracted(scoring.extract, row.answer)
    return row.answer if found is None else found


def _exact_match(scoring: Scoring, answer: str | None, row: Conversation) -> SampleScore:
    target, ignore = _target(scoring, row), scoring.ignore or ()
    if scoring.labels is not None:
        right = _right_label(scoring.labels, target, row)
        chosen = None if answer is None else label_of(answer, scoring.labels)
        return mean_grade(float(chosen == right), valid=chosen is not None)
    if answer is None:
        return mean_grade(0.0, valid=False)
    return mean_grade(float(normalised(answer, ignore) == normalised(target, ignore)))


def _binary_f1(scoring: Scoring, answer: str | None, row: Conversation) -> SampleScore:
    """An answer that is no label counts as the wrong one of the two."""
    labels = scoring.labels or []
    right = _right_label(labels, _target(scoring, row), row)
    chosen = None if answer is None else label_of(answer, labels)
    taken = 1 - right if chosen is None else chosen
    positive = labels.index(scoring.positive or "")
    hits = (taken == positive and right == positive, taken == positive, right == positive)
    tp, guessed, wanted = (int(flag) for flag in hits)
    return SampleScore(float(taken == right), (tp, guessed - tp, wanted - tp), chosen is not None)


def _macro_f1(scoring: Scoring, answer: str | None, row: Conversation) -> SampleScore:
    """An answer that is no label is missing from the right one and of no other."""
    labels = scoring.labels or []
    right = _right_label(labels, _target(scoring, row), row)
    chosen = None if answer is None else label_of(answer, labels)
    sums = [0] * (3 * len(labels))
    if chosen == right:
        sums[3 * right] = 1
    else:
        sums[3 * right + 2] = 1
        if chosen is not None:
            sums[3 * chosen + 1] = 1
    return SampleScore(float(chosen == right), tuple(sums), chosen is not None)


def _attribute_f1(scoring: Scoring, answer: str | None, row: Conversation) -> SampleScore:
    wanted = pairs(_target(scoring, row))
    if wanted is None:
        raise InputError(
            "the target names no attribute and value",
            where=row.where,
            expected='JSON [{"attribute": …, "value": …}] or lines `attribute: value`',
            found=repr(row.answer)[:80],
        )
    found = None if answer is None else pairs(answer)
    if found is not None and wanted and all(len(pair) == 2 for pair in wanted):
        found = {pair[:2] for pair in found}  # a source that was not asked for
    return _set_grade(found or set(), wanted, valid=found is not None)


def _span_f1(scoring: Scoring, answer: str | None, row: Conversation) -> SampleScore:
    wanted = spans(_target(scoring, row))
    return _set_grade(spans(answer or ""), wanted, valid=answer is not None)


def _token_f1(scoring: Scoring, answer: str | None, row: Conversation) -> SampleScore:
    if answer is None:
        return mean_grade(0.0, valid=False)
    return mean_grade(token_f1(answer, _target(scoring, row)))


def _rouge_l(scoring: Scoring, answer: str | None, row: Conversation) -> SampleScore:
    if answer is None:
        return mean_grade(0.0, valid=False)
    return mean_grade(rouge_l(answer, _target(scoring, row)))


def _ranking(scoring: Scoring, answer: str | None, row: Conversation) -> SampleScore:
    if scoring.metric == "ndcg":
        relevances = _relevances(scoring.reference or "", row)
        ranked = ranking(answer or "")
        return mean_grade(ndcg(ranked, relevances, scoring.k), valid=bool(ranked))
    relevant = _relevant(scoring, row)
    ranked = ranking(answer or "")
    measured = hit if scoring.metric == "hit" else recall
    return mean_grade(measured(ranked, relevant, scoring.k), valid=bool(ranked))


def _set_grade(
    found: Collection[tuple[str, ...] | str], wanted: Collection[tuple[str, ...] | str], valid: bool
) -> SampleScore:
    """TP, FP and FN of a set; the answer by itself is worth its own F1."""
    tp = len(set(found) & set(wanted))
    fp, fn = len(found) - tp, len(wanted) - tp
    alone = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else float(valid)
    return SampleScore(alone, (tp, fp, fn), valid)


def _right_label(labels: Sequence[str], target: str, row: Conversation) -> int:
    right = label_of(target, labels)
    if right is None:
        raise InputError(
            "the target is none of the labels",
            where=row.where,
            expected=" | ".join(labels)[:200],
            found=repr(target)[:80],
            do="name every label in labels, or set extract to find one in the target",
        )
    return right


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


def _relevant(scoring: Scoring, row: Conversation) -> list[int]:
    """The relevant items, from the field of the row that names them, else from the target."""
    if scoring.reference is None:
        text = _target(scoring, row)
    else:
        given = row.fields.get(scoring.reference, "")
        text = ",".join(map(str, given)) if isinstance(given, list) else str(given)
    relevant = ranking(text)
    if not relevant:
        raise InputError(
            "the row does not say which items are relevant",
            where=row.where,
            expected="numbers from 1 or letters, in "
            + (f"the field {scoring.reference!r}" if scoring.reference else "the target"),
            found=repr(text)[:80],
        )
    return relevant


_GRADERS: dict[str, Callable[[Scoring, str | None, Conversation], SampleScore]] = {
    "exact_match": _exact_match,
    "binary_f1": _binary_f1,
    "macro_f1": _macro_f1,
    "attribute_f1": _attribute_f1,
    "span_f1": _span_f1,
    "token_f1": _token_f1,
    "rouge_l": _rouge_l,
    "ndcg": _ranking,
    "hit": _ranking,
    "recall": _ranking,
}
