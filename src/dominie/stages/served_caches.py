"""Rows of a teacher cache from a server: tested first, scored several at once, never mixed up."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dominie.core.display import Advance, Display
from dominie.core.errors import DominieError, InputError, RunError
from dominie.core.io import mapping
from dominie.data.shards import Entry, ShardWriter
from dominie.generation.calls import Ask, Calls
from dominie.generation.endpoint import ServedModel, largest_reply, score_body, score_url
from dominie.generation.prompt_scores import (
    MOST_NOISE,
    TESTED,
    BadScores,
    Probe,
    PromptScores,
    scores_of,
    self_test,
    server_facts,
)
from dominie.generation.reply_log import ScoredReply, ScoreLog, call_key, read_scored
from dominie.teachers.cache_sampling import TokenStats
from dominie.teachers.cache_writer import chosen_of, distance, token_counts
from dominie.teachers.cached import key_of_row

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dominie.data.batch import Row
    from dominie.stages.run_folder import RunFolder
    from dominie.stages.teacher_caches import CachePlan
    from dominie.teachers.cache import Cache

_AT_ONCE = 8  # rows that are brought to the disk together
_CHUNK = 64  # rows, at least, between two looks at whether the server was started anew


class ServedTeacher:
    """Scores rows for a cache by a server.

    Raises:
        InputError: no such server or model, or one that does not return what a cache needs.
    """

    def __init__(self, folder: RunFolder, plan: CachePlan, display: Display) -> None:
        self.plan, self.display = plan, display
        self.served: ServedModel = folder.recipe.served[plan.teacher]
        self.where, self.k = f"models.{plan.teacher}", plan.settings.k_max
        self.facts = server_facts(self.served, where=self.where)
        rows = plan.rows.values()
        self._longest = max((len(row.input_ids) for row in rows), default=1)
        if self.facts.longest is not None and self._longest + 1 > self.facts.longest:
            raise InputError(
                "conversations are longer than the server takes",
                where=self.where,
                expected=f"at most {self.facts.longest} tokens, with one that it generates",
                found=f"{self._longest + 1}",
                do="start it with a larger --max-model-len, or lower train.max_length",
            )
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", plan.teacher)
        log = folder.path / "cache" / f"{name}.calls.jsonl"
        counted = self.served.budget is not None or self.served.price is not None
        self._log = ScoreLog(log, on_disk=counted)
        self._vocabulary = len(plan.prepared.tokenizer)

    def begin(self) -> tuple[TokenStats, dict[str, Any]]:
        """Test the server; return what a new cache of it begins with, and notes for its manifest.

        Raises:
            InputError: the server fails the test: nothing has been spent on rows yet.
        """
        row = self.plan.rows[min(self.plan.rows)]
        ids = [int(each) for each in row.input_ids[:TESTED]]
        first, second = self._scored_ids(ids), self._scored_ids(ids)
        found, probe = self_test(first, second, ids, self._vocabulary, where=self.where)
        line = ", ".join(f"{key} {value}" for key, value in found.items())
        self.display.line(f"{self.plan.teacher}: self-test of {self.served.title}: {line}")
        if (path := self.served.local) is not None:
            found["local"] = apart = self._distance(path, ids, first)
            warns = "warning: " if apart["difference_mean"] > MOST_NOISE else ""
            self.display.line(
                f"{warns}{self.plan.teacher}: the server is {apart['difference_mean']:.4f} nats a "
                f"token from {path}, KL {apart['kl']:.6f}"
            )
        stats = token_counts(list(self.plan.rows.values()), self._vocabulary, 0.0)
        notes = {"server": self.facts.compared, "self_test": found}
        return stats, {**notes, "probe": dataclasses.asdict(probe)}

    def check_same(self, cache: Cache) -> None:
        """Refuse a server that is not the one which the rows of a cache are from.

        Raises:
            InputError: says what differs.
        """
        before = mapping(cache.manifest.get("server"))
        for name, now in self.facts.compared.items():
            if before.get(name) != now:
                raise InputError(
                    f"the cache is from a server with another {name}",
                    where=str(cache.folder),
                    expected=str(before.get(name)),
                    found=str(now),
                    do="start the server as it was; or name another folder in the stage's cache, "
                    "or move this one away, and all rows are scored anew",
                )
        self._check_probe(cache)

    def write(self, rows: Sequence[Row], cache: Cache, advance: Advance) -> None:
        """Score rows and append them to a cache, the longest first.

        What is scored after a connection broke is held back until the server has proved to be the
        same: it may have been started anew, with other weights.

        Raises:
            InputError, RunError: rows that were scored are kept.
            Interrupted: a signal came; what was under way was waited for and kept.
        """
        from dominie.training.callbacks import SaveAndStop

        order = sorted(rows, key=lambda row: -len(row.input_ids))
        size = max(_CHUNK, 8 * self.served.concurrency)
        done, stop = _Done(len(rows), advance), SaveAndStop()
        with stop.catching(), ShardWriter(cache.folder, owner=cache.owner) as writer:
            for start in range(0, len(order), size):
                chunk = _Chunk(writer)
                try:
                    self._score(order[start : start + size], cache, chunk, done)
                except DominieError:
                    if stop.signum is None:
                        raise
                finally:
                    chunk.flush()
                    if chunk.held:
                        self._check_probe(cache)
                        writer.add(chunk.held)
                if stop.signum is not None:
                    break
            else:
                self._check_probe(cache)
        stop.check(where=f"stage {self.plan.stage}, {done.rows:,} of {len(rows):,} scored")

    def _score(self, rows: Sequence[Row], cache: Cache, chunk: _Chunk, done: _Done) -> None:
        calls = self._calls()

        async def work(row: Row, ask: Ask) -> None:
            taught = np.flatnonzero(np.asarray(row.supervised, np.bool_)[1:]) + 1
            ids = [int(each) for each in row.input_ids]
            scores = await self._ask(ids, taught.tolist(), ask, calls)
            if self.facts.weights is not None and scores.weights != self.facts.weights:
                raise self._other_weights(cache, f"weight version {scores.weights}")
            key, chosen = key_of_row(row), chosen_of(scores, self.plan.settings)
            entry = Entry(key, len(chosen), cache.coder.encoded(chosen, key))
            chunk.add(entry, held=calls.breaks > 0)
            done.add(len(chosen), calls.budget.note)

        calls.run(rows, work)

    def _scored_ids(self, ids: list[int], *, proof: bool = False) -> PromptScores:
        """Score every position of a prompt, within the budget unless rows depend on it as proof."""
        calls = self._calls(bounded=not proof)

        async def work(prompt: list[int], ask: Ask) -> PromptScores:
            return await self._ask(prompt, list(range(1, len(prompt))), ask, calls)

        return calls.run([ids], work)[0]

    def _distance(self, path: str, ids: list[int], scores: PromptScores) -> dict[str, float]:
        """Compare what the server says with the same weights here."""
        import torch

        from dominie.models.loading import load_frozen
        from dominie.models.spec import Model

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        row = _Prompt(np.array(ids, np.int32), np.ones(len(ids), np.bool_))
        model = load_frozen(Model(path=path), device=device)
        return distance(model, row, scores, self._vocabulary)

    async def _ask(
        self, ids: list[int], positions: list[int], ask: Ask, calls: Calls
    ) -> PromptScores:
        body = score_body(self.served, self.facts.engine, ids, self.k)
        key = call_key(self.served.model, ids, self.k)
        reply = await ask(key, body)
        if reply is None:
            said = calls.failures[key]
            if "logprob" in said and ("max" in said or "allowed" in said):
                raise InputError(
                    "the server returns fewer log-probabilities than are asked for",
                    where=self.where,
                    found=said,
                    do=f"start it with --max-logprobs {self.k}, or lower the stage's cache.k_max",
                )
            raise RunError(
                "the server does not score a conversation",
                where=self.where,
                found=f"{said} ({len(ids):,} tokens)",
                do="run again when it does: what was scored is kept",
            )
        assert isinstance(reply, ScoredReply)
        try:
            return scores_of(
                reply, self.facts.engine, ids, positions, k=self.k, vocabulary=self._vocabulary
            )
        except BadScores as error:
            raise InputError(
                "the server does not return the log-probabilities of a prompt as a cache needs "
                "them",
                where=self.where,
                expected=f"the {self.k} likeliest ids of every position, and the token itself",
                found=str(error),
                do="start vLLM or SGLang as docs/served.md has it; what was scored is kept",
            ) from None

    def _calls(self, *, bounded: bool = True) -> Calls:
        return Calls(
            self.served if bounded else dataclasses.replace(self.served, budget=None),
            self._log,
            where=self.where,
            show=self.display.line,
            url=score_url(self.served, self.facts.engine),
            read=read_scored,
            largest=largest_reply(self._longest, self.k),
        )

    def _check_probe(self, cache: Cache) -> None:
        """Refuse a server that says something else of the probe than it said at first."""
        kept = Probe(**mapping(cache.manifest.get("probe")))
        now = self._scored_ids(kept.ids, proof=True).actual
        apart = float(np.abs(now - np.array(kept.log_probs)).mean())
        if apart > max(MOST_NOISE, 5 * kept.noise):
            raise self._other_weights(cache, f"{apart:.4f} nats from what it said at first")

    def _other_weights(self, cache: Cache, found: str) -> RunError:
        return RunError(
            "the server has other weights than those the cache was begun with",
            where=str(cache.folder),
            expected=f"those of {self.served.title} that are in the cache",
            found=found,
            do="start it with them and run again: what was scored before is kept; or name another "
            "folder in the stage's cache, or move this one away",
        )


@dataclass(frozen=True)
class _Prompt:
    """A conversation of which every token counts."""

    input_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]


class _Chunk:
    """Rows as they are scored: written a few at once, or held back."""

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer
        self._ready: list[Entry] = []
        self.held: list[Entry] = []

    def add(self, entry: Entry, *, held: bool) -> None:
        (self.held if held else self._ready).append(entry)
        if len(self._ready) >= _AT_ONCE:
            self.flush()

    def flush(self) -> None:
        self._writer.add(self._ready)
        self._ready = []


class _Done:
    """Counts what is scored, for the progress."""

    def __init__(self, total: int, advance: Advance) -> None:
        self._total, self._advance, self._started = total, advance, time.monotonic()
        self.rows = self._tokens = 0

    def add(self, tokens: int, note: str) -> None:
        self.rows += 1
        self._tokens += tokens
        rate = self._tokens / max(time.monotonic() - self._started, 1e-9)
        self._advance(self.rows, self._total, f"{rate:,.0f} supervised tokens/s{note}")
