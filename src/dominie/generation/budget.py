"""The budget of an endpoint: what its calls cost, and what is left for the next one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dominie.core.errors import RunError
from dominie.generation.endpoint import Endpoint, length_limit
from dominie.generation.http_client import Outcome
from dominie.generation.refusals import costs_nothing
from dominie.generation.reply_log import Reply, read_reply

_TOKENS_PER_BYTE = 1 / 3  # of a prompt, on the careful side for English and Chinese
_REPLY_TOKENS = 1024  # of a reply whose length is not bounded

#: Counts a call by its outcome; returns its cost, None if no price is known, and its tokens.
Settle = Callable[[Outcome, Reply | None], tuple[float | None, int]]


class BudgetTracker:
    """Counts calls, tokens and money of one reply log, those of earlier runs included.

    A call that timed out counts as one: the server may charge for it.

    Args:
        records: what the log holds already.
        where: how messages name the endpoint's place in the recipe.
    """

    def __init__(
        self, endpoint: Endpoint, records: Sequence[Mapping[str, Any]], *, where: str
    ) -> None:
        self.endpoint, self.where = endpoint, where
        charged = [r for r in records if _may_be_charged(r.get("status"), r.get("body"))]
        self.calls, self.tokens, self.money = len(charged), 0, 0.0
        self._reserved_calls, self._reserved_tokens, self._reserved_money = 0, 0, 0.0
        self._proven, self._tokens_per_byte, self._longest = False, _TOKENS_PER_BYTE, 0
        for record in charged:
            cost, tokens = record.get("cost"), record.get("tokens")
            if cost is None or tokens is None:  # no price was known then, or nothing was counted
                reply = read_reply(record["body"]) if record["status"] == 200 else None
                tokens = self._tokens(record["request"], reply) if tokens is None else tokens
                cost = self._cost(record["request"], reply) if cost is None else cost
            self.money += cost
            self.tokens += tokens

    @property
    def note(self) -> str:
        """What was spent, for a progress line."""
        return f", {self.money:.2f} spent" if self.endpoint.price else ""

    @property
    def unproven(self) -> bool:
        """Whether money or tokens are bounded, and no reply has told yet what a call costs."""
        budget = self.endpoint.budget
        return bool(budget and (budget.money or budget.tokens)) and not self._proven

    @contextlib.contextmanager
    def reserved(self, body: Mapping[str, Any]) -> Iterator[Settle]:
        """Reserve what a call may cost while it is under way: calls at once cannot overspend.

        Raises:
            RunError: the budget does not reach.
        """
        most, most_tokens = self._estimate(body), sum(self._estimated_tokens(body))
        self._check(most, most_tokens)
        self._reserved_calls += 1
        self._reserved_tokens += most_tokens
        self._reserved_money += most

        def settle(outcome: Outcome, reply: Reply | None) -> tuple[float | None, int]:
            if not _may_be_charged(outcome.status, outcome.body) or outcome.refused:
                return (0.0 if self.endpoint.price else None), 0
            self.calls += 1
            tokens = self._tokens(body, reply)
            self.tokens += tokens
            if self.endpoint.price is None:
                return None, tokens
            cost = self._cost(body, reply)
            self.money += cost
            return cost, tokens

        try:
            yield settle
        finally:
            self._reserved_calls -= 1
            self._reserved_tokens -= most_tokens
            self._reserved_money -= most

    def _tokens(self, body: Mapping[str, Any], reply: Reply | None) -> int:
        """Return the tokens of a call, by the server's count if it gave one."""
        self._proven = self._proven or reply is not None
        if reply is None or reply.usage is None:
            return sum(self._estimated_tokens(body))
        self._learn(body, *reply.usage)
        return sum(reply.usage)

    def _cost(self, body: Mapping[str, Any], reply: Reply | None) -> float:
        """Return what a call cost, by the server's count of tokens if it gave one."""
        if self.endpoint.price is None:
            return 0.0
        self._proven = self._proven or reply is not None
        if reply is None or reply.usage is None:
            return self._estimate(body)
        self._learn(body, *reply.usage)
        return self.endpoint.price.of(*reply.usage)

    def _learn(self, body: Mapping[str, Any], prompt: int, tokens: int) -> None:
        """Raise the estimates to what a call has used."""
        # A server that exceeds the estimate, by its tokenizer or an unbounded reply, does so again.
        self._tokens_per_byte = max(self._tokens_per_byte, prompt / max(1, _size(body)))
        if tokens > (length_limit(body) or _REPLY_TOKENS):
            self._longest = max(self._longest, tokens)

    def _estimate(self, body: Mapping[str, Any]) -> float:
        """Return what a call may cost at most, as far as is known."""
        if self.endpoint.price is None:
            return 0.0
        return self.endpoint.price.of(*self._estimated_tokens(body))

    def _estimated_tokens(self, body: Mapping[str, Any]) -> tuple[int, int]:
        """Return the tokens of prompt and reply at most, as far as is known."""
        tokens = max(length_limit(body) or _REPLY_TOKENS, self._longest)
        return math.ceil(_size(body) * self._tokens_per_byte), tokens

    def _check(self, most: float, tokens: int) -> None:
        budget = self.endpoint.budget
        if budget is None:
            return
        if budget.calls is not None and self.calls + self._reserved_calls + 1 > budget.calls:
            raise self._spent(f"{self.calls} of {budget.calls} calls", "calls")
        if budget.tokens is not None and (
            self.tokens + self._reserved_tokens + tokens > budget.tokens
        ):
            raise self._spent(
                f"{self.tokens:,} of {budget.tokens:,}, and the next call may take {tokens:,}",
                "tokens",
            )
        if budget.money is not None and self.money + self._reserved_money + most > budget.money:
            raise self._spent(
                f"{self.money:.4f} of {budget.money:g}, and the next call may cost {most:.4f}",
                "money",
            )

    def _spent(self, found: str, kind: str) -> RunError:
        return RunError(
            "the budget is spent",
            where=f"{self.where}.budget.{kind}",
            found=found,
            do="raise it and run again: what was answered is kept and not paid for twice",
        )


def _size(body: Mapping[str, Any]) -> int:
    """Return the bytes of a prompt; of one in token ids, as if each were three."""
    if "messages" not in body:
        ids = body.get("prompt", body.get("input_ids"))
        return 3 * (len(ids) if isinstance(ids, list) else int(body.get("prompt_tokens", 0)))
    return sum(len(str(message["content"]).encode()) for message in body["messages"])


def _may_be_charged(status: Any, body: Any) -> bool:
    return status == 0 or (status == 200 and not costs_nothing(body))
