"""What calls cost, and how much may still be spent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dominie.core.errors import RunError
from dominie.generation.client import Outcome, Reply
from dominie.generation.endpoint import Endpoint

_CHARACTERS = 3.0  # of a prompt for each token, on the careful side for English
_REPLY_TOKENS = 1024  # of a reply whose length is not bounded

#: Notes what became of a call and gives its cost, None where no price is known.
Settle = Callable[[Outcome, Reply | None], float | None]


class Spending:
    """Calls and money of one ledger, those of earlier runs included.

    A call that timed out counts as one: whoever answers may charge for it.

    Args:
        endpoint: with its price and budget.
        records: what the ledger holds already.
        where: how messages name the endpoint's place in the recipe.
    """

    def __init__(
        self, endpoint: Endpoint, records: Sequence[Mapping[str, Any]], *, where: str
    ) -> None:
        self.endpoint, self.where = endpoint, where
        self.calls = sum(_may_be_charged(record["status"]) for record in records)
        self.money = sum(record.get("cost") or 0.0 for record in records)
        self._reserved_calls, self._reserved_money = 0, 0.0

    @property
    def told(self) -> str:
        """A few words for a progress line."""
        return f", {self.money:.2f} spent" if self.endpoint.price else ""

    @contextmanager
    def reserved(self, body: Mapping[str, Any]) -> Iterator[Settle]:
        """Hold what a call may cost while it is under way, so that calls at once cannot overspend.

        Raises:
            RunError: the budget does not reach.
        """
        most = self._estimate(body)
        self._check(most)
        self._reserved_calls += 1
        self._reserved_money += most

        def settle(outcome: Outcome, reply: Reply | None) -> float | None:
            if not _may_be_charged(outcome.status) or outcome.refused:
                return 0.0 if self.endpoint.price else None
            self.calls += 1
            if self.endpoint.price is None:
                return None
            usage = reply.usage if reply else None
            cost = self.endpoint.price.of(*usage) if usage else most
            self.money += cost
            return cost

        try:
            yield settle
        finally:
            self._reserved_calls -= 1
            self._reserved_money -= most

    def _estimate(self, body: Mapping[str, Any]) -> float:
        if self.endpoint.price is None:
            return 0.0
        written = sum(len(message["content"]) for message in body["messages"])
        return self.endpoint.price.of(written / _CHARACTERS, body.get("max_tokens", _REPLY_TOKENS))

    def _check(self, most: float) -> None:
        budget = self.endpoint.budget
        if budget is None:
            return
        if budget.calls is not None and self.calls + self._reserved_calls + 1 > budget.calls:
            raise self._spent(f"{self.calls} of {budget.calls} calls", "calls")
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


def _may_be_charged(status: int) -> bool:
    return status in (0, 200)
