"""Teachers behind servers: the rows of a cache, and those that are asked while a stage trains."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dominie.core.display import Advance, Display
from dominie.core.distributed import all_gather, rank, world_size
from dominie.core.errors import DominieError, InputError
from dominie.core.io import read_checksummed, write_checksummed
from dominie.data.shards import Entry, ShardWriter
from dominie.generation.calls import Ask, Calls
from dominie.generation.prompt_scores import PromptScores
from dominie.stages.server_scores import ServerScorer
from dominie.teachers.ahead import AskedScores, ScoredTeacher
from dominie.teachers.cache_sampling import CacheSettings, TokenStats
from dominie.teachers.cache_writer import chosen_of, token_counts
from dominie.teachers.cached import CachedTeacher, key_of_row

if TYPE_CHECKING:
    from dominie.data.batch import Row
    from dominie.stages.run_folder import RunFolder
    from dominie.stages.teacher_caches import CachePlan
    from dominie.stages.train import PreparedTraining
    from dominie.teachers import Teacher
    from dominie.teachers.cache import Cache

_AT_ONCE = 8  # rows that are brought to the disk together
_CHUNK = 64  # rows, at least, between two proofs that a server whose connections break is the same


class ServedTeacher:
    """Scores rows for a cache by a server.

    Raises:
        InputError: no such server or model, or one that does not return what a cache needs.
    """

    def __init__(self, folder: RunFolder, plan: CachePlan, display: Display) -> None:
        self.plan, self.display = plan, display
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", plan.teacher)
        rows = list(plan.rows.values())
        self._vocabulary = len(plan.prepared.tokenizer)
        self.scorer = ServerScorer(
            folder.recipe.served[plan.teacher],
            where=f"models.{plan.teacher}",
            purpose="a cache",
            kept="what was scored is kept",
            k=plan.settings.k_max,
            longest=max((len(row.input_ids) for row in rows), default=1),
            vocabulary=self._vocabulary,
            log=folder.path / "cache" / f"{name}.calls.jsonl",
            show=display.line,
        )

    def begin(self) -> tuple[TokenStats, dict[str, Any]]:
        """Test the server; return what a new cache of it begins with, and notes for its manifest.

        Raises:
            InputError: the server fails the test: nothing has been spent on rows yet.
        """
        rows = self.plan.rows
        notes = self.scorer.begin(rows[min(rows)].input_ids)
        return token_counts(list(rows.values()), self._vocabulary, 0.0), notes

    def check_same(self, cache: Cache) -> None:
        """Refuse a server that is not the one which the rows of a cache are from.

        Raises:
            InputError, RunError: says what differs.
        """
        self.scorer.go_on(cache.manifest, origin=str(cache.folder))

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
        done, stop, calls = _Done(len(rows), advance), SaveAndStop(), self.scorer.calls()
        with stop.catching(), ShardWriter(cache.folder, owner=cache.owner) as writer:
            window = _Window(writer, calls)

            async def work(row: Row, ask: Ask) -> None:
                taught = np.flatnonzero(np.asarray(row.supervised, np.bool_)[1:]) + 1
                ids = [int(each) for each in row.input_ids]
                scores = await self.scorer.ask(ids, taught.tolist(), ask, calls)
                key, chosen = key_of_row(row), chosen_of(scores, self.plan.settings)
                window.add(Entry(key, len(chosen), cache.coder.encoded(chosen, key)))
                done.add(len(chosen), calls.budget.note)
                if window.waits_for_proof:
                    await window.release(self.scorer.check_same_within(ask, calls))

            try:
                calls.run(order, work)
            except DominieError:
                if stop.signum is None:
                    raise
            finally:
                window.flush()
                if window.held:
                    self.scorer.check_same()
                    writer.add(window.held)
            if stop.signum is None and not window.held:
                self.scorer.check_same()
        stop.check(where=f"stage {self.plan.stage}, {done.rows:,} of {len(rows):,} scored")


class LiveScores:
    """Scores for a stage while it trains: a `ScoreSource` of a teacher.

    After a connection broke the server has to prove that it is the same before what it says is
    used: it may have been started anew, with other weights.

    Args:
        scorer: that has begun.
    """

    def __init__(self, scorer: ServerScorer) -> None:
        self.scorer = scorer
        self._proven = 0

    @cached_property
    def _calls(self) -> Calls:
        return self.scorer.calls()

    def score(
        self,
        asked: Sequence[AskedScores],
        found: Callable[[int, PromptScores], None],
    ) -> None:
        """Score conversations, several at once.

        Args:
            asked: of each its ids and the positions of the tokens that are predicted.
            found: called with the index of a conversation and its scores, as they come.

        Raises:
            InputError, RunError: as `ServerScorer.ask`.
        """
        calls, held = self._calls, list[tuple[int, PromptScores]]()

        async def work(index: int, ask: Ask) -> None:
            ids, positions = asked[index]
            scores = await self.scorer.ask(ids.tolist(), positions.tolist(), ask, calls)
            if calls.breaks > self._proven:
                held.append((index, scores))
            else:
                found(index, scores)

        calls.run(range(len(asked)), work)
        if held:
            breaks = calls.breaks
            self.scorer.check_same()
            self._proven = breaks
            for index, scores in held:
                found(index, scores)
        self.scorer.log.forget()


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher behind a server, while a stage trains.

    Attributes:
        teacher: gives a batch its targets.
        scorer: asks the server.
        notes: what the server told of itself, and its self-test.
    """

    teacher: ScoredTeacher
    scorer: ServerScorer
    notes: Mapping[str, Any]

    def finished(self) -> dict[str, Any]:
        """What `stage.json` says of it, once it has proved to be the same to the end.

        Raises:
            RunError: it has other weights now.
        """
        self.teacher.close()
        self.scorer.check_same()
        return {key: self.notes[key] for key in ("server", "self_test")} | {"k": self.scorer.k}


def live_teachers(
    folder: RunFolder, prepared: PreparedTraining, display: Display
) -> dict[str, LiveTeacher]:
    """The teachers of a stage that are asked while it trains, by name; each is tested first.

    What the first test found is in the stage's folder, and a run that goes on compares with it.

    Raises:
        InputError: a server that cannot teach, or a budget that no rank knows of another.
        RunError: one that has other weights than when the stage began.
    """
    found: dict[str, LiveTeacher] = {}
    for source in prepared.stage_sources:
        name = source.target_provider
        if name is None or name in found or (served := folder.recipe.served.get(name)) is None:
            continue
        if served.budget is not None and world_size() > 1:
            raise InputError(
                "a budget is counted by one process, and a live teacher is asked by each",
                where=f"models.{name}.budget",
                found=f"{world_size()} processes",
                do="remove the budget, train on one process, or fill a cache",
            )
        stage = folder.stage(prepared.name)
        label = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
        scorer = ServerScorer(
            served,
            where=f"models.{name}",
            purpose="this stage",
            kept="the stage goes on from its last checkpoint",
            k=(prepared.stage.cache or CacheSettings()).k_max,
            longest=prepared.stage.train.max_length,
            vocabulary=len(prepared.tokenizer),
            log=stage / f"{label}.calls.jsonl",
            show=display.line if rank() == 0 else lambda _: None,
        )
        path = stage / f"{label}.server.json"
        if rank() == 0 and not path.exists():
            write_checksummed(path, scorer.begin(source.train[0].input_ids))
        all_gather(None)  # for the one process that tests it
        notes = read_checksummed(path)
        scorer.go_on(notes, origin=str(path))
        found[name] = LiveTeacher(ScoredTeacher(LiveScores(scorer)), scorer, notes)
    return found


def stored_or_asked(
    caches: Mapping[str, Cache], asked: Mapping[str, LiveTeacher]
) -> dict[str, Teacher]:
    """The teachers of a stage that need no model here, by the names that its sources use."""
    stored = {name: CachedTeacher(cache) for name, cache in caches.items()}
    return {**stored, **{name: each.teacher for name, each in asked.items()}}


def finished(teachers: Mapping[str, LiveTeacher]) -> dict[str, Any]:
    """What `stage.json` says of live teachers, if there are any."""
    found = {name: each.finished() for name, each in teachers.items()}
    return {"served": found} if found else {}


class _Window:
    """Rows as they are scored: written a few at once, or held until the server is proved the same.

    Rows that are held keep none of the others from being scored.
    """

    def __init__(self, writer: ShardWriter, calls: Calls) -> None:
        self._writer, self._calls = writer, calls
        self._ready: list[Entry] = []
        self._proven = 0  # breaks after which the server was the same
        self._proving = False
        self.held: list[Entry] = []

    def add(self, entry: Entry) -> None:
        """Take a row in."""
        broken = self._calls.breaks > self._proven
        (self.held if broken else self._ready).append(entry)
        if len(self._ready) >= _AT_ONCE:
            self.flush()

    @property
    def waits_for_proof(self) -> bool:
        """Whether so many rows are held that the server should be asked."""
        return len(self.held) >= _CHUNK and not self._proving

    async def release(self, proof: Awaitable[None]) -> None:
        """Write the rows that are held, if the proof does not raise; later ones wait for others."""
        breaks, count, self._proving = self._calls.breaks, len(self.held), True
        try:
            await proof
        finally:
            self._proving = False
        self._writer.add(self.held[:count])
        del self.held[:count]
        self._proven = breaks

    def flush(self) -> None:
        """Write the rows that are ready."""
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
