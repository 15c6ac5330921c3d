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
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    by_id = {index: token for token, index in theirs.items()}
    differing = {index: token for token, index in ours.items() if by_id.get(index, token) != token}
    moved = {token: index for token, index in ours.items() if theirs.get(token, index) != index}
    if differing or moved:
        index = min([*differing, *moved.values()])
        mine = next(token for token, i in ours.items() if i == index)
        raise InputError(
            "student and teacher disagree on what token ids mean",
            where=where,
            expected=f"id {index} to be {mine!r}, as in the student's tokenizer",
            found=f"{by_id.get(index)!r} ({len(differing | moved)} differences)",
            do="choose a teacher with the student's tokenizer",
        )
