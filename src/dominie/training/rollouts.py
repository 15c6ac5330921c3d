"""Rollouts: how a student answers in its training, which conversations, and its answers on disk."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from dominie.core.errors import RunError
from dominie.core.io import read_checksummed, write_checksummed
from dominie.generation.endpoint import RolloutServer

#: Optimiser steps that one set of rollouts may serve: KL from the student that wrote to the one
#: that learns is 0.06 nats after 4 of them, 0.2 after 32 (Open-MOPD, arXiv 2608.19098).
MOST_STEPS = 4
#: Bytes of a stage's rollouts; beyond, the oldest that no checkpoint needs are removed.
MOST_BYTES = 2**30

_NAME = re.compile(r"step-(\d+)\.(rank|divergence)-(\d+)\.json")


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How the student answers the conversations of its sources that are `on_policy`.

    Attributes:
        max_new_tokens: longest answer; one that has not ended by then is learnt without an end.
        temperature: of the draws; 0 takes the most probable token. It decides which answers are
            seen, not the loss on them.
        start_new_tokens: longest answer at the first step, from which it grows evenly to
            `max_new_tokens`; None is that from the start.
        grow_over: fraction of the stage's steps after which answers may be as long as they ever
            get; counts with `start_new_tokens` alone.
        top_p: tokens are drawn from the smallest set with at least this probability; 1 is all.
        every: optimiser steps that are answered at once, at most 4, so that the later ones learn
            from answers of a slightly older student; the loss is always that of the student as it
            is.
        turn: which of the assistant's turns is written anew, the last one or a random one; what
            follows on it is left out.
        batch: answers of one forward pass, at most; changes time and memory.
        engine: a vLLM server that generates them; None, in a recipe `local`, is this process.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    max_new_tokens: int = 256
    start_new_tokens: int | None = None
    grow_over: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    every: int = 1
    turn: Literal["last", "random"] = "last"
    batch: int = 256
    engine: RolloutServer | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if (start := self.start_new_tokens) is not None and not 1 <= start <= self.max_new_tokens:
            raise ValueError(
                f"start_new_tokens must be from 1 to max_new_tokens, {self.max_new_tokens}, "
                f"got {start}"
            )
        if not 0 < self.grow_over <= 1:
            raise ValueError(f"grow_over must be above 0 and at most 1, got {self.grow_over}")
        if self.grow_over < 1 and start is None:
            raise ValueError(
                "grow_over says until when answers become longer, and start_new_tokens, from which "
                "length, is missing"
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and not negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 1 <= self.every <= MOST_STEPS:
            raise ValueError(f"every must be from 1 to {MOST_STEPS}, got {self.every}")

    def longest_at(self, step: int, steps: int) -> int:
        """The most tokens of an answer.

        Args:
            step: counted from 0.
            steps: of the stage.
        """
        if self.start_new_tokens is None:
            return self.max_new_tokens
        grown = min(1.0, step / max(1.0, self.grow_over * steps - 1))
        more = self.max_new_tokens - self.start_new_tokens
        return self.start_new_tokens + int(grown * more + 1e-9)

    def grown_at(self, steps: int) -> int:
        """The first step, counted from 1, at which answers may be as long as they ever get."""
        lengths = (self.longest_at(step, steps) for step in range(steps))
        return next((n for n, most in enumerate(lengths, 1) if most == self.max_new_tokens), steps)

    @property
    def lengths(self) -> str:
        """How long answers may be, in words."""
        if self.start_new_tokens is None:
            return f"up to {self.max_new_tokens:,} tokens each"
        until = (
            "at last" if self.grow_over == 1 else f"after {100 * self.grow_over:.3g} % of the steps"
        )
        first = f"up to {self.start_new_tokens:,} tokens each at first"
        return f"{first}, {self.max_new_tokens:,} {until}"

    @property
    def identity(self) -> dict[str, Any]:
        """What the trained model depends on."""
        grows = {"start_new_tokens": self.start_new_tokens, "grow_over": self.grow_over}
        return {
            **(grows if self.start_new_tokens is not None else {}),
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "every": self.every,
            "turn": self.turn,
            **({} if self.engine is None else {"engine": "server"}),
        }


class RolloutKey(NamedTuple):
    """Which conversation of a run an answer is to.

    Attributes:
        step: optimiser step that learns from it, counted from 1 as in `metrics.jsonl`.
        source: name of the source.
        row: number of the conversation among the source's training rows.
        copy: how often the same step had it before, 0 but for sources smaller than a step.
    """

    step: int
    source: str
    row: int
    copy: int = 0

    def number(self, seed: int, use: str) -> int:
        """64 bits that depend on the key, the run's seed and what they are for, and on no more."""
        text = repr((use, seed, *self)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())

    def uniform(self, seed: int, use: str) -> float:
        """A number from 0 to 1, below 1, likewise."""
        return (self.number(seed, use) >> 11) / 2**53


@dataclass(frozen=True)
class Rollout:
    """An answer of the student, in tokens.

    Attributes:
        key: the conversation.
        prompt: its tokens up to the answer.
        answer: the tokens that were generated, with the one that ended them.
        ended: whether one did.
    """

    key: RolloutKey
    prompt: Sequence[int]
    answer: Sequence[int]
    ended: bool

    def as_row(self, right: Sequence[int] = ()) -> AnsweredRow:
        """What is learnt from: the generated tokens alone.

        Args:
            right: the answer of the data, for a teacher that may read it.
        """
        ids = np.array([*self.prompt, *self.answer], np.int32)
        supervised = np.arange(len(ids)) >= len(self.prompt)
        return AnsweredRow(ids, supervised, np.array(right, np.int32))


class AnsweredRow(NamedTuple):
    """A conversation with an answer of the student, and `shown` [m], the data's own."""

    input_ids: Any
    supervised: Any
    shown: Any


class RolloutFiles:
    """The rollouts of a stage: of each rank a file for the steps that were answered at once.

    A file is written whole before its answers are used, with the hash of the weights that gave
    them. What the losses found of the answers is written beside it, step by step.

    Args:
        folder: of the rollouts; made with the first file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, step: int, rank: int, weights: str, rollouts: Iterable[Rollout]) -> None:
        """Write what one rank has generated.

        Args:
            step: the first of those that it serves.
            rank: of the process.
            weights: hash of the student's.
            rollouts: the answers.

        Raises:
            RunError: the disk does not take them.
        """
        found = [[[*r.key], list(r.prompt), list(r.answer), r.ended] for r in rollouts]
        self._write(f"step-{step:08}.rank-{rank}.json", {"weights": weights, "rollouts": found})

    def read(self, step: int) -> tuple[dict[RolloutKey, Rollout], set[str]]:
        """The rollouts of all ranks, and the hashes of their weights; a damaged file has none.

        Args:
            step: the first of those that they serve.
        """
        found: dict[RolloutKey, Rollout] = {}
        weights = set()
        for path in sorted(self.folder.glob(f"step-{step:08}.rank-*.json")):
            try:
                record = read_checksummed(path)
                read = [Rollout(RolloutKey(*k), p, a, e) for k, p, a, e in record["rollouts"]]
                weights.add(str(record["weights"]))
            except (OSError, ValueError, KeyError, TypeError):
                continue
            found |= {rollout.key: rollout for rollout in read}
        return found, weights

    def write_divergences(
        self, step: int, rank: int, found: Mapping[RolloutKey, Sequence[float]]
    ) -> None:
        """Write the divergence of each token of answers, in nats, as one rank has computed it.

        Raises:
            RunError: the disk does not take them.
        """
        listed = [[[*key], [round(v, 4) for v in values]] for key, values in found.items()]
        self._write(f"step-{step:08}.divergence-{rank}.json", {"divergences": listed})

    def divergences(self, step: int) -> dict[RolloutKey, list[float]]:
        """The divergences of the answers that one step has learnt from."""
        found: dict[RolloutKey, list[float]] = {}
        for path in sorted(self.folder.glob(f"step-{step:08}.divergence-*.json")):
            try:
                listed = read_checksummed(path)["divergences"]
                found |= {RolloutKey(*key): values for key, values in listed}
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return found

    def steps(self) -> list[int]:
        """The first step of each set of rollouts, ascending."""
        return sorted({step for step, kind, _ in self._files() if kind == "rank"})

    def remove(self, step: int) -> None:
        """Remove the rollouts of a step and what was found of them."""
        for of, _, path in self._files():
            if of == step:
                path.unlink(missing_ok=True)

    def prune(self, needed: int | None) -> None:
        """Remove the oldest files until no more than `MOST_BYTES` are left.

        Args:
            needed: the first step that may have to be taken again; None is any.
        """
        files = [(step, path, path.stat().st_size) for step, _, path in self._files()]
        total = sum(size for *_, size in files)
        for step, path, size in files:
            if total <= MOST_BYTES or needed is None or step + MOST_STEPS > needed:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _files(self) -> list[tuple[int, str, Path]]:
        named = ((_NAME.fullmatch(path.name), path) for path in self.folder.glob("step-*.json"))
        return sorted((int(name[1]), name[2], path) for name, path in named if name)

    def write_tokenizer(self, tokenizer: Any) -> None:
        """Write the student's tokenizer, for whoever looks at answers before there is a model.

        Raises:
            RunError: the disk does not take it.
        """
        with self._writing("tokenizer"):
            tokenizer.save_pretrained(self.folder / "tokenizer")

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        with self._writing(name):
            write_checksummed(self.folder / name, record, indent=None)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Within, errors of the disk are told."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise RunError(
                "the student's answers cannot be written",
                where=str(self.folder / name),
                found=error.strerror or str(error),
                do="make room and give the same command again: it goes on from the last checkpoint",
            ) from error


def repetition(answer: Sequence[int], size: int = 4) -> float:
    """The share of an answer's runs of four tokens that stood in it before; 0 if it is short."""
    runs = [tuple(answer[i : i + size]) for i in range(len(answer) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
