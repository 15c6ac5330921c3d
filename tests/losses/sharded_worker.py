"""One rank of test_vocabulary_sharded.py: the gradients of a wrapped model, gathered.

Run as ``python sharded_worker.py KIND RESULT`` with KIND ddp, fsdp, zero3 or single.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dominie.losses import vocabulary_losses

VOCABULARY, WIDTH = 13, 4
TOKENS = (5, 0)
"""Supervised tokens of each rank: the second has none, and must take part all the same."""


class Student(nn.Module):
    """The loss inside of the forward pass; embeddings are tied, or a head stands apart."""

    def __init__(self, tied):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = self.embedding if tied else nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids, labels, target):
        hidden = self.body(self.embedding(ids)).tanh()
        return vocabulary_losses(hidden, self.head.weight, target, labels=labels).total


def batch(rank):
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(VOCABULARY, (2, TOKENS[rank]), generator=generator)
    hidden = torch.randn(TOKENS[rank], WIDTH, generator=generator)
    return ids[0], ids[1], (hidden, torch.linspace(-1, 1, VOCABULARY * WIDTH).view(-1, WIDTH))


def gradients(model, kind, rank):
    """By parameter name, summed over the ranks."""
    if kind == "single":
        sum(model(*batch(rank)) for rank in range(len(TOKENS))).backward()
        return {name: p.grad for name, p in model.named_parameters()}
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    elif kind == "fsdp":
        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (len(TOKENS),)))
    else:
        return zero3_gradients(model, rank)
    # Both average over the ranks: times their number, that is the sum.
    (len(TOKENS) * wrapped(*batch(rank))).backward()
    return {
        name: p.grad.full_tensor() if kind == "fsdp" else p.grad
        for name, p in model.named_parameters()
    }


def zero3_gradients(model, rank):
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    assert all(parameter.numel() == 0 for parameter in model.parameters()), "nothing is sharded"
    engine.backward(len(TOKENS) * engine(*batch(rank)))
    return {name: safe_get_full_grad(p) for name, p in model.named_parameters()}


def main(kind, result):
    rank = int(os.environ.get("RANK", "0"))
    if kind != "single":
        store = dist.TCPStore("127.0.0.1", int(os.environ["STORE"]), is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=len(TOKENS))
    found = {}
    for tied in (False, True):
        torch.manual_seed(0)
        found[tied] = gradients(Student(tied), kind, rank)
    if rank == 0:
        torch.save(found, result)
    if kind != "single":
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
