"""The kernel that walks over the rows which see a block of keys: the keys' gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from dominie.losses.triton_attention_rows import load_positions

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 (capitals are constants of a compiled kernel)


@triton.jit
def _key_gradient_over(
    low, high, gradient, keys, k, first_taught, active, firsts, segments, weights,
    student_lse, teacher_lse, query, query_l, teacher_query, teacher_query_h, teacher_query_l,
    teacher_key, teacher_key_h, teacher_key_l, teacher_head, length, scale, teacher_scale,
    GROUP: tl.constexpr, KEY_GROUP: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, TEACHER_WIDTH: tl.constexpr,
    TEACHER_PADDED: tl.constexpr, INNER: tl.constexpr, BROKEN: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The gradient of the keys after the weighted blocks of rows from rank ``low`` to ``high``."""
    for rank in range(low, high):
        rows = tl.load(active + rank) * INNER + tl.arange(0, INNER)
        inside = rows < length
        weight = tl.load(weights + rows, mask=inside, other=0.0)
        lse = tl.load(student_lse + rows, mask=inside, other=1.0e30)
        q = load_positions(query, query_l, rows, length, WIDTH, PADDED)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale  # [keys, rows]
        difference = tl.exp2(scores - lse[None, :])
        for member in tl.static_range(GROUP):
            head = teacher_head + member
            taught_query = load_positions(
                teacher_query + head * teacher_query_h, teacher_query_l, rows, length,
                TEACHER_WIDTH, TEACHER_PADDED,
            )  # fmt: skip
            if GROUP == 1:
                t = first_taught  # stays on the chip
            else:
                t = load_positions(
                    teacher_key + (head // KEY_GROUP) * teacher_key_h, teacher_key_l, keys,
                    length, TEACHER_WIDTH, TEACHER_PADDED,
                )  # fmt: skip
            taught_lse = tl.load(teacher_lse + head * length + rows, mask=inside, other=1.0e30)
            taught = tl.dot(t, tl.trans(taught_query), input_precision=PRECISION) * teacher_scale
            difference -= tl.exp2(taught - taught_lse[None, :]) * (1.0 / GROUP)
        if MASKED:
            first = tl.load(firsts + rows, mask=inside, other=0)
            row_segments = tl.load(segments + rows, mask=inside, other=0)
            seen = (keys[:, None] <= rows[None, :]) & (keys[:, None] >= first[None, :])
            if BROKEN:
                key_segments = tl.load(segments + keys, mask=keys < length, other=-1)
                seen = seen & (key_segments[:, None] == row_segments[None, :])
            difference = tl.where(seen, difference, 0.0)
        difference *= weight[None, :]
        gradient = tl.dot(difference.to(q.dtype), q, gradient, input_precision=PRECISION)
    return gradient


@triton.jit
def key_gradient(
    gradient_out, size, student_lse, teacher_lse, weights, lasts, active, ranks, firsts, segments,
    query, query_b, query_h, query_l, key, key_b, key_h, key_l,
    teacher_query, teacher_query_b, teacher_query_h, teacher_query_l,
    teacher_key, teacher_key_b, teacher_key_h, teacher_key_l,
    length, scale, teacher_scale,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    TEACHER_HEADS: tl.constexpr, TEACHER_KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr, TEACHER_PADDED: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr, RAGGED: tl.constexpr, BROKEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What one query head adds to the gradient of a block of the keys that it reads."""
    key_start = tl.program_id(0) * OUTER  # the longest walks first
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    teacher_head = head * (TEACHER_HEADS // HEADS)
    keys = key_start + tl.arange(0, OUTER)
    count = tl.cdiv(length, INNER)
    ranks += batch * (count + 1)
    last = tl.max(tl.load(lasts + batch * length + keys, mask=keys < length, other=0), 0)
    low = tl.load(ranks + key_start // INNER)
    high = tl.load(ranks + last // INNER + 1)
    after = tl.minimum(tl.cdiv(key_start + OUTER, INNER), count)
    middle = tl.minimum(tl.load(ranks + after), high)
    firsts += batch * length
    segments += batch * length
    weights += batch * length
    active += batch * count
    query += batch * query_b + head * query_h
    key += batch * key_b + (head // (HEADS // KEY_HEADS)) * key_h
    student_lse += (batch * HEADS + head) * length
    teacher_query += batch * teacher_query_b
    teacher_key += batch * teacher_key_b
    teacher_lse += batch * TEACHER_HEADS * length
    k = load_positions(key, key_l, keys, length, WIDTH, PADDED)
    first_taught = load_positions(
        teacher_key + (teacher_head // (TEACHER_HEADS // TEACHER_KEY_HEADS)) * teacher_key_h,
        teacher_key_l, keys, length, TEACHER_WIDTH, TEACHER_PADDED,
    )  # fmt: skip
    gradient = tl.zeros([OUTER, PADDED], tl.float32)
    gradient = _key_gradient_over(
        low, middle, gradient, keys, k, first_taught, active, firsts, segments, weights,
        student_lse, teacher_lse, query, query_l,
        teacher_query, teacher_query_h, teacher_query_l,
        teacher_key, teacher_key_h, teacher_key_l, teacher_head, length, scale, teacher_scale,
        TEACHER_HEADS // HEADS, TEACHER_HEADS // TEACHER_KEY_HEADS,
        WIDTH, PADDED, TEACHER_WIDTH, TEACHER_PADDED, INNER, BROKEN, PRECISION, True,
    )  # fmt: skip
    gradient = _key_gradient_over(
        middle, high, gradient, keys, k, first_taught, active, firsts, segments, weights,
        student_lse, teacher_lse, query, query_l,
        teacher_query, teacher_query_h, teacher_query_l,
        teacher_key, teacher_key_h, teacher_key_l, teacher_head, length, scale, teacher_scale,
        TEACHER_HEADS // HEADS, TEACHER_HEADS // TEACHER_KEY_HEADS,
        WIDTH, PADDED, TEACHER_WIDTH, TEACHER_PADDED, INNER, BROKEN, PRECISION, RAGGED,
    )  # fmt: skip
    columns = tl.arange(0, PADDED)
    out = gradient_out + ((batch * HEADS + head) * length + keys)[:, None] * WIDTH
    written = (keys < length)[:, None] & (columns < WIDTH)[None, :]
    gradient *= tl.load(size) * scale * 0.6931471805599453
    tl.store(out + columns[None, :], gradient.to(gradient_out.dtype.element_ty), mask=written)
