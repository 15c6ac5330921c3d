"""What is counted of a student's answers by source, and warnings where they go wrong."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dominie.losses.targets import Signal
from dominie.training.rollouts import Rollout, repetition

logger = logging.getLogger(__name__)

#: A first divergence above this, in nats per token, is that of a teacher of another origin, under
#: which students collapse (0.19 of another origin, 0.04 of the same: arXiv 2606.30406).
FAR = 0.15
#: Answers this many times as long as the first ones, …
LONGER = 2.0
#: … or of which this part is cut off, are running away.
CUT = 0.5
#: Part of an answer that it repeats of itself, in the mean, above which it has become a loop.
REPEATED = 0.5


class RolloutFigures:
    """Figures of the student's answers since the last line of metrics.

    Args:
        sources: names of those that the student answers, in part or whole.
        lines: of metrics, where a run goes on.
        grown: the first step, counted from 1, at which answers may be as long as they ever get.

    Attributes:
        seconds: that generation took since the last line.
        teacher_seconds: likewise of the teachers' forward passes.
    """

    def __init__(
        self, sources: Sequence[str], lines: Iterable[Mapping[str, Any]] = (), *, grown: int = 1
    ) -> None:
        self.sources, self.grown = list(sources), grown
        self.begun: set[str] = set()  # sources with a line of metrics
        self.first: dict[str, float] = {}  # their mean lengths in the first one since `grown`
        for line in lines:
            self._begin(line.get("sources", {}), line.get("step", 0))
        self.seconds = self.teacher_seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # of GPU's passes
        self._warned: set[tuple[str, str]] = set()
        self._begin_line()

    def _begin_line(self) -> None:
        # Conversations, answers, their tokens, those cut off, those ended, repetition.
        self._counts = {name: np.zeros(6) for name in self.sources}
        # Of own answers and of the data: divergence, −log s(label), tokens.
        self._values = {name: np.zeros((2, 3)) for name in self.sources}

    def add_step(self, conversations: Iterable[tuple[str, Rollout | None]]) -> None:
        """Count the conversations of a step, over all ranks.

        Args:
            conversations: the source of each, and the student's answer if it has one.
        """
        for source, rollout in conversations:
            if source not in self._counts:
                continue
            self._counts[source][0] += 1
            if rollout is not None:
                repeated, ended = repetition(rollout.answer), rollout.ended
                self._counts[source][1:] += [1, len(rollout.answer), not ended, ended, repeated]

    def add_values(self, source: str, values: NDArray[Any], *, own: bool) -> None:
        """Count what the losses found of a conversation on this rank.

        Args:
            source: its own.
            values: [n, 2] divergence and −log s(label) of its supervised tokens.
            own: whether the student answered it.
        """
        if source in self._values and len(values):
            self._values[source][0 if own else 1] += [*values.sum(0), len(values)]

    def log_entry(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, dict[str, float]]:
        """For a line of `metrics.jsonl`, by source; that of the next line begins here.

        `own` is the part of the conversations that the student answered, `answer_tokens` the mean
        length of these answers, `answer_cut` and `answer_ended` the parts that were cut off and
        that ended, `repetition` the mean part of an answer that stood in it before,
        `divergence_own` and `divergence_data` the mean divergence per token on own answers and on
        the data's, in nats, `entropy` the mean −log s of own tokens, which at temperature 1 is the
        student's entropy in the mean.

        Args:
            reduce: sums a tensor over ranks.
        """
        if not self.sources:
            return {}
        stacked = torch.tensor(np.stack([self._values[name] for name in self.sources]))
        values = reduce(stacked).cpu().numpy()
        entry = {}
        for name, (own, data) in zip(self.sources, values, strict=True):
            found = _means(self._counts[name])
            if own[2]:
                found |= {"divergence_own": own[0] / own[2], "entropy": own[1] / own[2]}
            if data[2] and found:
                found["divergence_data"] = data[0] / data[2]
            if found:
                entry[name] = {key: round(float(value), 6) for key, value in found.items()}
        self._begin_line()
        return entry

    def timed(self, targets: Callable[[], Signal]) -> Callable[[], Signal]:
        """The same call, whose time counts as the teachers'; a GPU is not waited for."""

        def call() -> Signal:
            if not torch.cuda.is_available():
                began = time.perf_counter()
                found = targets()
                self.teacher_seconds += time.perf_counter() - began
                return found
            events = _event(), _event()
            events[0].record()
            found = targets()
            events[1].record()
            self._events.append(events)
            return found

        return call

    def seconds_entry(self) -> dict[str, float]:
        """For a line of `metrics.jsonl`: seconds of generation and teachers since the line before.

        A teacher's are of its forward passes; from its hidden states to the divergence the loss
        computes with the student's.
        """
        for first, last in self._events:
            last.synchronize()
            self.teacher_seconds += first.elapsed_time(last) / 1000
        found = {"generation_seconds": self.seconds, "teacher_seconds": self.teacher_seconds}
        self.seconds, self.teacher_seconds, self._events = 0.0, 0.0, []
        return {name: round(value, 3) for name, value in found.items()}

    def warn(self, entry: Mapping[str, Mapping[str, float]], step: int) -> None:
        """Warn, once a source, of answers that go wrong.

        Args:
            entry: of `log_entry`.
            step: of the line.
        """
        begun = set(self.begun)
        self._begin(entry, step)
        for source, found in entry.items():
            length = found.get("answer_tokens", 0.0)
            if source not in begun and found.get("divergence_own", 0.0) > FAR:
                self._once(
                    source,
                    "far",
                    f"the student's first answers are {found['divergence_own']:.3g} nats per token "
                    f"from their teacher, more than {FAR}, as if it were of another origin: "
                    "students have collapsed under such teachers. Train on the data's answers "
                    "first (on_policy: 0), or name a teacher trained from the student's base",
                )
            first = self.first.get(source, length)
            if length > LONGER * first > 0 and found["answer_cut"] > CUT:
                self._once(
                    source,
                    "long",
                    f"step {step}: answers run away: {length:.0f} tokens on average, {first:.0f} "
                    f"at first, {100 * found['answer_cut']:.0f} % cut off. Lower on_policy, so "
                    "that answers of the data teach their end, or the learning rate",
                )
            elif found.get("answer_cut", 0.0) >= 1.0 and step >= self.grown:
                self._once(
                    source,
                    "cut",
                    f"step {step}: every answer is cut off, so that none teaches its end. Raise "
                    "rollouts.max_new_tokens, or set on_policy below 1",
                )
            if found.get("repetition", 0.0) > REPEATED:
                self._once(
                    source,
                    "loop",
                    f"step {step}: answers repeat themselves: {100 * found['repetition']:.0f} % of "
                    "their runs of four tokens stood before. Train on the data's answers first, or "
                    "lower on_policy",
                )

    def _begin(self, entry: Mapping[str, Mapping[str, float]], step: int) -> None:
        """Keep the lengths that later ones are compared with; while answers may grow, none."""
        for source, found in entry.items():
            if "answer_tokens" in found:
                self.begun.add(source)
                if step >= self.grown:
                    self.first.setdefault(source, found["answer_tokens"])

    def _once(self, source: str, kind: str, text: str) -> None:
        if (source, kind) not in self._warned:
            self._warned.add((source, kind))
            logger.warning("%s: %s", source, text)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _means(counts: NDArray[Any]) -> dict[str, float]:
    """Means of the counted answers; nothing if there are none."""
    conversations, answers, *sums = counts.tolist()
    if not answers:
        return {}
    names = ("answer_tokens", "answer_cut", "answer_ended", "repetition")
    means = {name: total / answers for name, total in zip(names, sums, strict=True)}
    return {"own": answers / conversations, **means}
