"""The generator in this process: a local model, greedy or sampled, in left-padded batches."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, SuppressTokensLogitsProcessor, TextStreamer

from dominie.core.display import Advance
from dominie.core.errors import InputError
from dominie.data.assistant_spans import ends_of_turn
from dominie.data.tokenization import prompt_ids
from dominie.generation.generator import (
    Generation,
    GenerationRequest,
    OnResult,
    OnText,
    Sampling,
)
from dominie.generation.sampler import GREEDY, RowSampler
from dominie.generation.thoughts import begins_thoughts, is_mark, without_thoughts
from dominie.models.head import output_head, text_config
from dominie.models.info import info_of

_DECODING = 2  # raised when a model would give other answers to the same request
_TAIL = 48  # tokens of a prompt in which its thoughts may begin

#: Returns a model in evaluation mode and its tokenizer.
Load = Callable[[], tuple[Any, Any]]


@dataclass(frozen=True)
class _Prompt:
    """A request in tokens: the tokens that end its answer, and how many new ones fit."""

    index: int
    request: GenerationRequest
    ids: Sequence[int]
    stops: tuple[int, ...]
    room: int


class LocalGenerator:
    """Generates with a model in this process.

    An answer never runs past the model's context: without room for one it is empty, and its stop
    reason is `length`. What is drawn for a prompt does not depend on the batch that it is in.

    Args:
        load: called once, when there is something to answer.
        fingerprint: of the model, its tokens and its chat template.
        batch: requests of one forward pass.
        only_known: whether ids that the tokenizer does not have are never generated.
    """

    def __init__(
        self,
        load: Load,
        fingerprint: Sequence[str] = (),
        *,
        batch: int = 1,
        only_known: bool = False,
    ) -> None:
        self._load, self._fingerprint, self._batch = functools.cache(load), fingerprint, batch
        self._only_known = only_known
        self._ends: tuple[int, ...] = ()

    def identity(self, sampling: Sampling) -> Mapping[str, Any]:
        """Return the model's fingerprint and the sampling."""
        found = {
            "model": list(self._fingerprint),
            "max_new_tokens": sampling.max_new_tokens,
            "seed": sampling.seed,
            "decoding": _DECODING,
        }
        return found if sampling.top_p == 1.0 else {**found, "top_p": sampling.top_p}

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        on_result: OnResult,
        *,
        on_text: OnText | None = None,
        advance: Advance | None = None,
    ) -> None:
        """Answer requests batch by batch, the shortest prompts first.

        What follows on a batch is answered before the next one: if the process ends in between,
        whole conversations are there.

        Raises:
            InputError: a chat template that refuses a conversation.
        """
        complete = 0
        waiting = self._batches(enumerate(requests), 1 if on_text else self._batch)
        while waiting:
            following = []
            for index, result in self._results(waiting.pop(0), on_text):
                if (request := on_result(index, result)) is not None:
                    following.append((index, request))
                else:
                    complete += 1
            if advance is not None and not following:
                advance(complete, len(requests), "")
            waiting = [*self._batches(following, self._batch), *waiting]

    def _batches(
        self, requests: Iterator[tuple[int, GenerationRequest]] | Sequence[Any], size: int
    ) -> list[list[_Prompt]]:
        """Prompts that end alike together, in order of length."""
        alike: dict[Any, list[_Prompt]] = defaultdict(list)
        prompts = [self._prompt(index, request) for index, request in requests]
        for prompt in sorted(prompts, key=lambda each: len(each.ids)):
            alike[prompt.stops, prompt.room].append(prompt)
        return [
            group[start : start + size]
            for group in alike.values()
            for start in range(0, len(group), size)
        ]

    def _prompt(self, index: int, request: GenerationRequest) -> _Prompt:
        model, tokenizer = self._load()
        ids = request.token_ids
        if ids is None:
            ids = prompt_ids(tokenizer, list(request.messages or ()))
        stops = request.stop_ids
        if stops is None:
            self._ends = self._ends or tuple(ends_of_turn(tokenizer))
            stops = self._ends
        context = info_of(text_config(model)).context or 2**31
        return _Prompt(
            index,
            request,
            ids,
            tuple(sorted({*stops, *configured_stops(model)})),
            min(request.sampling.max_new_tokens, context - len(ids)),
        )

    @functools.cached_property
    def _unknown(self) -> list[int]:
        """Rows of the head that no token of the tokenizer has."""
        model, tokenizer = self._load()
        known = set(tokenizer.get_vocab().values())
        return [i for i in range(len(output_head(model).weight)) if i not in known]

    def _results(
        self, prompts: Sequence[_Prompt], on_text: OnText | None = None
    ) -> Iterator[tuple[int, Generation]]:
        """Yield the results of a batch, whose prompts have the same stops and room."""
        if prompts[0].room < 1:
            for prompt in prompts:
                yield prompt.index, Generation("", "length", [])
            return
        model, tokenizer = self._load()
        stops = prompts[0].stops
        padding = (stops or (0,))[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        length = max(len(prompt.ids) for prompt in prompts)
        ids = torch.full((len(prompts), length), padding)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[row, length - len(prompt.ids) :] = 1
        more: dict[str, Any] = {}
        processors: list[Any] = []
        if self._only_known and (unknown := self._unknown):
            processors.append(SuppressTokensLogitsProcessor(unknown, device=model.device))
        if any(prompt.request.sampling.temperature >= GREEDY for prompt in prompts):
            processors.append(RowSampler(prompts, length))
        if processors:
            more["logits_processor"] = processors
        if on_text is not None:
            more["streamer"] = _Streamer(tokenizer, prompts[0].index, on_text)
        with torch.no_grad(), plain_decoding(model):
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                **decoding_arguments(stops, padding, prompts[0].room),
                **more,
            )
        for prompt, tokens in zip(prompts, output[:, length:].tolist(), strict=True):
            end = next((i for i, token in enumerate(tokens) if token in stops), None)
            begun = begins_thoughts(tokenizer.decode(prompt.ids[-_TAIL:]))
            text = _text(tokenizer, tokens[:end], begun=begun)
            yield (
                prompt.index,
                Generation(
                    text if prompt.request.messages is None else text.strip(),
                    "length" if end is None else "stop",
                    tokens if end is None else tokens[: end + 1],
                    begun,
                ),
            )


def _text(tokenizer: Any, tokens: Sequence[int], *, begun: bool) -> str:
    """Return a text without special tokens, except those that set thoughts apart from it."""
    plain: str = tokenizer.decode(tokens, skip_special_tokens=True)
    special = {*tokenizer.all_special_ids} & {*tokens}
    dropped = {token for token in special if not is_mark(tokenizer.convert_ids_to_tokens(token))}
    if special == dropped:
        return plain
    marked: str = tokenizer.decode([token for token in tokens if token not in dropped])
    return plain if without_thoughts(marked, begun=begun) == marked else marked


#: The fields of a model's generation settings that count: ends of answers, tokens never written.
OBEYED = ("eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids")


@contextlib.contextmanager
def plain_decoding(model: Any) -> Iterator[None]:
    """Within, `model.generate` obeys of the model's own generation settings those in `OBEYED` only.

    `generate` takes whatever is no argument of a call from `model.generation_config`. All other
    fields have the defaults of transformers within, those unknown here too: penalties, beams,
    n-grams, lengths, time limits, sampling, biases, watermarks and forced tokens would make greedy
    answers others, caches and kinds of output are nothing to answers. cuDNN's attention is off.
    """
    own, kept = model.generation_config, _obeyed(model)
    model.generation_config = GenerationConfig(do_sample=False, **kept)
    try:
        with _without_cudnn_attention(model.device):
            yield
    finally:
        model.generation_config = own


@contextlib.contextmanager
def _without_cudnn_attention(device: torch.device) -> Iterator[None]:
    """Within, no attention on a GPU is cuDNN's.

    On Hopper PyTorch prefers it, and it builds a graph for every length that it has not seen, which
    takes longer than a step of generation: and each step has another length.
    """
    was_on = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(was_on and device.type != "cuda")
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_on)


def decoding_arguments(stops: Sequence[int], padding: int, max_new_tokens: int) -> dict[str, Any]:
    """Return arguments of `generate` within `plain_decoding`; greedy."""
    return {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": list(stops) or None,
        "pad_token_id": padding,
    }


def configured_stops(model: Any) -> set[int]:
    """Return the tokens that end an answer according to the model's own generation settings."""
    found = _obeyed(model)["eos_token_id"]
    if found is None:
        return set()
    return set(found) if isinstance(found, list) else {found}


def _obeyed(model: Any) -> dict[str, Any]:
    """The fields of a model's generation settings that count, if they are tokens."""
    most = min(2**31, info_of(text_config(model)).vocabulary or 2**31)
    found = {name: getattr(model.generation_config, name, None) for name in OBEYED}
    for name, value in found.items():
        listed = value if isinstance(value, list) else [value]
        if name == "bad_words_ids" and value is not None:
            words = [word if isinstance(word, list) and word else [None] for word in listed]
            listed = [token for word in words for token in word]
        whole = name == "eos_token_id" or isinstance(value, list)
        below = most if name == "bad_words_ids" else 2**31
        if value is not None and not (whole and all(_is_token(each, below) for each in listed)):
            raise InputError(
                "the model's generation settings name tokens that are none",
                where=f"generation_config.json of {model.config._name_or_path or 'the model'}",
                expected=f"{name}: tokens by number, below {below:,}",
                found=str(value)[:80],
                do="correct the file, or remove the field",
            )
    return found


def _is_token(value: Any, below: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value < below


class _Streamer(TextStreamer):
    """Hands on text as soon as it is known how its tokens are written."""

    def __init__(self, tokenizer: Any, index: int, on_text: OnText) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._index, self._on_text = index, on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take a piece of text; called by `generate`."""
        if text:
            self._on_text(self._index, text)
