"""Whether a student can learn from a teacher: the same tokens, heads and layers that map."""

from __future__ import annotations

from typing import Any

from dominie.errors import InputError


def check_same_tokens(student: Any, teacher: Any, *, where: str) -> None:
    """Refuse a teacher whose token ids mean something else; equal sizes prove nothing.

    Ids that only one side knows (padding rows, extra special tokens at the end) are allowed.

    Raises:
        InputError: names an id and what each side takes it for.
    """
    if differing := differing_ids(student, teacher):
        index = differing[0]
        raise InputError(
            "student and teacher disagree on what token ids mean",
            where=where,
            expected=f"id {index} to be {_token(student, index)}, as in the student's tokenizer",
            found=f"{_token(teacher, index)} ({len(differing)} ids differ)",
            do="choose a teacher with the student's tokenizer",
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


def _token(tokenizer: Any, index: int) -> str:
    found = next((token for token, i in tokenizer.get_vocab().items() if i == index), None)
    return "nothing" if found is None else repr(found)
