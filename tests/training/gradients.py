"""Conversations of odd lengths, and gradients compared parameter by parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dominie.data.batch import Row
from dominie.data.tokenization import Encoded


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
