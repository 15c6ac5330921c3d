"""Answers to the prompts of a source: how they are drawn, logged, and which are dropped."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dominie.core.display import Advance
from dominie.core.errors import RunError
from dominie.core.references import ModelName, SourceName
from dominie.data.conversations import Conversation, read_conversations
from dominie.data.formats import Message
from dominie.data.sources import Source, conversation_digest, prompt_digest, split_of_prompt
from dominie.generation.calls import Calls
from dominie.generation.endpoint import STRICT, ServedModel
from dominie.generation.generator import (
    FILTERED,
    EndpointGenerator,
    Generation,
    GenerationRequest,
    Generator,
    Sampling,
)
from dominie.generation.reply_log import ReplyLog, call_key

#: Where settings of a server belong, and what is not done.
_OF_MODELS = "the server of a writer, its price and its budget stand under models"
_NOT_HERE = "a judge or a task's metric chooses answers under keep: {judge: NAME} or {task: NAME}"
_ANSWERED = 0.95  # least share of what a server is asked, for its answers to be data
#: Seeds below this; further samples are drawn with seeds above it.
MOST_SEED = 2**32


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which of the whole answers are learnt from, by a score.

    Attributes:
        task: name of a task under `evaluate`, whose metric compares with the data's own answers;
            scores are from 0 to 1.
        judge: name of a model behind a server that rates each answer from 1 to 10.
        at_least: the lowest score that is kept; None is 1 of a task, and 7 of a judge.
        best: most answers to one prompt, the best first, and of equals the first; None is all.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    task: str | None = None
    judge: ModelName | None = None
    at_least: float | None = None
    best: int | None = None

    def __post_init__(self) -> None:
        if (self.task is None) == (self.judge is None):
            raise ValueError("keep names either a task or a judge")
        if self.best is not None and self.best < 1:
            raise ValueError(f"best must be at least 1, got {self.best}")

    @property
    def least(self) -> float:
        """The lowest score that is kept."""
        return self.at_least if self.at_least is not None else 1.0 if self.task else 7.0


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Which model answers which prompts, and how.

    Attributes:
        model: that answers: a stage, a name under models, a path or hub id.
        system: what the writer alone is told before a conversation that has no system turn: the
            data do not hold it.
        source: whose prompts are answered: those of its training split that no source of the
            recipe holds out for validation or test. A prompt is a conversation up to its last
            answer.
        samples: answers to each prompt; more than 1 needs a temperature above 0.
        temperature: 0 takes the most probable token each time.
        top_p: tokens are drawn from the smallest set with at least this probability; 1 is all.
        max_new_tokens: longest answer; one that has not ended by then is dropped.
        seed: of the draws; None is `train.seed` of the recipe. A server draws by its own.
        batch: answers of one forward pass; changes time and memory alone, and nothing where a
            server writes.
        keep: which answers are learnt from, by a task's metric or a judge; None is all that are
            whole and not repeated.
        keep_thoughts: whether what the writer thinks before it answers is part of its answer,
            between <think> and </think>.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    not_here: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("endpoint", "key_env", "price", "budget", "concurrency"), _OF_MODELS),
        **dict.fromkeys(("filter", "filters", "judge", "metric"), _NOT_HERE),
    }
    model: ModelName
    source: SourceName
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None
    batch: int = 64
    system: str | None = None
    keep: Keep | None = None
    keep_thoughts: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and not negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < MOST_SEED:
            raise ValueError(f"seed must be from 0 to {MOST_SEED - 1}, got {self.seed}")
        drawn = {
            "samples": self.samples > 1,
            "top_p": self.top_p < 1,
            "seed": self.seed is not None,
        }
        if not self.temperature and any(drawn.values()):
            name = next(name for name in drawn if drawn[name])
            raise ValueError(
                f"{name} {getattr(self, name)} has no meaning at temperature 0, where every answer "
                "to a prompt is the same: set a temperature above 0"
            )

    @property
    def samplings(self) -> list[Sampling]:
        """How each answer to a prompt is drawn."""
        first = Sampling(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p
        )
        seeds = [(self.seed or 0) + number * MOST_SEED for number in range(self.samples)]
        return [dataclasses.replace(first, seed=seed, sample=n) for n, seed in enumerate(seeds)]

    def asked(self, prompts: Sequence[Conversation], generator: Generator) -> list[Asked]:
        """Every answer that is wanted, those to one prompt one after the other."""
        drawn = [(each, generator.identity(each)) for each in self.samplings]
        return [
            Asked(call_key(identity, sampling.temperature, said), p, sampling, said)
            for p in prompts
            for said in [self.said(p.messages)]
            for sampling, identity in drawn
        ]

    def said(self, messages: list[Message]) -> list[Message]:
        """What the writer is sent for a prompt."""
        if self.system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system}, *messages]


@dataclass(frozen=True)
class Asked:
    """An answer that is wanted.

    Attributes:
        key: of its record in a log: all that the answer depends on.
        prompt: a conversation up to the answer.
        sampling: how it is drawn.
        said: what the writer is sent.
    """

    key: str
    prompt: Conversation
    sampling: Sampling
    said: Sequence[Message]

    def row(
        self, answer: Mapping[str, Any], model: str, served: ServedModel | None = None
    ) -> dict[str, Any]:
        """A row to train on: earlier turns of the assistant are read, and not learnt.

        Args:
            answer: its record in the log.
            model: the recipe's name of the model that wrote it.
            served: where it is, if it is behind a server.
        """
        unlearnt = {"weight": 0}
        earlier = [m | (unlearnt if m["role"] == "assistant" else {}) for m in self.prompt.messages]
        origin: dict[str, Any] = {"model": model, **dataclasses.asdict(self.sampling)}
        origin["seed"] = self.sampling.seed % MOST_SEED
        if served is not None:
            del origin["seed"]  # it has no part in a server's draws
            origin |= {"served_as": served.model, "request": served.request, "at": answer["at"]}
        origin |= {"stopped": answer["stopped"], "tokens": answer["tokens"]}
        if self.prompt.fields:
            origin["fields"] = self.prompt.fields
        messages = [*earlier, {"role": "assistant", "content": answer["text"]}]
        return {"messages": messages, "origin": origin}


def prompts_of(
    source: Source, held_out: Set[bytes], skipped: Counter[str] | None = None
) -> Iterator[Conversation]:
    """The prompts of a source's training split: each conversation up to its last answer, once.

    Args:
        source: where to read.
        held_out: hashes of prompts that are left out.
        skipped: counts the conversations that are left out, by reason.
    """
    seen: set[bytes] = set()
    skipped = Counter() if skipped is None else skipped
    for conversation in read_conversations(source):
        asked = conversation.messages[: conversation.last_answer]
        prompt = dataclasses.replace(conversation, messages=asked, weights=())
        opening = prompt_digest(conversation)
        if opening in held_out or split_of_prompt(opening, source) != "train":
            skipped["held out"] += 1
        elif conversation.tools or any(m["role"] == "tool" or m.get("tool_calls") for m in asked):
            skipped["with tools"] += 1
        elif not any(message["role"] == "user" for message in asked):
            skipped["without a question"] += 1
        elif (digest := conversation_digest(prompt)) in seen:
            skipped["with a prompt that stood before"] += 1
        else:
            seen.add(digest)
            yield prompt


def write_answers(
    generator: Generator,
    asked: Sequence[Asked],
    log: ReplyLog,
    *,
    at_once: int,
    advance: Advance | None = None,
) -> Counter[str]:
    """Have answers written, and log them as they come; an interruption loses none that was given.

    Args:
        at_once: answers that are brought to the disk together.
        advance: shows how many are written.

    Returns:
        How many a server has not answered, by reason; they are not logged.
    """
    waiting: list[dict[str, Any]] = []
    unanswered: Counter[str] = Counter()

    def flush() -> None:
        if waiting:
            log.append(*waiting)
            waiting.clear()

    def on_result(index: int, result: Generation) -> None:
        if result.stop_reason == "unanswered" and result.reason != FILTERED:
            unanswered[result.reason] += 1
            return
        parted = result.parted()
        local = result.token_ids is not None
        waiting.append(
            {
                "key": asked[index].key,
                "text": parted.answer if local else parted.answer.strip(),
                "thoughts": parted.thoughts or result.thoughts,
                "stopped": result.stop_reason,
                "tokens": result.tokens if result.token_ids is None else len(result.token_ids),
            }
            | ({} if local else {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
        )
        if len(waiting) >= at_once:
            flush()

    requests = [GenerationRequest(messages=each.said, sampling=each.sampling) for each in asked]
    try:
        generator.generate(requests, on_result, advance=advance)
    finally:
        flush()
    return unanswered


def server_answers(
    answers: Answers,
    served: ServedModel,
    prompts: Sequence[Conversation],
    logs: Path,
    show: Callable[[str], None],
    advance: Advance,
) -> list[Asked]:
    """Have a server write what is not logged yet; return all answers that are wanted.

    Every reply is on disk before it counts, so that whatever ends the run, none is paid twice.

    Args:
        logs: the folder of the answers; the replies as they came are in a file beside it.
        show: shows a line.

    Raises:
        RunError: it does not answer any more, its budget is spent, or more than one answer in
            twenty is missing.
    """
    where = f"models.{answers.model}"
    replies = ReplyLog(logs.with_name(f"{logs.name}.replies.jsonl"))
    generator = EndpointGenerator(Calls(served, replies, where=where, show=show))
    asked = answers.asked(prompts, generator)
    known = logged_answers(logs)
    missing = [each for each in asked if each.key not in known]
    log = ReplyLog(logs / "0.jsonl")
    failed = write_answers(generator, missing, log, at_once=1, advance=advance)
    if (count := failed.total()) > (1 - _ANSWERED) * len(asked):
        raise RunError(
            "too many prompts were not answered",
            where=where,
            expected=f"at least {100 * _ANSWERED:.0f} % of {len(asked):,}",
            found=f"{count:,} without an answer: {counted(dict(failed.most_common(3)))}",
            do="run again, which asks the missing ones alone",
        )
    return asked


def logged_answers(folder: Path) -> dict[str, dict[str, Any]]:
    """The answers in all logs of a folder, by key."""
    logs = (ReplyLog(path) for path in sorted(folder.glob("*.jsonl")))
    return {record["key"]: record for log in logs for record in log.records}


def counted(reasons: Mapping[str, int]) -> str:
    """Counts by reason, in words."""
    found = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
    return found or "none"
