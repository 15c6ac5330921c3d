"""One rank of test_sharded.py: what sharded teachers say, beside the same teachers held whole.

Run as ``python sharded_worker.py TEACHER TEACHER``, two folders of models.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import MistralConfig, MistralForCausalLM

from dominie.data.batch import Batch, collate
from dominie.data.tokenization import Encoded
from dominie.losses.objective import Objective
from dominie.losses.targets import Signal
from dominie.losses.terms import Attention as AttentionTerm
from dominie.losses.terms import LossTerms, NextToken, Prediction
from dominie.models.loading import load_frozen
from dominie.models.placement import is_sharded
from dominie.models.spec import Model
from dominie.teachers import LocalTeacher, RoutedTeacher
from dominie.training.loss_forward import DistillationInputs, loss_in_forward

ROUTES = ["mixture", "dense", None]
#: Sources of the rows of each micro-batch on each rank: some know one teacher alone, or none.
MICRO_BATCHES = [([0, 0], [1, 1]), ([0, 1], [0, 0]), ([1], [2]), ([2], [2]), ([1, 0], [1, 2])]


def routed(folders: list[str], mesh: object) -> RoutedTeacher:
    teachers = {}
    for name, folder in zip(("mixture", "dense"), folders, strict=True):
        model = load_frozen(Model(path=folder, placement="sharded"), mesh=mesh)
        assert is_sharded(model) is (mesh is not None)
        layers = [0, 1] if name == "mixture" else ()  # attention is compared on one source
        teachers[name] = LocalTeacher(model, attention_layers=layers)
    return RoutedTeacher(teachers, ROUTES)


def batch_of(sources: list[int], seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for source in sources:
        length = int(torch.randint(3, 9, (), generator=generator))
        ids = torch.randint(50, (length,), generator=generator).tolist()
        rows.append((source, Encoded(ids, [False] + [True] * (length - 1))))
    return collate(rows)


def assert_same(one: Signal, other: Signal) -> None:
    assert len(one.parts) == len(other.parts)
    for ours, theirs in zip(one.parts, other.parts, strict=True):
        assert ours.rows.tolist() == theirs.rows.tolist()
        torch.testing.assert_close(ours.target.hidden, theirs.target.hidden)
        assert ours.target.head.weight.equal(theirs.target.head.weight)
        assert ours.attention.keys() == theirs.attention.keys()
        for layer in ours.attention:
            torch.testing.assert_close(ours.attention[layer].key, theirs.attention[layer].key)


def gradient(student: MistralForCausalLM, teacher: RoutedTeacher, rank: int) -> torch.Tensor:
    """Over all micro-batches, and what the teachers say of each."""
    student.zero_grad()
    for number, sources in enumerate(MICRO_BATCHES):
        batch = batch_of(sources[rank], 10 * number + rank)
        student(inputs=DistillationInputs(batch, teacher.signal(batch)))["loss"].backward()
    return torch.cat([p.grad.flatten() for p in student.parameters()])


def main(*folders: str) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore("127.0.0.1", int(os.environ["STORE"]), is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    whole = routed(list(folders), None)
    sharded = routed(list(folders), init_device_mesh("cpu", (ranks,)))
    for number, sources in enumerate(MICRO_BATCHES):
        batch = batch_of(sources[rank], number)
        assert_same(sharded.signal(batch), whole.signal(batch))
    for name, teacher in sharded.teachers.items():  # layers have been let go of again
        layers = teacher.model.model.layers
        here = sum(p.to_local().numel() for p in layers.parameters())
        all_of_it = sum(p.numel() for p in whole.teachers[name].model.model.layers.parameters())
        assert here < 0.7 * all_of_it, (name, here, all_of_it)  # three experts do not halve
    torch.manual_seed(1)
    student = MistralForCausalLM(MistralConfig.from_pretrained(folders[1]))  # untrained
    terms = [
        LossTerms(prediction=Prediction(), attention=AttentionTerm()),
        LossTerms(prediction=Prediction()),
        LossTerms(next_token=NextToken()),
    ]
    with loss_in_forward(student, Objective(terms), [(0, 0), (1, 1)]):
        expected, found = (gradient(student, teacher, rank) for teacher in (whole, sharded))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
