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

from dominie.planning.flops import forward_flops
from dominie.planning.layers import with_layers
from dominie.planning.shapes import Shape, shape_of

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
        student: operations of forward and backward, all but the head.
        teachers: of the forward of the teacher that its source has, all but the head.
        heads: of both, on supervised positions alone.
        attention: of the attention loss: both models' scores, and two products of their difference.
    """

    student: float
    teachers: float
    heads: float
    attention: float

    @property
    def total(self) -> float:
        """Operations of one token."""
        return self.student + self.teachers + self.heads + self.attention

    @property
    def trained(self) -> float:
        """Those of the student's forward and backward, its head among them."""
        return self.student + self._student_head

    _student_head: float = 0.0


def work(
    student: Any, teachers: Sequence[tuple[Any, float]], length: int, *, attention: bool
) -> Work:
    """The work of a token in conversations of a length.

    Args:
        student: configuration.
        teachers: configuration and share of the tokens of each that runs.
        length: of a conversation.
        attention: whether maps are compared, of all layers.
    """
    own = shape_of(student)
    supervised = 0.75
    seen = length / 2 * (1 - 0.25**2)  # keys of supervised rows, of the mean token
    head = 3 * _head(own) * supervised
    heads = head + sum(share * _head(shape_of(c)) * supervised for c, share in teachers)
    product = 2 * own.layers * own.heads * own.head_width * seen
    return Work(
        student=3 * _body(own, length),
        teachers=sum(share * _body(shape_of(c), length) for c, share in teachers),
        heads=heads,
        attention=4 * product if attention else 0.0,
        _student_head=head,
    )


def _head(shape: Shape) -> float:
    return 2.0 * shape.vocabulary * shape.width


def _body(shape: Shape, length: int) -> float:
    return forward_flops(shape, length) - _head(shape)
