"""A model behind an endpoint: its settings, prices and limits, and its place in a recipe."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from dominie.core.errors import InputError, secret_in
from dominie.core.references import PathName, Reference

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
        tokens: of prompts and replies together.
        money: in the currency of the price.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    calls: int | None = None
    tokens: int | None = None
    money: float | None = None

    def __post_init__(self) -> None:
        for name in ("calls", "tokens", "money"):
            value = getattr(self, name)
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


#: Servers that return log-probabilities of a prompt's own tokens.
Engine = Literal["vllm", "sglang"]

#: What a recipe asks for where only weights serve, and why a server cannot give it.
NO_WEIGHTS = "a model behind a server cannot stand here: its weights are not at hand"
#: What it can be instead.
PLACES = (
    "name it as the teacher of a source, as the model of an answers stage, as a judge, or among "
    "the models that are scored"
)
_ON_THE_SERVER = "the server holds the weights: start it with them as they are to be"


@dataclass(frozen=True, kw_only=True)
class ServedModel(Endpoint):
    """A model behind a server: a teacher by way of a cache, and a writer of answers.

    Attributes:
        endpoint: URL up to and with the version, for example http://localhost:8000/v1.
        model: the name it has there.
        tokenizer: folder or hub id of its tokenizer; a teacher needs it, and may bring its chat
            template.
        chat_template: file of a Jinja chat template, for a tokenizer that has none or another one.
        engine: `vllm` or `sglang`, that a teacher is behind; None asks the server.
        local: folder or hub id of the same weights; a sample of what the server returns is
            compared with them before a cache is filled.
    """

    not_here: ClassVar[dict[str, str]] = {
        "path": "a model is in a folder (path) or behind a server (endpoint), not both; local "
        "names a copy to compare the server with",
        **dict.fromkeys(("adapter", "revision", "dtype", "attention"), _ON_THE_SERVER),
        **dict.fromkeys(("placement", "quantize"), _ON_THE_SERVER),
        "map_tokens": "a server returns the likeliest of its own tokens, which are not reordered: "
        "the teacher needs the student's tokens under the same ids",
    }
    tokenizer: PathName | None = None
    chat_template: PathName | None = None
    engine: Engine | None = None
    local: PathName | None = None

    @property
    def title(self) -> str:
        """The model and where it is, for messages."""
        return f"{self.model} at {self.endpoint}"


@dataclass(frozen=True, kw_only=True)
class RolloutServer(Endpoint):
    """A vLLM server that generates the student's answers; it loads its adapter while it runs.

    Attributes:
        endpoint: URL up to and with the version, for example http://localhost:8000/v1.
        model: the name that the model under the student's adapter has there.
        adapters: folder for the adapters, which this machine and the server both see; None is in
            the stage's folder.
    """

    not_here: ClassVar[dict[str, str]] = dict.fromkeys(
        ("price", "budget"), "the student on the server is your own, and costs nothing by the token"
    )
    adapters: Annotated[str, Reference("output")] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.price is not None or self.budget is not None:
            raise ValueError(self.not_here["price"])
        fixed = {"prompt", "max_tokens", "temperature", "top_p", "seed", "logprobs"}
        if twice := fixed & {*self.request, *self.omit}:
            raise ValueError(f"{min(twice)} is set by the stage's rollouts, and not here")


_BYTES = 256  # of an id with its log-probability, rank and text in a reply, at most


def score_url(served: ServedModel, engine: Engine) -> str:
    """The URL that scores prompts."""
    base = served.endpoint.rstrip("/")
    return f"{base}/completions" if engine == "vllm" else f"{base.removesuffix('/v1')}/generate"


def score_body(served: ServedModel, engine: Engine, ids: Sequence[int], k: int) -> dict[str, Any]:
    """The request for the `k` likeliest ids at each position of a prompt of token ids."""
    if engine == "vllm":
        asked: dict[str, Any] = {"model": served.model, "prompt": list(ids), "max_tokens": 1}
        asked |= {"temperature": 0.0, "prompt_logprobs": k}
    else:
        asked = {"input_ids": list(ids), "return_logprob": True, "logprob_start_len": 0}
        asked |= {"top_logprobs_num": k}
        asked |= {"sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
    fields = {**asked, **served.request}
    return {name: value for name, value in fields.items() if name not in served.omit}


def largest_reply(tokens: int, k: int) -> int:
    """Bytes that a reply to a prompt of so many tokens can have."""
    return (1 << 20) + _BYTES * tokens * (k + 1)
