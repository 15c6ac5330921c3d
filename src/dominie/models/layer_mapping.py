"""Which layer and which heads of a teacher a student's layer and heads learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dominie.core.errors import InputError

_WHERE = "loss.attention.layers"
_EXPECTED = "all, uniform, last, {every: k}, {last: n} or pairs [[student, teacher], …]"


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
