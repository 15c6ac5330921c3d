"""Tasks: how answers are scored, and the questions in the tokens of one model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar

from dominie.core.distributed import all_gather, rank, world_size
from dominie.core.errors import InputError
from dominie.core.references import PathName
from dominie.data.conversations import Conversation
from dominie.data.ecommerce_formats import listed
from dominie.data.left_out import LeftOut, summed
from dominie.data.tokenization import Encoded, encode_all, encode_and_tell, prompt_ids
from dominie.evaluation.metrics import METRICS, known_metric
from dominie.evaluation.text_forms import normalise

T = TypeVar("T")
_OF_ANSWERS = ("thoughts", "words beside")  # what no question has

Ignored = Literal["case", "punctuation", "articles"]


@dataclass(frozen=True, kw_only=True)
class Harness:
    """Tasks of EleutherAI's lm-evaluation-harness, run on the live model.

    Attributes:
        tasks: names of tasks, each a group of the result.
        include: a folder of task definitions (YAML) beside those that come with lm-eval.
        figure: which of the harness's figures is the score.
        filter: which of a task's filters reads the answers; to be named if a task has several.
        few_shot: worked examples before each question; None is what the task says.
        chat_template: whether questions go through the model's chat template.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    tasks: list[str]
    include: PathName | None = None
    figure: str = "acc"
    filter: str | None = None
    few_shot: int | None = None
    chat_template: bool = False

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks must name at least one task of lm-eval")


@dataclass(frozen=True, kw_only=True)
class MetricSettings:
    """How the answers of a task are scored.

    Attributes:
        metric: what is measured; see docs/evaluation.md.
        extract: a regular expression; its first group (or the whole match) is the answer. Applied
            to the target too, where it matches. An output without a match is invalid.
        ignore: what of the text does not matter to `exact_match`; white space never does.
        labels: the answers there are; any other output is invalid.
        positive: the label whose F1 `binary_f1` is.
        options: the field of the data rows that lists the options of `choice`.
        likelihood: of an option, `sum` over its tokens, or divided by its `tokens` or `bytes`.
        k: how much of a ranking counts; None is all of it.
        reference: the field of the data rows that says what is right in a ranking: relevances in
            the order of the items for `ndcg`; the numbers (from 1) or letters of the relevant
            items for `hit` and `recall`, which is otherwise read from the target.
        lm_eval: what `metric: lm_eval` runs.
        keep_thoughts: whether what a model thinks before it answers is part of its answer.
    """

    metric: str = field(default="exact_match", metadata={"values": METRICS})
    extract: str | None = None
    ignore: list[Ignored] | None = None
    labels: list[str] | None = None
    positive: str | None = None
    options: str = "options"
    likelihood: Literal["sum", "tokens", "bytes"] = "sum"
    k: int | None = None
    reference: str | None = None
    lm_eval: Harness | None = None
    keep_thoughts: bool = False

    def __post_init__(self) -> None:
        metric = known_metric(self.metric)
        if self.extract is not None:
            try:
                re.compile(self.extract)
            except re.error as error:
                raise ValueError(f"extract is no regular expression: {error}") from None
        if self.k is not None and self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if metric.check is not None:
            metric.check(self)
        if (self.metric == "lm_eval") != (self.lm_eval is not None):
            raise ValueError("metric lm_eval and the key lm_eval go together")
        for key in fields(MetricSettings):
            generated = ("keep_thoughts",) if metric.score or self.lm_eval else ()
            without_effect = key.name not in ("metric", *metric.keys, *generated)
            if without_effect and getattr(self, key.name) != key.default:
                raise ValueError(f"{key.name} means nothing to metric {self.metric}")

    @property
    def measure(self) -> str:
        """What the score is, in words for the head of a table."""
        measure = METRICS[self.metric].measure
        if measure is None:
            return self.metric.replace("_", " ")
        return measure if isinstance(measure, str) else measure(self)


@dataclass(frozen=True)
class Question:
    """A conversation whose last assistant turn is to be answered.

    Attributes:
        prompt: what is asked, as text for a person.
        target: the last assistant turn.
        group: what its score is broken down by, None without one.
        prompt_ids: tokens up to the beginning of the answer.
        encoded: the whole conversation in tokens, with the supervised mask.
        conversation: as it was read.
    """

    prompt: str
    target: str
    group: str | None
    prompt_ids: list[int]
    encoded: Encoded
    conversation: Conversation

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The messages before the answer."""
        return self.conversation.messages[: self.conversation.last_answer]

    @property
    def end_of_turn(self) -> int:
        """The token that ends the answer."""
        pairs = zip(self.encoded.input_ids, self.encoded.supervised, strict=True)
        return int([token for token, supervised in pairs if supervised][-1])


def questions(
    tokenizer: Any, conversations: Sequence[Conversation], *, by: str | None = None
) -> list[Question]:
    """Make questions of conversations under a tokenizer's chat template.

    Args:
        tokenizer: with a chat template.
        conversations: each with at least one message before its last assistant turn.
        by: field of the data rows that names the group.

    Raises:
        InputError: a conversation that asks nothing, a template that fails, or no row with `by`.
    """
    check_group(conversations, by)
    found = []
    for each, encoded in zip(conversations, encode_all(tokenizer, conversations), strict=True):
        asked = each.messages[: each.last_answer]
        if not asked:
            raise InputError("nothing is asked before the answer", where=each.where)
        group = None if by is None else each.fields.get(by)
        found.append(
            Question(
                prompt=_shown(asked),
                target=each.answer,
                group=None if group is None else str(group),
                prompt_ids=prompt_ids(tokenizer, asked, each.tools, where=each.where),
                encoded=encoded,
                conversation=each,
            )
        )
    return found


def check_rendering(
    tokenizers: Mapping[str, Any], conversations: Sequence[Conversation]
) -> dict[str, list[LeftOut]]:
    """Refuse questions on which the chat template of an evaluated model fails.

    One conversation of each kind is rendered: templates look at roles and keys, hardly at words.

    Args:
        tokenizers: by the name of the model; those of one template are tried once.
        conversations: of a task.

    Returns:
        What the template of a model leaves out of the questions, by the name of the model.

    Raises:
        InputError: as `questions` does.
    """
    kinds: dict[Any, Conversation] = {}
    for each in conversations:
        keys = tuple((message["role"], *sorted(message)) for message in each.messages)
        kinds.setdefault((bool(each.tools), keys), each)
    found: dict[str, list[LeftOut]] = {}
    for model, tokenizer in {str(t.chat_template): (m, t) for m, t in tokenizers.items()}.values():
        try:
            questions(tokenizer, list(kinds.values()))
            told = encode_and_tell(tokenizer, list(kinds.values()))
        except InputError as error:
            error.where = f"{error.where}, model {model}"
            raise
        found[model] = summed(
            each for _, lost in told for each in lost if not each.what.startswith(_OF_ANSWERS)
        )
    return found


def check_group(conversations: Sequence[Conversation], by: str | None) -> None:
    """Refuse a field that no row has.

    Raises:
        InputError: names the fields there are.
    """
    if by is None or any(by in c.fields for c in conversations):
        return
    known = sorted({field for c in conversations for field in c.fields})
    raise InputError(
        f"no row has the field {by!r} that scores are to be broken down by",
        where=conversations[0].where,
        expected=f"one of {', '.join(known)}" if known else "rows with further fields",
    )


_LABEL = re.compile(r"\s*[(（]?([^\W\d_]|\d+)[).:）．：、](?:\s|(?=[^\x00-\x7f]))")


def candidates(conversation: Conversation, field: str) -> tuple[list[str], int]:
    """Return the answers a row offers and which of them is right.

    Options are answers as they stand, or labels if the target is the label of one (`B` of
    `B: wool`).

    Raises:
        InputError: no options, one alone, or a target that is none of them.
    """
    given = listed(conversation.fields.get(field))
    if given is None or len(given) < 2:
        raise InputError(
            f"the row has no options to choose from in the field {field!r}",
            where=conversation.where,
            expected="a list of two or more, or the JSON of one",
            found=repr(conversation.fields.get(field))[:80],
            do=f"fields of this row: {', '.join(conversation.fields) or 'none'}",
        )
    texts = [str(option) for option in given]
    target = normalise(conversation.answer)
    plain = [normalise(text) for text in texts]
    if target in plain:
        return texts, plain.index(target)
    matches = [_LABEL.match(text) for text in texts]
    labels = [match.group(1) for match in matches if match]
    plain = [normalise(label) for label in labels]
    if len(labels) == len(texts) and target in plain:
        return labels, plain.index(target)
    raise InputError(
        "the target is none of the options",
        where=conversation.where,
        expected=" | ".join(texts)[:200],
        found=repr(target)[:80],
    )


def _shown(messages: Sequence[Mapping[str, Any]]) -> str:
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages)


#: Wraps a stream of so many items to show progress.
Track = Callable[[Any, int], Any]


def untracked(items: Any, _: int) -> Any:
    """Return the items; shows nothing."""
    return items


def compute_over_ranks(
    lengths: Sequence[int],
    batch: int,
    compute: Callable[[list[int]], Iterable[T]],
    track: Track = untracked,
) -> list[T]:
    """Compute something for each item, a batch at a time; the ranks of a run share the batches.

    The batches are those of a single process, so that the results are the same.

    Args:
        lengths: [N] of the items; those of like length share a batch.
        batch: items of a batch.
        compute: from the indices of a batch's items to their results, in the same order.
        track: shows progress.

    Returns:
        [N] results in the order of the items, on every rank.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    mine = batches[rank() :: world_size()]
    results: dict[int, T] = {}
    for members in track(mine, len(mine)):
        results |= dict(zip(members, compute(members), strict=True))
    found = {i: result for part in all_gather(results) for i, result in part.items()}
    return [found[i] for i in range(len(lengths))]
