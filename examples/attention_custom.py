"""Attention distillation on a model that is not from transformers: queries and keys are enough.

No attention map is ever held: `attention_divergence` works on queries and keys with stock kernels.
Its gradient is that of the KL divergence of the maps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dominie.losses import attention_divergence


class Block(nn.Module):
    """One layer of causal self-attention that hands out its query and key."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's output [B, L, width]; its query and key [B, heads, L, size]."""
        parts = self.project(x).unflatten(-1, (3, self.heads, self.size))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2)), query, key


class Mine(nn.Module):
    """Somebody's own small transformer."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Query and key of every layer."""
        x, found = self.embed(ids), []
        for block in self.blocks:
            x, query, key = block(x)
            found.append((query, key))
        return found


def distil(steps: int = 100) -> list[float]:
    """Bring the maps of a small model to those of one with more heads of another size.

    Returns:
        The mean KL over layers, heads and rows in nats, step by step.
    """
    torch.manual_seed(0)
    teacher, student = Mine(64, heads=8, layers=2), Mine(32, heads=4, layers=2)
    teacher.requires_grad_(False)
    for block in teacher.blocks:
        block.project.weight.mul_(3)  # maps worth learning
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    ids = torch.randint(100, (8, 24))
    supervised = torch.ones(8, 24)  # rows of the maps that count
    taught = teacher(ids)
    curve = []
    for _ in range(steps):
        total = torch.zeros(())
        for (query, key), (their_query, their_key) in zip(student(ids), taught, strict=True):
            total = total + attention_divergence(
                query,
                key,
                their_query,
                their_key,
                row_weights=supervised,
                student_scale=query.shape[-1] ** -0.5,
                teacher_scale=their_query.shape[-1] ** -0.5,
            )
        mean = total / (len(taught) * 4 * supervised.sum())
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float(mean.detach()))
    return curve


if __name__ == "__main__":
    kl = distil()
    print(f"KL of the attention maps: {kl[0]:.4f} nats a row at the start, {kl[-1]:.4f} at the end")
