"""Answers of a local model to chat prompts, greedy or sampled."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

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
