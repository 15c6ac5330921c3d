"""A model behind an OpenAI-compatible endpoint: where it is, what it may cost, how it is asked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import urlsplit

from dominie.core.errors import InputError

_SECRET = re.compile(r"api_?key|authori[sz]ation|bearer|password|secret|access_?token", re.I)
STRICT: dict[str, Any] = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, kw_only=True)
class Price:
    """What tokens cost, in one currency, by the million.

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
        """What so many tokens cost."""
        return (prompt_tokens * self.input + reply_tokens * self.output) / 1e6


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be spent in one run folder, over all its runs.

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
        endpoint: URL up to and with the version, http://localhost:8000/v1 say.
        model: the name it has there.
        key_env: environment variable, in capitals, that holds the key; a key never stands here.
        concurrency: calls under way at once.
        timeout: seconds for one call, from first byte sent to last byte read.
        retries: further attempts after 408, 429, 5xx, a timeout or a broken reply.
        backoff: seconds before the first of them; doubled each time, with jitter.
        price: needed where the budget is in money.
        budget: None spends without bound.
        request: further fields of every request, `{reasoning_effort: low}` say.
        omit: fields that this server refuses, `[temperature, max_tokens]` say.
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
            raise ValueError(f"endpoint is a URL, http://localhost:8000/v1 say: {self.endpoint!r}")
        if url.username or url.password or url.query:
            raise ValueError("the endpoint's URL carries no password and no key: use key_env")
        if self.key_env is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", self.key_env):
            # Not repeated here: it may be the key.
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
        if self.budget and self.budget.money is not None and self.price is None:
            raise ValueError("a budget in money needs the price of tokens")
        if named := [key for key in self.request if _SECRET.search(key)]:
            # The value is not repeated: it is as good as known then.
            raise ValueError(f"request.{named[0]} looks like a secret, which belongs in key_env")
        if fixed := {"model", "messages", "stream", "n"} & {*self.request, *self.omit}:
            raise ValueError(f"{min(fixed)} is no field to change here")

    def body(
        self, messages: Sequence[Mapping[str, str]], sampling: dict[str, Any]
    ) -> dict[str, Any]:
        """The request of a chat completion."""
        fields = {"model": self.model, "messages": list(messages), **sampling, **self.request}
        return {name: value for name, value in fields.items() if name not in self.omit}

    @property
    def url(self) -> str:
        """Where chat completions are asked for."""
        base = self.endpoint.rstrip("/").removesuffix("/chat/completions")
        return f"{base}/chat/completions"

    @property
    def identity(self) -> dict[str, str]:
        """What tells its replies from those of another."""
        return {"endpoint": self.url, "model": self.model}

    def key(self, *, where: str) -> str | None:
        """The key, from the environment.

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
