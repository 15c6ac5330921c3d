"""One protocol for whatever generates text, and the generator behind an endpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from dominie.data.formats import Message
from dominie.generation.calls import Ask, Calls
from dominie.generation.reply_log import call_key
from dominie.generation.thoughts import Parted, part_thoughts

if TYPE_CHECKING:
    from dominie.core.display import Advance


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen, and how many at most.

    Attributes:
        max_new_tokens: longest answer in tokens.
        temperature: 0 takes the most probable token.
        top_p: tokens are drawn from the smallest set with at least this probability; 1 is all.
        seed: of the draws of a local model, which depend on it and on the prompt alone.
        sample: number of the answer among several to one prompt: an endpoint is asked for each.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    sample: int = 0


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt and how to answer it; either `messages` or `token_ids`.

    Attributes:
        sampling: of the answer.
        messages: a conversation that ends with the turn to answer.
        token_ids: the prompt in the model's own tokens, up to where the answer begins.
        stop_ids: tokens that end the answer beside those of the model's generation settings; None
            is the end of a turn under the chat template.
    """

    sampling: Sampling
    messages: Sequence[Message] | None = None
    token_ids: Sequence[int] | None = None
    stop_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.token_ids is None):
            raise ValueError("a request has either messages or token_ids")


@dataclass(frozen=True)
class Generation:
    """What was generated for a request.

    Attributes:
        text: without special tokens, those that mark thoughts aside; an answer to messages without
            white space around it, unless an endpoint sent some.
        stop_reason: `stop` if the model ended the answer, `length` if a limit did: that of the
            request or the model's context; `unanswered` if an endpoint refused or failed.
        token_ids: the new tokens with the one that ended them; None if not known.
        begun: whether the prompt ends within thoughts.
        reason: why there is no answer.
        tokens: how many were generated, thoughts included; None if not known.
        thoughts: that came apart from the text, in a field of their own.
    """

    text: str
    stop_reason: Literal["stop", "length", "unanswered"]
    token_ids: list[int] | None = None
    begun: bool = False
    reason: str = ""
    tokens: int | None = None
    thoughts: str = ""

    def parted(self, *, keep_thoughts: bool = False) -> Parted:
        """Return the answer and the thoughts that are not part of it."""
        return Parted(self.text) if keep_thoughts else part_thoughts(self.text, begun=self.begun)


#: Takes the result of the request of an index; returns a request to go on with, or None.
OnResult = Callable[[int, Generation], GenerationRequest | None]
#: Takes a piece of the text of the request of an index.
OnText = Callable[[int, str], None]


class Generator(Protocol):
    """Generates answers to requests: a local model or one behind an endpoint."""

    def identity(self, sampling: Sampling) -> Mapping[str, Any]:
        """Return all that results depend on, the prompt and the temperature aside."""

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        on_result: OnResult,
        *,
        on_text: OnText | None = None,
        advance: Advance | None = None,
    ) -> None:
        """Answer requests in any order, several at a time.

        Args:
            on_result: called as soon as a result is there. A request that it returns is answered
                next, under the same index: the further turns of a conversation.
            on_text: called with pieces of text as they come; a local model then answers one
                request at a time, an endpoint gives the whole text in one piece.
            advance: shows how many requests are complete.
        """


def generate_all(generator: Generator, requests: Sequence[GenerationRequest]) -> list[Generation]:
    """Return the results in the order of the requests."""
    found: dict[int, Generation] = {}
    generator.generate(requests, lambda index, result: found.update({index: result}))
    return [found[i] for i in range(len(requests))]


#: Why there is no answer if the server gave one, was paid, and took it away.
FILTERED = "taken away by a content filter"


class EndpointGenerator:
    """Generates with a model behind an endpoint, several requests at once.

    Every reply is logged and never paid for again. The seed is not sent: a reply is found again by
    what was sent, and servers differ in what a seed means to them.
    """

    def __init__(self, calls: Calls) -> None:
        self.endpoint, self._calls = calls.endpoint, calls

    def identity(self, sampling: Sampling) -> Mapping[str, Any]:
        """Return the endpoint and all fields of its requests but prompt and temperature."""
        fields = _sampling_fields(sampling)
        del fields["temperature"]
        found = {**self.endpoint.identity, "request": self.endpoint.body((), fields)}
        return {**found, "sample": sampling.sample} if sampling.sample else found

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        on_result: OnResult,
        *,
        on_text: OnText | None = None,
        advance: Advance | None = None,
    ) -> None:
        """Answer requests through the endpoint.

        A request that the endpoint refuses or fails on is `unanswered`.

        Raises:
            ValueError: a request of token ids or with stops of its own.
            InputError: the endpoint refuses what it is asked, whatever that is.
            RunError: it does not answer any more, or the budget is spent.
        """

        async def answer(item: tuple[int, GenerationRequest], ask: Ask) -> None:
            index, request = item
            following: GenerationRequest | None = request
            while following is not None:
                result = await self._result(following, ask)
                if on_text is not None and result.stop_reason != "unanswered":
                    on_text(index, result.text)
                following = on_result(index, result)

        self._calls.run(list(enumerate(requests)), answer, advance)

    async def _result(self, request: GenerationRequest, ask: Ask) -> Generation:
        if request.messages is None or request.stop_ids is not None:
            raise ValueError("an endpoint is sent messages and ends an answer itself")
        body = self.endpoint.body(request.messages, _sampling_fields(request.sampling))
        sample = request.sampling.sample  # of the key alone: servers differ in what a seed means
        key = call_key(self.endpoint.identity, body, *([sample] if sample else []))
        kept = [reply for reply in self._calls.log.replies(key) if not reply.refused]
        reply = kept[-1] if kept else await ask(key, body)
        if reply is None:
            return Generation("", "unanswered", reason=self._calls.failures[key])
        if reply.refused:
            return Generation("", "unanswered", reason=FILTERED)
        tokens = reply.usage and reply.usage[1]
        stopped: Literal["stop", "length"] = "length" if reply.cut else "stop"
        return Generation(reply.text, stopped, tokens=tokens, thoughts=reply.thoughts)


def _sampling_fields(sampling: Sampling) -> dict[str, Any]:
    fields = {"temperature": sampling.temperature, "max_tokens": sampling.max_new_tokens}
    return fields if sampling.top_p == 1.0 else {**fields, "top_p": sampling.top_p}
