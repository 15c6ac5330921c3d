"""Conversations of odd lengths; gradients: the naive one, kept ones, compared one by one."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import log_softmax
from transformers import TrainerCallback

from dominie.data.batch import Row
from dominie.data.tokenization import Encoded
from dominie.losses.terms import LossTerms


class StepGradient(TrainerCallback):
    """Keeps the gradient of the first optimiser step."""

    def __init__(self) -> None:
        self.gradient: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.gradient:
            named = kwargs["model"].named_parameters()
            self.gradient = {n: p.grad.clone() for n, p in named if p.grad is not None}


def ragged_rows(count: int, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for _ in range(count):
        length = int(rng.integers(4, 15))
        supervised = rng.random(length) < 0.5
        supervised[-1] = True
        rows.append(Encoded(rng.integers(0, 61, length).tolist(), supervised.tolist()))
    return rows


@dataclass(frozen=True)
class WeightedRow:
    """A conversation whose tokens have weights of their own."""

    input_ids: list[int]
    supervised: list[bool]
    weights: list[float]


def weighted(rows: Sequence[Row], seed: int) -> list[Row]:
    """The same rows with weights, a few of them 0."""
    rng = np.random.default_rng(seed)
    return [
        WeightedRow(
            row.input_ids,
            row.supervised,
            (rng.random((2, len(row.input_ids))) * 3).round(1).prod(0).tolist(),
        )
        for row in rows
    ]


#: transformers' eager attention takes its softmax in fp32, whatever the model's dtype.
ORACLE = 1e-5


def naive_gradient(
    model: Any, teacher: Any, rows: Sequence[Row], terms: LossTerms
) -> dict[str, torch.Tensor]:
    """One conversation at a time, all logits and maps held: the paper's formulas."""
    model, teacher = fresh_copy(model), fresh_copy(teacher)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    assert terms.next_token
    assert terms.prediction
    for row in rows:
        ids = torch.tensor(row.input_ids)[None]
        positions = [i for i in range(len(row.input_ids) - 1) if row.supervised[i + 1]]
        own = torch.as_tensor(getattr(row, "weights", None) or [1.0] * len(row.input_ids)).double()
        own = own[[i + 1 for i in positions]]
        tokens += len(positions)
        mine = model(input_ids=ids, output_attentions=True, use_cache=False)
        with torch.no_grad():
            theirs = teacher(input_ids=ids, output_attentions=True, use_cache=False)
        logits, target = mine.logits[0, positions], theirs.logits[0, positions]
        labels = ids[0, [i + 1 for i in positions]]
        total = (
            total
            - terms.next_token.weight
            * (own * log_softmax(logits, -1)[torch.arange(len(positions)), labels]).sum()
        )
        heat = terms.prediction.temperature
        p, q = log_softmax(target / heat, -1), log_softmax(logits / heat, -1)
        total = total + terms.prediction.weight * heat**2 * (own[:, None] * p.exp() * (p - q)).sum()
        if terms.attention:
            for a, b in zip(theirs.attentions, mine.attentions, strict=True):
                kl = a * (a.clamp(min=1e-300).log() - b.clamp(min=1e-300).log())
                kl = (own[:, None] * kl[0, :, positions]).sum()
                kl = kl / (a.shape[1] * len(mine.attentions))
                total = total + terms.attention.weight * kl
    (total / tokens).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def fresh_copy(model: Any) -> Any:
    """The same weights in a model that gives out its maps."""
    copy = type(model)(deepcopy(model.config)).double()
    copy.load_state_dict(model.state_dict())
    copy.set_attn_implementation("eager")
    return copy.eval()


def assert_equal_gradients(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], rtol: float = 1e-9
) -> None:
    assert one.keys() == other.keys()
    assert any(bool(g.abs().max() > 1e-4) for g in one.values())
    for name in one:
        torch.testing.assert_close(
            one[name],
            other[name],
            rtol=rtol,
            atol=rtol * 1e-2,
            msg=lambda text, name=name: f"{name}: {text}",
        )
