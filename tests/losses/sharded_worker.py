"""One rank of test_vocabulary_sharded.py: the gradients of a wrapped model, gathered.

Run as ``python sharded_worker.py KIND RANK RENDEZVOUS RESULT`` with KIND ddp, fsdp or single.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dominie.losses import vocabulary_losses

VOCABULARY, WIDTH = 13, 4
TOKENS = (5, 0)
"""Supervised tokens of each rank: the second has none, and must take part all the same."""


class Student(nn.Module):
    """Tied embeddings, and the loss inside of the forward pass."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids, labels, target):
        hidden = self.body(self.embedding(ids)).tanh()
        return vocabulary_losses(hidden, self.embedding.weight, target, labels=labels).total


def batch(rank):
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(VOCABULARY, (2, TOKENS[rank]), generator=generator)
    hidden = torch.randn(TOKENS[rank], WIDTH, generator=generator)
    return ids[0], ids[1], (hidden, torch.linspace(-1, 1, VOCABULARY * WIDTH).view(-1, WIDTH))


def main(kind, rank, rendezvous, result):
    torch.manual_seed(0)
    model = Student()
    if kind == "single":
        sum(model(*batch(rank)) for rank in range(len(TOKENS))).backward()
    else:
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=len(TOKENS)
        )
        if kind == "ddp":
            wrapped = DistributedDataParallel(model)
        else:
            wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (len(TOKENS),)))
        # Both average over the ranks: times their number, that is the sum.
        (len(TOKENS) * wrapped(*batch(rank))).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    gradients = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
    if rank == 0:
        torch.save(gradients, result)
    if kind != "single":
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
