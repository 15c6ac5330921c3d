"""A teacher with the student's tokens under other ids is made to speak the student's ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dominie.errors import InputError
from dominie.models.head import causal_lm


def token_map(student: Any, teacher: Any, *, size: int, where: str) -> Tensor:
    """The teacher's id of every id of the student's, completed to a permutation.

    Args:
        student: tokenizer of the student.
        teacher: tokenizer of the teacher.
        size: rows of the teacher's embedding.
        where: what the message names.

    Returns:
        int64 [size]; rows that neither tokenizer uses fill up in their order.

    Raises:
        InputError: one of the two has a token that the other lacks, or an id beyond `size`.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if alone := sorted(ours.keys() ^ theirs.keys()):
        raise InputError(
            "map_tokens needs the same tokens under other ids",
            where=where,
            found=f"{len(alone)} tokens that only one side has: {', '.join(map(repr, alone[:3]))}",
            do="choose a teacher with the student's tokens",
        )
    if (highest := max(*ours.values(), *theirs.values())) >= size:
        raise InputError(
            "a token id lies beyond the teacher's embedding",
            where=where,
            expected=f"ids below {size}",
            found=str(highest),
        )
    mapped = torch.full((size,), -1)
    mapped[torch.tensor(list(ours.values()))] = torch.tensor([theirs[token] for token in ours])
    unused = torch.ones(size, dtype=torch.bool)
    unused[mapped[mapped >= 0]] = False
    mapped[mapped < 0] = unused.nonzero().squeeze(1)
    return mapped


@torch.no_grad()
def adopt_ids(model: torch.nn.Module, ids: Tensor) -> None:
    """Reorder the rows of a frozen model's embedding and head: row i becomes row `ids[i]`.

    Args:
        model: a causal language model.
        ids: permutation [rows of its embedding], see `token_map`.
    """
    inner = causal_lm(model)
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    tied = head.weight is embedding.weight
    embedding.weight.data = embedding.weight[ids.to(embedding.weight.device)]
    if not tied:
        head.weight.data = head.weight[ids.to(head.weight.device)]
    if getattr(head, "bias", None) is not None:
        head.bias.data = head.bias[ids.to(head.bias.device)]
