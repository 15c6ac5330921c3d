"""Has a student that is being trained answer prompts, as it is at that moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import nn

from dominie.models.head import causal_lm
from dominie.models.packed_attention import use_stock_attention
from dominie.training.loss_forward import without_losses
from dominie.training.rollouts import Rollout, RolloutKey, RolloutSettings


@dataclass(frozen=True)
class AskedAnswer:
    """An answer that is wanted.

    Attributes:
        key: the conversation.
        prompt: its tokens up to the answer.
        room: tokens that the answer may have.
    """

    key: RolloutKey
    prompt: list[int]
    room: int


class StudentAnswers:
    """Generates answers with a student between two optimiser steps.

    No dropout, no loss and no packed attention meanwhile, and none of the student's random numbers
    are used: what is drawn for a prompt depends on its key and on the run's seed.

    Args:
        student: the model that is trained, within `loss_in_forward`.
        tokenizer: the student's; ids that it does not have are never generated.
        ends: tokens that end an answer, beside those of the model's generation settings.
        settings: the stage's `rollouts`.
        seed: of the run.
    """

    def __init__(
        self,
        student: nn.Module,
        tokenizer: Any,
        *,
        ends: Sequence[int],
        settings: RolloutSettings,
        seed: int,
    ) -> None:
        from dominie.generation.local import LocalGenerator  # not where nothing is generated

        self.student, self.settings, self.seed = student, settings, seed
        self._ends = tuple(ends)
        self._generator = LocalGenerator(
            lambda: (causal_lm(student), tokenizer), batch=settings.batch, only_known=True
        )

    @torch.no_grad()
    def write(self, asked: Sequence[AskedAnswer]) -> list[Rollout]:
        """The answers, in the order in which they are asked for."""
        from dominie.generation.generator import GenerationRequest, Sampling, generate_all

        requests = [
            GenerationRequest(
                sampling=Sampling(
                    max_new_tokens=each.room,
                    temperature=self.settings.temperature,
                    top_p=self.settings.top_p,
                    seed=each.key.number(self.seed, "rollout"),
                ),
                token_ids=each.prompt,
                stop_ids=self._ends,
            )
            for each in asked
        ]
        was_training = self.student.training
        self.student.eval()
        use_stock_attention(causal_lm(self.student))
        try:
            with without_losses(self.student):
                results = generate_all(self._generator, requests)
        finally:
            self.student.train(was_training)
        return [
            Rollout(each.key, each.prompt, result.token_ids or [], result.stop_reason == "stop")
            for each, result in zip(asked, results, strict=True)
        ]

    def weights_hash(self) -> str:
        """Hash of the weights that are trained: of the sum of the bits of each tensor.

        Weights that an optimiser has changed have another; it is one pass over them.
        """
        whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        trained = [p.detach().contiguous() for p in self.student.parameters() if p.requires_grad]
        sums = [p.view(whole[p.element_size()]).sum(dtype=torch.int64) for p in trained]
        bits = torch.stack([each.to(sums[0].device) for each in sums]).cpu().numpy().tobytes()
        return blake2b(bits, digest_size=8).hexdigest()
