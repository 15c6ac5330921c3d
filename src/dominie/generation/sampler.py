"""Draws tokens with random numbers of each row's own, so that batches change no answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from dominie.generation.generator import GenerationRequest

#: Temperatures below are zero.
GREEDY = 1e-4


class Prompt(Protocol):
    """A request in tokens, and how many new ones fit."""

    @property
    def request(self) -> GenerationRequest:
        """What is asked, and how the answer is drawn."""

    @property
    def ids(self) -> Sequence[int]:
        """Its tokens."""

    @property
    def room(self) -> int:
        """New tokens at most."""


class RowSampler:
    """Draws each row's token with random numbers of that row's own; a logits processor.

    The cumulative distribution is inverted at a uniform number, in float64, so that the draw does
    not depend on the other rows. Rows of temperature 0 keep their logits.
    """

    def __init__(self, prompts: Sequence[Prompt], length: int) -> None:
        sampling = [prompt.request.sampling for prompt in prompts]
        self._length = length
        self._draws = torch.stack([_uniform(prompt) for prompt in prompts])
        self._temperature = torch.tensor([s.temperature for s in sampling], dtype=torch.float64)
        self._top_p = torch.tensor([s.top_p for s in sampling], dtype=torch.float64)
        self._cut = any(s.top_p < 1 for s in sampling)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return [B, V] logits of which only the drawn token's is finite."""
        if self._draws.device != scores.device:  # once: each copy is waited for
            self._draws, self._temperature, self._top_p = (
                each.to(scores.device) for each in (self._draws, self._temperature, self._top_p)
            )
        draw = self._draws[:, input_ids.shape[1] - self._length, None]
        temperature = self._temperature[:, None]
        greedy = temperature < GREEDY
        weights = torch.softmax(scores.double() / temperature.masked_fill(greedy, 1.0), -1)
        if self._cut:
            ordered, order = weights.sort(descending=True)
            outside = ordered.cumsum(-1) - ordered >= self._top_p[:, None]
            weights = torch.zeros_like(weights).scatter(-1, order, ordered.masked_fill(outside, 0))
        cumulative = weights.cumsum(-1)
        token = (cumulative <= draw * cumulative[:, -1:]).sum(-1, keepdim=True)
        drawn = torch.full_like(scores, -torch.inf).scatter(
            -1, token.clamp(max=scores.shape[-1] - 1), 0.0
        )
        return torch.where(greedy, scores, drawn)


def _uniform(prompt: Prompt) -> torch.Tensor:
    """[room] numbers from 0 to 1 of a prompt's own; the global random state is untouched."""
    text = repr((prompt.request.sampling.seed, list(prompt.ids))).encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest())
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(prompt.room, dtype=torch.float64, generator=generator)
