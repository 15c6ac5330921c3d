"""Has a student that is being trained answer prompts, as it is at that moment."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dominie.core.errors import RunError
from dominie.models.head import causal_lm
from dominie.models.packed_attention import use_stock_attention
from dominie.models.placement import whole_weights
from dominie.training.loss_forward import without_losses
from dominie.training.rollouts import Rollout, RolloutKey, RolloutSettings

if TYPE_CHECKING:
    from dominie.training.stage_sources import StageTraining

logger = logging.getLogger(__name__)

#: Nats between what a server and the student say of the tokens of an answer: beyond it there is a
#: warning (a vLLM in bf16 was 0.05 to 0.07 nats from the same weights in fp32), and beyond
#: the other an error.
WARNED_APART = 0.1
MOST_APART = 0.5


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


class AnswerWriter(Protocol):
    """Has the student answer, as it is: in this process or on a server."""

    def write(self, asked: Sequence[AskedAnswer]) -> list[Rollout]:
        """The answers, in the order in which they are asked for. All ranks call it at once."""

    def weights_hash(self) -> str:
        """Hash of the weights that are trained."""

    def compare(self, key: RolloutKey, losses: Sequence[float]) -> float | None:
        """How far an answer is from being the student's own, in nats a token; None if it is.

        Args:
            key: of the answer.
            losses: −log-probability of each of its tokens, by the student with the same weights.
        """


def answer_writer(
    stage: StageTraining, student: nn.Module, tokenizer: Any, folder: Path
) -> AnswerWriter:
    """What has the student of a stage answer.

    Args:
        stage: what is trained on and how.
        student: the model that is trained.
        tokenizer: the student's.
        folder: of the rollouts.
    """
    ends, seed = stage.ends_of_turn(tokenizer), stage.settings.seed
    if stage.rollouts.engine is None:
        return StudentAnswers(student, tokenizer, ends=ends, settings=stage.rollouts, seed=seed)
    from dominie.training.server_answers import ServerAnswers  # which shows what it waits for

    return ServerAnswers(
        student, tokenizer, ends=ends, settings=stage.rollouts, seed=seed, folder=folder
    )


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
            with without_losses(self.student), whole_weights(self.student):
                results = generate_all(self._generator, requests)
        finally:
            self.student.train(was_training)
        return [
            Rollout(each.key, each.prompt, result.token_ids or [], result.stop_reason == "stop")
            for each, result in zip(asked, results, strict=True)
        ]

    def weights_hash(self) -> str:
        """Hash of the weights that are trained."""
        return weights_hash(self.student)

    def compare(self, key: RolloutKey, losses: Sequence[float]) -> float | None:
        """Nothing: what is generated here is the student's own (`ServerAnswers.compare`)."""
        del key, losses
        return None


def weights_hash(student: nn.Module) -> str:
    """Hash of the weights that are trained: of the sum of the bits of each tensor.

    Weights that an optimiser has changed have another; it is one pass over them. Of weights that
    are cut up every process has the same hash, that of the whole; all call it at once.
    """
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    parameters = [p.detach() for p in student.parameters() if p.requires_grad]
    is_cut = [isinstance(p, DTensor) for p in parameters]
    trained = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    trained = [p.contiguous() for p in trained]
    sums = [p.view(whole[p.element_size()]).sum(dtype=torch.int64) for p in trained]
    added = torch.stack([each.to(sums[0].device) for each in sums])
    if any(is_cut):
        parts = torch.where(torch.tensor(is_cut, device=added.device), added, 0)
        torch.distributed.all_reduce(parts)
        added = torch.where(torch.tensor(is_cut, device=added.device), parts, added)
    bits = added.cpu().numpy().tobytes()
    return blake2b(bits, digest_size=8).hexdigest()


def check_apart(apart: Sequence[float], *, step: int) -> None:
    """Compare a server's log-probabilities of the tokens that it drew with the student's.

    Args:
        apart: nats a token, of each answer (`ServerAnswers.compare`).
        step: that learns from them, counted from 1.

    Raises:
        RunError: the answers are of other weights.
    """
    if not apart:
        return
    mean = sum(apart) / len(apart)
    if not mean <= MOST_APART:
        raise RunError(
            "the answers are not the student's: the server has other weights than it was sent",
            where=f"rollouts.engine, step {step}",
            expected=f"log-probabilities at most {MOST_APART:g} nats apart, on average",
            found=f"{mean:.3f} over {len(apart):,} answers",
            do="start it with the very model that the student's adapter is over, and train no "
            "adapter on its head or embedding (train.lora.target_modules)",
        )
    if mean > WARNED_APART:
        logger.warning(
            "step %d: the server's log-probabilities of the tokens that it drew are %.3f nats from "
            "the student's; above %g its rounding, its precision or its --logprobs-mode is to "
            "blame",
            step,
            mean,
            WARNED_APART,
        )
