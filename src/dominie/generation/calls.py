"""Many calls to one endpoint: bounded in number, money and concurrency; each is paid once."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dominie.core.errors import DominieError, InputError, RunError
from dominie.generation.budget import Spending
from dominie.generation.client import Client, Outcome, Reply, delay, read_reply
from dominie.generation.endpoint import Endpoint


def call_key(*parts: Any) -> str:
    """32 hexadecimal digits of all a reply depends on: model, prompt, sampling."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Ledger:
    """A JSON Lines file that is only appended to; each line is on disk before `append` returns.

    A line that a crash cut in two is moved out of the way when the file is opened again.

    Args:
        path: the file; made with its folder by the first `append`.

    Raises:
        InputError: the file cannot be read, or is damaged elsewhere than in its last line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._by_key: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._file: Any = None
        for record in self._whole_lines():
            self._by_key[record["key"]].append(record)

    def of(self, key: str) -> list[dict[str, Any]]:
        """What was written under a key, oldest first."""
        return self._by_key.get(key, [])

    @property
    def records(self) -> list[dict[str, Any]]:
        """All that was written, key by key."""
        return [record for records in self._by_key.values() for record in records]

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record, which has a `key`, and wait until it is on disk."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._by_key[record["key"]].append(dict(record))

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _whole_lines(self) -> list[dict[str, Any]]:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError("cannot be read", where=str(self.path), found=error.strerror) from None
        lines = content.split(b"\n")
        torn = lines.pop()  # empty where the last line is whole
        if torn:
            with self.path.open("r+b") as file:
                file.truncate(len(content) - len(torn))
                os.fsync(file.fileno())
        return [self._parsed(line, number) for number, line in enumerate(lines, 1) if line.strip()]

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("key"), str):
                return record
            found = "no record of a reply"
        except ValueError as error:
            found = str(error)
        raise InputError(
            "the record of replies is damaged",
            where=f"{self.path}:{number}",
            found=found,
            do="correct or remove this line; what it held is then asked again",
        )


Item = TypeVar("Item")
Result = TypeVar("Result")

#: Shows progress: done, of how many, a few words.
Advance = Callable[[int, int | None, str], None]

#: Sends a request under a key: the reply, None where the endpoint gave none.
Ask = Callable[[str, dict[str, Any]], Awaitable[Reply | None]]

_REFUSALS = 3  # requests refused outright, with nothing answered, before all of it is given up


class _Stopping(Exception):
    """No further call is to be sent."""


class Calls:
    """Works through items with calls to an endpoint.

    Whatever stops it, the calls under way are waited for and written down: they are paid for. The
    first SIGINT or SIGTERM stops it so, a second one at once.

    Args:
        endpoint: whom to ask.
        ledger: where every reply goes before it counts.
        where: how messages name the endpoint's place in the recipe.
        say: prints a line.
    """

    def __init__(
        self, endpoint: Endpoint, ledger: Ledger, *, where: str, say: Callable[[str], None]
    ) -> None:
        self.endpoint, self.ledger, self.where, self.say = endpoint, ledger, where, say
        self.spending = Spending(endpoint, ledger.records, where=where)
        self._key: str | None = None
        self._answered = self._failed_in_a_row = 0
        self._client: Client
        self._stopped: asyncio.Event
        self._error: DominieError | None = None
        self._signal: int | None = None

    def over(
        self,
        items: Sequence[Item],
        work: Callable[[Item, Ask], Awaitable[Result]],
        advance: Advance,
    ) -> list[Result]:
        """What `work` makes of each item, several at a time, in the order of the items.

        Raises:
            InputError: the endpoint refuses what it is asked.
            RunError: it does not answer, or the budget is spent. What was answered is kept.
        """
        found: dict[int, Result] = {}
        if items:
            self._key = self.endpoint.key(where=self.where)
            try:
                asyncio.run(self._over(items, work, advance, found))
            finally:
                self.ledger.close()
        if self._signal is not None:
            signal.raise_signal(self._signal)  # to whoever listened before
            raise RunError("interrupted; what was answered is kept", where=self.where)
        if self._error is not None:
            raise self._error
        return [found[i] for i in range(len(items))]

    async def _over(
        self,
        items: Sequence[Item],
        work: Callable[[Item, Ask], Awaitable[Result]],
        advance: Advance,
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
                rate = len(found) / max(time.monotonic() - started, 1e-9)
                advance(len(found), len(items), f"{rate:.1f}/s{self.spending.told}")

        async with Client(self.endpoint, self._key) as self._client:
            with self._listening():
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
                break  # a server that restarts is waited for, one that never was is not
            if attempt < self.endpoint.retries:
                await self._pause(delay(self.endpoint.backoff, attempt, outcome.wait))
        self._note_failure(outcome)
        return None

    async def _attempt(self, key: str, body: dict[str, Any]) -> tuple[Outcome, Reply | None]:
        with self.spending.reserved(body) as settle:
            began = time.time()
            # The same until it is answered, then another: what a gateway repeats, it bills once.
            answered = sum(record["status"] == 200 for record in self.ledger.of(key))
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
                self.ledger.append(record)
        return outcome, reply

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)

    def _note_failure(self, outcome: Outcome) -> None:
        """Go on after the failure of one call; raise where it will be that of all."""
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
    def _listening(self) -> Iterator[None]:
        """Within, the first signal stops further calls. Only the main thread can listen."""
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
        self.say("interrupted: waiting for the calls under way, which are paid for")


def _excerpt(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 200 else f"{flat[:200]}…"
