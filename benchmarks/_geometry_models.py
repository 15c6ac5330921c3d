"""Models of the paper's shapes with random weights, conversations for them, and the work they are.

The configurations are those of `recipes/configs`, with fewer layers; on a CPU also narrower.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _results import DEVICE

from dominie.models.info import ModelFlops, Workload, model_flops
from dominie.planning.trace import with_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"
STUDENT = "mistralai--Mistral-7B-v0.1.json"
TEACHER = "mistralai--Mixtral-8x7B-Instruct-v0.1.json"

#: Of these shapes' families, for a CPU.
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 2048,
}
#: Random weights say next to nothing of the next token; heads so much larger say it with about the
#: entropy that trained ones do, which is what a cache stores.
_SHARPNESS = 3.0
_SUPERVISED = 0.75  # share of a conversation's tokens


def configuration(file: str, layers: int, *, tiny: bool) -> Any:
    """The configuration of a paper's model with so many layers."""
    from transformers import AutoConfig

    config = with_layers(AutoConfig.from_pretrained(CONFIGS / file), layers)
    for key, value in (_TINY if tiny else {}).items():
        setattr(config, key, value)
    return config


def made(config: Any, *, trained: bool, seed: int) -> Any:
    """A model where it will run: fp32 weights to train, else frozen ones in bf16, as loaded."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            dtype=torch.float32 if trained else torch.bfloat16,
            attn_implementation="sdpa",
        )
    if trained:
        return model.train()
    with torch.no_grad():
        model.lm_head.weight.mul_(_SHARPNESS)
    return model.requires_grad_(False).eval()


@dataclass(frozen=True, eq=False)
class Conversation:
    """A tokenised conversation: a quarter is the prompt, the rest is supervised."""

    input_ids: NDArray[np.int64]

    @cached_property
    def supervised(self) -> NDArray[np.bool_]:
        """[n]."""
        return np.arange(len(self.input_ids)) >= len(self.input_ids) // 4


def conversations(count: int, length: int, vocabulary: int, seed: int) -> list[Conversation]:
    """So many of one length, of random tokens."""
    generator = np.random.default_rng(seed)
    return [Conversation(row) for row in generator.integers(vocabulary, size=(count, length))]


@dataclass(frozen=True)
class Work:
    """What a job has to compute of one token: nothing twice, nothing thrown away.

    Attributes:
        student: operations of its forward and backward pass, the head on supervised tokens alone.
        teachers: of the forward pass of the teacher that the token's source has.
        attention: of the attention loss: both models' scores, and two products of their difference.
    """

    student: float
    teachers: float
    attention: float

    @property
    def total(self) -> float:
        """Operations of one token."""
        return self.student + self.teachers + self.attention


def work(
    student: ModelFlops,
    teachers: Sequence[tuple[ModelFlops, float]],
    length: int,
    *,
    attention: bool,
) -> Work:
    """The work of a token in conversations of a length.

    Args:
        student: its products.
        teachers: products and share of the tokens of each that runs.
        length: of a conversation.
        attention: whether maps are compared, of all layers.
    """
    windows = {w for each in (student, *(t for t, _ in teachers)) for w in each.attended}
    keys = {w: sum(min(i + 1, w or length) for i in range(length)) / length for w in windows}
    load = Workload(tokens=1, supervised=_SUPERVISED, keys=keys)
    seen = (1 - (1 - _SUPERVISED) ** 2) * length / 2  # keys of supervised rows, a token's mean
    return Work(
        student=student.training(load),
        teachers=sum(share * teacher.forward(load) for teacher, share in teachers),
        attention=4 * 2 * sum(student.attended.values()) * seen if attention else 0.0,
    )


def products(config: Any) -> ModelFlops:
    """The products of a model of a configuration, which is not made; all its weights trained.

    Of a frozen one's forward pass, which is all that it runs, it tells the same.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    return model_flops(model)
