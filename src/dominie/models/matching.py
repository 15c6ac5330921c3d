"""Matches models: whether their tokens agree, a teacher's token ids, its layers and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dominie.core.errors import InputError
from dominie.models.head import causal_lm
from dominie.models.info import ModelInfo


def check_same_tokens(student: Any, teacher: Any, *, where: str) -> None:
    """Refuse a teacher whose token ids mean something else; equal sizes prove nothing.

    Ids that only one side knows (padding rows, extra special tokens at the end) are allowed.

    Raises:
        InputError: names an id and what each side takes it for.
    """
    _refuse_differing(
        student,
        teacher,
        "student and teacher disagree on what token ids mean",
        where=where,
        whose="the student's",
        do="compare with it by spans of text: loss: {spans: 1.0} in place of prediction; or choose "
        "a teacher with the student's tokenizer; where only the order differs, map it: models: "
        "{NAME: {path: …, map_tokens: true}}",
    )


def check_one_tokenizer(first: Any, other: Any, *, where: str) -> None:
    """Refuse to make one model of two whose token ids mean different things.

    Raises:
        InputError: names an id and what each model takes it for.
    """
    _refuse_differing(
        first,
        other,
        "models of different tokenizers cannot be made one",
        where=where,
        whose="the first model's",
        do="name models that were trained from one model",
    )


def differing_ids(one: Any, other: Any) -> list[int]:
    """Ids that two tokenizers take for different tokens; those only one of them knows are none."""
    ours, theirs = one.get_vocab(), other.get_vocab()
    if ours == theirs:
        return []
    by_id = {index: token for token, index in theirs.items()}
    return sorted(
        index
        for token, index in ours.items()
        if by_id.get(index, token) != token or theirs.get(token, index) != index
    )


def check_context(model: ModelInfo, length: int, *, where: str, do: str | None = None) -> None:
    """Refuse conversations longer than a model can place, if it is known how long they may be.

    Args:
        model: that reads them.
        length: tokens of the longest conversation.
        where: what the message names.
        do: what it advises.

    Raises:
        InputError: `length` is beyond the model's positions.
    """
    positions = model.context
    if positions is not None and length > positions:
        raise InputError(
            "conversations are longer than the model's context",
            where=where,
            expected=f"at most {positions} tokens (max_position_embeddings)",
            found=str(length),
            do=do or f"set train.max_length={positions}",
        )


def check_vocabulary(model: ModelInfo, highest_id: int, *, where: str) -> None:
    """Refuse tokens that a model has no embedding for, if it is known how many it has.

    Args:
        model: that reads them.
        highest_id: the highest token id in the data.
        where: what the message names.

    Raises:
        InputError: the tokenizer knows more tokens than the model, and the data hold one of them.
    """
    if model.vocabulary is not None and highest_id >= model.vocabulary:
        raise InputError(
            "the tokenizer knows tokens that the model does not",
            where=where,
            expected=f"token ids below {model.vocabulary} (vocab_size)",
            found=f"id {highest_id} in the data",
            do="use the model's own tokenizer, or resize the model's embeddings first",
        )


def _refuse_differing(one: Any, other: Any, what: str, *, where: str, whose: str, do: str) -> None:
    """Name the first id that two tokenizers take for different tokens, if there is one."""
    if differing := differing_ids(one, other):
        index = differing[0]
        raise InputError(
            what,
            where=where,
            expected=f"id {index} to be {_token(one, index)}, as in {whose} tokenizer",
            found=f"{_token(other, index)} ({len(differing)} ids differ)",
            do=do,
        )


def _token(tokenizer: Any, index: int) -> str:
    found = next((token for token, i in tokenizer.get_vocab().items() if i == index), None)
    return "nothing" if found is None else repr(found)


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
def reorder_vocabulary(model: torch.nn.Module, ids: Tensor) -> None:
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


_WHERE = "loss.attention.layers"
_EXPECTED = "all, uniform, kept, last, {every: k}, {last: n} or pairs [[student, teacher], …]"


def map_layers(spec: Any, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """Pairs (student layer, teacher layer), ascending, layers counted from 0.

    Args:
        spec: ``"all"`` each layer with its like, depths being equal; ``"uniform"`` every student
            layer with the teacher layer at the same relative height, last with last; ``"last"``
            the last of both; ``{"last": n}`` the last n of both; ``{"every": k}`` layers k−1,
            2k−1, … with their like; or explicit pairs.
        student_depth: number of the student's layers.
        teacher_depth: number of the teacher's layers.

    Raises:
        InputError: the spec is none of these, or does not fit the depths.
    """
    if spec == "uniform":
        return [
            (layer, max(0, (layer + 1) * teacher_depth // student_depth - 1))
            for layer in range(student_depth)
        ]
    if spec == "all":
        return _like_with_like(1, student_depth, teacher_depth)
    if spec == "last":
        return [(student_depth - 1, teacher_depth - 1)]
    if isinstance(spec, Mapping) and len(spec) == 1:
        (name, count), *_ = spec.items()
        if name in ("every", "last") and isinstance(count, int) and count >= 1:
            if name == "every":
                return _like_with_like(count, student_depth, teacher_depth)
            if count <= min(student_depth, teacher_depth):
                return [(student_depth - n, teacher_depth - n) for n in range(count, 0, -1)]
            raise InputError(
                f"there are no {count} last layers to map",
                where=_WHERE,
                expected=f"last: 1 … {min(student_depth, teacher_depth)}",
                found=f"last: {count}; depths {student_depth} and {teacher_depth}",
            )
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        return _explicit_pairs(spec, student_depth, teacher_depth)
    raise InputError(
        "this is not a mapping of layers", where=_WHERE, expected=_EXPECTED, found=repr(spec)
    )


def check_heads(student_heads: int, teacher_heads: int) -> int:
    """Number of teacher heads that teach each head of the student: 1, or a group's size.

    Raises:
        InputError: the teacher's heads are not a multiple of the student's.
    """
    if teacher_heads % student_heads:
        raise InputError(
            "the teacher's attention heads cannot be shared out over the student's",
            where="loss.attention",
            expected=f"a multiple of the student's {student_heads} heads",
            found=f"{teacher_heads} heads",
            do="choose a teacher or student with a fitting head count, or set attention: 0",
        )
    return teacher_heads // student_heads


def _like_with_like(step: int, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    if student_depth != teacher_depth:
        raise InputError(
            "student and teacher differ in depth",
            where=_WHERE,
            expected=f"a teacher of {student_depth} layers, or a mapping",
            found=f"a teacher of {teacher_depth} layers",
            do="set layers: uniform, or list pairs [[student, teacher], …]",
        )
    pairs = [(layer, layer) for layer in range(step - 1, student_depth, step)]
    if not pairs:
        raise InputError(
            "no layer is mapped",
            where=_WHERE,
            expected=f"every: 1 … {student_depth}",
            found=f"every: {step}",
        )
    return pairs


def _explicit_pairs(
    spec: Sequence[Any], student_depth: int, teacher_depth: int
) -> list[tuple[int, int]]:
    pairs = []
    for pair in spec:
        if (
            not isinstance(pair, Sequence)
            or len(pair) != 2
            or any(type(layer) is not int for layer in pair)
        ):
            raise InputError(
                "this is not a pair of layers",
                where=_WHERE,
                expected="[student layer, teacher layer]",
                found=repr(pair),
            )
        if not (0 <= pair[0] < student_depth and 0 <= pair[1] < teacher_depth):
            raise InputError(
                "a pair names a layer that does not exist",
                where=_WHERE,
                expected=f"[0 … {student_depth - 1}, 0 … {teacher_depth - 1}]",
                found=str(list(pair)),
            )
        pairs.append((pair[0], pair[1]))
    if not pairs or len(set(pairs)) != len(pairs):
        raise InputError(
            "pairs of layers are missing or repeated",
            where=_WHERE,
            expected="at least one pair, each once",
            found=repr(spec),
        )
    return sorted(pairs)
