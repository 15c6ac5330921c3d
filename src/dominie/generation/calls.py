"""Many calls to one endpoint: bounded in number, money and concurrency; each is paid once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from dominie.core.display import Advance
from dominie.core.errors import DominieError, InputError, RunError
from dominie.generation.endpoint import Client, Endpoint, Outcome, delay
from dominie.generation.reply_log import Reply, ReplyLog, read_reply

_CHARACTERS = 3.0  # of a prompt for each token, on the careful side for English
_REPLY_TOKENS = 1024  # of a reply whose length is not bounded

#: Counts a call by its outcome and returns its cost, None if no price is known.
Settle = Callable[[Outcome, Reply | None], float | None]


class BudgetTracker:
    """Counts calls and money of one reply log, those of earlier runs included.

    A call that timed out counts as one: the server may charge for it.

    Args:
        records: what the log holds already.
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
    def note(self) -> str:
        """What was spent, for a progress line."""
        return f", {self.money:.2f} spent" if self.endpoint.price else ""

    @contextlib.contextmanager
    def reserved(self, body: Mapping[str, Any]) -> Iterator[Settle]:
        """Reserve what a call may cost while it is under way: calls at once cannot overspend.

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


Item = TypeVar("Item")
Result = TypeVar("Result")

#: Sends a request under a key; returns the reply, None if the endpoint gave none.
Ask = Callable[[str, dict[str, Any]], Awaitable[Reply | None]]

_REFUSALS = 3  # requests refused outright, with nothing answered, before the run is given up


class _Stopping(Exception):
    """No further call is to be sent."""


class Calls:
    """Works through items with calls to an endpoint.

    Whatever stops it, the calls under way are waited for and logged: they are paid for. The first
    SIGINT or SIGTERM stops it so, a second one at once.

    Args:
        log: holds every reply before it counts.
        where: how messages name the endpoint's place in the recipe.
    """

    def __init__(
        self, endpoint: Endpoint, log: ReplyLog, *, where: str, show: Callable[[str], None]
    ) -> None:
        self.endpoint, self.log, self.where, self._show = endpoint, log, where, show
        self.budget = BudgetTracker(endpoint, log.records, where=where)
        self._key: str | None = None
        self._answered = self._failed_in_a_row = 0
        self._client: Client
        self._stopped: asyncio.Event
        self._error: DominieError | None = None
        self._signal: int | None = None

    def run(
        self,
        items: Sequence[Item],
        work: Callable[[Item, Ask], Awaitable[Result]],
        advance: Advance | None = None,
    ) -> list[Result]:
        """Return the result of `work` for each item, several at a time, in the order of the items.

        Raises:
            InputError: the endpoint refuses what it is asked.
            RunError: it does not answer, or the budget is spent. What was answered is kept.
        """
        found: dict[int, Result] = {}
        if items:
            self._key = self.endpoint.key(where=self.where)
            asyncio.run(self._run(items, work, advance, found))
        if self._signal is not None:
            signal.raise_signal(self._signal)  # for the handler that was set before
            raise RunError("interrupted; what was answered is kept", where=self.where)
        if self._error is not None:
            raise self._error
        return [found[i] for i in range(len(items))]

    async def _run(
        self,
        items: Sequence[Item],
        work: Callable[[Item, Ask], Awaitable[Result]],
        advance: Advance | None,
        found: dict[int, Result],
    ) -> None:
        self._stopped = asyncio.Event()
        queue, started = iter(enumerate(items)), time.monotonic()

        async def worker() -> None:
            for i, item in queue:
                try:
                    found[i] = await work(item, self._ask)
                except _Stopping:
                    return
                except DominieError as error:
                    self._error = self._error or error
                    self._stopped.set()
                    return
                if advance is not None:
                    rate = len(found) / max(time.monotonic() - started, 1e-9)
                    advance(len(found), len(items), f"{rate:.1f}/s{self.budget.note}")

        async with Client(self.endpoint, self._key) as self._client:
            with self._handling_signals():
                workers = min(self.endpoint.concurrency, len(items))
                await asyncio.gather(*(worker() for _ in range(workers)))

    async def _ask(self, key: str, body: dict[str, Any]) -> Reply | None:
        outcome = Outcome(0, "")
        for attempt in range(self.endpoint.retries + 1):
            if self._stopped.is_set():
                raise _Stopping
            outcome, reply = await self._attempt(key, body)
            if reply is not None:
                self._answered += 1
                self._failed_in_a_row = 0
                return reply
            if outcome.status != 200 and not outcome.retryable:
                break
            if outcome.refused and not self._answered and attempt >= 2:
                break  # a server that restarts is waited for, one that never answered is not
            if attempt < self.endpoint.retries:
                with contextlib.suppress(TimeoutError):
                    seconds = delay(self.endpoint.backoff, attempt, outcome.wait)
                    await asyncio.wait_for(self._stopped.wait(), seconds)
        self._note_failure(outcome)
        return None

    async def _attempt(self, key: str, body: dict[str, Any]) -> tuple[Outcome, Reply | None]:
        with self.budget.reserved(body) as settle:
            began = time.time()
            # The same until it is answered, then another: a gateway bills what it repeats once.
            answered = sum(record["status"] == 200 for record in self.log.of(key))
            outcome = await self._client.send(body, call=f"{key}-{answered}")
            reply = read_reply(outcome.body) if outcome.status == 200 else None
            record = {
                "key": key,
                "time": round(began, 3),
                "seconds": round(time.time() - began, 3),
                "status": outcome.status,
                "cost": settle(outcome, reply),
                "request": body,
                "body": outcome.body,
            }
            if not outcome.refused:  # nothing was sent, so nothing is owed
                self.log.append(record)
        return outcome, reply

    def _note_failure(self, outcome: Outcome) -> None:
        """Go on after the failure of one call; raise if all will fail alike."""
        self._failed_in_a_row += 1
        found = f"HTTP {outcome.status}: {_excerpt(outcome.body)}".removeprefix("HTTP 0: ")
        if outcome.status in (401, 403):
            raise InputError(
                "the endpoint refuses the key" if self._key else "the endpoint asks for a key",
                where=self.where,
                found=found,
                do=f"check the key in {self.endpoint.key_env}"
                if self.endpoint.key_env
                else "name the environment variable that holds it: key_env",
            )
        if outcome.refused and not self._answered:
            raise InputError(
                "the endpoint cannot be reached",
                where=self.where,
                found=f"{self.endpoint.url}: {found}",
                do="start the server, or correct the URL",
            )
        asked_wrongly = 300 <= outcome.status < 500 and not outcome.retryable
        if outcome.status == 404 or (
            asked_wrongly and not self._answered and self._failed_in_a_row >= _REFUSALS
        ):
            raise InputError(
                f"the endpoint refuses requests for model {self.endpoint.model}",
                where=self.where,
                found=found,
                do="set logprobs: false; preferences are then not weighed"
                if "logprobs" in outcome.body
                else "check endpoint (its URL up to /v1) and model",
            )
        if self._failed_in_a_row >= max(_REFUSALS, self.endpoint.concurrency):
            raise RunError(
                "the endpoint does not answer any more",
                where=self.where,
                found=f"{self._failed_in_a_row} calls in a row failed, the last with {found}",
                do="run again when it does: what was answered is kept",
            )

    @contextlib.contextmanager
    def _handling_signals(self) -> Iterator[None]:
        """Within, the first signal stops further calls. Only the main thread can handle signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        for signum in before:
            loop.add_signal_handler(signum, self._interrupt, signum)
        try:
            yield
        finally:
            for signum, handler in before.items():
                loop.remove_signal_handler(signum)
                signal.signal(signum, handler)

    def _interrupt(self, signum: int) -> None:
        if self._signal is not None:
            os._exit(128 + signum)
        self._signal = signum
        self._stopped.set()
        self._show("interrupted: waiting for the calls under way, which are paid for")


def _excerpt(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 200 else f"{flat[:200]}…"
