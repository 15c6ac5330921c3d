"""A model behind an OpenAI-compatible endpoint: its settings, and one call to it."""

from __future__ import annotations

import asyncio
import email.utils
import html.entities
import math
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import urlsplit

from dominie.core.errors import InputError, secret_in
from dominie.core.network import check_variables, is_loopback, through_proxy

STRICT: dict[str, Any] = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, kw_only=True)
class Price:
    """Prices of tokens, in one currency, by the million.

    Attributes:
        input: of a prompt.
        output: of a reply.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    input: float
    output: float

    def __post_init__(self) -> None:
        if not (0 <= self.input < float("inf") and 0 <= self.output < float("inf")):
            raise ValueError("a price is finite and not negative")

    def of(self, prompt_tokens: float, reply_tokens: float) -> float:
        """Return the cost of so many tokens."""
        return (prompt_tokens * self.input + reply_tokens * self.output) / 1e6


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of what is spent in one run folder, over all its runs.

    Attributes:
        calls: replies that may be paid for.
        money: in the currency of the price.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    calls: int | None = None
    money: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("calls", self.calls), ("money", self.money)):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"a budget of {value} {name} buys nothing; raise it or leave it")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A model behind an endpoint.

    Attributes:
        endpoint: URL up to and with the version, for example http://localhost:8000/v1.
        model: the name it has there.
        key_env: environment variable, in capitals, that holds the key, which never stands here.
        concurrency: calls under way at once.
        timeout: seconds for one call, from first byte sent to last byte read.
        retries: further attempts after 408, 429, 5xx, a timeout or a broken reply.
        backoff: seconds before the first of them; doubled each time, with jitter.
        price: needed if the budget is in money.
        budget: None spends without bound.
        request: further fields of every request, such as `{reasoning_effort: low}`.
        omit: fields that this server refuses, such as `[temperature, max_tokens]`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    endpoint: str
    model: str
    key_env: str | None = None
    concurrency: int = 8
    timeout: float = 180.0
    retries: int = 6
    backoff: float = 0.5
    price: Price | None = None
    budget: Budget | None = None
    request: dict[str, Any] = field(default_factory=dict)
    omit: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        url = urlsplit(self.endpoint)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("endpoint is a URL, http://localhost:8000/v1 say")  # it may hold a key
        if url.username or url.password or url.query or url.fragment:
            raise ValueError("the endpoint's URL carries no password and no key: use key_env")
        if self.key_env is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", self.key_env):
            # Not repeated in the message: it may be the key.
            raise ValueError("key_env is the name of a variable in capitals, never the key itself")
        if not self.model.strip():
            raise ValueError("model names the model at the endpoint")
        if not 1 <= self.concurrency <= 1024:
            raise ValueError(f"concurrency is from 1 to 1024, got {self.concurrency}")
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"timeout is in seconds and above 0, got {self.timeout}")
        if not 0 <= self.retries <= 100:
            raise ValueError(f"retries is from 0 to 100, got {self.retries}")
        if not 0 <= self.backoff < float("inf"):
            raise ValueError(f"backoff is in seconds and not negative, got {self.backoff}")
        if self.budget and self.budget.money is not None:
            if self.price is None:
                raise ValueError("a budget in money needs the price of tokens")
            if length_limit(self.body((), {"max_tokens": 1})) is None:
                raise ValueError(
                    "a budget in money needs a bound on the length of replies: without max_tokens, "
                    "set request: {max_completion_tokens: N}"
                )
        if (place := secret_in(self.request, "request")) is not None:
            # The value is not repeated: it is as good as known then.
            raise ValueError(f"{place} looks like a secret, which belongs in key_env")
        if fixed := {"model", "messages", "stream", "n"} & {*self.request, *self.omit}:
            raise ValueError(f"{min(fixed)} is no field to change here")

    def body(
        self, messages: Sequence[Mapping[str, str]], sampling: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the request of a chat completion."""
        fields = {"model": self.model, "messages": list(messages), **sampling, **self.request}
        return {name: value for name, value in fields.items() if name not in self.omit}

    @property
    def url(self) -> str:
        """The URL of chat completions."""
        base = self.endpoint.rstrip("/").removesuffix("/chat/completions")
        return f"{base}/chat/completions"

    @property
    def identity(self) -> dict[str, str]:
        """What distinguishes its replies from those of another."""
        return {"endpoint": self.url, "model": self.model}

    def key(self, *, where: str) -> str | None:
        """Return the key, from the environment.

        Raises:
            InputError: the variable is not set, or holds what no header can carry.
        """
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise InputError(
                f"the key of {self.model} is {'not usable' if key else 'missing'}",
                where=f"{where}.key_env",
                expected=f"the key in the environment variable {self.key_env}",
                do=f"export {self.key_env}=…",
            )
        return key


#: Fields that bound a reply, by the names that servers have for it.
_LIMITS = ("max_tokens", "max_completion_tokens", "max_new_tokens", "max_output_tokens")


def length_limit(body: Mapping[str, Any]) -> int | None:
    """Return the tokens that a request allows its reply, the largest if it has several bounds."""
    found = [body[name] for name in _LIMITS if type(body.get(name)) in (int, float)]
    return max((int(limit) for limit in found if 0 < limit < math.inf), default=None)


_LARGEST = 8 * 2**20  # bytes of a reply; a server that sends more is broken or hostile
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
    """Sends calls to an endpoint over one pool of connections. Use with `async with`."""

    def __init__(self, endpoint: Endpoint, key: str | None) -> None:
        import httpx2  # here, since recipes are read without it

        self.endpoint = endpoint
        self._echo = _escaped(key) if key and key.casefold() not in _NO_SECRETS else None
        headers = {"authorization": f"Bearer {key}"} if key else {}
        url = urlsplit(endpoint.url)
        here = is_loopback(url.hostname or "")
        self._through = through_proxy(endpoint.url)
        try:
            self._http = httpx2.AsyncClient(
                headers=headers,
                timeout=endpoint.timeout,
                limits=httpx2.Limits(max_connections=endpoint.concurrency),
                trust_env=not here,  # no proxy leads to this machine; its certificates count
                verify=httpx2.create_ssl_context() if here and url.scheme == "https" else True,
            )
        except Exception as error:
            check_variables()
            raise InputError(
                "no connection can be made",
                where=endpoint.url,
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
        import httpx2

        try:
            async with asyncio.timeout(self.endpoint.timeout):
                return await self._sent(body, {"idempotency-key": call})
        except TimeoutError:
            return Outcome(0, f"no whole reply within {self.endpoint.timeout:g} s")
        except httpx2.ConnectError as error:
            text = f"{str(error) or 'cannot be reached'}{self._through}"
            return Outcome(0, self.redacted(text), refused=True)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            return Outcome(0, self.redacted(f"{type(error).__name__}: {error}{self._through}"))

    async def _sent(self, body: dict[str, Any], headers: dict[str, str]) -> Outcome:
        async with self._http.stream(
            "POST", self.endpoint.url, json={**body, "stream": False}, headers=headers
        ) as response:
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > _LARGEST:
                    return Outcome(0, f"more than {_LARGEST >> 20} MiB for one reply")
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
