import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dominie.data import row_store as store
from dominie.data.row_store import Row, Rows, RowsWriter


def written(path, rows):
    writer = RowsWriter(path)
    for ids, flags in rows:
        writer.add(Row(ids, flags))
    return Rows(path, writer.close())


def random_rows(count, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, count)
    return [(rng.integers(0, 32_000, n).tolist(), (rng.random(n) < 0.4).tolist()) for n in lengths]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=20),
        max_size=12,
    ),
    batch_tokens=st.integers(1, 50),
)
def test_rows_are_read_as_they_were_written(tmp_path_factory, rows, batch_tokens):
    rows = [tuple(map(list, zip(*row, strict=True))) for row in rows]
    path = tmp_path_factory.mktemp("store") / "rows.arrow"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_BATCH_TOKENS", batch_tokens)
        read = written(path, rows)
    assert [(row.input_ids.tolist(), row.supervised.tolist()) for row in read] == rows
    assert read.lengths.tolist() == [len(ids) for ids, _ in rows]
    assert read.supervised_lengths.tolist() == [sum(flags[1:]) for _, flags in rows]
    assert read.supervised_tokens == sum(sum(flags[1:]) for _, flags in rows)


def test_rows_are_arrays_of_the_types_promised(tmp_path):
    row = written(tmp_path / "x", random_rows(3))[1]
    assert row.input_ids.dtype == np.int32
    assert row.supervised.dtype == np.bool_
    assert not row.input_ids.flags.writeable


def test_rows_are_a_sequence(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_BATCH_TOKENS", 100)
    data = random_rows(50)
    rows = written(tmp_path / "x", data)
    assert len(rows) == 50
    assert rows[-1].input_ids.tolist() == data[-1][0]
    assert [row.input_ids.tolist() for row in rows[40:]] == [ids for ids, _ in data[40:]]
    for index in (50, -51):
        with pytest.raises(IndexError):
            rows[index]


def test_no_rows_are_rows_too(tmp_path):
    rows = written(tmp_path / "x", [])
    assert len(rows) == 0
    assert rows.lengths.tolist() == []
    assert rows.supervised_tokens == 0
    assert len(rows.first(3)) == 0


def test_the_first_few_are_rows(tmp_path):
    rows = written(tmp_path / "x", random_rows(50))
    few = rows.first(7)
    assert len(few) == len(few.lengths) == len(few.supervised_lengths) == 7
    assert few[-1].input_ids.tolist() == rows[6].input_ids.tolist()
    assert few.supervised_tokens == rows.supervised_lengths[:7].sum()
    assert few.digest != rows.digest
    assert len(few.first(3)) == 3
    assert rows.first(None) is rows.first(50) is rows


def test_a_pickle_reopens_the_map(tmp_path):
    rows = written(tmp_path / "x", random_rows(2000))
    pickled = pickle.dumps(rows.first(1999))
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert len(again) == 1999
    assert again[1998].input_ids.tolist() == rows[1998].input_ids.tolist()


def test_the_digest_is_that_of_the_content(tmp_path):
    data = random_rows(20)
    digest = written(tmp_path / "a", data).digest
    assert written(tmp_path / "b", data).digest == digest
    assert written(tmp_path / "c", data[::-1]).digest != digest
    ids, flags = data[3]
    data[3] = (ids, [not flag for flag in flags])
    assert written(tmp_path / "d", data).digest != digest
    split, joined = [([1], [True]), ([2], [True])], [([1, 2], [True, True])]
    assert written(tmp_path / "e", split).digest != written(tmp_path / "f", joined).digest


def test_datasets_opens_the_file(tmp_path):
    import datasets

    data = random_rows(30)
    written(tmp_path / "x.arrow", data)
    opened = datasets.Dataset.from_file(str(tmp_path / "x.arrow"))
    assert opened.column_names == ["input_ids", "supervised", "supervised_tokens", "weights"]
    assert opened[7]["input_ids"] == data[7][0]
    assert opened[7]["supervised"] == data[7][1]


def test_reading_a_row_is_cheap(tmp_path):
    rows = written(tmp_path / "x", random_rows(5000, longest=300))
    order = np.random.default_rng(0).permutation(5000).tolist()
    fastest = min(_seconds(rows, order) for _ in range(3))
    assert fastest / 5000 < 100e-6  # about 4 µs; the margin is for a busy machine


def _seconds(rows, order):
    start = time.perf_counter()
    for index in order:
        rows[index]
    return time.perf_counter() - start
