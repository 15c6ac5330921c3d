"""Prompts scored by a server: it is tested before it is paid, and proved to be the same since."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dominie.core.errors import InputError, RunError
from dominie.core.io import mapping
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
from dominie.teachers.cache_codec import Coder
from dominie.teachers.cache_writer import chosen_of, distance, token_counts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dominie.stages.teacher_caches import CachePlan


class ServerScorer:
    """Asks a server for the likeliest ids at the positions of prompts.

    Args:
        served: the server and its model.
        where: how messages name it.
        purpose: what the scores are for, in a few words: `a cache`.
        kept: what is not lost after an error, as a clause.
        k: ids at each position.
        longest: tokens of the longest prompt.
        vocabulary: ids of the tokenizer.
        log: file that calls are counted in, if they cost or are bounded.
        show: shows a line.

    Attributes:
        facts: what the server tells of itself.
        probe: a prompt and what the server said of it at first; None before `begin` or `go_on`.

    Raises:
        InputError: no such server or model, one that scores no prompts, or not such long ones.
    """

    def __init__(
        self,
        served: ServedModel,
        *,
        where: str,
        purpose: str,
        kept: str,
        k: int,
        longest: int,
        vocabulary: int,
        log: Path,
        show: Callable[[str], None],
    ) -> None:
        self.served, self.where, self.purpose, self.k = served, where, purpose, k
        self.kept = kept
        self._longest, self._vocabulary, self._show = longest, vocabulary, show
        self.facts = server_facts(served, where=where)
        if self.facts.longest is not None and longest + 1 > self.facts.longest:
            raise InputError(
                "conversations are longer than the server takes",
                where=where,
                expected=f"at most {self.facts.longest} tokens, with one that it generates",
                found=f"{longest + 1}",
                do="start it with a larger --max-model-len, or lower train.max_length",
            )
        counted = served.budget is not None or served.price is not None
        self.log = ScoreLog(log, on_disk=counted)
        self.probe: Probe | None = None
        self._origin = ""

    def begin(self, ids: Sequence[int]) -> dict[str, Any]:
        """Test the server with a conversation.

        Returns:
            What is to be kept of it: `server`, `self_test` and `probe`, by which it is recognised.

        Raises:
            InputError: the server fails the test: nothing else has been paid for yet.
        """
        ids = [int(each) for each in ids[:TESTED]]
        first, second = self.scored(ids), self.scored(ids)
        found, self.probe = self_test(first, second, ids, self._vocabulary, where=self.where)
        line = ", ".join(f"{key} {value}" for key, value in found.items())
        name = self.where.rpartition(".")[2]
        self._show(f"{name}: self-test of {self.served.title}: {line}")
        if (path := self.served.local) is not None:
            found["local"] = apart = self._distance(path, ids, first)
            warns = "warning: " if apart["difference_mean"] > MOST_NOISE else ""
            self._show(
                f"{warns}{name}: the server is {apart['difference_mean']:.4f} nats a "
                f"token from {path}, KL {apart['kl']:.6f}"
            )
        notes = {"server": self.facts.compared, "self_test": found}
        return {**notes, "probe": dataclasses.asdict(self.probe)}

    def go_on(self, notes: Mapping[str, Any], *, origin: str) -> None:
        """Refuse a server that is not the one of which `begin` told before.

        Args:
            notes: what was kept of it.
            origin: where that is kept, for messages.

        Raises:
            InputError: another engine, version or model.
            RunError: other weights.
        """
        self._origin, before = origin, mapping(notes.get("server"))
        for name, now in self.facts.compared.items():
            if before.get(name) != now:
                raise InputError(
                    f"{self.purpose} is from a server with another {name}",
                    where=origin,
                    expected=str(before.get(name)),
                    found=str(now),
                    do="start the server as it was; or move this folder away, or name another one, "
                    "and all is scored anew",
                )
        self.probe = Probe(**mapping(notes.get("probe")))
        self.check_same()

    def check_same(self) -> None:
        """Refuse a server that says something else of the probe than it said at first.

        It is asked whatever is left of a budget: what was paid for depends on it.

        Raises:
            RunError: it does.
        """
        assert self.probe is not None, "begin or go_on comes first"
        self._compare(self.scored(self.probe.ids, proof=True))

    async def check_same_within(self, ask: Ask, calls: Calls) -> None:
        """`check_same`, between other calls and within their budget."""
        assert self.probe is not None, "begin or go_on comes first"
        ids = self.probe.ids
        self._compare(await self.ask(ids, range(1, len(ids)), ask, calls))

    def _compare(self, scores: PromptScores) -> None:
        assert self.probe is not None
        apart = float(np.abs(scores.actual - np.array(self.probe.log_probs)).mean())
        if apart > max(MOST_NOISE, 5 * self.probe.noise):
            raise self._other_weights(f"{apart:.4f} nats from what it said at first")

    def scored(self, ids: list[int], *, proof: bool = False) -> PromptScores:
        """Score every position of a prompt, within the budget unless others depend on it."""
        calls = self.calls(bounded=not proof)

        async def work(prompt: list[int], ask: Ask) -> PromptScores:
            return await self.ask(prompt, range(1, len(prompt)), ask, calls)

        return calls.run([ids], work)[0]

    async def ask(
        self, ids: list[int], positions: Sequence[int], ask: Ask, calls: Calls
    ) -> PromptScores:
        """Score some positions of a prompt, the first of which is 1.

        Raises:
            InputError: what the server returns is not what was asked for.
            RunError: it returns nothing, or tells of other weights.
        """
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
                do=f"run again when it does: {self.kept}",
            )
        assert isinstance(reply, ScoredReply)
        try:
            scores = scores_of(
                reply, self.facts.engine, ids, positions, k=self.k, vocabulary=self._vocabulary
            )
        except BadScores as error:
            raise InputError(
                f"the server does not return the log-probabilities of a prompt as {self.purpose} "
                "needs them",
                where=self.where,
                expected=f"the {self.k} likeliest ids of every position, and the token itself",
                found=str(error),
                do=f"start vLLM or SGLang as docs/served.md has it; {self.kept}",
            ) from None
        if self.facts.weights is not None and scores.weights != self.facts.weights:
            raise self._other_weights(f"weight version {scores.weights}")
        return scores

    def calls(self, *, bounded: bool = True) -> Calls:
        """Calls to the server, counted in the log."""
        return Calls(
            self.served if bounded else dataclasses.replace(self.served, budget=None),
            self.log,
            where=self.where,
            show=self._show,
            url=score_url(self.served, self.facts.engine),
            read=read_scored,
            largest=largest_reply(self._longest, self.k),
        )

    def _distance(self, path: str, ids: list[int], scores: PromptScores) -> dict[str, float]:
        """Compare what the server says with the same weights here."""
        import torch

        from dominie.models.loading import load_frozen
        from dominie.models.spec import Model

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        row = _Prompt(np.array(ids, np.int32), np.ones(len(ids), np.bool_))
        model = load_frozen(Model(path=path), device=device)
        return distance(model, row, scores, self._vocabulary)

    def _other_weights(self, found: str) -> RunError:
        return RunError(
            f"the server has other weights than those that {self.purpose} was begun with",
            where=self._origin or self.where,
            expected=f"those of {self.served.title} at first",
            found=found,
            do=f"start it with them and run again: {self.kept}; or move this folder away, or name "
            "another one, and all is scored anew",
        )


#: Bytes of an id with its log-probability in a reply, as vLLM writes them.
_BYTES_RECEIVED = 80


def estimated(plan: CachePlan, served: ServedModel) -> dict[str, Any]:
    """What a cache would take, without asking.

    Bytes a token are of probabilities that fall as rank^-1.5, and of ids at random.
    """
    rows, k, rng = list(plan.rows.values()), plan.settings.k_max, np.random.default_rng(0)
    size = len(plan.prepared.tokenizer)
    k, taught = min(k, size), sum(int(np.asarray(row.supervised)[1:].sum()) for row in rows)
    shape, many = np.arange(1, size + 1) ** -1.5, 256
    p = np.sort(shape[:k] / shape.sum() * np.exp(rng.normal(0, 0.3, (many, k)) - 0.3))[:, ::-1]
    ids = np.concatenate([rng.choice(size, k, replace=False) for _ in range(many)])
    scores = PromptScores(np.full(many, k), ids, np.log(p.ravel()), np.log(p[:, 0]))
    coder = Coder.of(token_counts(rows, size, 0.0), plan.settings)
    each = len(coder.encoded(chosen_of(scores, plan.settings), bytes(16))) / many
    tokens = sum(len(row.input_ids) for row in rows)
    found: dict[str, Any] = {
        "stage": plan.stage,
        "teacher": plan.teacher,
        "requests": len(rows) + 3,  # the self-test, and the proof at the end
        "tokens": tokens + len(rows),
        "supervised_tokens": taught,
        "bytes_per_token": round(each, 2),
        "bytes": round(each * taught),
        "bytes_received": _BYTES_RECEIVED * tokens * (k + 1),
    }
    return found | ({"money": served.price.of(tokens, len(rows))} if served.price else {})


@dataclass(frozen=True)
class _Prompt:
    """A conversation of which every token counts."""

    input_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
