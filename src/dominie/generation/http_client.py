"""One call to an endpoint over HTTP: what is sent, how much is read, and what came of it."""

from __future__ import annotations

import asyncio
import email.utils
import html.entities
import math
import random
import re
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from dominie.core.errors import InputError
from dominie.core.network import check_variables, is_loopback, through_proxy
from dominie.generation.endpoint import Endpoint

LARGEST = 8 * 2**20  # bytes of a reply to a chat completion
_LONGEST_WAIT = 120.0  # seconds, whatever Retry-After says
_RETRIED = {408, 409, 425, 429}
_UNPAID = re.compile(
    r"insufficient.{0,3}(?:quota|balance|credit|fund)|exceeded_current_quota", re.I
)


@dataclass(frozen=True)
class Outcome:
    """The response to a call, or why there is none.

    Attributes:
        status: HTTP status, 0 if no whole response came.
        body: of the response, or what went wrong; the key is blacked out.
        wait: seconds the server asks for before the next attempt.
        refused: no server answered at this address.
    """

    status: int
    body: str
    wait: float | None = None
    refused: bool = False

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later."""
        passes = self.status in {0, *_RETRIED} or self.status >= 500
        return passes and not self.unpaid and self.status != 501  # 501: will not be there tomorrow

    @property
    def unpaid(self) -> bool:
        """Whether the account lacks money, in the words that servers have for it."""
        return self.status == 402 or (self.status < 500 and bool(_UNPAID.search(self.body)))


# Not the openai SDK: it does not ask again after a malformed reply or a Retry-After of more than
# two minutes, has no `backoff`, reads replies of any size, follows redirects, and sends the
# environment's OPENAI_API_KEY to whatever endpoint a recipe names. Its retries would have to be
# switched off, as each one is logged and counted against the budget.
class Client:
    """Sends calls to an endpoint over one pool of connections. Use with `async with`.

    Args:
        key: of the endpoint, if it has one.
        url: that calls are sent to; None is that of chat completions.
        largest: bytes of a reply that are read; a server that sends more is broken or hostile.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        key: str | None,
        *,
        url: str | None = None,
        largest: int = LARGEST,
    ) -> None:
        import httpx2  # here, since recipes are read without it

        self.endpoint, self.url, self._largest = endpoint, url or endpoint.url, largest
        self._echo = _escaped(key) if key and key.casefold() not in _NO_SECRETS else None
        headers = {"authorization": f"Bearer {key}"} if key else {}
        parts = urlsplit(self.url)
        here = is_loopback(parts.hostname or "")
        self._through = through_proxy(self.url)
        try:
            self._http = httpx2.AsyncClient(
                headers=headers,
                timeout=endpoint.timeout,
                limits=httpx2.Limits(max_connections=endpoint.concurrency),
                trust_env=not here,  # no proxy leads to this machine; its certificates count
                verify=httpx2.create_ssl_context() if here and parts.scheme == "https" else True,
            )
        except Exception as error:
            check_variables()
            raise InputError(
                "no connection can be made",
                where=self.url,
                found=f"{type(error).__name__}: {error}",
                do="see the variables of the environment for proxies and certificates",
            ) from error

    async def __aenter__(self) -> Client:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def send(self, body: dict[str, Any], *, call: str) -> Outcome:
        """Send one attempt.

        Args:
            body: the request.
            call: the same for every attempt at it, so that a gateway can recognise it.
        """
        fields = {**body, "stream": False}
        return await self._answered("POST", self.url, fields, {"idempotency-key": call})

    async def get(self, url: str) -> Outcome:
        """Read what the server says at another URL of its own, once."""
        return await self._answered("GET", url, None, {})

    async def _answered(
        self, method: str, url: str, fields: dict[str, Any] | None, headers: dict[str, str]
    ) -> Outcome:
        import httpx2

        try:
            async with asyncio.timeout(self.endpoint.timeout):
                return await self._sent(method, url, fields, headers)
        except TimeoutError:
            return Outcome(0, f"no whole reply within {self.endpoint.timeout:g} s")
        except httpx2.ConnectError as error:
            text = f"{str(error) or 'cannot be reached'}{self._through}"
            return Outcome(0, self.redacted(text), refused=True)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            return Outcome(0, self.redacted(f"{type(error).__name__}: {error}{self._through}"))

    async def _sent(
        self, method: str, url: str, fields: dict[str, Any] | None, headers: dict[str, str]
    ) -> Outcome:
        async with self._http.stream(method, url, json=fields, headers=headers) as response:
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > self._largest:
                    return Outcome(0, f"more than {self._largest >> 20} MiB for one reply")
            text = self.redacted(content.decode("utf-8", errors="replace"))
            if response.has_redirect_location:
                text = self.redacted(f"leads to {response.headers['location']}")
            return Outcome(response.status_code, text, _wait(response.headers.get("retry-after")))

    def redacted(self, text: str) -> str:
        """Return a text without the key, should a server have sent it back, escaped or not."""
        return self._echo.sub("[key]", text) if self._echo else text


#: Keys that servers' documentation gives for want of one: they are words of replies, too.
_NO_SECRETS = {"empty", "none", "null", "dummy", "ollama", "lm-studio", "not-needed", "no-key"}


def _escaped(key: str) -> re.Pattern[str]:
    """Return a pattern of a key as it is, and as JSON, HTML, a URL or several of them write it."""
    return re.compile("".join(_escaped_sign(sign) for sign in key))


def _escaped_sign(sign: str) -> str:
    code, names = ord(sign), {v: k for k, v in html.entities.name2codepoint.items()}
    forms = [
        rf"\\{{0,8}}{re.escape(sign)}",
        rf"\\{{1,8}}(?:u00|x)(?i:{code:02x})",
        rf"%(?:25){{0,3}}(?i:{code:02x})",
        rf"&(?:amp;){{0,3}}#(?:0{{0,6}}{code}|[xX]0{{0,6}}(?i:{code:02x}));",
    ]
    if code in names:
        forms.append(rf"&(?:amp;){{0,3}}{names[code]};")
    return f"(?:{'|'.join(forms)})"


def delay(backoff: float, attempt: int, asked: float | None) -> float:
    """Return seconds before the next attempt: exponential with jitter, at least those asked for."""
    grown = min(backoff * 2.0 ** min(attempt, 30), _LONGEST_WAIT) * random.uniform(0.5, 1.0)
    return max(grown, min(asked or 0.0, _LONGEST_WAIT))


def _wait(retry_after: str | None) -> float | None:
    """Return seconds from a Retry-After header: a number or a date; None for anything else."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None
