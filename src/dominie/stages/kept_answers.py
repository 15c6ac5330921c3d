"""Which answers of a writer are learnt from: what is dropped, and the best by a metric or judge."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dominie.core.errors import RunError
from dominie.data.conversations import Conversation, read_conversations
from dominie.data.sources import Source, conversation_digest
from dominie.evaluation.answer_text import extract
from dominie.evaluation.metrics import score_answer
from dominie.generation.calls import Ask, Calls
from dominie.generation.reply_log import ReplyLog, call_key
from dominie.judge.prompts import rating, rating_prompt

if TYPE_CHECKING:
    from dominie.generation.endpoint import ServedModel
    from dominie.generation.prompt_answers import Answers, Asked
    from dominie.recipe import Task
    from dominie.stages.stage_kind import StageRun

#: Scores answers to prompts; None where there is no verdict.
Score = Callable[[Sequence[tuple["Asked", Mapping[str, Any]]]], list[float | None]]

#: How an answer begins that declines, in English. Such answers are counted, and kept: without
#: them the data would be of other prompts than were asked.
_DECLINES = re.compile(
    r"\W{0,3}(?:(?:i['’]?m|i am) (?:really |very |so )?(?:sorry|unable|not able)"
    r"|sorry, (?:but )?i\b"
    r"|i (?:cannot|can['’]?t|won['’]?t|will not|must decline|do not feel comfortable)\b"
    r"|as an? (?:ai|artificial|large language)\b|unfortunately, i (?:can|am)\w*)",
    re.IGNORECASE,
)
_LONGEST_REPLY = 1024
_JUDGED = 0.95  # least share of answers with a verdict


def declines(text: str) -> bool:
    """Whether an answer begins as one that refuses."""
    return _DECLINES.match(text) is not None


def fault(answer: Mapping[str, Any], before: Set[str]) -> str | None:
    """Why an answer is dropped; None if it is learnt from.

    Args:
        answer: its record in the log.
        before: the answers to the same prompt that are kept.
    """
    if answer["stopped"] == "unanswered":
        return "refused by the server"
    if answer["stopped"] != "stop":
        return "cut off"
    if not answer["text"].strip():
        return "empty"
    return "repeated" if answer["text"] in before else None


def kept_answers(
    answers: Answers,
    asked: Sequence[Asked],
    logged: Mapping[str, Mapping[str, Any]],
    dropped: Counter[str],
    score: Score | None,
) -> Iterator[tuple[Asked, Mapping[str, Any], float | None]]:
    """The answers that are learnt from with their scores, in the order in which they were asked.

    Args:
        answers: the stage's settings.
        asked: every answer that was wanted, those to one prompt one after the other.
        logged: the answers there are, by key.
        dropped: counts those that are not kept, by reason.
        score: of answers; None where `answers.keep` is not set, and scores choose nothing.
    """
    whole: list[list[tuple[Asked, Mapping[str, Any]]]] = []
    for _, same_prompt in groupby(asked, key=lambda each: id(each.prompt)):
        texts: set[str] = set()
        whole.append([])
        for each in same_prompt:
            if (answer := logged.get(each.key)) is None:
                dropped["not answered"] += 1
            elif (reason := fault(answer, texts)) is not None:
                dropped[reason] += 1
            else:
                texts.add(answer["text"])
                whole[-1].append((each, answer))
    flat = [one for group in whole for one in group]
    scores = iter(score(flat) if score else [None] * len(flat))
    keep = answers.keep
    for group in whole:
        found = [(each, answer, next(scores)) for each, answer in group]
        if keep is None:
            yield from found
            continue
        enough = [one for one in found if one[2] is not None and one[2] >= keep.least]
        dropped["without a verdict"] += sum(value is None for *_, value in found)
        below = sum(value is not None for *_, value in found) - len(enough)
        dropped["below keep.at_least"] += below
        order = sorted(range(len(enough)), key=lambda i: (-(enough[i][2] or 0.0), i))
        chosen = sorted(order[: keep.best])
        dropped["not among the best"] += len(enough) - len(chosen)
        yield from (enough[i] for i in chosen)


def with_thoughts(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """An answer with what its writer thought before it, as models that think are taught."""
    thoughts = answer["thoughts"]
    text = f"<think>\n{thoughts}\n</think>\n\n{answer['text']}" if thoughts else answer["text"]
    return {**answer, "text": text}


def scorer_of(answers: Answers, run: StageRun, verdicts: Path) -> Score | None:
    """What scores the answers of a stage: a task's metric or a judge; None without either.

    Args:
        answers: the stage's settings.
        run: of the stage.
        verdicts: file that a judge's replies are logged in.
    """
    keep, recipe = answers.keep, run.folder.recipe
    if keep is None:
        return None
    if keep.task is not None:
        assert recipe.evaluate is not None, "checked when the recipe was loaded"
        task, source = recipe.evaluate.tasks[keep.task], run.folder.source(answers.source)
        return lambda answered: scores_by_task(task, source, answered)
    judge = str(keep.judge)
    return lambda answered: scores_by_judge(
        judge, recipe.served[judge], answered, verdicts, run.display.line
    )


def scores_by_task(
    task: Task, source: Source, answered: Sequence[tuple[Asked, Mapping[str, Any]]]
) -> list[float | None]:
    """Scores from 0 to 1 by a task's metric, with the answers of the data as what is right."""
    right: dict[bytes, Conversation] = {}
    for conversation in read_conversations(source):
        asked = conversation.messages[: conversation.last_answer]
        prompt = dataclasses.replace(conversation, messages=asked, weights=())
        right.setdefault(conversation_digest(prompt), conversation)
    return [
        score_answer(
            task, extract(task.extract, answer["text"]), right[conversation_digest(each.prompt)]
        ).score
        for each, answer in answered
    ]


def scores_by_judge(
    name: str,
    served: ServedModel,
    answered: Sequence[tuple[Asked, Mapping[str, Any]]],
    log: Path,
    show: Callable[[str], None],
) -> list[float | None]:
    """Ratings from 1 to 10 by a model behind a server; replies are logged and paid for once.

    Raises:
        InputError, RunError: it does not answer, or one verdict in twenty cannot be read.
    """
    calls = Calls(served, ReplyLog(log), where=f"models.{name}", show=show)
    prompt = rating_prompt(reference=False, turns=1)

    async def rated(one: tuple[Asked, Mapping[str, Any]], ask: Ask) -> float | None:
        each, answer = one
        turns = [f"{m['role']}: {m['content']}" for m in each.prompt.messages]
        question = turns[0].removeprefix("user: ") if len(turns) == 1 else "\n".join(turns)
        messages = prompt.messages({"question": question}, {"answer": answer["text"]})
        body = served.body(messages, {"temperature": 0.0, "max_tokens": _LONGEST_REPLY})
        key = call_key(served.identity, body)
        kept = calls.log.replies(key)
        reply = kept[-1] if kept else await ask(key, body)
        return None if reply is None else rating(reply, [answer["text"]])

    found = calls.run(list(answered), rated)
    if sum(value is not None for value in found) < _JUDGED * len(found):
        raise RunError(
            "too many answers have no verdict",
            where=f"models.{name}",
            expected=f"a rating in double brackets, [[7]], of {100 * _JUDGED:.0f} % of them",
            found=f"{sum(value is None for value in found):,} of {len(found):,} without",
            do=f"look at the replies in {log}; name another judge, or run again",
        )
    return found
