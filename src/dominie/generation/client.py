"""One call to an endpoint: sent, bounded in time and size, its reply read without trust."""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from dominie.generation.endpoint import Endpoint

_MOST_TOKENS = 10_000_000  # no call uses more; a server that says so is not believed


@dataclass(frozen=True)
class Reply:
    """A chat completion.

    Attributes:
        text: what the model said.
        cut: whether it was ended by its length limit.
        candidates: log-probabilities of the first token's alternatives, where they were given.
        usage: (prompt, reply) tokens where the server counted them believably.
    """

    text: str
    cut: bool = False
    candidates: Mapping[str, float] | None = None
    usage: tuple[int, int] | None = None


def read_reply(body: str) -> Reply | None:
    """The reply in the body of a response, None where it holds none."""
    try:
        tree = json.loads(body)
        choice = tree["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if not isinstance(text, str):
        return None
    return Reply(
        text=text,
        cut=choice.get("finish_reason") == "length",
        candidates=_candidates(choice),
        usage=_usage(tree.get("usage")),
    )


def _candidates(choice: Mapping[str, Any]) -> dict[str, float] | None:
    try:
        first: Sequence[Any] = choice["logprobs"]["content"][0]["top_logprobs"]
        found = {str(entry["token"]): float(entry["logprob"]) for entry in first}
    except (LookupError, TypeError, ValueError):
        return None
    believable = {t: p for t, p in found.items() if not math.isnan(p) and p <= 1e-6}
    return believable or None


def _usage(usage: Any) -> tuple[int, int] | None:
    if not isinstance(usage, dict):
        return None
    prompt, said = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not (type(prompt) is int and type(said) is int):
        return None
    believable = 0 <= prompt <= _MOST_TOKENS and 0 <= said <= _MOST_TOKENS
    return (prompt, said) if believable else None


_LARGEST = 8 * 2**20  # bytes of a reply; a server that sends more is broken or hostile
_LONGEST_WAIT = 120.0  # seconds, whatever Retry-After says
_RETRIED = {408, 409, 425, 429}


@dataclass(frozen=True)
class Outcome:
    """What became of a call.

    Attributes:
        status: HTTP status, 0 where no whole response came.
        body: of the response, or what went wrong; the key is blacked out.
        wait: seconds the server asks for before the next attempt.
        refused: nobody listened.
    """

    status: int
    body: str
    wait: float | None = None
    refused: bool = False

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later."""
        if self.status == 429 and "insufficient_quota" in self.body:
            return False
        return self.status == 0 or self.status in _RETRIED or self.status >= 500


class Client:
    """Sends calls to an endpoint over one pool of connections. Use with `async with`.

    Args:
        endpoint: where.
        key: sent as a bearer token.
    """

    def __init__(self, endpoint: Endpoint, key: str | None) -> None:
        self.endpoint, self._key = endpoint, key
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=endpoint.timeout,
            limits=httpx2.Limits(max_connections=endpoint.concurrency),
        )

    async def __aenter__(self) -> Client:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def send(self, body: dict[str, Any], *, call: str) -> Outcome:
        """One attempt.

        Args:
            body: the request.
            call: the same for every attempt at it, so that a gateway can tell.
        """
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                return await self._sent(body, {"idempotency-key": call})
        except TimeoutError:
            return Outcome(0, f"no whole reply within {self.endpoint.timeout:g} s")
        except httpx2.ConnectError as error:
            return Outcome(0, self.redacted(str(error) or "cannot be reached"), refused=True)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            return Outcome(0, self.redacted(f"{type(error).__name__}: {error}"))

    async def _sent(self, body: dict[str, Any], headers: dict[str, str]) -> Outcome:
        async with self._http.stream(
            "POST", self.endpoint.url, json=body, headers=headers
        ) as response:
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > _LARGEST:
                    return Outcome(0, f"more than {_LARGEST >> 20} MiB for one reply")
            text = self.redacted(content.decode("utf-8", errors="replace"))
            return Outcome(response.status_code, text, _wait(response.headers.get("retry-after")))

    def redacted(self, text: str) -> str:
        """A text without the key, should a server have sent it back."""
        return text.replace(self._key, "[key]") if self._key else text


def delay(backoff: float, attempt: int, asked: float | None) -> float:
    """Seconds before the next attempt: exponential with jitter, and never less than asked for."""
    grown = min(backoff * 2.0 ** min(attempt, 30), _LONGEST_WAIT) * random.uniform(0.5, 1.0)
    return max(grown, min(asked or 0.0, _LONGEST_WAIT))


def _wait(retry_after: str | None) -> float | None:
    """Seconds from a Retry-After header: a number or a date; None for anything else."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None
