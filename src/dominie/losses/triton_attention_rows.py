"""Kernels that walk over the keys a block of rows sees: statistics, and the queries' gradient."""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 (capitals are constants of a compiled kernel)


_HIDDEN = tl.constexpr(-1.0e30)  # finite: the difference of two infinities is not a number


@triton.jit
def load_positions(base, stride, positions, length, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """[positions, PADDED] of a head, zeros beyond its length and width."""
    columns = tl.arange(0, PADDED)
    inside = positions[:, None] < length
    if WIDTH != PADDED:
        inside = inside & (columns[None, :] < WIDTH)
    return tl.load(base + positions[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _seen(rows, keys, first, row_segments, segments, length, BROKEN: tl.constexpr):
    """[rows, keys]: whether a row sees a key; ``first`` and ``row_segments`` are the rows'."""
    seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= first[:, None])
    if BROKEN:
        key_segments = tl.load(segments + keys, mask=keys < length, other=-1)
        seen = seen & (row_segments[:, None] == key_segments[None, :])
    return seen


@triton.jit
def _online(maximum, total, scores, seen, MASKED: tl.constexpr):
    """Running maximum and sum of powers of two after a tile: (maximum, total, powers, decay)."""
    if MASKED:
        scores = tl.where(seen, scores, _HIDDEN)
    larger = tl.maximum(maximum, tl.max(scores, 1))
    powers = tl.exp2(scores - larger[:, None])
    if MASKED:
        powers = tl.where(seen, powers, 0.0)  # a row may see nothing of a tile
    decay = tl.exp2(maximum - larger)
    return larger, total * decay + tl.sum(powers, 1), powers, decay


@triton.jit
def _statistics_over(
    low, high, state, rows, first, row_segments, query, teacher_query, segments,
    key, key_stride, teacher_key, teacher_key_stride, length, scale, teacher_scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, TEACHER_WIDTH: tl.constexpr,
    TEACHER_PADDED: tl.constexpr, INNER: tl.constexpr, BROKEN: tl.constexpr,
    PRECISION: tl.constexpr, DIVERGENCE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The state of both softmaxes after the keys from ``low`` to ``high``."""
    maximum, total, teacher_maximum, teacher_total, divergence = state
    for start in range(low, high, INNER):
        keys = start + tl.arange(0, INNER)
        k = load_positions(key, key_stride, keys, length, WIDTH, PADDED)
        t = load_positions(
            teacher_key, teacher_key_stride, keys, length, TEACHER_WIDTH, TEACHER_PADDED
        )
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale
        taught = tl.dot(teacher_query, tl.trans(t), input_precision=PRECISION) * teacher_scale
        seen = _seen(rows, keys, first, row_segments, segments, length, BROKEN)
        maximum, total, _, _ = _online(maximum, total, scores, seen, MASKED)
        teacher_maximum, teacher_total, powers, decay = _online(
            teacher_maximum, teacher_total, taught, seen, MASKED
        )
        if DIVERGENCE:
            divergence = divergence * decay + tl.sum(powers * (taught - scores), 1)
    return maximum, total, teacher_maximum, teacher_total, divergence


@triton.jit
def statistics(
    student_lse, teacher_lse, divergence_out, weights, firsts, segments,
    query, query_b, query_h, query_l, key, key_b, key_h, key_l,
    teacher_query, teacher_query_b, teacher_query_h, teacher_query_l,
    teacher_key, teacher_key_b, teacher_key_h, teacher_key_l,
    length, scale, teacher_scale,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    TEACHER_HEADS: tl.constexpr, TEACHER_KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr, TEACHER_PADDED: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr, RAGGED: tl.constexpr, BROKEN: tl.constexpr,
    PRECISION: tl.constexpr, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps, and the divergence, of a block of rows of one teacher head."""
    row_start = (tl.num_programs(0) - 1 - tl.program_id(0)) * OUTER  # the longest walks first
    batch = (tl.program_id(1) // TEACHER_HEADS).to(tl.int64)
    teacher_head = tl.program_id(1) % TEACHER_HEADS
    head = teacher_head // (TEACHER_HEADS // HEADS)
    rows = row_start + tl.arange(0, OUTER)
    weight = tl.load(weights + batch * length + rows, mask=rows < length, other=0.0)
    counts = weight != 0.0
    if tl.max(counts.to(tl.int32), 0) == 0:
        return
    first = tl.load(firsts + batch * length + rows, mask=rows < length, other=0)
    segments += batch * length
    row_segments = tl.load(segments + rows, mask=rows < length, other=0)
    query += batch * query_b + head * query_h
    key += batch * key_b + (head // (HEADS // KEY_HEADS)) * key_h
    teacher_query += batch * teacher_query_b + teacher_head * teacher_query_h
    teacher_key += (
        batch * teacher_key_b
        + (teacher_head // (TEACHER_HEADS // TEACHER_KEY_HEADS)) * teacher_key_h
    )
    q = load_positions(query, query_l, rows, length, WIDTH, PADDED)
    t = load_positions(teacher_query, teacher_query_l, rows, length, TEACHER_WIDTH, TEACHER_PADDED)
    low, middle, high = _key_range(counts, first, row_start, length, OUTER, INNER)
    zero = tl.zeros([OUTER], tl.float32)
    state = (zero + _HIDDEN, zero, zero + _HIDDEN, zero, zero)
    state = _statistics_over(
        low, middle, state, rows, first, row_segments, q, t, segments,
        key, key_l, teacher_key, teacher_key_l, length, scale, teacher_scale,
        WIDTH, PADDED, TEACHER_WIDTH, TEACHER_PADDED, INNER, BROKEN, PRECISION, DIVERGENCE,
        RAGGED,
    )  # fmt: skip
    maximum, total, teacher_maximum, teacher_total, divergence = _statistics_over(
        middle, high, state, rows, first, row_segments, q, t, segments,
        key, key_l, teacher_key, teacher_key_l, length, scale, teacher_scale,
        WIDTH, PADDED, TEACHER_WIDTH, TEACHER_PADDED, INNER, BROKEN, PRECISION, DIVERGENCE,
        True,
    )  # fmt: skip
    written = counts & (rows < length)
    total = tl.where(total > 0.0, total, 1.0)
    teacher_total = tl.where(teacher_total > 0.0, teacher_total, 1.0)
    lse = maximum + tl.log2(total)
    taught_lse = teacher_maximum + tl.log2(teacher_total)
    tl.store(student_lse + (batch * HEADS + head) * length + rows, lse, mask=written)
    offset = (batch * TEACHER_HEADS + teacher_head) * length
    tl.store(teacher_lse + offset + rows, taught_lse, mask=written)
    if DIVERGENCE:
        result = (divergence / teacher_total - taught_lse + lse) * 0.6931471805599453
        tl.store(divergence_out + offset + rows, result, mask=written)


@triton.jit
def _key_range(
    counts, first, row_start, length, OUTER: tl.constexpr, INNER: tl.constexpr
):  # fmt: skip
    """Keys to walk over: the first, the first of the masked ones, the end.

    Keys before the first row of the block are seen by all of it where nothing but order hides.
    """
    earliest = tl.min(tl.where(counts, first, length), 0)
    low = earliest // INNER * INNER
    middle = tl.maximum(low, row_start // INNER * INNER)
    return low, middle, tl.minimum(row_start + OUTER, length)


@triton.jit
def _query_gradient_over(
    low, high, gradient, rows, first, row_segments, query, lse, segments,
    key, key_stride, first_taught, teacher_query, teacher_query_h, teacher_query_l, teacher_lse,
    teacher_key, teacher_key_h, teacher_key_l, teacher_head, length, scale, teacher_scale,
    GROUP: tl.constexpr, KEY_GROUP: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, TEACHER_WIDTH: tl.constexpr,
    TEACHER_PADDED: tl.constexpr, INNER: tl.constexpr, BROKEN: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries after the keys from ``low`` to ``high``."""
    for start in range(low, high, INNER):
        keys = start + tl.arange(0, INNER)
        k = load_positions(key, key_stride, keys, length, WIDTH, PADDED)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale
        difference = tl.exp2(scores - lse[:, None])
        for member in tl.static_range(GROUP):
            head = teacher_head + member
            if GROUP == 1:
                q = first_taught  # stays on the chip
            else:
                q = load_positions(
                    teacher_query + head * teacher_query_h, teacher_query_l, rows, length,
                    TEACHER_WIDTH, TEACHER_PADDED,
                )  # fmt: skip
            t = load_positions(
                teacher_key + (head // KEY_GROUP) * teacher_key_h, teacher_key_l, keys, length,
                TEACHER_WIDTH, TEACHER_PADDED,
            )  # fmt: skip
            taught_lse = tl.load(
                teacher_lse + head * length + rows, mask=rows < length, other=1.0e30
            )
            taught = tl.dot(q, tl.trans(t), input_precision=PRECISION) * teacher_scale
            difference -= tl.exp2(taught - taught_lse[:, None]) * (1.0 / GROUP)
        if MASKED:
            seen = _seen(rows, keys, first, row_segments, segments, length, BROKEN)
            difference = tl.where(seen, difference, 0.0)
        gradient = tl.dot(difference.to(k.dtype), k, gradient, input_precision=PRECISION)
    return gradient


@triton.jit
def query_gradient(
    gradient_out, size, student_lse, teacher_lse, weights, firsts, segments,
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
    """The gradient of a block of queries of one head."""
    row_start = (tl.num_programs(0) - 1 - tl.program_id(0)) * OUTER
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    rows = row_start + tl.arange(0, OUTER)
    weight = tl.load(weights + batch * length + rows, mask=rows < length, other=0.0)
    counts = weight != 0.0
    columns = tl.arange(0, PADDED)
    written = (rows < length)[:, None] & (columns < WIDTH)[None, :]
    out = gradient_out + ((batch * HEADS + head) * length + rows)[:, None] * WIDTH
    out += columns[None, :]
    gradient = tl.zeros([OUTER, PADDED], tl.float32)
    if tl.max(counts.to(tl.int32), 0) == 0:
        tl.store(out, gradient.to(gradient_out.dtype.element_ty), mask=written)
        return
    first = tl.load(firsts + batch * length + rows, mask=rows < length, other=0)
    segments += batch * length
    row_segments = tl.load(segments + rows, mask=rows < length, other=0)
    lse = tl.load(
        student_lse + (batch * HEADS + head) * length + rows, mask=rows < length, other=1.0e30
    )
    q = load_positions(
        query + batch * query_b + head * query_h, query_l, rows, length, WIDTH, PADDED
    )
    key += batch * key_b + (head // (HEADS // KEY_HEADS)) * key_h
    teacher_query += batch * teacher_query_b
    teacher_key += batch * teacher_key_b
    teacher_lse += batch * TEACHER_HEADS * length
    teacher_head = head * (TEACHER_HEADS // HEADS)
    first_taught = load_positions(
        teacher_query + teacher_head * teacher_query_h, teacher_query_l, rows, length,
        TEACHER_WIDTH, TEACHER_PADDED,
    )  # fmt: skip
    low, middle, high = _key_range(counts, first, row_start, length, OUTER, INNER)
    gradient = _query_gradient_over(
        low, middle, gradient, rows, first, row_segments, q, lse, segments, key, key_l,
        first_taught, teacher_query, teacher_query_h, teacher_query_l, teacher_lse,
        teacher_key, teacher_key_h, teacher_key_l, teacher_head, length, scale, teacher_scale,
        TEACHER_HEADS // HEADS, TEACHER_HEADS // TEACHER_KEY_HEADS,
        WIDTH, PADDED, TEACHER_WIDTH, TEACHER_PADDED, INNER, BROKEN, PRECISION, RAGGED,
    )  # fmt: skip
    gradient = _query_gradient_over(
        middle, high, gradient, rows, first, row_segments, q, lse, segments, key, key_l,
        first_taught, teacher_query, teacher_query_h, teacher_query_l, teacher_lse,
        teacher_key, teacher_key_h, teacher_key_l, teacher_head, length, scale, teacher_scale,
        TEACHER_HEADS // HEADS, TEACHER_HEADS // TEACHER_KEY_HEADS,
        WIDTH, PADDED, TEACHER_WIDTH, TEACHER_PADDED, INNER, BROKEN, PRECISION, True,
    )  # fmt: skip
    gradient *= (weight * (tl.load(size) * scale * 0.6931471805599453))[:, None]
    tl.store(out, gradient.to(gradient_out.dtype.element_ty), mask=written)
