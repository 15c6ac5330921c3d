"""Generates answers: by a local model, greedy or sampled, or by a model behind an endpoint."""

from __future__ import annotations

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dominie.core.errors import RunError
from dominie.data.formats import Message
from dominie.data.tokenization import ends_of_turn, prompt_ids
from dominie.generation.calls import Advance, Ask, Calls, call_key
from dominie.generation.client import read_reply
from dominie.generation.endpoint import Endpoint
from dominie.models.head import text_config
from dominie.models.info import info_of

_GREEDY = 1e-4  # temperatures below are zero


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    end_of_turn: Sequence[int],
    max_new_tokens: int,
    batch: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[tuple[int, str]]:
    """Answers, batched by length.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        prompts: token ids up to where the assistant begins to speak.
        end_of_turn: tokens that end an answer.
        max_new_tokens: longest answer in tokens.
        batch: prompts per forward pass; they are padded on the left.
        temperature: of sampling from the whole distribution; 0 takes the most probable token.
        seed: of sampling; the global random state is untouched.

    Yields:
        (index of the prompt, the answer's text without special tokens), in order of length.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    stops = sorted(set(end_of_turn) | configured_stops(model))
    padding = (stops or [0])[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sampled = temperature >= _GREEDY
    for start in range(0, len(order), batch):
        members = order[start : start + batch]
        length = max(len(prompts[i]) for i in members)
        ids = torch.full((len(members), length), padding)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(members):
            ids[row, length - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, length - len(prompts[i]) :] = 1
        drawn = (
            _seeded(seed, [prompts[i] for i in members]) if sampled else contextlib.nullcontext()
        )
        with torch.no_grad(), drawn:
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=sampled,
                temperature=temperature if sampled else None,
                top_p=None,
                top_k=None,
                eos_token_id=stops or None,
                pad_token_id=padding,
            )
        for i, tokens in zip(members, output[:, length:].tolist(), strict=True):
            yield i, tokenizer.decode(_until_stop(tokens, stops), skip_special_tokens=True)


@contextlib.contextmanager
def _seeded(seed: int, prompts: Sequence[Sequence[int]]) -> Iterator[None]:
    """Random numbers of these prompts' own, whatever was drawn before them."""
    text = repr((seed, [list(prompt) for prompt in prompts])).encode()
    with torch.random.fork_rng():
        torch.manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=7).digest()))
        yield


def configured_stops(model: Any) -> set[int]:
    """The tokens that end an answer according to the model's own generation settings."""
    found = model.generation_config.eos_token_id
    if found is None:
        return set()
    return set(found) if isinstance(found, list) else {found}


def _until_stop(tokens: Sequence[int], stops: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return list(tokens[:end])


@dataclass(frozen=True)
class Dialogue:
    """What a model is asked, turn by turn; each answer stays in sight of the next question.

    Attributes:
        id: of the question.
        turns: what the user says.
        temperature: of the answers.
    """

    id: int | str
    turns: tuple[str, ...]
    temperature: float = 0.0


Done = Callable[[Dialogue, Sequence[str]], None]


class Generator(Protocol):
    """Whoever answers."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that its answers depend on, the dialogue aside."""

    def speak(self, dialogues: Sequence[Dialogue], done: Done, advance: Advance) -> None:
        """Answer, calling `done` as soon as a dialogue is complete, in any order."""


Load = Callable[[], tuple[Any, Any]]


class LocalGenerator:
    """A model in this process, batched.

    Args:
        load: gives the model in evaluation mode and its tokenizer, once there is something to say.
        fingerprint: of the model, its tokens and its chat template.
        max_new_tokens: longest answer.
        batch: dialogues at a time; they are complete, and kept, together.
        seed: of sampled answers.
    """

    def __init__(
        self,
        load: Load,
        fingerprint: Sequence[str],
        *,
        max_new_tokens: int,
        batch: int,
        seed: int = 0,
    ) -> None:
        self._load, self._batch, self._seed = load, batch, seed
        self.max_new_tokens = max_new_tokens
        self.identity: Mapping[str, Any] = {
            "model": list(fingerprint),
            "max_new_tokens": max_new_tokens,
            "seed": seed,
        }

    def speak(self, dialogues: Sequence[Dialogue], done: Done, advance: Advance) -> None:
        """Answer a batch at a time, dialogues of one temperature and like length together."""
        model, tokenizer = self._load()
        order = sorted(dialogues, key=lambda d: (d.temperature, sum(map(len, d.turns))))
        said = 0
        for start in range(0, len(order), self._batch):
            members = order[start : start + self._batch]
            for dialogue, turns in zip(
                members, self._answered(model, tokenizer, members), strict=True
            ):
                done(dialogue, turns)
            said += len(members)
            advance(said, len(order), "")

    def _answered(
        self, model: Any, tokenizer: Any, dialogues: Sequence[Dialogue]
    ) -> list[list[str]]:
        histories: list[list[Message]] = [[] for _ in dialogues]
        said: list[list[str]] = [[] for _ in dialogues]
        for turn in range(max(len(d.turns) for d in dialogues)):
            asked: dict[float, list[int]] = defaultdict(list)
            for i, dialogue in enumerate(dialogues):
                if turn < len(dialogue.turns):
                    histories[i].append({"role": "user", "content": dialogue.turns[turn]})
                    asked[dialogue.temperature].append(i)
            for temperature, members in asked.items():
                replies = self._replies(
                    model, tokenizer, [histories[i] for i in members], temperature
                )
                for i, text in zip(members, replies, strict=True):
                    histories[i].append({"role": "assistant", "content": text})
                    said[i].append(text)
        return said

    def _replies(
        self,
        model: Any,
        tokenizer: Any,
        histories: Sequence[list[Message]],
        temperature: float,
    ) -> list[str]:
        """One reply to each history; an empty one where it fills the model's whole context."""
        prompts = [prompt_ids(tokenizer, history) for history in histories]
        context = info_of(text_config(model)).context or 2**31
        by_room: dict[int, list[int]] = defaultdict(list)
        for i, prompt in enumerate(prompts):
            by_room[min(self.max_new_tokens, context - len(prompt))].append(i)
        replies = [""] * len(prompts)
        for room, members in by_room.items():
            if room < 1:
                continue
            stream = answers(
                model,
                tokenizer,
                [prompts[i] for i in members],
                end_of_turn=ends_of_turn(tokenizer),
                max_new_tokens=room,
                batch=self._batch,
                temperature=temperature,
                seed=self._seed,
            )
            for place, text in stream:
                replies[members[place]] = text.strip()
        return replies


class EndpointGenerator:
    """A model behind an endpoint, several dialogues at once.

    Args:
        endpoint: where it is.
        calls: to it.
        max_new_tokens: longest answer.
    """

    def __init__(self, endpoint: Endpoint, calls: Calls, *, max_new_tokens: int) -> None:
        self.endpoint, self._calls, self._most = endpoint, calls, max_new_tokens
        self.identity: Mapping[str, Any] = {
            **endpoint.identity,
            "request": endpoint.body((), {"max_tokens": max_new_tokens}),
        }

    def speak(self, dialogues: Sequence[Dialogue], done: Done, advance: Advance) -> None:
        """Answer through the endpoint; every single reply is kept and never asked for again.

        Raises:
            RunError: answers that could not be had.
        """

        async def told(dialogue: Dialogue, ask: Ask) -> bool:
            messages: list[dict[str, str]] = []
            said = []
            for turn in dialogue.turns:
                messages.append({"role": "user", "content": turn})
                sampling = {"temperature": dialogue.temperature, "max_tokens": self._most}
                body = self.endpoint.body(messages, sampling)
                key = call_key(self.endpoint.identity, body)
                text = self._kept(key)
                if text is None:
                    reply = await ask(key, body)
                    if reply is None:
                        return False
                    text = reply.text
                messages.append({"role": "assistant", "content": text})
                said.append(text)
            done(dialogue, said)
            return True

        complete = self._calls.over(dialogues, told, advance)
        if missing := complete.count(False):
            raise RunError(
                f"{missing} of {len(dialogues)} answers could not be had",
                where=self._calls.where,
                do=f"see {self._calls.ledger.path}, then run again: what was answered is kept",
            )

    def _kept(self, key: str) -> str | None:
        bodies = [r["body"] for r in self._calls.ledger.of(key) if r["status"] == 200]
        replies = [reply for body in bodies if (reply := read_reply(body)) is not None]
        return replies[-1].text if replies else None
