"""Numbers in few bits: what is written is read, and nothing else is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dominie.teachers import rice as bits

numbers = st.lists(st.integers(0, 2**31), max_size=60).map(lambda x: np.array(x, np.int64))
small = st.lists(st.integers(0, 9), max_size=60).map(lambda x: np.array(x, np.int64))


@given(st.lists(numbers | small, max_size=4), st.data())
def test_streams_are_read_as_they_were_written(streams, data):
    codes = [data.draw(st.sampled_from(["rice", "by_magnitude"])) for _ in streams]
    written = b"".join(
        getattr(bits, code)(values) for code, values in zip(codes, streams, strict=True)
    )
    reader = bits.BitReader(written)
    for code, values in zip(codes, streams, strict=True):
        np.testing.assert_array_equal(getattr(reader, code)(len(values)), values)
    assert reader.at_end


@given(st.integers(0, 2**60))
def test_a_number_is_read_as_it_was_written(value):
    assert bits.BitReader(bits.number(value)).number() == value


@given(numbers, st.integers(0, 400))
def test_what_is_cut_off_is_refused(values, cut):
    written = bits.rice(values) + bits.by_magnitude(values)
    reader = bits.BitReader(written[: min(cut, len(written) - 1)])
    with pytest.raises(bits.Damaged):
        _ = reader.rice(len(values)), reader.by_magnitude(len(values))


def test_geometric_numbers_take_about_their_entropy():
    p = 1 / 50
    values = np.random.default_rng(0).geometric(p, 4000) - 1
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) / p
    assert 8 * len(bits.rice(values)) / len(values) < 1.05 * entropy


def test_equal_numbers_take_no_room():
    assert len(bits.rice(np.full(1000, 50))) == 2
