"""Many calls to one endpoint: bounded in number, money and concurrency; each is paid once."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from dominie.core.display import Advance
from dominie.core.errors import DominieError, RunError
from dominie.generation.budget import BudgetTracker
from dominie.generation.endpoint import Endpoint, length_limit
from dominie.generation.http_client import LARGEST, Client, Outcome, delay
from dominie.generation.refusals import (
    foreign,
    found_in,
    no_text,
    refusal,
    refused_for_its_text,
    status_inside,
)
from dominie.generation.reply_log import Reply, ReplyLog, read_reply

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Sends a request under a key; returns the reply, None if the endpoint gave none.
Ask = Callable[[str, dict[str, Any]], Awaitable[Reply | None]]

_REFUSALS = 3  # requests refused outright, with nothing answered, before the run is given up
_BROKEN = 3  # attempts at the same call with broken replies, with nothing answered
_LONG_WAIT = 20.0  # seconds of a wait that is told, once
_WAITING = "interrupted: waiting for the calls under way, which are paid for"


class _Stopping(Exception):
    """No further call is to be sent."""


class Calls:
    """Works through items with calls to an endpoint.

    Whatever stops it, the calls under way are waited for and logged: they are paid for. The first
    SIGINT or SIGTERM stops it so, a second one at once.

    Args:
        log: holds every reply before it counts.
        where: how messages name the endpoint's place in the recipe.
        url: that calls are sent to; None is that of chat completions.
        read: the reply in the body of a response, None if it holds none.
        largest: bytes of a reply that are read.

    Attributes:
        failures: why a request was not answered, by its key, the last one last.
        breaks: calls whose connection was refused, broke or took too long.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        log: ReplyLog,
        *,
        where: str,
        show: Callable[[str], None],
        url: str | None = None,
        read: Callable[[str], Reply | None] = read_reply,
        largest: int = LARGEST,
    ) -> None:
        self.endpoint, self.log, self.where, self._show = endpoint, log, where, show
        self._url, self._read, self._largest = url, read, largest
        self.budget = BudgetTracker(endpoint, log.records, where=where)
        self.failures: dict[str, str] = {}
        self.breaks = 0
        self._replied_before = any(record["status"] == 200 for record in log.records)
        self._key: str | None = None
        self._answered = self._failed_in_a_row = 0
        self._silent = 0  # replies without text since the first, -1 after one with text
        self._client: Client
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waited = False  # so long that it was told
        self._halted = False  # before the loop ran
        self._stopped: asyncio.Event
        self._first: asyncio.Lock
        self._places: asyncio.Semaphore
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
            self._run_loop(self._run(items, work, advance, found))
        if self._signal is not None:
            signal.raise_signal(self._signal)  # for the handler that was set before
            raise RunError("interrupted; what was answered is kept", where=self.where)
        if self._error is not None:
            raise self._error
        return [found[i] for i in range(len(items))]

    def _run_loop(self, calls: Coroutine[Any, Any, None]) -> None:
        """Run the calls; in a thread of their own if a loop runs here, as in a notebook."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(calls)
            return
        with ThreadPoolExecutor(1) as thread:
            done = thread.submit(asyncio.run, calls)
            try:
                done.result()
            except KeyboardInterrupt:  # it comes to the main thread, which waits here
                self._halted = True
                if self._loop is not None:
                    with contextlib.suppress(RuntimeError):  # it has just ended
                        self._loop.call_soon_threadsafe(self._stopped.set)
                self._show(_WAITING)
                raise

    async def _run(
        self,
        items: Sequence[Item],
        work: Callable[[Item, Ask], Awaitable[Result]],
        advance: Advance | None,
        found: dict[int, Result],
    ) -> None:
        self._stopped, self._first = asyncio.Event(), asyncio.Lock()
        self._places = asyncio.Semaphore(self.endpoint.concurrency)
        self._loop = asyncio.get_running_loop()
        if self._halted:
            return
        queue, started = iter(enumerate(items)), time.monotonic()

        async def worker() -> None:
            while not self._stopped.is_set():
                async with self._places:
                    if (following := next(queue, None)) is None:
                        return
                    i, item = following
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

        self._client = Client(self.endpoint, self._key, url=self._url, largest=self._largest)
        async with self._client:
            with self._handling_signals():
                # More than calls at once: one that waits before a further attempt has no place.
                workers = min(2 * self.endpoint.concurrency, len(items))
                await asyncio.gather(*(worker() for _ in range(workers)))

    async def _ask(self, key: str, body: dict[str, Any]) -> Reply | None:
        outcome, broken = Outcome(0, ""), 0
        for attempt in range(self.endpoint.retries + 1):
            if self._stopped.is_set():
                raise _Stopping
            outcome, reply = await self._attempt(key, body)
            if reply is not None:
                self._note_reply(reply, body)
                return reply
            broken += outcome.status == 200
            if outcome.status != 200 and not outcome.retryable:
                break
            # A server that restarts is waited for, one that never answered is not.
            if not self._answered and (
                (outcome.refused and attempt >= 2)
                or broken >= _BROKEN
                or (outcome.status == 200 and foreign(outcome.body))
            ):
                break
            if attempt < self.endpoint.retries:
                seconds = delay(self.endpoint.backoff, attempt, outcome.wait)
                if seconds >= _LONG_WAIT and not self._waited:
                    self._waited = True
                    self._show(f"{self.where}: waits up to {seconds:.0f} s, {found_in(outcome)}")
                await self._wait(seconds)
        self.failures[key] = found_in(outcome)
        if not refused_for_its_text(outcome, replied=bool(self._answered) or self._replied_before):
            self._note_failure(outcome, body)
        return None

    async def _wait(self, seconds: float) -> None:
        """Wait before a further attempt, or until all stops.

        Meanwhile another item is begun, if the endpoint has answered any.
        """
        if not self._answered:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), seconds)
            return
        self._places.release()
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), seconds)
        finally:
            await self._places.acquire()

    async def _attempt(self, key: str, body: dict[str, Any]) -> tuple[Outcome, Reply | None]:
        if self.budget.unproven:
            async with self._first:  # one call shows what a call costs, before there are many
                if self.budget.unproven:
                    return await self._sent(key, body)
        return await self._sent(key, body)

    async def _sent(self, key: str, body: dict[str, Any]) -> tuple[Outcome, Reply | None]:
        with self.budget.reserved(body) as settle:
            began = time.time()
            # The same until it is answered, then another: a gateway bills what it repeats once.
            answered = sum(record["status"] == 200 for record in self.log.of(key))
            outcome = await self._client.send(body, call=f"{key}-{answered}")
            self.breaks += outcome.status == 0
            reply = self._read(outcome.body) if outcome.status == 200 else None
            if outcome.status == 200 and reply is None:
                inside = status_inside(outcome.body)
                outcome = dataclasses.replace(outcome, status=inside or 200)
            cost, tokens = settle(outcome, reply)
            record = {
                "key": key,
                "time": round(began, 3),
                "seconds": round(time.time() - began, 3),
                "status": outcome.status,
                "cost": cost,
                "tokens": tokens,
                "request": body,
                "body": outcome.body,
            }
            if not outcome.refused:  # nothing was sent, so nothing is owed
                self.log.append(record)
        return outcome, reply

    def _note_reply(self, reply: Reply, body: Mapping[str, Any]) -> None:
        """Count a reply; raise if the first ones have no text."""
        self._answered += 1
        self._failed_in_a_row = 0
        if length_limit(body) == 1:
            return  # one token may well be a mark or a blank
        self._silent = self._silent + 1 if reply.silent and self._silent >= 0 else -1
        if self._silent >= _REFUSALS:
            raise no_text(where=self.where, found=self.log.path)

    def _note_failure(self, outcome: Outcome, body: Mapping[str, Any]) -> None:
        """Go on after the failure of one call; raise if all will fail alike."""
        self._failed_in_a_row += 1
        spent = outcome.status == 429 and not outcome.retryable
        at_once = spent or outcome.status in (401, 402, 404, 407)
        broken = outcome.status == 200 and not foreign(outcome.body)  # several times already
        first = outcome.refused or outcome.status == 403 or broken
        refused = outcome.refused or not outcome.retryable
        if at_once or (
            refused and not self._answered and (first or self._failed_in_a_row >= _REFUSALS)
        ):
            raise refusal(
                self.endpoint, outcome, body, where=self.where, has_key=self._key is not None
            )
        if self._failed_in_a_row >= max(_REFUSALS, self.endpoint.concurrency):
            last = f"{self._failed_in_a_row} calls in a row failed, the last with"
            raise RunError(
                "the endpoint does not answer any more",
                where=self.where,
                found=f"{last} {found_in(outcome)}",
                do="run again when it does: what was answered is kept",
            )

    @property
    def last_failure(self) -> str | None:
        """What came of the last call without a reply."""
        return next(reversed(self.failures.values()), None)

    @property
    def interrupted(self) -> bool:
        """Whether a signal stopped it."""
        return self._signal is not None

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
        self._show(_WAITING)
